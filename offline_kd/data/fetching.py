"""Files of datasets that lie in a bucket or below a web address: fetched whole, and proven.

A file has the same name below every root. Which root has it is not asked before it is read: that would cost a request
for every file, and say nothing about the moment at which it is read.
"""

import hashlib
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offline_kd.support.downloads import Downloads
from offline_kd.support.errors import DataError, RecipeError, StoreCorrupt, StoreError, shorten
from offline_kd.support.places import SCHEMES, Bucket, place_at
from offline_kd.support.proven import difference, read_proven
from offline_kd.support.web import Web

Root = Path | Bucket | Web  # of a folder, the links in it are followed
MAX_FILE_BYTES = 2**33  # of a tar or of weights: what a server offers beyond that is not read
REMEDY = (
    "the manifest says the latter. The file was changed or damaged: fetch or pack it again, or correct the manifest."
)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # drives of Windows have one letter; pathlib makes one slash of two


@dataclass(frozen=True)
class Fetched:
    """A file that was read: its whole content, whose sha256 this is."""

    where: str
    content: bytes = field(repr=False)
    sha256: str

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True)
class Remote:
    """A file below the first of several roots that has it; the first root is not a folder."""

    file: str
    roots: tuple[Root, ...]

    def __str__(self) -> str:
        return f"{self.roots[0]}/{self.file}"

    def fetch(self, sha256: str | None, downloads: Downloads | None = None) -> Fetched:
        """Read it, and ask once more if what comes from afar is not what it should be.

        Args:
            sha256: that it must have; None: whatever is there is taken, and never kept in `downloads`.

        Raises DataError when no root has it, or the first that has it has another; StoreUnreachable when a server does
        not answer, or each time with other bytes.
        """
        for root in self.roots:
            try:
                return _fetch(root, self.file, sha256, downloads)
            except FileNotFoundError:
                continue
            except StoreCorrupt as error:
                raise DataError(str(error)) from None
        raise not_found(self.file, self.roots)

    def is_there(self) -> bool:
        """Whether a root has it now: one request for each that is asked."""
        return any(_has(root, self.file) for root in self.roots)


def _fetch(root: Root, file: str, sha256: str | None, downloads: Downloads | None) -> Fetched:
    where = f"{root}/{file}"
    if sha256 is not None and not isinstance(root, Path):
        content = read_proven(root, file, sha256, limit=MAX_FILE_BYTES, downloads=downloads, remedy=REMEDY)
        return Fetched(where, content, sha256)
    content = (root / file).read_bytes() if isinstance(root, Path) else root.read(file, MAX_FILE_BYTES)
    if sha256 is not None and (problem := difference(None, sha256, content)):
        raise DataError(f"{where}: {problem}: {REMEDY}")
    return Fetched(where, content, hashlib.sha256(content).hexdigest())


def _has(root: Root, file: str) -> bool:
    if isinstance(root, Path):
        return (root / file).is_file()
    if isinstance(root, Bucket):
        return root.size(file) is not None
    try:
        root.read(file, 0)
    except StoreCorrupt:  # it is longer than that: nothing of it was read
        return True
    except FileNotFoundError:
        return False
    return True


def not_found(file: str, roots: Sequence[Root]) -> DataError:
    return DataError(
        f"{shorten(file)}: not found in {', '.join(str(root) for root in roots)}. "
        "Set OFFLINE_KD_DATA or pass --data-root, or make it with `offline-kd data pack`."
    )


def is_url(location: str | Path) -> bool:
    return URL.match(str(location)) is not None


def root_at(location: str | Path) -> Root:
    """The folder, bucket or web address of a path or URL; raises RecipeError for a URL that is none of them."""
    text = str(location)
    if not is_url(text):
        return Path(text)
    try:
        place = place_at(text)
    except StoreError as error:
        raise RecipeError(f"data root {shorten(str(error))}") from None
    if isinstance(place, Bucket | Web):
        return place
    raise RecipeError(
        f"data root {shorten(text)}: no such URL. Write SCHEME://, which is one of {', '.join(SCHEMES)}, as text: "
        "pathlib makes one slash of two."
    )


def below(root: Root, folder: str) -> Root:
    """A folder below a root."""
    if isinstance(root, Path):
        return root / folder
    inside = posixpath.normpath(folder)
    return root if inside == "." else type(root)(f"{root}/{inside}")

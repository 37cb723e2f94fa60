"""Where a store lies: a folder, a prefix of an object store (`s3://`, `gs://`, `az://`), or a web address.

All hand out whole files by name, never more bytes than the caller expects. Folders and buckets also create files that
must not exist yet in one atomic step, which is all that the commit protocol needs. Credentials and endpoints of object
stores come from the environment, as their own tools read them (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_REGION, AWS_ENDPOINT_URL).
"""

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from offline_kd.support.errors import StoreCorrupt, StoreError, StoreForbidden, StoreUnreachable
from offline_kd.support.files import create_exclusively, write_atomically
from offline_kd.support.web import ATTEMPTS, CHECK_NETWORK, READ_BYTES, SILENCE_SECONDS, WHOLE_SECONDS, Web, too_long

T = TypeVar("T")
SCHEMES = ("s3", "gs", "az", "http", "https")
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")  # as S3, Azure and Google say it
MISSING_BUCKET = "there is no such bucket on this server. Make it first, or correct the address."
MAX_FILES = 3 * 2**20  # that are listed: a server that lists without end must not fill the memory
LINK = "is a link, and links inside a store are not followed. Put the file or folder itself there."
RETRIES: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}


@dataclass(frozen=True)
class Folder:
    """A store in a local folder. Files appear whole, and are flushed to disk before they appear.

    The folder itself may be a link. Inside it none is followed, so that nothing outside is read or written.
    """

    path: Path
    parallel = 2  # requests worth making at once
    is_remote = False

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str, limit: int = READ_BYTES) -> bytes:
        """A file's content; raises FileNotFoundError, or StoreCorrupt for what is no file or has more than `limit`."""
        try:
            # Opening a pipe must not wait, and what became a link since it was looked at is not followed.
            descriptor = os.open(self._inside(name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise StoreCorrupt(f"{self}/{name}: {LINK}") from None
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise StoreCorrupt(f"{self}/{name}: is no regular file. Copy the store again.")
            if about.st_size > limit:
                raise too_long(f"{self}/{name}", about.st_size, limit)
            return file.read(about.st_size)

    def size(self, name: str) -> int | None:
        try:
            return self._inside(name).lstat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def create(self, name: str, content: bytes) -> bool:
        """Create a file unless there is one; returns whether it was created here."""
        file = self._inside(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return create_exclusively(file, content)

    def put(self, name: str, content: bytes) -> None:
        file = self._inside(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)

    def delete(self, name: str) -> None:
        """Remove a file; of a link, the link."""
        self._inside(name, or_link=True).unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name and size of every file below `prefix`; a link is listed as a file."""
        found: dict[str, int] = {}
        folders = [prefix.rstrip("/")]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(self._inside(folder)))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                name = f"{folder}/{entry.name}".lstrip("/")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                    continue
                try:
                    found[name] = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # a temporary file of another writer
                    continue
        return found

    def _inside(self, name: str, *, or_link: bool = False) -> Path:
        """The path of a file of the store; raises StoreCorrupt when a link lies on the way, or is the file itself."""
        path, parts = self.path, [part for part in name.split("/") if part]
        for number, part in enumerate(parts, start=1):
            path = path / part
            if part == ".." or (path.is_symlink() and not (or_link and number == len(parts))):
                raise StoreCorrupt(f"{path}: {LINK}")
        return path


@dataclass(frozen=True)
class Bucket:
    """A store below a URL, through obstore. Puts are atomic; `create` is the server's own put-if-absent."""

    url: str
    parallel = 16
    is_remote = True

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}  # a connection does not travel to another process

    @cached_property
    def _client(self) -> Any:
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise StoreError(f"{self.url}: needs obstore. Install it: pip install 'offline-kd[remote]'") from error
        options: Any = {
            "connect_timeout": "10s",
            "read_timeout": f"{SILENCE_SECONDS}s",
            "timeout": f"{WHOLE_SECONDS}s",
        }
        # Given options replace those of the environment. Plain http is used where an address says so.
        if any(one.startswith("http://") for one in (self.url, os.environ.get("AWS_ENDPOINT_URL", ""))):
            options["allow_http"] = True
        with self._errors(""):
            return from_url(self.url, client_options=options, retry_config=RETRIES)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn what the server or the network said into one line; a missing file stays a FileNotFoundError."""
        import obstore.exceptions

        try:
            yield
        except obstore.exceptions.BaseError as error:
            if any(name in str(error) for name in NO_BUCKET):
                raise StoreUnreachable(f"{self.url}: {MISSING_BUCKET}") from error
            said = " ".join(str(error).split("Debug source:")[0].split())
            denied = isinstance(error, obstore.exceptions.PermissionDeniedError)
            kind = StoreForbidden if denied else StoreUnreachable
            raise kind(f"{self.url}/{name}: {said:.400} {CHECK_NETWORK}") from error

    def _again(self, name: str, ask: Callable[[], T]) -> T:
        """Ask until an answer arrives whole. Only those that were cut short: the client retries everything else."""
        import obstore.exceptions

        until = time.monotonic() + RETRIES.get("retry_timeout", timedelta()).total_seconds()
        for attempt in range(ATTEMPTS):
            try:
                with self._errors(name):
                    return ask()
            except StoreUnreachable as error:
                cut = isinstance(error.__cause__, obstore.exceptions.GenericError)
                if not cut or attempt == ATTEMPTS - 1 or time.monotonic() > until:
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def _write(self, name: str, ask: Callable[[], T]) -> T:
        """As `_again`, where what is not found can only be the bucket."""
        try:
            return self._again(name, ask)
        except FileNotFoundError:
            raise StoreUnreachable(f"{self.url}: {MISSING_BUCKET}") from None

    def read(self, name: str, limit: int = READ_BYTES) -> bytes:
        """A file's content; raises FileNotFoundError, or StoreCorrupt for one that has more than `limit` bytes."""
        import obstore

        def ask() -> bytes:
            answer = obstore.get(self._client, name)
            if answer.meta["size"] > limit:
                raise too_long(f"{self}/{name}", answer.meta["size"], limit)
            return bytes(answer.bytes())

        return self._again(name, ask)

    def size(self, name: str) -> int | None:
        import obstore

        try:
            return self._again(name, lambda: int(obstore.head(self._client, name)["size"]))
        except FileNotFoundError:
            return None

    def version(self, name: str) -> str | None:
        """Size and ETag of a file, which change with its content; None where there is no file, or no ETag."""
        import obstore

        try:
            about = self._again(name, lambda: obstore.head(self._client, name))
        except FileNotFoundError:
            return None
        return f"{about['size']} {about['e_tag']}" if about["e_tag"] else None

    def create(self, name: str, content: bytes) -> bool:
        """Create a file unless there is one; returns whether it was created by the last try of this request."""
        import obstore
        import obstore.exceptions

        try:
            self._write(name, lambda: obstore.put(self._client, name, content, mode="create", use_multipart=False))
        except StoreUnreachable as error:
            if isinstance(error.__cause__, obstore.exceptions.AlreadyExistsError):
                return False  # perhaps by the first try of this very request: callers compare contents
            raise
        return True

    def put(self, name: str, content: bytes) -> None:
        import obstore

        self._write(name, lambda: obstore.put(self._client, name, content, use_multipart=False))

    def delete(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self._again(name, lambda: obstore.delete(self._client, name))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        import obstore

        def ask() -> dict[str, int]:
            found: dict[str, int] = {}
            for page in obstore.list(self._client, prefix or None):
                found |= {item["path"]: int(item["size"]) for item in page}
                if len(found) > MAX_FILES:
                    raise StoreError(
                        f"{self}/{prefix}: lists more than {MAX_FILES:,} files. No store of ours has them."
                    )
            return found

        return self._write(prefix, ask)


Place = Folder | Bucket | Web


def place_at(location: str | Path) -> Place:
    """The folder, bucket or web address of a path or URL; raises StoreError for what is none of them."""
    text = str(location)
    if not text:
        raise StoreError("the store's location is empty. Name a folder or a URL; the current folder is './'.")
    scheme = re.match(r"([a-z0-9]+)://", text)
    if scheme is None:
        return Folder(Path(text))
    if scheme[1] not in SCHEMES:
        raise StoreError(f"{text}: '{scheme[1]}://' is not known. Use a folder, or one of {', '.join(SCHEMES)}.")
    return (Web if scheme[1] in ("http", "https") else Bucket)(text.rstrip("/"))


def can_list(place: Place) -> bool:
    """Whether files can be enumerated: plain web servers have no such request."""
    return not isinstance(place, Web)

"""Image tars: their samples, read and checked."""

import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from webdataset import tariterators

from offline_kd.data.fetching import Fetched, Remote, Root
from offline_kd.data.labels import CLS, Labels
from offline_kd.data.manifest import Tar
from offline_kd.data.proofs import known_sha256, remember_sha256
from offline_kd.support.errors import DataError
from offline_kd.support.web import Web

TARS = (".tar", ".tar.gz")
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
MAX_KEY_BYTES = 256  # of a key in UTF-8: tars without extended headers have none longer
NOT_IN_KEYS = re.compile("[\x00-\x1f\x7f-\x9f\ufffd]")  # control characters, and what stands for broken text
WHAT_SAYS = {"cls": "one .cls", "none": "no label", "json": "a .json that says its label"}  # by a rule's beginning


@dataclass(frozen=True)
class Sample:
    key: str
    label: int  # -1: the dataset says none, or a set
    encoded: bytes
    extension: str
    classes: tuple[int, ...] = ()  # the set, rising, where labels are sets


def hash_key(key: str) -> int:
    """The 64-bit name of a sample in stores: blake2b of its key. Never 2**64 - 1, which marks an empty row."""
    value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return min(value, 2**64 - 2)


Proof = Literal["always", "once", "never"]  # when a file's sha256 is compared: "once" on this machine, until it changes


def problem_of_key(key: str) -> str:
    """How a name breaks the one rule for keys; '' if it is a key.

    A key is 1 to 256 bytes of UTF-8 without control characters, does not begin or end with '/', and has no '..' between
    two '/'. It is taken as it is: nothing is normalised, case counts.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return "is not UTF-8"
    if not 0 < size <= MAX_KEY_BYTES:
        return f"has {size} bytes, a key has 1 to {MAX_KEY_BYTES}"
    if NOT_IN_KEYS.search(key):
        return "holds a control character"
    return "begins or ends with '/', or leads through '..'" if {"", ".."} & {*key.split("/")} else ""


def pack_keys(keys: list[str]) -> NDArray[np.uint8]:
    """`[n, MAX_KEY_BYTES]`: every key in UTF-8, filled up with zeros; none may be longer."""
    return (
        np.array([key.encode() for key in keys], dtype=f"S{MAX_KEY_BYTES}")
        .view(np.uint8)
        .reshape(len(keys), MAX_KEY_BYTES)
    )


def unpack_keys(packed: NDArray[np.uint8]) -> list[str]:
    """The keys in `[n, MAX_KEY_BYTES]`; what is no UTF-8 becomes a character that no key has."""
    rows = np.ascontiguousarray(packed).view(f"S{MAX_KEY_BYTES}")[:, 0]
    return [row.decode(errors="replace") for row in rows.tolist()]


# ---- reading -------------------------------------------------------------------------------------------------------


def tars_in(folder: Root) -> list[Path | Remote]:
    """The image tars of a folder, by name; raises DataError for a web address, which cannot list."""
    if isinstance(folder, Path):
        return [*sorted(path for path in folder.glob("*.tar*") if path.name.endswith(TARS))]
    if isinstance(folder, Web):
        raise DataError(f"{folder}: a web address does not list its tars. Name a dataset of the manifest, or a bucket.")
    names = sorted(name for name in folder.sizes() if "/" not in name and name.endswith(TARS))
    return [Remote(name, (folder,)) for name in names]


def read_tar(
    file: Path | Remote | Fetched, *, expected: Tar | None = None, prove: Proof = "always", labels: Labels = CLS
) -> tuple[list[Sample], str]:
    """Read all samples of a tar, in order, with the file's sha256.

    Args:
        file: what lies afar is fetched, unless it has been, and is always hashed.
        prove: hash a local file always; "once" for every state of the file on this machine; "never" where a sha256 is
            expected, which is then returned, because every image is compared with something else.

    Raises DataError when the file is damaged or truncated, when a key is used twice, is not legal or lacks its image
    or its label, and when sha256 or count are not the `expected` ones.
    """
    if isinstance(file, Remote):
        file = file.fetch(expected.sha256 if expected else None)
    if isinstance(file, Path):
        content, sha256 = _read_local(file, expected, prove)
    else:
        content, sha256 = file.content, file.sha256
    path = str(file)
    if expected is not None and expected.sha256 not in (None, sha256):
        problem = _why_unreadable(content)
        raise DataError(
            f"{path}: sha256 is {sha256}, the manifest says {expected.sha256}{problem and f'; {problem}'}. "
            "The file was changed or damaged: fetch or pack it again, or correct the manifest."
        )
    samples = parse_samples(content, str(path), labels)
    if expected is not None and expected.count != len(samples):
        raise DataError(
            f"{path}: holds {len(samples)} samples, the manifest says {expected.count}. "
            "The file may be cut: fetch or pack it again, or correct the manifest."
        )
    return samples, sha256


def _read_local(path: Path, expected: Tar | None, prove: Proof) -> tuple[bytes, str]:
    """Content and sha256 of a file; "once" and "never" do not hash what need not be hashed."""
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        content = file.read()
        unchanged = os.fstat(file.fileno()).st_ctime_ns == about.st_ctime_ns
    sha256 = known_sha256(path, about) if prove == "once" else None
    if prove == "never" and expected is not None:
        sha256 = expected.sha256
    if sha256 is None:
        sha256 = hashlib.sha256(content).hexdigest()
        if prove == "once" and unchanged:
            remember_sha256(path, about, sha256)
    return content, sha256


def parse_samples(content: bytes, where: str, labels: Labels, left_out: list[str] | None = None) -> list[Sample]:
    """The samples of a tar's bytes, in order.

    Args:
        where: names the tar in messages.
        left_out: gets the names of files that stand together and are none of ours.

    Raises what `read_tar` does of samples.
    """
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    try:
        for member in _members(content):
            sample = _parse_sample(where, member, labels)
            if sample is None:
                if left_out is not None:
                    left_out.append(str(member["__key__"]))
                continue
            if sample.key in seen:
                raise DataError(
                    f"{where}: key '{sample.key}' is used twice, by samples {seen[sample.key]} and {len(samples)}. "
                    "Keys must be unique: pack the dataset again."
                )
            seen[sample.key] = len(samples)
            samples.append(sample)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{where}: damaged or truncated after {len(samples)} samples "
            f"({len(content):,} bytes; {error}). Fetch or pack the file again."
        ) from error
    except ValueError as error:  # webdataset: a member name that comes twice inside one sample
        raise DataError(f"{where}: after {len(samples)} samples: {error.args[0]}. Pack the dataset again.") from error
    return samples


def _members(content: bytes) -> Iterator[dict[str, object]]:
    files = _plain_files(content) or tariterators.tar_file_iterator(io.BytesIO(content), skip_meta=None)
    return tariterators.group_by_keys({**file, "__url__": ""} for file in files)


def _plain_files(content: bytes) -> list[dict[str, object]] | None:
    """The files of an uncompressed tar of plain members, which nearly all are; None where tarfile has to look closer.

    tarfile spends most of the time that reading takes on turning headers into objects. webdataset's writer puts the
    fraction of a second of every member's time into an extended header.
    """
    files: list[dict[str, object]] = []
    offsets, sums, at = [], [], 0
    long_name = b""
    try:
        while content[at : at + 512].strip(b"\0"):
            header = content[at : at + 512]
            size = int(header[124:136].rstrip(b" \0"), 8)
            if header[156:157] not in (b"0", b"\0", b"x") or at + 512 + size > len(content):
                return None
            data = content[at + 512 : at + 512 + size]
            if header[156:157] == b"x":
                extended = _extended_header(data)
                if not extended.keys() <= {b"mtime", b"path"} or b"" in extended.values():
                    return None
                long_name = extended.get(b"path", b"")
            else:
                name = header[:100].rstrip(b"\0")
                if header[257:263] == b"ustar\0" and (prefix := header[345:500].rstrip(b"\0")):
                    name = prefix + b"/" + name
                files.append({"fname": (long_name or name).decode(), "data": data})
                long_name = b""
            offsets.append(at)
            sums.append(int(header[148:156].rstrip(b" \0"), 8))
            at += 512 + -(-size // 512) * 512
    except ValueError:
        return None
    if len(content) < at + 512:
        return None  # cut
    headers = np.frombuffer(content, dtype=np.uint8)[np.array(offsets, dtype=np.int64)[:, None] + np.arange(512)]
    headers[:, 148:156] = ord(" ")
    return files if np.array_equal(headers.sum(axis=1, dtype=np.int64), sums) else None


def _extended_header(records: bytes) -> dict[bytes, bytes]:
    """Of a POSIX tar: lines `LENGTH NAME=VALUE`; raises ValueError for others."""
    found = {}
    while records:
        start = records.index(b" ") + 1
        length = int(records[: start - 1])
        name, equals, value = records[start : length - 1].partition(b"=")
        if length <= start or not equals or records[length - 1 : length] != b"\n":
            raise ValueError("no extended header")
        found[name], records = value, records[length:]
    return found


def _why_unreadable(content: bytes) -> str:
    try:
        for _ in _members(content):
            pass
    except Exception as error:
        return f"reading it fails with: {error.args[0] if error.args else error}"
    return ""


def _parse_sample(tar: str, member: dict[str, object], labels: Labels) -> Sample | None:
    """A sample has one image and what says its label; whatever else it has is not looked at.

    Files that stand together and are no image, no `.cls`, and say no label are none of ours: None.
    """
    key = str(member["__key__"])
    where = f"{tar}: sample '{key}'"
    fields = {name: value for name, value in member.items() if isinstance(value, bytes)}
    images = [name for name in fields if name in IMAGE_EXTENSIONS]
    classes: tuple[int, ...] | None = ()
    try:
        label = labels.of(fields)
        if labels.are_sets and (classes := labels.set_of(fields)) is None:
            label = None
    except ValueError as error:
        raise DataError(f"{where}: {error}. Correct `labels` in the manifest, or pack the dataset again.") from error
    # What ends like a member of ours behind a second dot may be an image under a name that was not meant.
    ours = {name.rpartition(".")[2] for name in fields} & {*IMAGE_EXTENSIONS, "cls"}
    if not ours and (label is None or labels.rule == "none"):
        return None
    if problem := problem_of_key(key):
        raise DataError(f"{where}: its key {problem}. Pack the dataset again.")
    if len(images) != 1 or label is None:
        raise DataError(
            f"{where}: expected one image ({', '.join(IMAGE_EXTENSIONS)}) and {WHAT_SAYS[labels.rule[:4]]}, found "
            f"{', '.join('.' + name for name in fields)}. A key ends at the first dot of the file name; "
            "both members of a sample must stand together; labels that stand elsewhere: `labels` in the manifest."
        )
    return Sample(key, label, fields[images[0]], images[0], classes or ())

"""Image tars: read them, prove a copy of them.

One input format: WebDataset tars (`.tar` or `.tar.gz`) with members `KEY.(png|jpg|webp)` and `KEY.cls`.
A tar is read whole: the bytes whose sha256 is checked are the bytes that are decoded.
"""

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from webdataset import tariterators

from offline_kd.decoding import UNDECODABLE, decode_image, image_size
from offline_kd.errors import DataError
from offline_kd.manifest import Dataset, Split, Tar, fingerprint, locate

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
KEY_PATTERN = re.compile(r"[0-9A-Za-z_\-]+(/[0-9A-Za-z_\-]+)*")


@dataclass(frozen=True)
class Sample:
    key: str
    label: int
    encoded: bytes
    extension: str


@dataclass(frozen=True)
class BadImage:
    """A sample that was left out, and why."""

    key: str
    problem: str


OnBadImage = Literal["fail", "skip"]


@dataclass(frozen=True)
class ImageBlock:
    """One image tar. Row i of every field is the i-th sample of the tar that was not left out."""

    path: Path
    sha256: str
    keys: list[str]
    key_hash: NDArray[np.uint64]  # [n]
    image_crc: NDArray[np.uint32]  # [n] crc32c of the encoded image
    labels: NDArray[np.int32]  # [n]
    encoded: list[bytes]
    pixels: Tensor | None  # [n, 3, H, W] uint8, where all images have one size and were decoded
    on_bad: OnBadImage = "fail"
    left_out: list[BadImage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def images(self) -> Tensor:
        assert self.pixels is not None, "a block of images of different sizes is decoded by a Decoder"
        return self.pixels

    def sizes(self) -> NDArray[np.int64]:
        """`[n, 2]` height and width, upright; 1 x 1 for what is no image, which decoding will find."""
        if self.pixels is not None:
            return np.broadcast_to(np.array(self.pixels.shape[2:], dtype=np.int64), (len(self), 2))
        sizes = np.ones((len(self), 2), dtype=np.int64)
        for row, encoded in enumerate(self.encoded):
            try:
                sizes[row] = image_size(encoded)
            except UNDECODABLE:
                continue
        return sizes

    def without(self, bad: dict[int, str]) -> "ImageBlock":
        """The block without these rows, which are listed as left out."""
        kept = np.array([row for row in range(len(self)) if row not in bad], dtype=np.int64)
        return ImageBlock(
            path=self.path,
            sha256=self.sha256,
            keys=[self.keys[row] for row in kept],
            key_hash=self.key_hash[kept],
            image_crc=self.image_crc[kept],
            labels=self.labels[kept],
            encoded=[self.encoded[row] for row in kept],
            pixels=None if self.pixels is None else self.pixels[torch.from_numpy(kept)],
            on_bad=self.on_bad,
            left_out=[*self.left_out, *(BadImage(self.keys[row], bad[row]) for row in sorted(bad))],
        )


class Decoder:
    """The images of a block's rows, `[H, W, 3]` uint8, decoded when they are asked for and kept until `forget`.

    Raises DataError for an image that cannot be decoded, unless the block says that such are skipped: then it gives
    None and lists the row in `bad`.
    """

    def __init__(self, block: ImageBlock) -> None:
        self.block = block
        self.kept: dict[int, NDArray[np.uint8] | None] = {}
        self.bad: dict[int, str] = {}

    def __call__(self, row: int) -> NDArray[np.uint8] | None:
        if row not in self.kept:
            try:
                self.kept[row] = np.array(decode_image(self.block.encoded[row]))
            except UNDECODABLE as error:
                why = re.sub(r" <_io.BytesIO object at \w+>", "", " ".join(str(error).split()))
                problem = f"the image cannot be decoded ({why})"
                if self.block.on_bad == "fail":
                    raise _bad_image(self.block.path, self.block.keys[row], problem) from error
                self.kept[row] = None
                self.bad[row] = problem
        return self.kept[row]

    def forget(self) -> None:
        self.kept.clear()


def _bad_image(path: Path, key: str, problem: str) -> DataError:
    return DataError(
        f"{path}: sample '{key}': {problem}. Repair or remove it, or leave such images out: --set data.bad_images=skip"
    )


def hash_key(key: str) -> int:
    """The 64-bit name of a sample in stores: blake2b of its key. Never 2**64 - 1, which marks an empty row."""
    value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return min(value, 2**64 - 2)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_tar(path: Path, *, expected: Tar | None = None, prove: bool = True) -> tuple[list[Sample], str]:
    """Read all samples of a tar, in order, with the file's sha256; without `prove`, the one that is expected of it.

    Raises DataError when the file is damaged or truncated, when a key is used twice, is not legal or lacks its image
    or its label, and when sha256 or count are not the `expected` ones.
    """
    content = path.read_bytes()
    known = expected.sha256 if expected else None
    sha256 = known if known and not prove else hashlib.sha256(content).hexdigest()
    if expected is not None and expected.sha256 not in (None, sha256):
        problem = _why_unreadable(content)
        raise DataError(
            f"{path}: sha256 is {sha256}, the manifest says {expected.sha256}{problem and f'; {problem}'}. "
            "The file was changed or damaged: fetch or pack it again, or correct the manifest."
        )
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    try:
        for member in _members(content):
            sample = _parse_sample(path, member)
            if sample.key in seen:
                raise DataError(
                    f"{path}: key '{sample.key}' is used twice, by samples {seen[sample.key]} and {len(samples)}. "
                    "Keys must be unique: pack the dataset again."
                )
            seen[sample.key] = len(samples)
            samples.append(sample)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: damaged or truncated after {len(samples)} samples "
            f"({len(content):,} bytes; {error}). Fetch or pack the file again."
        ) from error
    except ValueError as error:  # webdataset: a member name that comes twice inside one sample
        raise DataError(f"{path}: after {len(samples)} samples: {error.args[0]}. Pack the dataset again.") from error
    if expected is not None and expected.count != len(samples):
        raise DataError(
            f"{path}: holds {len(samples)} samples, the manifest says {expected.count}. "
            "The file may be cut: fetch or pack it again, or correct the manifest."
        )
    return samples, sha256


def _members(content: bytes) -> Iterator[dict[str, object]]:
    files = _plain_files(content) or tariterators.tar_file_iterator(io.BytesIO(content), skip_meta=None)
    return tariterators.group_by_keys({**file, "__url__": ""} for file in files)


def _plain_files(content: bytes) -> list[dict[str, object]] | None:
    """The files of an uncompressed tar of plain members, which nearly all are; None where tarfile has to look closer.

    tarfile spends most of the time that reading takes on turning headers into objects.
    """
    files: list[dict[str, object]] = []
    offsets, sums, at = [], [], 0
    try:
        while content[at : at + 512].strip(b"\0"):
            header = content[at : at + 512]
            size = int(header[124:136].rstrip(b" \0"), 8)
            if header[156:157] not in (b"0", b"\0") or at + 512 + size > len(content):
                return None
            name = header[:100].rstrip(b"\0")
            if header[257:263] == b"ustar\0" and (prefix := header[345:500].rstrip(b"\0")):
                name = prefix + b"/" + name
            files.append({"fname": name.decode(), "data": content[at + 512 : at + 512 + size]})
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


def _why_unreadable(content: bytes) -> str:
    try:
        for _ in _members(content):
            pass
    except Exception as error:
        return f"reading it fails with: {error.args[0] if error.args else error}"
    return ""


def _parse_sample(path: Path, member: dict[str, object]) -> Sample:
    key = str(member["__key__"])
    fields = {name: value for name, value in member.items() if not name.startswith("__")}
    images = [name for name in fields if name in IMAGE_EXTENSIONS]
    where = f"{path}: sample '{key}'"
    if not KEY_PATTERN.fullmatch(key):
        raise DataError(f"{where}: keys may hold letters, digits, '_', '-' and '/' only. Pack the dataset again.")
    if len(images) != 1 or "cls" not in fields:
        raise DataError(
            f"{where}: expected one image ({', '.join(IMAGE_EXTENSIONS)}) and one .cls, found "
            f"{', '.join('.' + name for name in fields)}. A key ends at the first dot of the file name; "
            "both members of a sample must stand together."
        )
    encoded, text = fields[images[0]], fields["cls"]
    assert isinstance(encoded, bytes)
    assert isinstance(text, bytes)
    if not text.strip().isdigit():
        raise DataError(f"{where}: the label is {text[:40]!r}, not a class index. Pack the dataset again.")
    return Sample(key, int(text), encoded, images[0])


def load_block(
    path: Path, tar: Tar, num_classes: int, *, decode: bool = True, on_bad: OnBadImage = "fail", prove: bool = True
) -> ImageBlock:
    """Read and check one tar.

    Args:
        decode: decode all images, which must have one size; otherwise a `Decoder` does it when they are needed.
        on_bad: whether an image that cannot be decoded is an error, or left out and listed.
        prove: compare the file's sha256 with the manifest's. Who compares every image with a store need not.
    """
    samples, sha256 = read_tar(path, expected=tar, prove=prove)
    for sample in samples:
        if sample.label >= num_classes:
            raise DataError(
                f"{path}: sample '{sample.key}': label {sample.label}, but the dataset has {num_classes} classes "
                f"(0..{num_classes - 1}). Correct `classes` in the manifest, or pack the dataset again."
            )
    block = ImageBlock(
        path=path,
        sha256=sha256,
        keys=[sample.key for sample in samples],
        key_hash=np.array([hash_key(sample.key) for sample in samples], dtype=np.uint64),
        image_crc=np.array([google_crc32c.value(sample.encoded) for sample in samples], dtype=np.uint32),
        labels=np.array([sample.label for sample in samples], dtype=np.int32),
        encoded=[sample.encoded for sample in samples],
        pixels=None,
        on_bad=on_bad,
    )
    return _with_pixels(block) if decode else block


def _with_pixels(block: ImageBlock) -> ImageBlock:
    decoder, pixels = Decoder(block), []
    for row, key in enumerate(block.keys):
        image = decoder(row)
        decoder.forget()
        if image is None:
            continue
        pixels.append(image)
        if pixels[-1].shape != pixels[0].shape:
            raise DataError(
                f"{block.path}: sample '{key}': the image is {_size(pixels[-1])}, the first of the tar is "
                f"{_size(pixels[0])}. Images of different sizes need views that resize them: `views: {{kind: "
                "random_resized_crop, ...}` or `{kind: center_crop, ...}`."
            )
    if not pixels:
        raise DataError(f"{block.path}: none of its {len(block)} images can be decoded. Fetch or pack the file again.")
    kept = block.without(decoder.bad) if decoder.bad else block
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return replace(kept, pixels=images, encoded=[])


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


class BlockLoader:
    """Blocks of one dataset split by number; those that were read are kept while they fit `keep_bytes`.

    A kept block saves reading, checking and decoding its tar again in every later epoch.

    Args:
        decode: decode all images when a tar is read; they must have one size.
        on_bad: whether an image that cannot be decoded is an error, or left out and listed.
        prove: compare sha256 with the manifest's.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        roots: Sequence[Path],
        keep_bytes: int = 2**30,
        *,
        decode: bool = True,
        on_bad: OnBadImage = "fail",
        prove: bool = True,
    ) -> None:
        self.dataset, self.split, self.keep_bytes = dataset, split, keep_bytes
        self.decode, self.on_bad, self.prove = decode, on_bad, prove
        self.paths = [locate(f"{dataset.folder}/{tar.file}", roots) for tar in split.tars]
        self.kept: dict[int, ImageBlock] = {}
        self.kept_bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> ImageBlock:
        if number in self.kept:
            return self.kept[number]
        block = load_block(
            self.paths[number],
            self.split.tars[number],
            len(self.dataset.classes),
            decode=self.decode,
            on_bad=self.on_bad,
            prove=self.prove,
        )
        size = sum(map(len, block.encoded)) if block.pixels is None else block.pixels.nbytes
        if self.kept_bytes + size <= self.keep_bytes:
            self.kept[number] = block
            self.kept_bytes += size
        return block

    def __iter__(self) -> Iterator[ImageBlock]:
        return (self[number] for number in range(len(self)))


def dataset_fingerprint(dataset: Dataset, split: Split) -> str:
    """sha256 over what defines a split: class names in order, and count and sha256 of every tar in order."""
    return fingerprint([dataset.classes, [[tar.count, tar.sha256] for tar in split.tars]])


# ---- proving a copy ------------------------------------------------------------------------------------------------


def check_dataset(
    dataset: Dataset, roots: Sequence[Path], progress: Callable[[Iterable[Tar]], Iterable[Tar]]
) -> dict[str, int]:
    """Prove a local copy: sha256, count, keys, labels and decodability of every tar. Returns samples per split.

    Raises DataError naming the first difference: file, sample and both values.
    """
    counts: dict[str, int] = {}
    first_use: dict[str, str] = {}
    for split_name, split in dataset.splits.items():
        per_class = np.zeros(len(dataset.classes), dtype=np.int64)
        for tar in progress(split.tars):
            path = locate(f"{dataset.folder}/{tar.file}", roots)
            samples, _ = read_tar(path, expected=tar)
            for sample in samples:
                where = f"{path}: sample '{sample.key}'"
                if sample.label >= len(dataset.classes):
                    raise DataError(
                        f"{where}: label {sample.label}, the manifest names {len(dataset.classes)} classes. "
                        "Correct `classes` in the manifest, or pack the dataset again."
                    )
                use = f"{split_name}/{sample.key}"
                if use in first_use:
                    raise DataError(
                        f"{where}: its key was used before, in {first_use[use]}. Keys of a split must be unique: "
                        "pack the dataset again."
                    )
                first_use[use] = tar.file
                try:
                    decode_image(sample.encoded)
                except UNDECODABLE as error:
                    raise DataError(f"{where}: cannot be decoded ({error}). Repair or remove it.") from error
                per_class[sample.label] += 1
        for index in np.flatnonzero(per_class == 0):
            raise DataError(
                f"split '{split_name}': no sample of class {index} ('{dataset.classes[index]}') in "
                f"{split.count} samples. Correct `classes` in the manifest, or pack the dataset again."
            )
        counts[split_name] = int(per_class.sum())
    return counts

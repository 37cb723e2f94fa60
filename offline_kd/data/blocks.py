"""Image tars: read them, prove a copy of them.

One input format: WebDataset tars (`.tar` or `.tar.gz`) with members `KEY.(png|jpg|webp)` and what says the label.
A tar is read whole: the bytes whose sha256 is checked are the bytes that are decoded.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.decoding import UNDECODABLE, decode_image, image_size
from offline_kd.data.labels import CLS, Labels, labels_of
from offline_kd.data.manifest import Dataset, Split, Tar, folders_of, locate
from offline_kd.data.tars import Proof, Sample, hash_key, read_tar
from offline_kd.support.errors import DataError

DIGEST_BYTES = 16


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
    image_digest: NDArray[np.uint8]  # [n, 16] the first half of the sha256 of the encoded image
    image_crc: NDArray[np.uint32]  # [n] its crc32c, which is all that stores before schema 3 know
    labels: NDArray[np.int32]  # [n]; -1 in a split without labels
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
            image_digest=self.image_digest[kept],
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


def load_block(
    path: Path,
    tar: Tar,
    num_classes: int,
    *,
    decode: bool = True,
    on_bad: OnBadImage = "fail",
    prove: Proof = "always",
    labels: Labels = CLS,
) -> ImageBlock:
    """Read and check one tar.

    Args:
        decode: decode all images, which must have one size; otherwise a `Decoder` does it when they are needed.
        on_bad: whether an image that cannot be decoded is an error, or left out and listed.
        prove: when the file's sha256 is compared with the manifest's: see `read_tar`.
        labels: what says the label of a sample.
    """
    samples, sha256 = read_tar(path, expected=tar, prove=prove, labels=labels)
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
        image_digest=_digests(samples),
        image_crc=np.array([google_crc32c.value(sample.encoded) for sample in samples], dtype=np.uint32),
        labels=np.array([sample.label for sample in samples], dtype=np.int32),
        encoded=[sample.encoded for sample in samples],
        pixels=None,
        on_bad=on_bad,
    )
    return _with_pixels(block) if decode else block


def _digests(samples: Sequence[Sample]) -> NDArray[np.uint8]:
    digests = b"".join(hashlib.sha256(sample.encoded).digest()[:DIGEST_BYTES] for sample in samples)
    return np.frombuffer(digests, dtype=np.uint8).reshape(len(samples), DIGEST_BYTES)


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
        prove: when sha256 are compared with the manifest's: see `read_tar`.
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
        prove: Proof = "always",
    ) -> None:
        self.dataset, self.split, self.keep_bytes = dataset, split, keep_bytes
        self.decode, self.on_bad, self.prove = decode, on_bad, prove
        folders = folders_of(dataset, roots)
        self.paths = [locate(tar.file, folders) for tar in split.tars]
        self.labels = labels_of(split.labels, dataset.classes)
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
            labels=self.labels,
        )
        size = sum(map(len, block.encoded)) if block.pixels is None else block.pixels.nbytes
        if self.kept_bytes + size <= self.keep_bytes:
            self.kept[number] = block
            self.kept_bytes += size
        return block

    def __iter__(self) -> Iterator[ImageBlock]:
        return (self[number] for number in range(len(self)))

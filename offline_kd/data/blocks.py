"""Image tars: read them, prove a copy of them.

One input format: WebDataset tars (`.tar` or `.tar.gz`) with members `KEY.(png|jpg|webp)` and what says the label.
A tar is read whole: the bytes whose sha256 is checked are the bytes that are decoded.
"""

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.decoding import UNDECODABLE, Decoded, decode, image_size, is_scalable
from offline_kd.data.fetching import Fetched, Remote, Root
from offline_kd.data.label_sets import pack_sets
from offline_kd.data.labels import CLS, Labels, labels_of
from offline_kd.data.manifest import Dataset, Split, Tar, folders_of, locate
from offline_kd.data.tars import Proof, Sample, hash_key, read_tar
from offline_kd.support.counter_rng import U64
from offline_kd.support.downloads import DEFAULT_BYTES, shared_downloads
from offline_kd.support.errors import DataError
from offline_kd.support.files import cache_folder

DIGEST_BYTES = 16
READ_AHEAD = 2  # tars, from afar
THREADS = 4  # that fetch them
AHEAD_BYTES = 2**28  # of tars on their way or waiting to be read; one of any size is always fetched


@dataclass(frozen=True)
class BadImage:
    """A sample that was left out, and why."""

    key: str
    problem: str


OnBadImage = Literal["fail", "skip"]


@dataclass(frozen=True)
class ImageBlock:
    """One image tar. Row i of every field is the i-th sample of the tar that was not left out."""

    where: str  # path or URL
    sha256: str
    keys: list[str]
    key_hash: NDArray[np.uint64]  # [n]
    image_digest: NDArray[np.uint8]  # [n, 16] the first half of the sha256 of the encoded image
    image_crc: NDArray[np.uint32]  # [n] its crc32c, which is all that stores before schema 3 know
    labels: NDArray[np.int32] | NDArray[np.uint8]  # [n], -1 in a split without labels; [n, bytes] packed sets
    encoded: list[bytes]
    pixels: Tensor | None  # [n, 3, H, W] uint8, where all images have one size and were decoded
    on_bad: OnBadImage = "fail"
    left_out: list[BadImage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def name(self) -> str:
        return self.where.rsplit("/", 1)[-1]

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

    def take(self, rows: NDArray[np.int64]) -> "ImageBlock":
        """The block of these rows alone."""
        return replace(
            self,
            keys=[self.keys[row] for row in rows],
            key_hash=self.key_hash[rows],
            image_digest=self.image_digest[rows],
            image_crc=self.image_crc[rows],
            labels=self.labels[rows],
            encoded=[self.encoded[row] for row in rows] if self.encoded else [],
            pixels=None if self.pixels is None else self.pixels[torch.from_numpy(rows)],
        )

    def without(self, bad: dict[int, str]) -> "ImageBlock":
        """The block without these rows, which are listed as left out."""
        kept = np.array([row for row in range(len(self)) if row not in bad], dtype=np.int64)
        left_out = [*self.left_out, *(BadImage(self.keys[row], bad[row]) for row in sorted(bad))]
        return replace(self.take(kept), left_out=left_out)


class Decoder:
    """The images of a block's rows, decoded when they are asked for, at each scale, and kept until `forget`.

    Raises DataError for an image that cannot be decoded, unless the block says that such are skipped: then it gives
    None and lists the row in `bad`.
    """

    def __init__(self, block: ImageBlock) -> None:
        self.block = block
        self.kept: dict[tuple[int, int], Decoded | None] = {}  # by row and scale
        self.bad: dict[int, str] = {}

    def __call__(self, row: int) -> NDArray[np.uint8] | None:
        """The whole image, `[H, W, 3]`."""
        whole = self.scaled(row, 1)
        return None if whole is None else whole.pixels

    def scaled(self, row: int, scale: int) -> Decoded | None:
        """The image at 1/scale if it is a JPEG that can be decoded so, else the whole image."""
        encoded = self.block.encoded[row]
        at = (row, scale if scale > 1 and is_scalable(encoded) else 1)
        if at not in self.kept:
            try:
                self.kept[at] = decode(encoded, at[1])
            except UNDECODABLE as error:
                why = re.sub(r" <_io.BytesIO object at \w+>", "", " ".join(str(error).split()))
                problem = f"the image cannot be decoded ({why})"
                if self.block.on_bad == "fail":
                    raise _bad_image(self.block.where, self.block.keys[row], problem) from error
                self.kept[at] = None
                self.bad[row] = problem
        return self.kept[at]

    def forget(self) -> None:
        self.kept.clear()


def _bad_image(where: str, key: str, problem: str) -> DataError:
    return DataError(
        f"{where}: sample '{key}': {problem}. Repair or remove it, or leave such images out: --set data.bad_images=skip"
    )


def load_block(
    file: Path | Remote | Fetched,
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
        file: the tar; what lies afar is fetched, unless it has been.
        decode: decode all images, which must have one size; otherwise a `Decoder` does it when they are needed.
        on_bad: whether an image that cannot be decoded is an error, or left out and listed.
        prove: when the file's sha256 is compared with the manifest's: see `read_tar`.
        labels: what says the label of a sample.
    """
    samples, sha256 = read_tar(file, expected=tar, prove=prove, labels=labels)
    for sample in samples:
        if (label := max((sample.label, *sample.classes[-1:]))) >= num_classes:
            raise DataError(
                f"{file}: sample '{sample.key}': label {label}, but the dataset has {num_classes} classes "
                f"(0..{num_classes - 1}). Correct `classes` in the manifest, or pack the dataset again."
            )
    block = ImageBlock(
        where=str(file),
        sha256=sha256,
        keys=[sample.key for sample in samples],
        key_hash=np.array([hash_key(sample.key) for sample in samples], dtype=np.uint64),
        image_digest=_digests(samples),
        image_crc=np.array([google_crc32c.value(sample.encoded) for sample in samples], dtype=np.uint32),
        labels=_labels(samples, num_classes, labels),
        encoded=[sample.encoded for sample in samples],
        pixels=None,
        on_bad=on_bad,
    )
    return _with_pixels(block) if decode else block


def _labels(samples: Sequence[Sample], num_classes: int, rule: Labels) -> NDArray[np.int32] | NDArray[np.uint8]:
    if rule.are_sets:
        return pack_sets([sample.classes for sample in samples], num_classes)
    return np.array([sample.label for sample in samples], dtype=np.int32)


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
                f"{block.where}: sample '{key}': the image is {_size(pixels[-1])}, the first of the tar is "
                f"{_size(pixels[0])}. Images of different sizes need views that resize them: `views: {{kind: "
                "random_resized_crop, ...}` or `{kind: center_crop, ...}`; to be evaluated, they need a crop."
            )
    if not pixels:
        raise DataError(f"{block.where}: none of its {len(block)} images can be decoded. Fetch or pack the file again.")
    kept = block.without(decoder.bad) if decoder.bad else block
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return replace(kept, pixels=images, encoded=[])


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


class HowRead(TypedDict, total=False):
    """How a `BlockLoader` reads; everything may be left out."""

    decode: bool  # all images when a tar is read: they must have one size; True if absent
    on_bad: OnBadImage  # is an image that cannot be decoded an error, or left out and listed? "fail" if absent
    prove: Proof  # when sha256 of local tars are compared with the manifest's, see `read_tar`; "always" if absent
    download_bytes: int  # how much of what comes from afar is kept on the local disk; 10 GiB if absent


class BlockLoader:
    """Blocks of one dataset split by number; those that were read are kept while they fit `keep_bytes`.

    A kept block saves reading, checking and decoding its tar again in every later epoch.

    Args:
        roots: where the tars are looked for: local ones now, those afar when they are read.
        how: see `HowRead`.

    Raises DataError when a tar is in no folder, and no root lies afar.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        roots: Sequence[Root],
        keep_bytes: int = 2**30,
        **how: Unpack[HowRead],
    ) -> None:
        self.dataset, self.split, self.keep_bytes = dataset, split, keep_bytes
        self.decode, self.on_bad = how.get("decode", True), how.get("on_bad", "fail")
        self.prove: Proof = how.get("prove", "always")
        folders = folders_of(dataset, roots)
        self.tars = split.tars  # as they are; those of `split` have as many samples as blocks have rows
        self.chosen: list[U64] | None = None  # by tar, the hashes of the keys of the rows of its block; None: all
        self.files = [locate(tar.file, folders) for tar in split.tars]
        self.downloads = shared_downloads(cache_folder(), how.get("download_bytes", DEFAULT_BYTES))
        self.labels = labels_of(split.labels, dataset.classes)
        self.kept: dict[int, ImageBlock] = {}
        self.kept_bytes = 0
        self.coming: dict[int, Future[Path | Fetched]] = {}
        self.sizes: dict[int, int] = {}  # bytes of the tars that came from afar so far

    def __getstate__(self) -> dict[str, Any]:
        """Neither threads nor what they fetch travel to another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_threads"} | {"coming": {}}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> ImageBlock:
        if number in self.kept:
            return self.kept[number]
        coming = self.coming.pop(number, None)
        block = load_block(
            coming.result() if coming else self._fetched(number),
            self.tars[number],
            len(self.dataset.classes),
            decode=self.decode and self.chosen is None,
            on_bad=self.on_bad,
            prove=self.prove,
            labels=self.labels,
        )
        if self.chosen is not None:
            block = block.take(np.flatnonzero(np.isin(block.key_hash, self.chosen[number])))
            block = _with_pixels(block) if self.decode else block
        size = sum(map(len, block.encoded)) if block.pixels is None else block.pixels.nbytes
        if self.kept_bytes + size <= self.keep_bytes:
            self.kept[number] = block
            self.kept_bytes += size
        return block

    def __iter__(self) -> Iterator[ImageBlock]:
        return (block for _, block in self.in_order(range(len(self))))

    # ---- some of the samples ---------------------------------------------------------------------------------------

    def keys(self, number: int) -> list[str]:
        """Of all samples of a tar, in their order; no image is decoded."""
        samples, _ = read_tar(self._fetched(number), expected=self.tars[number], prove=self.prove, labels=self.labels)
        return [sample.key for sample in samples]

    def only(self, chosen: Sequence[U64], decode: bool | None = None) -> "BlockLoader":
        """A loader of some of the samples, those whose keys have the hashes `chosen[number]` `[n]`, of every tar.

        No other sample is decoded, and a tar of which none is chosen is no block of it.

        Args:
            decode: as of `HowRead`, where it is another than of this loader.
        """
        numbers = [number for number, hashes in enumerate(chosen) if len(hashes)]
        other = copy(self)
        other.__dict__.pop("_threads", None)
        other.kept, other.kept_bytes, other.coming, other.sizes = {}, 0, {}, {}
        other.tars, other.files = [self.tars[one] for one in numbers], [self.files[one] for one in numbers]
        other.chosen = [chosen[number] for number in numbers]
        other.decode = self.decode if decode is None else decode
        tars = [self.tars[number].model_copy(update={"count": len(chosen[number])}) for number in numbers]
        other.split = self.split.model_copy(update={"tars": tars})
        return other

    # ---- from afar -------------------------------------------------------------------------------------------------

    @property
    def is_remote(self) -> bool:
        """Whether any tar lies afar, as far as is known before it is read."""
        return any(isinstance(file, Remote) for file in self.files)

    def in_order(self, numbers: Iterable[int]) -> Iterator[tuple[int, ImageBlock]]:
        """Blocks with their numbers; while one is worked on, the next ones are fetched, if they lie afar."""
        waiting: deque[int] = deque()
        ahead = READ_AHEAD if self.is_remote else 0
        for number in numbers:
            waiting.append(number)
            if len(waiting) > ahead:
                yield self._first_of(waiting)
        while waiting:
            yield self._first_of(waiting)

    def _first_of(self, waiting: "deque[int]") -> tuple[int, ImageBlock]:
        number = waiting.popleft()
        for later in waiting:
            self.fetch_ahead(later)
        return number, self[number]

    def fetch_ahead(self, number: int) -> None:
        """Begin to fetch the tar of a block, if it lies afar and there is room; errors come out where it is read.

        Bytes only: unpacking and decoding stay with who reads the block.
        """
        if number in self.kept or number in self.coming or not isinstance(self.files[number], Remote):
            return
        largest = max(list(self.sizes.values()), default=AHEAD_BYTES)  # as large may be what has not come yet
        if not self.coming or sum(self.sizes.get(one, largest) for one in [*self.coming, number]) <= AHEAD_BYTES:
            self.coming[number] = self._threads.submit(self._fetched, number)

    def _fetched(self, number: int) -> Path | Fetched:
        file = self.files[number]
        if isinstance(file, Path):
            return file
        fetched = file.fetch(self.split.tars[number].sha256, self.downloads)
        self.sizes[number] = len(fetched.content)
        return fetched

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS)

"""Writing image tars: of any samples, of official CIFAR files, of scikit-learn's digits."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image

from offline_kd.data.fetching import MAX_FILE_BYTES, Root
from offline_kd.data.folders import Photos, Picture
from offline_kd.data.manifest import Tar
from offline_kd.data.shrinking import JPEG_QUALITY, shrunk_size
from offline_kd.data.tars import Sample, problem_of_key
from offline_kd.support.console import counted, progress, say
from offline_kd.support.errors import DataError, StoreUnreachable
from offline_kd.support.files import file_sha256, flush_to_disk
from offline_kd.support.places import Bucket
from offline_kd.support.web import Web

PUTS = 2  # of a tar into a bucket, where a network lies between


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of `[H, W]` or `[H, W, 3]` pixels, stored without compression.

    Compressed PNG bytes differ between zlib builds; stored ones do not, so packing gives the same sha256 anywhere.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def pack(samples: Iterable[Sample], folder: Root, prefix: str, samples_per_tar: int) -> list[Tar]:
    """Write samples to `folder/PREFIX-NNNNNN.tar`, each of which appears when it is complete, here or in a bucket.

    The bytes depend on the samples alone. Raises DataError for an illegal key or one that was used before, StoreError
    for a web address, which cannot be written to, and StoreUnreachable when a tar does not arrive as it was sent.
    """
    tars: list[Tar] = []
    seen: set[str] = set()
    chunk: list[Sample] = []

    def flush() -> None:
        name = f"{prefix}-{len(tars):06d}.tar"
        sha256 = _write(folder / name, chunk) if isinstance(folder, Path) else _send(folder, name, chunk)
        tars.append(Tar(file=name, count=len(chunk), sha256=sha256))
        chunk.clear()

    for sample in samples:
        if problem := problem_of_key(sample.key) or ("." in sample.key.rpartition("/")[2] and "has a dot in it"):
            raise DataError(f"key '{sample.key}': {problem}. Rename the file.")
        if sample.key in seen:
            raise DataError(f"key '{sample.key}' comes twice. Rename one of the two files.")
        seen.add(sample.key)
        chunk.append(sample)
        if len(chunk) == samples_per_tar:
            flush()
    if chunk:
        flush()
    if not tars:
        raise DataError(f"{folder}: nothing to pack: no samples were found.")
    return tars


def shrunk(photos: Photos, side: int) -> Photos:
    """The same pictures, of which those with a shorter side of more than `side` pixels are packed with so many; says
    how many they are."""

    def packed(picture: Picture) -> Picture:
        if min(picture.size) <= side:
            return picture
        return replace(picture, size=shrunk_size(picture.size, side), side=side, extension="jpg")

    splits = {part: [packed(one) for one in pictures] for part, pictures in photos.splits.items()}
    smaller = sum(one.side is not None for pictures in splits.values() for one in pictures)
    if smaller:
        say(
            f"{photos.folder}: {counted(smaller, 'pictures')} of {sum(map(len, splits.values())):,} with more than "
            f"{side:,} pixels on the shorter side will be packed with {side:,} (JPEG, quality {JPEG_QUALITY}). To pack "
            "them as they are: --side 0"
        )
    return replace(photos, splits=splits)


def pack_photos(photos: Photos, folder: Root, samples_per_tar: int) -> dict[str, list[Tar]]:
    """The tars of every split of a folder of pictures; raises what `pack` does, and DataError for changed pictures."""
    with progress("packing", sum(map(len, photos.splits.values())), "pictures") as meter:

        def watched(samples: Iterable[Sample]) -> Iterator[Sample]:
            for sample in samples:
                yield sample
                meter.advance()

        return {part: pack(watched(photos.samples(part)), folder, part, samples_per_tar) for part in photos.splits}


def refuse_inside(source: Path, out: Root) -> None:
    """Raise DataError where tars would be written among the pictures, of which they would be a class the next time."""
    if isinstance(out, Path) and out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out}: lies in the folder of the pictures, {source}. Write to a folder outside of it.")


def _write_tar(file: IO[bytes], samples: Sequence[Sample]) -> None:
    with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for sample in samples:
            label = str(sample.label).encode()
            writer.write({"__key__": sample.key, sample.extension: sample.encoded, "cls": label})


def _write(path: Path, samples: Sequence[Sample]) -> str:
    """Under a temporary name that is renamed when complete; returns the sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        _write_tar(file, samples)
    sha256 = file_sha256(partial)
    flush_to_disk(partial)
    os.replace(partial, path)
    return sha256


def _send(place: Bucket | Web, name: str, samples: Sequence[Sample]) -> str:
    """In one request, which is atomic; read back, because a network may change what it carries. Returns the sha256."""
    content = io.BytesIO()
    _write_tar(content, samples)
    sha256 = hashlib.sha256(content.getbuffer()).hexdigest()
    for _ in range(PUTS):
        place.put(name, content.getvalue())
        if hashlib.sha256(place.read(name, MAX_FILE_BYTES)).hexdigest() == sha256:
            return sha256
    raise StoreUnreachable(f"{place}/{name}: did not arrive as it was sent. Check the network, and pack again.")


def digits_samples() -> dict[str, list[Sample]]:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels; every fifth image is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for index, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        grey = np.round(pixels * (255 / 16)).astype(np.uint8)
        sample = Sample(f"{index:04d}", int(label), encode_png(grey), "png")
        splits["test" if index % 5 == 4 else "train"].append(sample)
    return splits


def cifar_samples(name: str, folder: Path) -> tuple[dict[str, Iterator[Sample]], list[str]]:
    """CIFAR-10 or CIFAR-100 from a user's own official copy, read (and md5-checked) by torchvision, in official order.

    `folder` is the one that holds `cifar-10-batches-py` or `cifar-100-python`.
    """
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        parts = {split: source(str(folder), train=split == "train") for split in ("train", "test")}
    except RuntimeError as error:
        raise DataError(
            f"{folder / source.base_folder}: the official files of {name} are missing or damaged ({error}). "
            f"Unpack the archive {source.filename} there."
        ) from error

    def samples(split: str) -> Iterator[Sample]:
        part = parts[split]
        for index, (pixels, label) in enumerate(zip(part.data, part.targets, strict=True)):
            yield Sample(f"{index:06d}", int(label), encode_png(pixels), "png")

    return {split: samples(split) for split in parts}, list(parts["train"].classes)

"""Writing image tars: of people's folders, of official CIFAR files, of scikit-learn's digits."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image

from offline_kd.data.decoding import UNDECODABLE, decode_image
from offline_kd.data.manifest import Tar
from offline_kd.data.tars import IMAGE_EXTENSIONS, Sample, hash_key, problem_of_key
from offline_kd.support.errors import DataError, shorten
from offline_kd.support.files import flush_to_disk


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of `[H, W]` or `[H, W, 3]` pixels, stored without compression.

    Compressed PNG bytes differ between zlib builds; stored ones do not, so packing gives the same sha256 anywhere.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def pack(samples: Iterable[Sample], folder: Path, prefix: str, samples_per_tar: int) -> list[Tar]:
    """Write samples to `folder/PREFIX-NNNNNN.tar`, each under a temporary name that is renamed when complete.

    The bytes depend on the samples alone. Raises DataError for an illegal key or one that was used before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tars: list[Tar] = []
    seen: set[str] = set()
    chunk: list[Sample] = []

    def flush() -> None:
        path = folder / f"{prefix}-{len(tars):06d}.tar"
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
                for sample in chunk:
                    label = str(sample.label).encode()
                    writer.write({"__key__": sample.key, sample.extension: sample.encoded, "cls": label})
        sha256 = hashlib.sha256(partial.read_bytes()).hexdigest()
        flush_to_disk(partial)
        os.replace(partial, path)
        tars.append(Tar(file=path.name, count=len(chunk), sha256=sha256))
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


SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "dev", "test", "testing")


def imagefolder_splits(folder: Path, split: str | None = None) -> tuple[dict[str, Iterator[Sample]], list[str]]:
    """The splits of `folder/SPLIT/CLASS/**/IMAGE`, or the one of `folder/CLASS/**/IMAGE`, called `split` or "train".

    Raises DataError for splits of different classes, and for a parent of splits when one `split` is asked for.
    """
    splits = sub_folders(folder)
    if not _are_splits(splits):
        samples, classes = imagefolder_samples(folder)
        return {split or "train": samples}, classes
    names = [one.name for one in splits]
    if split is not None:
        raise DataError(
            f"{folder}: holds splits ({', '.join(names)}), not classes. Leave --split out to pack them all, or "
            f"give one as --source {splits[0]}."
        )
    packed, classes_of = {}, {}
    for one in splits:
        packed[one.name], classes_of[one.name] = imagefolder_samples(one)
        different = set(classes_of[one.name]) ^ set(classes_of[names[0]])
        if different:
            raise DataError(
                f"{folder}: '{min(different)}' is a class of {names[0]} or of {one.name}, not of both. All splits must "
                f"have the same classes: correct the folders, or pack one with --source {one} --split {one.name}."
            )
    return packed, classes_of[names[0]]


def sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name; raises DataError where there is no folder."""
    if not os.path.isdir(folder):
        raise DataError(
            f"{shorten(str(folder))}: no such folder. Give one with a sub-folder of images for every class."
        )
    return sorted(entry for entry in folder.iterdir() if entry.is_dir())


def _are_splits(folders: list[Path]) -> bool:
    """Whether folders are splits and not classes: none has images itself, and they have the same sub-folders, or one of
    them has sub-folders and the name of a split."""
    inside = [{one.name for one in folder.iterdir() if one.is_dir()} for folder in folders]
    has_images = [
        any(one.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS for one in folder.iterdir()) for folder in folders
    ]
    named = any(
        folder.name.lower() in SPLIT_NAMES and names and not images
        for folder, names, images in zip(folders, inside, has_images, strict=True)
    )
    same = len(folders) > 1 and len(inside[0]) > 1 and all(names == inside[0] for names in inside)
    return named or (same and not any(has_images))


def imagefolder_samples(folder: Path) -> tuple[Iterator[Sample], list[str]]:
    """`folder/CLASS/**/IMAGE`: classes are the sorted sub-folders; PNG, JPEG and WebP files are taken byte for byte.

    The key is the path below `folder` without its extension, other characters than letters, digits, '_', '-', '/'
    becoming '_'; where two paths would share a key, the later one gets a hash of its path appended. The order is
    that of the keys' hashes, which mixes the classes.
    """
    classes = [entry.name for entry in sub_folders(folder)]
    if len(classes) < 2:
        raise DataError(f"{folder}: {len(classes)} class folders, at least 2 are needed (FOLDER/CLASS/IMAGE).")

    def samples() -> Iterator[Sample]:
        found: dict[str, tuple[Path, int]] = {}
        for label, name in enumerate(classes):
            for path in sorted(path for path in (folder / name).rglob("*") if path.is_file()):
                relative = path.relative_to(folder).with_suffix("").as_posix()
                key = re.sub(r"[^0-9A-Za-z_\-/]", "_", relative)
                if key in found:
                    key += "_" + hashlib.sha256(path.name.encode()).hexdigest()[:8]
                found[key] = path, label
        # Of all classes in every tar: training shuffles a few tars at a time, and mixes images within one.
        for key in sorted(found, key=hash_key):
            path, label = found[key]
            extension = path.suffix.lower().lstrip(".")
            if extension not in IMAGE_EXTENSIONS:
                raise DataError(f"{path}: not a {', '.join(IMAGE_EXTENSIONS)} file. Convert it, or move it elsewhere.")
            encoded = path.read_bytes()
            try:
                decode_image(encoded)
            except UNDECODABLE as error:
                raise DataError(f"{path}: cannot be decoded ({error}). Repair or remove it.") from error
            yield Sample(key, label, encoded, extension)

    return samples(), classes

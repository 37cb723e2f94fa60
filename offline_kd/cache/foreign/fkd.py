"""FKD (Shen and Xing 2022, arXiv:2112.01528): soft labels of `generate_soft_label.py`, a file for every image.

`FOLDER/train/CLASS/NAME.tar` is no tar: it is a list that torch has saved, of crops `[v, 4]` as shares of the image
(top, left, height, width), flips `[v]`, and labels: `[v, 2, k]`, classes above probabilities, or `[v, 2]` for k = 1.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offline_kd.cache.foreign.answers import Answers, Sample, checked, crops, read_file, views_taken
from offline_kd.cache.foreign.plain import itemsize, numbers_of, read_plain
from offline_kd.support.errors import DataError, shorten
from offline_kd.views.imported import ImportedCrops

BETWEEN = 0.05  # of a pixel, by which a crop may miss the whole number that it was
HALF = 2**-12  # of the side, by which it may miss it more where shares were rounded to half precision
EXACT_HALF = 2048  # class ids up to here are exact in half precision

LOST = [
    "logits: only the probabilities of the likeliest classes are kept, and what is left for all others together",
    "the teacher: neither its weights nor its name, input size and normalisation stand in the files",
]


@dataclass
class FKD:
    """A folder of FKD's soft labels."""

    where: str
    folder: Path  # whose folders are classes
    views: ImportedCrops
    k: int
    temperature: int
    teacher: str = ""
    is_numbered: bool = False
    name: str = "fkd"
    lost: list[str] = field(default_factory=lambda: list(LOST))

    def content(self, sample: Sample) -> bytes:
        """The file of the sample's name."""
        for name in (sample.key, f"{sample.class_name}/{sample.key}"):
            file = self.folder / f"{name}.tar"
            if file.is_file():
                return read_file(file)
        raise DataError(
            f"{self.folder}: has no labels of sample '{sample.key}' ({sample.key}.tar). Give the dataset that the "
            "labels were made of, with its folders' and files' names as keys."
        )

    def answers(self, content: bytes, sample: Sample, num_classes: int) -> Answers:
        """Raises DataError for other shapes than those of the first file, and boxes between the image's pixels."""
        where = f"{self.folder / sample.key}.tar"
        box, flip, labels, is_half = _arrays(content, where)
        if labels.shape != (len(box), 2, self.k) or len(box) < self.views.count:
            raise DataError(
                f"{where}: labels of shape {list(labels.shape)}, the first file's are of at least {self.views.count} "
                f"views of {self.k} classes. Labels of one kind belong into one store."
            )
        if is_half and num_classes > EXACT_HALF + 1:
            raise DataError(
                f"{where}: class ids in half precision (--use_fp16), which are exact up to {EXACT_HALF:,}; the dataset "
                f"has {num_classes:,} classes. Make the labels again without it."
            )
        some = slice(0, self.views.count)
        pixels = box[some] * np.tile(np.array(sample.size), 2)
        near = np.rint(pixels)
        if (np.abs(pixels - near) > BETWEEN + HALF * is_half * max(sample.size)).any():
            raise DataError(
                f"{where}: a crop of {pixels[np.abs(pixels - near).max(1).argmax()].round(2).tolist()} (top, left, "
                f"height, width) lies between the pixels of an image that is {sample.size[1]}x{sample.size[0]} here: "
                "it is about another image, or one of another size. Give the dataset that the labels were made of."
            )
        if (labels[some, 0] % 1 != 0).any():
            raise DataError(f"{where}: class ids are no whole numbers. It is damaged: copy it again.")
        ids, probabilities = labels[some, 0].astype(np.int64), labels[some, 1]
        told = Answers(crops(near.astype(np.int64), flip[some] != 0, {}), ids, probabilities)
        return checked(where, sample, told, num_classes)

    def problem_of_count(self, samples: int) -> str:
        """Files are found by name: the dataset may be a part of what they are about."""
        return ""


def open_fkd(source: Path, size: int, interpolation: str, temperature: int, num_views: int | None) -> FKD:
    """The labels in a folder, as its first file says.

    Args:
        source: the folder whose folders are classes, or the one with `train` in it.
        size: of the student's images.
        num_views: how many of the views of every image are taken, the first ones; None: all.

    Raises DataError where there are none that can be imported.
    """
    folder = source / "train" if os.path.isdir(source / "train") else source
    classes = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    first = next((file for one in classes for file in sorted(one.glob("*.tar")) if os.path.isfile(file)), None)
    if first is None:
        raise DataError(
            f"{shorten(str(source))}: holds no CLASS/NAME.tar of FKD, here or in train/. Give the folder whose folders "
            "are classes."
        )
    box, _, labels, _ = _arrays(read_file(first), str(first))
    views = ImportedCrops.model_validate(
        {
            "kind": "imported",
            "size": size,
            "interpolation": interpolation,
            "count": views_taken(num_views, len(box), str(first)),
        }
    )
    return FKD(str(source), folder, views, labels.shape[2], temperature)


def _arrays(content: bytes, where: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], bool]:
    """Crops `[v, 4]`, flips `[v]`, labels `[v, 2, k]`, and whether they are in half precision."""
    match read_plain(content, where):
        case [crop, flip, label]:
            box, flips, labels = (
                numbers_of(one, where, what) for one, what in ((crop, "crops"), (flip, "flips"), (label, "labels"))
            )
        case _:
            raise DataError(f"{where}: does not hold crops, flips and labels, as FKD's files do.")
    if labels.ndim == 1:
        raise DataError(f"{where}: holds the likeliest class alone (--label_type hard), without a probability.")
    if labels.ndim == 2 and labels.shape[1] == 2:
        labels = labels[..., None]
    if not len(box) or box.shape != (len(flips), 4) or labels.shape[:2] != (len(box), 2) or labels.ndim != 3:
        raise DataError(
            f"{where}: crops of shape {list(box.shape)}, flips {list(flips.shape)}, labels {list(labels.shape)} do not "
            "belong together. It is damaged, or no file of FKD: copy it again."
        )
    if not (np.isfinite(box).all() and np.isfinite(labels).all()):
        raise DataError(f"{where}: holds values that are no numbers. It is damaged: copy it again.")
    return box, flips, labels, itemsize(label) == 2

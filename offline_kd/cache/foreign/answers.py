"""What every format says of itself: which views there are, and what a teacher said of those of one image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offline_kd.support.errors import DataError, RecipeError
from offline_kd.views.imported import ImportedCrops
from offline_kd.views.kind import MOST_VIEWS, UNIT, Parameters

MOST_BYTES = 2**26  # of one file
ABOVE_ONE = 0.02  # by which rounded probabilities may sum to more than 1


@dataclass(frozen=True)
class Sample:
    """One image of the dataset, as other programs may know it."""

    key: str
    class_name: str
    number: int  # in the order of torchvision's ImageFolder, or of a list of keys
    size: tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Answers:
    """What a file says of one image: v views, and the k likeliest classes of each."""

    parameters: Parameters  # [v, ...] by array of the views
    ids: NDArray[np.int64]  # [v, k]
    probabilities: NDArray[np.float64]  # [v, k]

    @property
    def likeliest(self) -> NDArray[np.int64]:
        """`[v]` the class that the teacher named."""
        return np.take_along_axis(self.ids, self.probabilities.argmax(axis=1)[:, None], axis=1)[:, 0]


class Foreign(Protocol):
    """A label store of another program."""

    name: str  # of the format, as the command line has it
    where: str
    views: ImportedCrops
    k: int  # likeliest classes of a view
    teacher: str  # its name; "" where nothing says it
    temperature: int  # of the softmax
    lost: list[str]  # what the files do not say, a sentence each

    @property
    def is_numbered(self) -> bool:
        """Whether images are found by their number, not by their key."""

    def content(self, sample: Sample) -> bytes:
        """All that is stored of an image; raises DataError where nothing is."""

    def answers(self, content: bytes, sample: Sample, num_classes: int) -> Answers:
        """The same as numbers; raises DataError for what is damaged or about another image."""

    def problem_of_count(self, samples: int) -> str:
        """What is wrong with it for a dataset of so many images; "" if nothing is."""


def read_file(file: Path) -> bytes:
    """A file of numbers; raises DataError for one that is missing or far larger than such files are."""
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"{file}: {size:,} bytes, at most {MOST_BYTES:,} are read. Is it another kind of file?")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error


def views_taken(wanted: int | None, there: int, where: str) -> int:
    """How many views of every image are imported; raises RecipeError when there are not so many."""
    if (wanted or 1) > there or (wanted or there) > MOST_VIEWS:
        raise RecipeError(
            f"{where}: has {there:,} views of an image, --views asks for {wanted or 'all'}; a store takes up to "
            f"{MOST_VIEWS:,}. Correct --views."
        )
    return wanted or there


def checked(where: str, sample: Sample, answers: Answers, num_classes: int) -> Answers:
    """The answers; raises DataError where boxes reach outside the image, or these are no classes and probabilities."""
    box, (height, width) = answers.parameters["box"].astype(np.int64), sample.size
    outside = (box < 0).any(1) | (box[:, 2:] < 1).any(1)
    outside |= (box[:, 0] + box[:, 2] > height) | (box[:, 1] + box[:, 3] > width)
    if outside.any():
        view = int(outside.argmax())
        raise DataError(
            f"{where}: view {view} is the box {box[view].tolist()} (top, left, height, width) of an image that is "
            f"{width}x{height} here ('{sample.key}'): it is about another image. Give the dataset that it was made of."
        )
    ids, probabilities = answers.ids, answers.probabilities
    if ids.min() < 0 or ids.max() >= num_classes:
        raise DataError(
            f"{where}: names class {ids.max() if ids.max() >= num_classes else ids.min()}, the dataset has "
            f"{num_classes}, 0 to {num_classes - 1}. Give the dataset that it was made of."
        )
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise DataError(f"{where}: names a class twice in one view. It is damaged: copy it again.")
    legal = (probabilities >= 0).all(1) & (probabilities.sum(axis=1) <= 1 + ABOVE_ONE)
    if not legal.all():  # NaN, too
        view = int((~legal).argmax())
        raise DataError(
            f"{where}: view {view} has {probabilities[view].tolist()!s:.200}, which are no probabilities. It is "
            "damaged, or of another kind: copy it again."
        )
    return answers


def crops(box: NDArray[np.int64], flip: NDArray[np.bool_], more: Mapping[str, NDArray[np.generic]]) -> Parameters:
    """Parameters `[v, ...]` of the types that stores have; no side of an image is longer than int16 goes."""
    return {"box": box.clip(-1, 2**15 - 1).astype(np.int16), "flip": flip.astype(np.uint8), **more}


def erased_boxes(box: NDArray[np.int64], size: int) -> NDArray[np.int16]:
    """Boxes `[v, 4]` in pixels of views of that size, as stores have them; the pixels follow exactly."""
    return np.rint(box * (UNIT / size)).astype(np.int16)

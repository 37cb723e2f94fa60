"""What every kind of view says of itself, and `draw`: which augmentation a sample gets, as explicit numbers.

A view is a box in source pixels, which may reach outside the image, and what happens to its pixels afterwards: a flip,
operations with magnitudes, an erased box, another image of the same tar mixed in. Both stages render the same stored
numbers, so the student sees the very pixels that the teacher saw.

All random choices are pure functions of counters (seed, key hash, view): no library, worker count, batch size or rank
can change them.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offline_kd.data.manifest import EvaluationCrop, Interpolation
from offline_kd.support.counter_rng import U64
from offline_kd.support.strict import Strict

Outside = Literal["zeros", "reflect"]  # what lies outside the image: black, or its mirror image
Decoding = Annotated[  # left out of JSON where it is full, so that views are described as by earlier versions
    Literal["full", "scaled"],
    Field(
        exclude_if=lambda decoding: decoding == "full",
        description="scaled: JPEGs at 1/2, 1/4 or 1/8 where a crop is so much larger than what it is resized to",
    ),
]
Erased = Literal["mean", "noise", "black"]  # what lies in an erased box: ImageNet's mean colour, noise, or nothing
Parameters = dict[str, NDArray[Any]]  # of views, by array: `[n, v, ...]`; which there are says `ViewSpec.arrays`
Uniform = Callable[[int, int], NDArray[np.float64]]  # numbers of a stream, `[n, v]` in [0, 1): one for every view

UNIT = 2**14  # boxes of erasing and mixing are in 1/UNIT of the image's side
MOST_VIEWS = 4096  # of an image, where there is no end of different ones
EMPTY = -(2**15)  # marks an empty place in an array of int16
BOX = ("box", 4)  # the axis of boxes
TRIES = 10  # for a box that fits

# First counters of the draws, so that they are independent of each other.
CROP, FLIP, AUGMENT, JITTER, ERASE, MIX = (0x76696577 << 8 | number for number in range(6))


@dataclass(frozen=True)
class ViewArray:
    """One array of view parameters: type, what marks an empty place, and its axis behind row and view if it has one."""

    dtype: str
    fill: float
    axis: tuple[str, int] | None
    legal: tuple[float, float]
    description: str


class ViewSpec(Strict):
    """A kind of view, with the fields that recipes and stores give it. One file per kind; `VIEWS` makes it known.

    A kind must say what it draws. Everything else it says only where it differs: as it stands here, it has one view,
    copies pixels of images that all have one size, and stores a box and a flip.
    """

    kind: str

    @property
    def num_distinct(self) -> int:
        """How many different views of an image there are, at most."""
        return 1

    @property
    def num_views(self) -> int:
        """How many of them every image has; raises RecipeError when it says more than there are."""
        return 1

    def with_count(self, num_views: int) -> Self:
        """The same views, so many of them; a kind without a `count` stays what it is."""
        return self.model_copy(update={"count": num_views}) if "count" in type(self).model_fields else self

    @property
    def is_drawn(self) -> bool:
        """Whether parameters follow from keys, so that they can be drawn again and compared with what is stored."""
        return True

    @property
    def interpolation_used(self) -> Interpolation | None:
        """How crops are resampled, one image after the other; None: pixels are copied, in batches on the device."""
        return None

    @property
    def decoding_used(self) -> Decoding:
        """Whether images whose crops are resampled are decoded whole."""
        return "full"

    @property
    def is_exact(self) -> bool:
        """Whether rendering copies pixels only, so that images have one size and are rendered in batches."""
        return self.interpolation_used is None

    @property
    def output_size(self) -> int | None:
        """Side of a resampled view in pixels, for the student; None: as the image is."""
        return None

    @property
    def evaluation_crop(self) -> EvaluationCrop | None:
        """How the student sees images of different sizes when it is evaluated; None: as they are, all of one size."""
        return None

    @property
    def outside(self) -> Outside:
        """What lies outside the image, where pixels are copied."""
        return "zeros"

    @property
    def erased(self) -> Erased:
        """What lies in erased boxes."""
        return "mean"

    @property
    def mixes(self) -> bool:
        """Whether another image of the tar may be mixed into a view."""
        return False

    def arrays(self) -> dict[str, ViewArray]:
        """The arrays, below `view/` in the store, that `draw_views` returns; always with a box and a flip."""
        return {
            "box": ViewArray("<i2", EMPTY, BOX, (EMPTY + 1, 2**15 - 1), "top, left, height, width in source pixels"),
            "flip": ViewArray("|u1", 255, None, (0, 1), "1: mirrored left-right after cropping"),
        }

    @abstractmethod
    def draw_views(self, key_hash: U64, sizes: NDArray[np.int64], view: NDArray[np.int64]) -> Parameters:
        """Parameters `[n, v, ...]`, one array for each of `arrays`, of its type.

        A pure function of the key, the size and the number of a view, so that more views can be added later without
        changing those before; only who is mixed in depends on the row, and on how many there are. Of the arrays, only
        the box may depend on the size: a store does not keep it, and `verify` draws all others again.

        Args:
            key_hash: `[n]`.
            sizes: `[n, 2]` height and width of the images.
            view: `[1, v]` or `[n, v]`: which views are wanted.
        """


def draw(
    views: ViewSpec, key_hash: U64, sizes: NDArray[np.int64], position: NDArray[np.int64] | None = None
) -> Parameters:
    """Parameters `[n, v, ...]` of all views of the samples of a tar, or `[n, 1, ...]` of one view of each.

    Args:
        key_hash: `[n]`, in the order of the tar.
        sizes: `[n, 2]` height and width of the images.
        position: `[n]`, the view that is wanted of each sample; the same numbers as where all views are drawn.
    """
    view = np.arange(views.num_views)[None] if position is None else position[:, None]
    return views.draw_views(key_hash, sizes.astype(np.int64), view.astype(np.int64))


def unmirrored(box: NDArray[np.int64]) -> Parameters:
    """Parameters of the one view that lies in `box` `[n, 4]`."""
    return {"box": box[:, None].astype(np.int16), "flip": np.zeros((len(box), 1), dtype=np.uint8)}

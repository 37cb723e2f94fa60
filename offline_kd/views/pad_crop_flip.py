"""The augmentation of the CIFAR papers, whose views can all be stored."""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offline_kd.support.counter_rng import U64, keyed_permutation
from offline_kd.support.errors import RecipeError
from offline_kd.support.strict import Seed
from offline_kd.views.kind import Outside, Parameters, ViewSpec


class PadCropFlip(ViewSpec):
    """Pad by `padding` pixels, crop back to the image's size, flip left-right: the augmentation of the CIFAR papers.

    There are only (2 * padding + 1)**2 * 2 such views, so `count: all` stores every one and offline training is
    online training exactly. A smaller `count` draws that many different ones for every sample.
    """

    kind: Literal["pad_crop_flip"]
    padding: int = Field(4, ge=0, le=64, description="pixels on every side")
    fill: Outside = Field("zeros", description="what lies outside the image: black, or its mirror image")
    flip: bool = Field(True, description="half of all views are mirrored left-right")
    count: Annotated[int, Field(ge=1)] | Literal["all"] = Field("all", description="views of every image")
    seed: Seed = Field(0, description="of the order in which each sample has its views")

    @property
    def num_distinct(self) -> int:
        """Offsets, and each of them mirrored."""
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    @property
    def num_views(self) -> int:
        """The count; raises RecipeError when there are not so many."""
        if self.count == "all":
            return self.num_distinct
        if self.count > self.num_distinct:
            raise RecipeError(
                f"views.count is {self.count}, but padding {self.padding} {'with' if self.flip else 'without'} flip "
                f"has only {self.num_distinct} different views. Use `count: all`."
            )
        return self.count

    @property
    def outside(self) -> Outside:
        """What the image is padded with."""
        return self.fill

    def draw_views(self, key_hash: U64, sizes: NDArray[np.int64], view: NDArray[np.int64]) -> Parameters:
        """View v of a sample is the v-th element of the sample's own permutation of the distinct views.

        So none comes twice, and `all` is the whole permutation. Raises RecipeError where an image is too small to be
        mirrored at its edge.
        """
        height, width = sizes[:, 0], sizes[:, 1]
        if self.fill == "reflect" and self.padding >= int(sizes.min()):
            raise RecipeError(
                f"views.padding is {self.padding} with fill reflect, but the images are {width[0]}x{height[0]}: "
                "reflection reaches at most one pixel less than the image's side. Use a smaller padding."
            )
        permutation = keyed_permutation(self.num_distinct, self.seed, key_hash)
        choice = np.take_along_axis(permutation, view, axis=1)
        side = 2 * self.padding + 1
        flip, offset = np.divmod(choice, side * side)
        top, left = offset // side - self.padding, offset % side - self.padding
        height, width = (np.broadcast_to(size[:, None], top.shape) for size in (height, width))
        return {
            "box": np.stack([top, left, height, width], axis=-1).astype(np.int16),
            "flip": flip.astype(np.uint8),
        }

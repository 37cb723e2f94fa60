"""Views: which augmentation a sample gets, as explicit numbers, and how it is rendered.

A view is a box in source pixels, which may reach outside the image, and a flip. Both stages call the same `render`
with the same stored numbers, so the student sees the very pixels that the teacher saw.

All random choices are pure functions of counters (seed, key hash, view), computed here: no library, worker count,
batch size or rank can change them.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from offline_kd.errors import RecipeError
from offline_kd.manifest import Strict

U64 = NDArray[np.uint64]
Fill = Literal["zeros", "reflect"]  # what lies outside the image: black, or its mirror image


class NoAugmentation(Strict):
    """The image as it is; one view."""

    kind: Literal["none"] = "none"

    @property
    def fill(self) -> Fill:
        return "zeros"  # never seen: the box is the image

    @property
    def num_distinct(self) -> int:
        return 1

    @property
    def num_views(self) -> int:
        return 1


class PadCropFlip(Strict):
    """Pad by `padding` pixels, crop back to the image's size, flip left-right: the augmentation of the CIFAR papers.

    There are only (2 * padding + 1)**2 * 2 such views, so `count: all` stores every one and offline training is
    online training exactly. A smaller `count` draws that many different ones for every sample.
    """

    kind: Literal["pad_crop_flip"]
    padding: int = Field(4, ge=0, le=64)
    fill: Fill = "zeros"
    flip: bool = True
    count: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    seed: int = Field(0, ge=0)

    @property
    def num_distinct(self) -> int:
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    @property
    def num_views(self) -> int:
        if self.count == "all":
            return self.num_distinct
        if self.count > self.num_distinct:
            raise RecipeError(
                f"views.count is {self.count}, but padding {self.padding} {'with' if self.flip else 'without'} flip "
                f"has only {self.num_distinct} different views. Use `count: all`."
            )
        return self.count


AnyViews = NoAugmentation | PadCropFlip
Views = Annotated[AnyViews, Field(discriminator="kind")]


@dataclass(frozen=True)
class ViewParameters:
    """What is stored for a view, n samples by v views."""

    box: NDArray[np.int16]  # [n, v, 4] top, left, height, width in source pixels; may reach outside the image
    flip: NDArray[np.uint8]  # [n, v] 1 = mirrored left-right after cropping


# ---- choosing ------------------------------------------------------------------------------------------------------


def mix(counters: U64) -> U64:
    """A bijective scrambling of 64-bit counters (the finaliser of splitmix64, Steele et al. 2014)."""
    z = (counters ^ (counters >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def counter_hash(*counters: int | U64) -> U64:
    """A 64-bit hash of a tuple of counters, elementwise with broadcasting. Changing this breaks every store."""
    state = np.zeros(1, dtype=np.uint64)
    for counter in counters:
        value = np.atleast_1d(np.asarray(counter, dtype=np.uint64))
        state = mix((state ^ value) + np.uint64(0x9E3779B97F4A7C15))
    return state


def counter_uniform(*counters: int | U64) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), a pure function of the counters."""
    return (counter_hash(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(num: int, *counters: int | U64) -> NDArray[np.int64]:
    """`[n, num]`: for every row of counters (broadcast to `[n]`) its own permutation of 0..num-1."""
    rows = counter_hash(*counters)[:, None]
    return np.argsort(counter_hash(rows, np.arange(num, dtype=np.uint64)[None]), axis=1, kind="stable")


def draw(views: AnyViews, key_hash: U64, height: int, width: int) -> ViewParameters:
    """Parameters of all views of the samples `key_hash` `[n]` whose images are `height` x `width`.

    View v of a sample is the v-th element of that sample's own permutation of the distinct views: no view comes
    twice, more views can be added later without changing those before, and `all` is the whole permutation.
    """
    if isinstance(views, NoAugmentation):
        box = np.broadcast_to(np.array([0, 0, height, width], dtype=np.int16), (len(key_hash), 1, 4))
        return ViewParameters(box.copy(), np.zeros((len(key_hash), 1), dtype=np.uint8))
    if views.fill == "reflect" and views.padding >= min(height, width):
        raise RecipeError(
            f"views.padding is {views.padding} with fill reflect, but the images are {width}x{height}: "
            "reflection reaches at most one pixel less than the image's side. Use a smaller padding."
        )
    choice = keyed_permutation(views.num_distinct, views.seed, key_hash)[:, : views.num_views]
    side = 2 * views.padding + 1
    flip, offset = np.divmod(choice, side * side)
    top, left = offset // side - views.padding, offset % side - views.padding
    box = np.stack([top, left, np.full_like(top, height), np.full_like(top, width)], axis=-1)
    return ViewParameters(box.astype(np.int16), flip.astype(np.uint8))


def view_groups(num_views: int, views_per_group: int) -> list[range]:
    """The views 0..num_views-1 in the groups that are stored, committed and read together."""
    return [range(start, min(start + views_per_group, num_views)) for start in range(0, num_views, views_per_group)]


def view_of_epoch(seed: int, key_hash: U64, epoch: int, groups: list[range]) -> tuple[int, NDArray[np.int64]]:
    """Which view each sample shows in an epoch (counted from 0): a group, and `[n]` positions within that group.

    A pure function of (seed, key, epoch). A sample shows all its views before one comes again; after that a new cycle
    begins, in another order. The group is common to all samples, so an epoch reads one group of the store and not
    all; the order within the group is the sample's own.
    """
    cycle, step = divmod(epoch, sum(len(group) for group in groups))
    for group in keyed_permutation(len(groups), seed, cycle)[0]:
        if step < len(groups[group]):
            break
        step -= len(groups[group])
    return int(group), keyed_permutation(len(groups[group]), seed, cycle, key_hash)[:, step]


# ---- rendering -----------------------------------------------------------------------------------------------------


def render(images: Tensor, box: Tensor, flip: Tensor, fill: Fill) -> Tensor:
    """Cut one view out of every image, on the images' device; exact, since no resampling takes place.

    Args:
        images: `[B, 3, H, W]` uint8.
        box: `[B, 4]` integer top, left, height, width; all of one height and one width.
        flip: `[B]`, nonzero where the view is mirrored.
        fill: what pixels outside the image are: 0, or the image mirrored at its edge (the edge not repeated).

    Returns:
        `[B, 3, height, width]` uint8.
    """
    box = box.long()
    height, width = int(box[0, 2]), int(box[0, 3])
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device).expand(len(images), width)
    across = torch.where(flip.bool()[:, None], width - 1 - across, across)
    rows, rows_inside = _into_image(box[:, 0:1] + down, images.shape[2], fill)  # [B, height]
    columns, columns_inside = _into_image(box[:, 1:2] + across, images.shape[3], fill)  # [B, width]
    source = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)  # [B, height * width]
    pixels = images.flatten(2).gather(2, source[:, None].expand(-1, 3, -1))
    if fill == "zeros":
        inside = (rows_inside[:, :, None] & columns_inside[:, None, :]).flatten(1)
        pixels = pixels * inside[:, None]
    return pixels.view(len(images), 3, height, width)


def _into_image(index: Tensor, size: int, fill: Fill) -> tuple[Tensor, Tensor]:
    """Legal indices, and where the given ones were legal already."""
    inside = (index >= 0) & (index < size)
    if fill == "reflect":
        return (size - 1) - ((size - 1) - index.abs()).abs(), inside
    return index.clamp(0, size - 1), inside

"""The augmentation of the ImageNet papers: a random box of the image, and what may follow."""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offline_kd.data.manifest import EvaluationCrop, Interpolation
from offline_kd.support.counter_rng import U64, counter_uniform
from offline_kd.support.strict import Seed
from offline_kd.views.augment import Augment, ColorJitter, operation_arrays
from offline_kd.views.erase import Erase
from offline_kd.views.kind import (
    CROP,
    FLIP,
    MOST_VIEWS,
    TRIES,
    Decoding,
    Erased,
    Parameters,
    Uniform,
    ViewArray,
    ViewSpec,
)
from offline_kd.views.mixing import Mixing


class RandomCrop(ViewSpec):
    """Random-resized crops (Szegedy et al. 2015) of images of any size, and what may follow. Any number of views."""

    kind: Literal["random_resized_crop"]
    size: int = Field(224, ge=1, le=4096, description="of the student's image; the teacher may have another")
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = Field(
        (0.08, 1.0), description="of the box, as a share of the image: from, to"
    )
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (3 / 4, 4 / 3), description="width / height of the box: from, to"
    )
    interpolation: Interpolation = Field("bilinear", description="how pixels are resampled")
    decoding: Decoding = "full"
    flip: float = Field(0.5, ge=0, le=1, description="probability that a view is mirrored left-right")
    augment: Augment | None = Field(None, description="operations on the view's colours and geometry")
    jitter: ColorJitter | None = Field(None, description="of colours")
    erase: Erase | None = Field(None, description="of a box of the view")
    mixing: Mixing | None = Field(None, description="another image of the same tar, mixed into the view")
    count: int = Field(ge=1, le=MOST_VIEWS, description="views of every image")
    seed: Seed = Field(0, description="of everything that is drawn")

    @property
    def num_distinct(self) -> int:
        """There is no end of different ones: as many as a store takes."""
        return MOST_VIEWS

    @property
    def num_views(self) -> int:
        """The count."""
        return self.count

    @property
    def interpolation_used(self) -> Interpolation:
        """How crops are resampled."""
        return self.interpolation

    @property
    def decoding_used(self) -> Decoding:
        """As it says."""
        return self.decoding

    @property
    def output_size(self) -> int:
        """Side of a view in pixels."""
        return self.size

    @property
    def evaluation_crop(self) -> EvaluationCrop:
        """The share of the image that ImageNet evaluations cut out: 7/8 of the short side."""
        return EvaluationCrop(size=self.size, resize=round(self.size * 8 / 7), interpolation=self.interpolation)

    @property
    def erased(self) -> Erased:
        """What lies in erased boxes, where there are any."""
        return self.erase.fill if self.erase else "mean"

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is asked for."""
        return self.mixing is not None

    @property
    def num_ops(self) -> int:
        """Places for operations that every view has."""
        return sum(one.num_places for one in (self.augment, self.jitter) if one)

    def arrays(self) -> dict[str, ViewArray]:
        """Box and flip, and those of what follows."""
        arrays = super().arrays()
        if self.num_ops:
            arrays |= operation_arrays(self.num_ops, self.augment.codes() if self.augment else [])
        for one in (self.erase, self.mixing):
            arrays |= one.arrays() if one else {}
        return arrays

    def draw_views(self, key_hash: U64, sizes: NDArray[np.int64], view: NDArray[np.int64]) -> Parameters:
        """Every number of every view has a counter of its own."""
        counters = key_hash[:, None], view.astype(np.uint64)

        def uniform(stream: int, number: int) -> NDArray[np.float64]:
            return counter_uniform(self.seed, stream, number, *counters)

        parameters: Parameters = {
            "box": self._crop_boxes(uniform, sizes, view.shape[1]),
            "flip": (uniform(FLIP, 0) < self.flip).astype(np.uint8),
        }
        ops = [drawn for one in (self.augment, self.jitter) if one for drawn in one.draw(uniform)]
        if ops:
            parameters["op"] = np.stack([op for op, _ in ops], axis=-1).astype(np.uint8)
            parameters["magnitude"] = np.stack([magnitude for _, magnitude in ops], axis=-1).astype(np.float32)
        if self.erase:
            parameters["erase"] = self.erase.draw(uniform)
        if self.mixing:
            parameters |= self.mixing.draw(uniform)
        return parameters

    def _crop_boxes(self, uniform: Uniform, sizes: NDArray[np.int64], num_views: int) -> NDArray[np.int16]:
        """As torchvision's RandomResizedCrop: up to ten tries, and a crop of the middle when none fits."""
        h, w = (np.repeat(sizes[:, axis, None], num_views, axis=1) for axis in (0, 1))
        low, high = self.ratio
        # Of the middle: all of the image, as far as the ratio allows.
        box_h = np.where(w / h > high, h, np.where(w / h < low, np.rint(w / low), h)).clip(1, h)
        box_w = np.where(w / h > high, np.rint(h * high), w).clip(1, w)
        top, left = np.rint((h - box_h) / 2), np.rint((w - box_w) / 2)
        found = np.zeros(h.shape, dtype=bool)
        for number in range(TRIES):
            area = h * w * (self.scale[0] + uniform(CROP, 4 * number) * (self.scale[1] - self.scale[0]))
            ratio = np.exp(np.log(low) + uniform(CROP, 4 * number + 1) * (np.log(high) - np.log(low)))
            try_h, try_w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
            fits = ~found & (try_h >= 1) & (try_w >= 1) & (try_h <= h) & (try_w <= w)
            top = np.where(fits, np.floor(uniform(CROP, 4 * number + 2) * (h - try_h + 1)), top)
            left = np.where(fits, np.floor(uniform(CROP, 4 * number + 3) * (w - try_w + 1)), left)
            box_h, box_w = np.where(fits, try_h, box_h), np.where(fits, try_w, box_w)
            found |= fits
        return np.stack([top, left, box_h, box_w], axis=-1).astype(np.int16)

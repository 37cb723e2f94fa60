"""Crops that another program drew, and that `store import` brought here: they are stored, and never drawn again."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offline_kd.data.manifest import EvaluationCrop, Interpolation
from offline_kd.support.counter_rng import U64
from offline_kd.support.errors import RecipeError
from offline_kd.views.augment import Operations, codes_of, operation_arrays
from offline_kd.views.erase import Erase
from offline_kd.views.kind import MOST_VIEWS, Erased, Parameters, ViewArray, ViewSpec


class ImportedCrops(ViewSpec):
    """Crops of an imported store, with the operations and erased boxes that came along. None can be drawn here."""

    kind: Literal["imported"]
    size: int = Field(224, ge=1, le=4096, description="of the student's image; the teacher may have had another")
    interpolation: Interpolation = Field("bilinear", description="how pixels are resampled")
    num_ops: int = Field(0, ge=0, le=8, description="operations of a view")
    operations: Operations = Field(None, description="that views may have")
    erase: bool = Field(False, description="whether views may have a black box")
    count: int = Field(ge=1, le=MOST_VIEWS, description="views of every image")

    @property
    def num_distinct(self) -> int:
        """As many as a store takes."""
        return MOST_VIEWS

    @property
    def num_views(self) -> int:
        """The count."""
        return self.count

    @property
    def is_drawn(self) -> bool:
        """They follow from nothing but what is stored."""
        return False

    @property
    def interpolation_used(self) -> Interpolation:
        """How crops are resampled."""
        return self.interpolation

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
        """What lies in erased boxes."""
        return "black"

    def arrays(self) -> dict[str, ViewArray]:
        """Box and flip, and what came along."""
        arrays = super().arrays()
        if self.num_ops:
            arrays |= operation_arrays(self.num_ops, codes_of(self.operations or []))
        return arrays | (Erase().arrays() if self.erase else {})

    def draw_views(self, key_hash: U64, sizes: NDArray[np.int64], view: NDArray[np.int64]) -> Parameters:
        """Raises RecipeError: only the store that they were imported into has them."""
        raise RecipeError(
            "views of kind 'imported' are in the store that they were imported into, and cannot be drawn: train with "
            "an objective that reads that store, or without it on views of another kind, such as `views: {kind: "
            "random_resized_crop, count: 1}`."
        )

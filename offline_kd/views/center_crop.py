"""The middle of an image of any size."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from offline_kd.data.manifest import EvaluationCrop, Interpolation
from offline_kd.support.counter_rng import U64
from offline_kd.views.kind import Decoding, Parameters, ViewSpec, unmirrored


class CenterCrop(ViewSpec):
    """One view without augmentation of images of any size: the short side to `resize`, the middle `size` x `size`."""

    kind: Literal["center_crop"]
    size: int = Field(224, ge=1, le=4096, description="of the student's image; the teacher may have another")
    resize: int = Field(256, ge=1, le=8192, description="of the image's short side, before the middle is cut out")
    interpolation: Interpolation = Field("bilinear", description="how pixels are resampled")
    decoding: Decoding = "full"

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
        """The student is evaluated on what it is trained on."""
        return EvaluationCrop(size=self.size, resize=self.resize, interpolation=self.interpolation)

    def draw_views(self, key_hash: U64, sizes: NDArray[np.int64], view: NDArray[np.int64]) -> Parameters:
        """The box in the middle that becomes `size` x `size` when the short side becomes `resize`."""
        height, width = sizes[:, 0], sizes[:, 1]
        side = np.maximum(np.rint(np.minimum(height, width) * min(self.size / self.resize, 1)), 1).astype(np.int64)
        return unmirrored(np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=-1))

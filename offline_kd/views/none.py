"""The image as it is."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offline_kd.support.counter_rng import U64
from offline_kd.views.kind import Parameters, ViewSpec, unmirrored


class NoAugmentation(ViewSpec):
    """The image as it is; one view."""

    kind: Literal["none"] = "none"

    def draw_views(self, key_hash: U64, sizes: NDArray[np.int64], view: NDArray[np.int64]) -> Parameters:
        """The whole image."""
        return unmirrored(np.concatenate([np.zeros_like(sizes), sizes], axis=1))

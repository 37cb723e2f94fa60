"""No logits at all: of teachers without classes, whose features are kept."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from torch import Tensor

from offline_kd.objectives.needs import Needs
from offline_kd.store.codecs.codec import Arrays, Codec, CodecArray, Floats, Tables
from offline_kd.support.errors import StoreMismatch


class NoLogits(Codec):
    """Nothing: the teacher has no classes, and gives no logits."""

    name: Literal["none"] = "none"

    def arrays(self) -> dict[str, CodecArray]:
        return {}

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        return {}

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        """Raises StoreMismatch, always."""
        raise StoreMismatch(
            "codec none: this store holds no logits, because its teacher has no classes. Take its features instead."
        )

    def error_bound(self, logits: Floats) -> Floats:
        return np.zeros_like(logits[..., :1])

    def serves(self, needs: Needs) -> str:
        return "because its teacher has no classes, so that there are no logits" if needs.logits else ""

"""Logits as they are: 4 C bytes of a row of C classes, without any error."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from offline_kd.store.codecs.codec import CLASSES, Arrays, Codec, CodecArray, Floats, Tables


class Float32(Codec):
    """Logits as they are, 4 bytes each."""

    keeps_whole: ClassVar[bool] = True
    serves_sets: ClassVar[bool] = True
    name: Literal["f32"] = "f32"

    def arrays(self) -> dict[str, CodecArray]:
        return {"values": CodecArray("<f4", np.nan, CLASSES, "raw logits")}

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        return {"values": logits}

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        return arrays["values"].float()

    def error_bound(self, logits: Floats) -> Floats:
        return np.zeros_like(logits[..., :1])

"""Half precision: 2 C bytes of a row of C classes; an error of 2**-11 of a logit's size (below 2**-14: 2**-25)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.store.codecs.codec import CLASSES, Arrays, Codec, CodecArray, Floats, Tables
from offline_kd.support.errors import TeacherError


class Float16(Codec):
    """Logits in half precision, 2 bytes each."""

    keeps_whole: ClassVar[bool] = True
    serves_sets: ClassVar[bool] = True
    name: Literal["f16"]

    def arrays(self) -> dict[str, CodecArray]:
        return {"values": CodecArray("<f2", np.nan, CLASSES, "raw logits")}

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        return {"values": as_float16(logits)}

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        return arrays["values"].float()

    def error_bound(self, logits: Floats) -> Floats:
        return float16_error(logits)

    @classmethod
    def candidates(cls, logits: Floats) -> list[Self]:
        return [cls(name="f16")]


def as_float16(values: Floats) -> NDArray[np.float16]:
    """Rounded to half precision; raises TeacherError for what is larger than that goes."""
    largest = np.abs(values).max(initial=0)
    if largest > np.finfo(np.float16).max:
        raise TeacherError(f"a logit of size {largest:g} does not fit f16, which ends at 65504. Use codec f32 or int.")
    return values.astype(np.float16)


def float16_error(logits: Floats) -> Floats:
    """`[..., 1]`: what `as_float16` may change of any of `[..., C]` logits."""
    largest = np.abs(logits).max(axis=-1, keepdims=True)
    return np.maximum(largest * np.float32(2**-11), np.float32(2**-25))

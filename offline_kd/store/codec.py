"""Logits to compact arrays and back: pure functions, each codec with its error bound.

Raw logits are kept, offset included: DTKD's temperatures need it. `encode` works on NumPy arrays on the way to disk,
`decode` on Tensors on the device of the student.

| codec | bytes per class | largest error of a logit |
|---|---|---|
| f32 | 4 | 0 |
| f16 | 2 | 2**-11 of its size (below 2**-14: 2**-25) |
| int, 8 bits | 1, and 8 per row | (max - min) / 508 of its row; the smallest and the largest logit are exact |
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from offline_kd.errors import TeacherError
from offline_kd.manifest import Strict


class Float32(Strict):
    name: Literal["f32"] = "f32"


class Float16(Strict):
    name: Literal["f16"]


class Int(Strict):
    """Integers on a line from each row's smallest to its largest logit."""

    name: Literal["int"]
    bits: Literal[8] = 8

    @property
    def levels(self) -> int:
        """Number of steps; the code 2**bits - 1 is left to mark empty rows."""
        return 2**self.bits - 2


Codec = Annotated[Float32 | Float16 | Int, Field(discriminator="name")]
AnyCodec = Float32 | Float16 | Int


@dataclass(frozen=True)
class CodecArray:
    """One array of a codec: its type, what marks an empty row, and whether it has a class axis."""

    dtype: str
    fill: float
    has_classes: bool
    description: str


def codec_arrays(codec: AnyCodec) -> dict[str, CodecArray]:
    """The arrays, below `logits/` in the store, that `encode` returns and `decode` takes."""
    match codec:
        case Float32():
            return {"values": CodecArray("<f4", np.nan, True, "raw logits")}
        case Float16():
            return {"values": CodecArray("<f2", np.nan, True, "raw logits")}
        case Int():
            return {
                "codes": CodecArray("|u1", 255, True, "logit = low + codes * step"),
                "low": CodecArray("<f4", np.nan, False, "smallest logit of the row"),
                "step": CodecArray("<f4", np.nan, False, "distance between neighbouring codes"),
            }


def encode(codec: AnyCodec, logits: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """Pack `[..., C]` finite float32 logits; raises TeacherError when a logit does not fit the codec."""
    match codec:
        case Float32():
            return {"values": logits}
        case Float16():
            largest = np.abs(logits).max(initial=0)
            if largest > np.finfo(np.float16).max:
                raise TeacherError(
                    f"a logit of size {largest:g} does not fit f16, which ends at 65504. Use codec f32 or int."
                )
            return {"values": logits.astype(np.float16)}
        case Int():
            low, high = logits.min(axis=-1), logits.max(axis=-1)
            step = ((high.astype(np.float64) - low) / codec.levels).astype(np.float32)
            scaled = (logits - low[..., None]) / np.where(step > 0, step, 1)[..., None]
            codes = np.rint(scaled).clip(0, codec.levels).astype(np.uint8)
            return {"codes": codes, "low": low, "step": step}


def decode(codec: AnyCodec, arrays: dict[str, Tensor]) -> Tensor:
    """`[..., C]` float32 logits from what `encode` made."""
    if isinstance(codec, Int):
        return torch.addcmul(arrays["low"][..., None], arrays["codes"].float(), arrays["step"][..., None])
    return arrays["values"].float()


def error_bound(codec: AnyCodec, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[...]`: the largest error that encoding and decoding may make on any logit of each row of `[..., C]`."""
    largest = np.abs(logits).max(axis=-1)
    match codec:
        case Float32():
            return np.zeros_like(largest)
        case Float16():
            return np.maximum(largest * np.float32(2**-11), np.float32(2**-25))
        case Int():
            # Half a step, and the float32 rounding of low, step and their sum.
            spread = logits.max(axis=-1) - logits.min(axis=-1)
            return (spread / (2 * codec.levels) + 2**-21 * (largest + spread)).astype(np.float32)

"""Integers between each row's extremes: C codes of b bits in bytes, 8 bytes for the line, and 4 m for the m largest.

The largest error of a logit is half a step: (max - min) of the others / (2**(b + 1) - 2), - 4 for 8 bits. The m
largest have the error of f16, and for m = 0 the largest is exact.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from offline_kd.store.codecs.codec import CLASSES, Arrays, Codec, CodecArray, Floats, Tables
from offline_kd.store.codecs.f16 import float16_error
from offline_kd.store.codecs.largest import largest, largest_arrays, put_largest, without


class Int(Codec):
    """Integers on a line from each row's smallest to its largest logit; the `exact_top` largest are kept apart.

    The codes of fewer than 8 bits are stored as bytes: zstd, which follows, packs them closer than bits would lie.
    """

    serves_sets: ClassVar[bool] = True
    name: Literal["int"]
    bits: int = Field(8, ge=3, le=8, description="of a code")
    exact_top: int = Field(0, ge=0, le=64, description="largest logits that are kept apart, as f16")

    @property
    def levels(self) -> int:
        """Number of steps. Of 8 bits, the code 255 is left to mark empty rows."""
        return 2**self.bits - (2 if self.bits == 8 else 1)

    def arrays(self) -> dict[str, CodecArray]:
        line = {
            "codes": CodecArray("|u1", 255, CLASSES, "logit = low + codes * step"),
            "low": CodecArray("<f4", np.nan, None, "smallest logit of the row"),
            "step": CodecArray("<f4", np.nan, None, "distance between neighbouring codes"),
        }
        return line | (largest_arrays(self.exact_top) if self.exact_top else {})

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        top = largest(logits, self.exact_top) if self.exact_top else {}
        others = without(logits, top["top_id"]) if top else logits
        low = logits.min(axis=-1)
        high = np.maximum(others.max(axis=-1), low)
        step = ((high.astype(np.float64) - low) / self.levels).astype(np.float32)
        scaled = (logits - low[..., None]) / np.where(step > 0, step, 1)[..., None]
        codes = np.rint(scaled).clip(0, self.levels).astype(np.uint8)
        return {"codes": codes, "low": low, "step": step} | top

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        logits = torch.addcmul(arrays["low"][..., None], arrays["codes"].float(), arrays["step"][..., None])
        return put_largest(logits, arrays) if self.exact_top else logits

    def error_bound(self, logits: Floats) -> Floats:
        # Half a step, and the float32 rounding of low, step and their sum.
        size, low, others = np.abs(logits).max(axis=-1, keepdims=True), logits.min(axis=-1, keepdims=True), logits
        if self.exact_top:
            others = without(logits, largest(logits, self.exact_top)["top_id"])
        spread = np.maximum(others.max(axis=-1, keepdims=True), low) - low
        bound: Floats = (spread / (2 * self.levels) + 2**-21 * (size + spread)).astype(np.float32)
        return np.maximum(bound, float16_error(logits)) if self.exact_top else bound

    def legal_range(self, array: str) -> tuple[int, int] | None:
        return (0, self.levels) if array == "codes" else None

    def label(self) -> str:
        return f"int {self.bits}" + (f" + top {self.exact_top}" if self.exact_top else "")

    @classmethod
    def candidates(cls, logits: Floats) -> list[Self]:
        """Every width, with and without the largest logits apart."""
        tops = [top for top in (0, 8) if top < logits.shape[-1]]
        return [cls(name="int", bits=bits, exact_top=top) for top in tops for bits in range(8, 2, -1)]

"""The k largest logits and the mass of all others: 4 k + 12 bytes of a row, for plain KD and many classes.

The k largest have the error of f16; the others share what is left evenly, so that theirs has no bound.
"""

from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
from pydantic import Field
from torch import Tensor

from offline_kd.objectives.needs import Needs
from offline_kd.store.codecs.codec import Arrays, Codec, CodecArray, Comparison, Floats, Tables
from offline_kd.store.codecs.f16 import float16_error
from offline_kd.store.codecs.largest import largest, largest_arrays, put_largest, without
from offline_kd.support.errors import TeacherError

TAIL_TEMPERATURES = (1, 2, 4)


class TopK(Codec):
    """The `k` largest logits, and what is left in all others at T = 1, 2 and 4. For plain KD and many classes.

    Decoding shares what is left evenly, so that the row has the teacher's mass outside the top at `tail_temperature`.
    """

    name: Literal["topk"]
    k: int = Field(16, ge=1, le=1024, description="largest logits that are kept; fewer than classes")
    tail_temperature: Literal[1, 2, 4] = Field(1, description="at which the mass of all others is right")

    def arrays(self) -> dict[str, CodecArray]:
        rest = "log of the sum of exp(logit / T) over all other classes, for T = 1, 2, 4"
        temperatures = ("temperature", len(TAIL_TEMPERATURES))
        return largest_arrays(self.k) | {"rest": CodecArray("<f4", np.nan, temperatures, rest)}

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        if logits.shape[-1] <= self.k:
            raise TeacherError(f"codec topk keeps {self.k} of {logits.shape[-1]} classes: use int instead.")
        top = largest(logits, self.k)
        others = without(logits, top["top_id"]).astype(np.float64)
        most = others.max(axis=-1, keepdims=True)
        rest = [most[..., 0] / t + np.log(np.exp((others - most) / t).sum(axis=-1)) for t in TAIL_TEMPERATURES]
        return top | {"rest": np.stack(rest, axis=-1).astype(np.float32)}

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        t = self.tail_temperature
        rest = arrays["rest"][..., TAIL_TEMPERATURES.index(t)]
        each = t * (rest - float(np.log(num_classes - self.k)))
        return put_largest(each[..., None].expand(*each.shape, num_classes).clone(), arrays)

    def error_bound(self, logits: Floats) -> Floats:
        """Infinite outside the k largest."""
        bound = np.full_like(logits, np.inf)
        ids = largest(logits, self.k)["top_id"].astype(np.int64)
        np.put_along_axis(bound, ids, np.broadcast_to(float16_error(logits), ids.shape), axis=-1)
        return bound

    def compare(
        self, stored: Tensor, again: Tensor, unpacked: Mapping[str, Tensor], tables: Tables, dtype: str
    ) -> Comparison:
        """Near ties, another class may be among the k largest: there, and only there, the value is what is compared."""
        z_top, t_top = (part.topk(self.k, dim=1).values for part in (stored, again))
        allowed = super().compare(stored, again, unpacked, tables, dtype).allowed.amax(dim=1, keepdim=True)
        errors = (z_top - t_top).abs()
        return Comparison(errors, allowed.expand_as(z_top), errors)

    def serves(self, needs: Needs) -> str:
        """Only KD, and TTM, near the tail's temperature.

        WTTM's weight, DTKD's pair of temperatures and the relations of DIST, DKD and NKD need the classes outside the
        top.
        """
        if not needs.logits:
            return ""
        temperature = needs.tail_temperature
        if temperature is None:
            return "which it cannot have of the largest logits alone"
        if not self.tail_temperature / 2 <= temperature <= 2 * self.tail_temperature:
            return f"at T = {temperature:g}; its tail is right at T = {self.tail_temperature}"
        return ""

    def label(self) -> str:
        return f"topk {self.k}" + ("" if self.tail_temperature == 1 else f" at T = {self.tail_temperature}")

    @classmethod
    def candidates(cls, logits: Floats) -> list[Self]:
        return [cls(name="topk", k=k) for k in (5, 10, 16, 50, 100) if k < logits.shape[-1]]

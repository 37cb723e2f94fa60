"""No logits are kept: they are computed from the store's features of what comes into the teacher's last layer.

The layer is stored once, as tables: logits = weight f + bias, for the decoded features f `[D]` of a view. A store of
features then serves objectives on logits as well, at D numbers a view in place of C, or at a few bytes of templates.

The same features give the same bits in any batch and on any device: f and every row of `weight` are rounded to whole
numbers of powers of two, with so many bits (23 for 64 features, 20 for 4,096) that no sum of products reaches beyond
2**53, up to where float64 is exact in any order of summation. What is rounded off is about what float32 would.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from offline_kd.store.codecs.codec import ARITHMETIC, Arrays, Codec, CodecArray, Comparison, Floats, Tables

EXACT_BITS = 53  # of a whole number in float64
EXPONENT = 0x7F800000  # the bits of a float32 that are left of the power of two below it


class LastLayer(Codec):
    """Logits by the teacher's last layer, which is stored once, of features that the store has: see `last_layer.py`.

    It loses what the code of the features loses.
    """

    serves_sets: ClassVar[bool] = True
    name: Literal["last_layer"]
    features: str = Field(
        min_length=1, description="name in capture.features of what comes into the last layer (`at: input` of it)"
    )

    @property
    def of_features(self) -> str:
        return self.features

    @property
    def has_tables(self) -> bool:
        return True

    def tables(self, num_classes: int, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": ("<f4", (num_classes, channels)), "bias": ("<f4", (num_classes,))}

    def problem_of(self, tables: Tables) -> str:
        return "" if all(np.isfinite(table.astype(np.float32)).all() for table in tables.values()) else "no numbers"

    def arrays(self) -> dict[str, CodecArray]:
        return {}

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        return {}

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        """`[..., C]` float32 logits.

        Args:
            arrays: `features` `[..., D]` float32, decoded.
        """
        features = arrays["features"]
        whole, unit = _whole(features, _bits(features.shape[-1]))
        sums = whole @ tables["whole"].T
        return (sums * (unit * tables["unit"]) + tables["bias"]).float()

    def decoding_tables(self, tables: Tables) -> dict[str, Tensor]:
        """`whole` `[C, D]`, `unit` `[C]` and `bias` `[C]` in float64: row c of the weights is `whole[c] * unit[c]`."""
        weight, bias = (torch.from_numpy(tables[name].astype(np.float32)) for name in ("weight", "bias"))
        whole, unit = _whole(weight, _bits(weight.shape[1]))
        return {"whole": whole, "unit": unit[:, 0], "bias": bias.double()}

    def error_bound(self, logits: Floats) -> Floats:
        """Infinite everywhere: what the code of the features loses is measured."""
        return np.full_like(logits[..., :1], np.inf)

    def compare(
        self, stored: Tensor, again: Tensor, unpacked: Mapping[str, Tensor], tables: Tables, dtype: str
    ) -> Comparison:
        """The stored layer, of the teacher's features now, must give its logits now, as far as arithmetic goes; and
        stored logits differ by no more than that and what the layer makes of the features' error, by the inequality of
        Cauchy and Schwarz. That this error is the code's is compared where features are.
        """
        layer = self.decoding_tables(tables)
        of_live = self.decode({"features": unpacked["live"]}, again.shape[1], layer)
        arithmetic = torch.full_like(again, ARITHMETIC[dtype] * max(1.0, again.abs().max().item()))
        lengths = torch.from_numpy(tables["weight"].astype(np.float32)).norm(dim=1)
        reach = (unpacked["features"] - unpacked["live"]).norm(dim=1, keepdim=True) * lengths
        errors = (stored - again).abs()
        both = torch.cat([(of_live - again).abs(), errors], dim=1)
        return Comparison(both, torch.cat([arithmetic, arithmetic + reach], dim=1), errors)

    def label(self) -> str:
        return f"last_layer of {self.features}"


def _bits(channels: int) -> int:
    """How large whole numbers may be so that sums of so many products stay exact."""
    return (EXACT_BITS - (channels - 1).bit_length()) // 2


def _whole(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers `[..., D]` of at most 2**bits, and `[..., 1]` the power of two that each row of them counts, which
    make finite float32 `values` but for rounding; both in float64.
    """
    largest = values.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    unit = (largest.view(torch.int32) & EXPONENT).view(torch.float32).double() * 2.0 ** (1 - bits)
    return (values.double() / unit).round(), unit

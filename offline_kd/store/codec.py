"""Logits to compact arrays and back: pure functions, each codec with its error bound.

Raw logits are kept, offset included: DTKD's temperatures need it. `encode` works on NumPy arrays on the way to disk,
`decode` on Tensors on the device of the student; both are vectorised over rows.

| codec | bytes of a row of C classes, before entropy coding | largest error of a logit |
|---|---|---|
| f32 | 4 C | 0 |
| f16 | 2 C | 2**-11 of its size (below 2**-14: 2**-25) |
| int, b bits, the m largest apart | C codes of b bits in bytes, 8, and 4 m | half a step: (max - min) of the others
  / (2**(b + 1) - 2), - 4 for 8 bits; the m largest have the error of f16, and for m = 0 the largest is exact |
| klt | a tenth of 2 C, or less: see `klt.py`; needs tables | not bounded, measured |
| topk | 4 k + 12 | the k largest: that of f16; the others share what is left evenly, so not bounded |
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from offline_kd.store import klt
from offline_kd.store.klt import Tables
from offline_kd.support.errors import TeacherError
from offline_kd.support.strict import Strict

MAX_IDS = 2**16 - 1  # class ids are uint16, the last one marks empty rows


class Float32(Strict):
    name: Literal["f32"] = "f32"


class Float16(Strict):
    name: Literal["f16"]


class Int(Strict):
    """Integers on a line from each row's smallest to its largest logit; the `exact_top` largest are kept apart.

    The codes of fewer than 8 bits are stored as bytes: zstd, which follows, packs them closer than bits would lie.
    """

    name: Literal["int"]
    bits: int = Field(8, ge=3, le=8)
    exact_top: int = Field(0, ge=0, le=64)

    @property
    def levels(self) -> int:
        """Number of steps. Of 8 bits, the code 255 is left to mark empty rows."""
        return 2**self.bits - (2 if self.bits == 8 else 1)


class TopK(Strict):
    """The `k` largest logits, and what is left in all others at T = 1, 2 and 4. For plain KD and many classes.

    Decoding shares what is left evenly, so that the row has the teacher's mass outside the top at `tail_temperature`.
    """

    name: Literal["topk"]
    k: int = Field(16, ge=1, le=1024)
    tail_temperature: Literal[1, 2, 4] = 1


class Klt(Strict):
    """Principal axes of the teacher's logits, rounded to steps, and the likeliest classes made finer: see `klt.py`.

    The axes are learned from the teacher's answers when a store is begun. Smaller steps are better and longer.
    """

    name: Literal["klt"]
    step: float = Field(1.5, gt=0, le=100)
    refine: int = Field(64, ge=1, le=256, description="classes, the likeliest first, that are made finer")
    refine_step: float = Field(1 / 32, gt=0, le=10, description="of the likeliest class; it grows with the rank")
    axes: int = Field(1024, ge=1, le=2048, description="at most; there are no more than classes")
    fit_rows: int = Field(16384, ge=16, description="views that the axes are learned from")
    row_bytes: int = Field(1024, ge=64, le=8192, description="most that a row may take; zeros behind it cost nothing")


Codec = Annotated[Float32 | Float16 | Int | TopK | Klt, Field(discriminator="name")]
AnyCodec = Float32 | Float16 | Int | TopK | Klt
CODEC_TABLES = "codec"  # under which a store keeps the tables of a codec
TAIL_TEMPERATURES = (1, 2, 4)


@dataclass(frozen=True)
class CodecArray:
    """One array of a codec: its type, what marks an empty row, and its axis behind row and view, if it has one."""

    dtype: str
    fill: float
    axis: tuple[str, int | None] | None  # name and size; None for as many as classes
    description: str


CLASSES: tuple[str, None] = ("class", None)


def codec_arrays(codec: AnyCodec) -> dict[str, CodecArray]:
    """The arrays, below `logits/` in the store, that `encode` returns and `decode` takes."""
    match codec:
        case Float32():
            return {"values": CodecArray("<f4", np.nan, CLASSES, "raw logits")}
        case Float16():
            return {"values": CodecArray("<f2", np.nan, CLASSES, "raw logits")}
        case Int():
            what = "smallest logit of the row"
            arrays = {
                "codes": CodecArray("|u1", 255, CLASSES, "logit = low + codes * step"),
                "low": CodecArray("<f4", np.nan, None, what),
                "step": CodecArray("<f4", np.nan, None, "distance between neighbouring codes"),
            }
            return arrays | (_top_arrays(codec.exact_top) if codec.exact_top else {})
        case TopK():
            rest = "log of the sum of exp(logit / T) over all other classes, for T = 1, 2, 4"
            return _top_arrays(codec.k) | {
                "rest": CodecArray("<f4", np.nan, ("temperature", len(TAIL_TEMPERATURES)), rest)
            }
        case Klt():
            what = "rANS code of the row: offline_kd/store/klt.py"
            return {"code": CodecArray("|u1", 0, ("byte", codec.row_bytes), what)}


def codec_tables(codec: AnyCodec, num_classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of what a codec needs beside its arrays, learned from logits by `fit_codec`."""
    if not isinstance(codec, Klt):
        return {}
    axes, refine = min(codec.axes, num_classes), _refined(codec, num_classes)
    return {
        "axes": ("<i2", (axes, num_classes)),
        "mean": ("<i4", (num_classes,)),
        "frequency": ("<u2", (axes, 2 * klt.MOST + 1)),
        "refine_frequency": ("<u2", (refine, 2 * klt.MOST + 1)),
    }


def _refined(codec: Klt, num_classes: int) -> int:
    return min(codec.refine, num_classes)


def fit_codec(codec: AnyCodec, logits: NDArray[np.float32]) -> Tables:
    """The tables of a codec from `[n, C]` logits of the teacher; raises TeacherError when they are too few."""
    if not isinstance(codec, Klt):
        return {}
    if len(logits) < 16:
        raise TeacherError(f"codec klt learns its axes from 16 rows at least, there are {len(logits)}.")
    return klt.fit_klt(
        logits,
        step=codec.step,
        num_axes=min(codec.axes, logits.shape[1]),
        refine=_refined(codec, logits.shape[1]),
        refine_step=codec.refine_step,
    )


def _top_arrays(count: int) -> dict[str, CodecArray]:
    return {
        "top_id": CodecArray("<u2", MAX_IDS, ("rank", count), "classes of the largest logits, largest first"),
        "top_value": CodecArray("<f2", np.nan, ("rank", count), "their logits"),
    }


def encode(
    codec: AnyCodec, logits: NDArray[np.float32], tables: Tables | None = None
) -> dict[str, NDArray[np.generic]]:
    """Pack `[..., C]` finite float32 logits, with the codec's tables if it has any.

    Raises TeacherError when a logit does not fit the codec.
    """
    match codec:
        case Float32():
            return {"values": logits}
        case Float16():
            return {"values": _as_float16(logits)}
        case Int():
            top = _top(logits, codec.exact_top) if codec.exact_top else {}
            others = _without(logits, top["top_id"], -np.inf) if top else logits
            low = logits.min(axis=-1)
            high = np.maximum(others.max(axis=-1), low)
            step = ((high.astype(np.float64) - low) / codec.levels).astype(np.float32)
            scaled = (logits - low[..., None]) / np.where(step > 0, step, 1)[..., None]
            codes = np.rint(scaled).clip(0, codec.levels).astype(np.uint8)
            return {"codes": codes, "low": low, "step": step} | top
        case TopK():
            if logits.shape[-1] <= codec.k:
                raise TeacherError(f"codec topk keeps {codec.k} of {logits.shape[-1]} classes: use int instead.")
            top = _top(logits, codec.k)
            others = _without(logits, top["top_id"], -np.inf).astype(np.float64)
            largest = others.max(axis=-1, keepdims=True)
            rest = [
                largest[..., 0] / t + np.log(np.exp((others - largest) / t).sum(axis=-1)) for t in TAIL_TEMPERATURES
            ]
            return top | {"rest": np.stack(rest, axis=-1).astype(np.float32)}
        case Klt():
            assert tables is not None
            rows = np.ascontiguousarray(logits.reshape(-1, logits.shape[-1]))
            code = klt.encode_klt(
                rows,
                tables,
                step=codec.step,
                refine=_refined(codec, rows.shape[1]),
                refine_step=codec.refine_step,
                row_bytes=codec.row_bytes,
            )
            return {"code": code.reshape(*logits.shape[:-1], -1)}


def _as_float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    largest = np.abs(values).max(initial=0)
    if largest > np.finfo(np.float16).max:
        raise TeacherError(f"a logit of size {largest:g} does not fit f16, which ends at 65504. Use codec f32 or int.")
    return values.astype(np.float16)


def _top(logits: NDArray[np.float32], count: int) -> dict[str, NDArray[np.generic]]:
    """Ids and values of the `count` largest logits of every row, largest first; ties in the order of the ids."""
    classes = logits.shape[-1]
    if not count < classes <= MAX_IDS:
        raise TeacherError(f"the {count} largest of {classes} logits cannot be kept apart: use another codec.")
    ids = np.sort(np.argpartition(-logits, count - 1, axis=-1)[..., :count], axis=-1)
    values = np.take_along_axis(logits, ids, axis=-1)
    order = np.argsort(-values, axis=-1, kind="stable")
    return {
        "top_id": np.take_along_axis(ids, order, axis=-1).astype(np.uint16),
        "top_value": _as_float16(np.take_along_axis(values, order, axis=-1)),
    }


def _without(logits: NDArray[np.float32], ids: NDArray[np.generic], instead: float) -> NDArray[np.float32]:
    others = logits.copy()
    np.put_along_axis(others, ids.astype(np.int64), instead, axis=-1)
    return others


def unpack(
    codec: AnyCodec, arrays: dict[str, NDArray[np.generic]], tables: Tables | None
) -> dict[str, NDArray[np.generic]]:
    """What `decode` takes, of what `encode` made and a store kept: the part that is done on the CPU, in workers."""
    if not isinstance(codec, Klt):
        return arrays
    assert tables is not None
    code = arrays["code"]
    q, differences = klt.Coder.of(tables).decode(code.reshape(-1, code.shape[-1]).astype(np.uint8, copy=False))
    return {"q": q.reshape(*code.shape[:-1], -1), "differences": differences.reshape(*code.shape[:-1], -1)}


def unpacked_arrays(codec: AnyCodec) -> list[str]:
    """The names of what `unpack` returns."""
    return ["q", "differences"] if isinstance(codec, Klt) else list(codec_arrays(codec))


def decode(
    codec: AnyCodec, arrays: dict[str, Tensor], num_classes: int, tables: dict[str, Tensor] | None = None
) -> Tensor:
    """`[..., C]` float32 logits, on the device of `arrays`, which `unpack` made.

    Args:
        tables: of the codec, on the same device.
    """
    match codec:
        case Float32() | Float16():
            return arrays["values"].float()
        case Int():
            logits = torch.addcmul(arrays["low"][..., None], arrays["codes"].float(), arrays["step"][..., None])
            if not codec.exact_top:
                return logits
        case TopK():
            t = codec.tail_temperature
            rest = arrays["rest"][..., TAIL_TEMPERATURES.index(t)]
            each = t * (rest - float(np.log(num_classes - codec.k)))
            logits = each[..., None].expand(*each.shape, num_classes).clone()
        case Klt():
            assert tables is not None
            q, differences = arrays["q"], arrays["differences"]
            rows = klt.decode_klt(
                q.reshape(-1, q.shape[-1]),
                differences.reshape(-1, differences.shape[-1]),
                tables,
                step=codec.step,
                refine=_refined(codec, num_classes),
                refine_step=codec.refine_step,
            )
            return rows.view(*q.shape[:-1], num_classes)
    return logits.scatter_(-1, arrays["top_id"].long(), arrays["top_value"].float())


def decode_stored(
    codec: AnyCodec, arrays: dict[str, NDArray[np.generic]], tables: Tables | None, num_classes: int
) -> Tensor:
    """`[..., C]` from what `encode` made, all on the CPU: for those who are in no hurry."""

    def tensors(some: dict[str, NDArray[np.generic]]) -> dict[str, Tensor]:
        # Torch knows uint16 but can do little with it.
        return {
            n: torch.from_numpy(np.array(a.astype(np.int32) if a.dtype == np.uint16 else a)) for n, a in some.items()
        }

    return decode(codec, tensors(unpack(codec, arrays, tables)), num_classes, tensors(tables or {}))


def error_bound(codec: AnyCodec, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[..., C]` or `[..., 1]`: the largest error that encoding and decoding may make on each logit of `[..., C]`.

    Infinite where there is no bound: outside the k largest of TopK, and for Klt.
    """
    largest = np.abs(logits).max(axis=-1, keepdims=True)
    as_float16 = np.maximum(largest * np.float32(2**-11), np.float32(2**-25))
    match codec:
        case Float32():
            return np.zeros_like(largest)
        case Float16():
            return as_float16
        case Int():
            # Half a step, and the float32 rounding of low, step and their sum.
            low, others = logits.min(axis=-1, keepdims=True), logits
            if codec.exact_top:
                others = _without(logits, _top(logits, codec.exact_top)["top_id"], -np.inf)
            spread = np.maximum(others.max(axis=-1, keepdims=True), low) - low
            bound = (spread / (2 * codec.levels) + 2**-21 * (largest + spread)).astype(np.float32)
            return np.maximum(bound, as_float16) if codec.exact_top else bound
        case TopK():
            bound = np.full_like(logits, np.inf)
            ids = _top(logits, codec.k)["top_id"].astype(np.int64)
            np.put_along_axis(bound, ids, np.broadcast_to(as_float16, ids.shape), axis=-1)
            return bound
        case Klt():
            return np.full_like(largest, np.inf)

"""Transform coding of logits: principal axes of one teacher's logits, whole numbers, and an entropy coder.

A row z `[C]` becomes q = round(axes (z - mean) / step), whole numbers of which most are 0; what the axes make of q is
z within about a third of a step. For the `refine` classes that are then the likeliest, the difference from z is kept
as well, in steps that are finest for the first. All these numbers go through one entropy coder (`rans.py`) whose
frequencies, one table an axis and a rank, were counted on the logits that the axes come from.

Which classes are the likeliest must not depend on how a machine rounds sums: axes and mean are whole numbers of
1/SCALE, and all sums stay below 2**24, so that float32 is exact in any order of summation, on any device.
"""

from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from offline_kd.store.codecs.codec import Arrays, Codec, CodecArray, Comparison, Floats, Tables
from offline_kd.store.codecs.rans import Coder, frequencies
from offline_kd.support.constants import constant
from offline_kd.support.errors import TeacherError

FEWEST_CLASSES = 64  # with fewer it gains nothing
FEWEST_ROWS = 16
SCALE = 2**11  # axes are stored in 1/SCALE: exact in TF32, too
MOST = 1023  # |q|, and |difference| in its steps
MOST_NORM = 6000.0  # |q| of a row, so that sums stay below 2**24
DEADZONE = 0.1  # |q| is rounded up from .6: shorter, and the error that matters is refined
GROWTH, COARSEST = 0.7, 0.5  # the r-th rank's step is refine_step * r**GROWTH, at most COARSEST


class Klt(Codec):
    """Principal axes of the teacher's logits, rounded to steps, and the likeliest classes made finer: see `klt.py`.

    The axes are learned from the teacher's answers when a store is begun. Smaller steps are better and longer.
    """

    name: Literal["klt"]
    step: float = Field(1.5, gt=0, le=100, description="that coordinates on the axes are rounded to")
    refine: int = Field(64, ge=1, le=256, description="classes, the likeliest first, that are made finer")
    refine_step: float = Field(1 / 32, gt=0, le=10, description="of the likeliest class; it grows with the rank")
    axes: int = Field(1024, ge=1, le=2048, description="at most; there are no more than classes")
    fit_rows: int = Field(16384, ge=16, description="views that the axes are learned from")
    row_bytes: int = Field(1024, ge=64, le=8192, description="most that a row may take; zeros behind it cost nothing")

    def arrays(self) -> dict[str, CodecArray]:
        # The path is that of the first stores, which new ones equal to the byte.
        what = "rANS code of the row: offline_kd/store/klt.py"
        return {"code": CodecArray("|u1", 0, ("byte", self.row_bytes), what)}

    @property
    def learns_from(self) -> int:
        return self.fit_rows

    def tables(self, num_classes: int, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        axes, refine = min(self.axes, num_classes), min(self.refine, num_classes)
        return {
            "axes": ("<i2", (axes, num_classes)),
            "mean": ("<i4", (num_classes,)),
            "frequency": ("<u2", (axes, 2 * MOST + 1)),
            "refine_frequency": ("<u2", (refine, 2 * MOST + 1)),
        }

    def fit(self, logits: Floats) -> dict[str, NDArray[np.generic]]:
        """Axes and frequencies from `[..., C]` logits of one teacher.

        Returns:
            `axes` `[k, C]` int16 and `mean` `[C]` int32 in 1/SCALE (the mean: of a step); `frequency`
            `[k, 2 MOST + 1]` and `refine_frequency` `[m, 2 MOST + 1]` uint16, of rans.TOTAL, 0 for what is never
            written.
        """
        logits = logits.reshape(-1, logits.shape[-1])
        if len(logits) < FEWEST_ROWS:
            raise TeacherError(f"codec klt learns its axes from 16 rows at least, there are {len(logits)}.")
        tables = fit_axes(logits, step=self.step, num_axes=min(self.axes, logits.shape[1]))
        q, centre = _transform(logits, tables, self.step)
        differences = _differences(logits, q, centre, tables, self.step, self._steps(logits.shape[1]))
        return tables | {
            "frequency": frequencies(q, MOST),
            "refine_frequency": frequencies(differences, MOST),
        }

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        """A row that does not fit into `row_bytes` loses its finest axes."""
        rows = np.ascontiguousarray(logits.reshape(-1, logits.shape[-1]))
        code = _encode(rows, tables, step=self.step, steps=self._steps(rows.shape[1]), row_bytes=self.row_bytes)
        return {"code": code.reshape(*logits.shape[:-1], -1)}

    def unpack(self, arrays: Arrays, tables: Tables) -> Arrays:
        code = arrays["code"]
        values = _coder(tables).decode(code.reshape(-1, code.shape[-1]).astype(np.uint8, copy=False))
        q, differences = np.split(values, [len(tables["frequency"])], axis=1)
        return {
            "q": np.ascontiguousarray(q).reshape(*code.shape[:-1], -1),
            "differences": np.ascontiguousarray(differences).reshape(*code.shape[:-1], -1),
        }

    def unpacked_arrays(self) -> list[str]:
        return ["q", "differences"]

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        shape = arrays["q"].shape[:-1]
        q, differences = (arrays[name].reshape(-1, arrays[name].shape[-1]) for name in ("q", "differences"))
        whole = whole_logits(q, tables["axes"].float(), tables["mean"].float())
        steps = constant(tuple(self._steps(num_classes).tolist()), whole)
        finer = (whole * (self.step / SCALE)).scatter_add_(1, ranked(whole, len(steps)), differences.float() * steps)
        return finer.view(*shape, num_classes)

    def decoding_tables(self, tables: Tables) -> dict[str, Tensor]:
        return axes_and_mean(tables)

    def error_bound(self, logits: Floats) -> Floats:
        """Infinite everywhere: what it loses is measured."""
        return np.full_like(logits[..., :1], np.inf)

    def compare(
        self, stored: Tensor, again: Tensor, unpacked: Mapping[str, Tensor], tables: Tables, dtype: str
    ) -> Comparison:
        """What coding the teacher's answer now would give must be what is stored, up to a few coordinates that
        rounding pushed over an edge.
        """
        num_classes = again.shape[1]
        as_now = self.decode_stored(self.encode(again.numpy(), tables), tables, num_classes)
        differences = (stored - as_now).norm(dim=1)
        allowed = torch.full_like(differences, self.step * (3 + (0.05 * num_classes) ** 0.5))
        if dtype != "float32":
            allowed = 2 * allowed
        return Comparison(differences, allowed, (stored - again).abs())

    def label(self) -> str:
        default = self.model_fields_set <= {"name", "step"}
        return f"klt {self.step:g}" + ("" if default else f", {self.refine} by {self.refine_step:.3g}")

    @classmethod
    def candidates(cls, logits: Floats) -> list[Self]:
        """Five steps, by the spread of the logits; nothing for a few classes, where it gains nothing."""
        if logits.shape[-1] < FEWEST_CLASSES:
            return []
        return [cls(name="klt", step=step_of(logits, factor)) for factor in (0.5, 1, 1.5, 2, 3)]

    def _steps(self, num_classes: int) -> Floats:
        """`[min(refine, C)]` by rank."""
        ranks = np.arange(1, min(self.refine, num_classes) + 1, dtype=np.float64)
        steps: Floats = np.minimum(self.refine_step * ranks**GROWTH, max(COARSEST, self.refine_step)).astype(np.float32)
        return steps


# ---- learning ------------------------------------------------------------------------------------------------------


def step_of(logits: Floats, factor: float) -> float:
    """A step of so many times the standard deviation of the logits, as far as a step may be that."""
    return float(f"{min(max(factor * float(logits.std()), 1e-3), 100.0):.2g}")


def fit_axes(logits: Floats, *, step: float, num_axes: int) -> dict[str, NDArray[np.generic]]:
    """`axes` `[num_axes, C]` int16 and `mean` `[C]` int32, see `Klt.fit`, of `[n, C]` logits of one teacher.

    Raises TeacherError for logits that are not finite.
    """
    rows, classes = logits.shape
    if not np.isfinite(logits).all():
        bad = np.count_nonzero(~np.isfinite(logits).all(axis=1))
        raise TeacherError(
            f"a codec learns from logits that are not finite: {bad} of {rows} views have some. Nothing was stored. "
            "Check the teacher's weights, and its dtype if it is not float32."
        )
    mean = np.rint(logits.mean(axis=0, dtype=np.float64) / step * SCALE).clip(-(2**22), 2**22).astype(np.int32)
    centred = torch.from_numpy(logits - (mean * (step / SCALE)).astype(np.float32))
    if classes <= 4096:
        covariance = (centred.T @ centred).double() / rows
        axes = torch.linalg.eigh(covariance)[1].flip(1)[:, :num_axes].T
    else:  # more classes than a covariance is worth: the largest axes by random projections
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            axes = torch.svd_lowrank(centred, q=min(num_axes, rows), niter=3)[2].T
        # What so few rows do not tell of stays 0, which takes next to nothing.
        axes = torch.nn.functional.pad(axes, (0, 0, 0, num_axes - len(axes)))
    # The sign of an axis says nothing; fixed, for stores that are equal.
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return {"axes": torch.round(axes * SCALE).to(torch.int16).contiguous().numpy(), "mean": mean}


# ---- numbers -------------------------------------------------------------------------------------------------------


def _transform(logits: Floats, tables: Tables, step: float) -> tuple[NDArray[np.int16], Floats]:
    """q `[n, k]`, and `[n, C]` what it means, in steps/SCALE, as exact whole numbers in float32."""
    axes = torch.from_numpy(tables["axes"].astype(np.float32))
    centred = torch.from_numpy(logits / np.float32(step) - tables["mean"].astype(np.float32) / SCALE)
    coordinates = (centred @ axes.T / SCALE).numpy()
    size = np.floor(np.abs(coordinates) + (0.5 - DEADZONE)).clip(0, MOST)
    q = np.copysign(size, coordinates).astype(np.int16)
    if "frequency" in tables:
        reach = (tables["frequency"].astype(np.int64) > 0).sum(axis=1) // 2
        q = q.clip(-reach, reach).astype(np.int16)
    norm = np.linalg.norm(q.astype(np.float32), axis=1, keepdims=True)
    if (norm > MOST_NORM).any():
        q = np.where(norm > MOST_NORM, np.trunc(q * (MOST_NORM / norm.clip(min=1))), q).astype(np.int16)
    return q, whole_logits(torch.from_numpy(q), axes, torch.from_numpy(tables["mean"].astype(np.float32))).numpy()


def axes_and_mean(tables: Tables) -> dict[str, Tensor]:
    """`axes` `[k, C]` and `mean` `[C]` float32, in which they are multiplied: converted once, not for every batch."""
    return {name: torch.from_numpy(tables[name].astype(np.float32)) for name in ("axes", "mean")}


def whole_logits(q: Tensor, axes: Tensor, mean: Tensor) -> Tensor:
    """`[n, C]` in steps/SCALE: exact, since |q| <= MOST_NORM and axes of length 1 keep every sum below 2**24."""
    return torch.addmm(mean, q.float(), axes)


def ranked(whole: Tensor, count: int) -> Tensor:
    """`[n, count]` the classes with the largest of whole numbers `[n, C]`; of equal ones the first comes first."""
    classes = whole.shape[1]
    unique = whole.long() * classes + torch.arange(classes - 1, -1, -1, device=whole.device)
    return unique.topk(count, dim=1).indices


def _differences(
    logits: Floats, q: NDArray[np.int16], centre: Floats, tables: Tables, step: float, steps: Floats
) -> NDArray[np.int16]:
    """`[n, m]` what is missing of the classes that q makes the likeliest, in `steps`."""
    chosen = ranked(torch.from_numpy(centre), len(steps)).numpy()
    missing = np.take_along_axis(logits - centre * np.float32(step / SCALE), chosen, axis=1)
    differences = np.rint(missing / steps).clip(-MOST, MOST).astype(np.int16)
    if "refine_frequency" in tables:
        reach = (tables["refine_frequency"].astype(np.int64) > 0).sum(axis=1) // 2
        differences = differences.clip(-reach, reach).astype(np.int16)
    return differences


def _coder(tables: Tables) -> Coder:
    return Coder.of(np.concatenate([tables["frequency"], tables["refine_frequency"]]).astype(np.uint16, copy=False))


def _encode(logits: Floats, tables: Tables, *, step: float, steps: Floats, row_bytes: int) -> NDArray[np.uint8]:
    """`[n, row_bytes]`: the code of every row of `[n, C]` logits, zeros behind it."""
    q, centre = _transform(logits, tables, step)
    coder = _coder(tables)
    values = np.concatenate([q, _differences(logits, q, centre, tables, step, steps)], axis=1)
    codes, too_long = coder.encode(values, row_bytes)
    axes, mean = (torch.from_numpy(tables[name].astype(np.float32)) for name in ("axes", "mean"))
    kept = q.shape[1]
    while len(too_long):
        kept //= 2
        q[too_long, kept:] = 0
        some = q[too_long]
        centre = whole_logits(torch.from_numpy(some), axes, mean).numpy()
        differences = _differences(logits[too_long], some, centre, tables, step, steps)
        codes[too_long], still = coder.encode(np.concatenate([some, differences], axis=1), row_bytes)
        too_long = too_long[still] if kept else still[:0]
    return codes

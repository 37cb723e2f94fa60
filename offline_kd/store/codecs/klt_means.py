"""Transform coding with image means: as `klt`, and views of one image predict each other.

Of each image the mean over the views of its first view group is coded once, finely, on the axes; every view, of later
groups too, is coded as what it adds to that, in coarser steps. On an axis with numbers p of the mean and q of a view

    t = finer q + p        p = round(share mean_v(x) finer / step),  q = round((x - p step / finer) / step)

is what the view has there, in whole units of step / finer, and share is how much of the mean a view can expect. A view
that says what the others say is nothing but zeros, and what a coarse step cuts away in every view, the mean still has.

The classes that t makes the likeliest are then made finer, in steps that grow with how far below the first one a class
lies: its share of the softmax is what an error there costs. A row says by one of LEVELS numbers how many these are.

What must be the same on every machine is exact: logits are rounded to parts of a unit, axes are whole numbers of
1/SCALE, and all sums stay below 2**24 where they are float32.
"""

from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from offline_kd.store.codecs.codec import ARITHMETIC, Arrays, Codec, CodecArray, Comparison, Floats, Tables
from offline_kd.store.codecs.klt import (
    FEWEST_CLASSES,
    FEWEST_ROWS,
    MOST_NORM,
    SCALE,
    axes_and_mean,
    fit_axes,
    step_of,
    whole_logits,
)
from offline_kd.store.codecs.likeliest import likeliest
from offline_kd.store.codecs.rans import TOTAL, frequencies
from offline_kd.store.codecs.row_coder import Coders, coders_of
from offline_kd.store.codecs.row_coder import decode as decode_rows
from offline_kd.store.codecs.row_coder import encode as encode_rows
from offline_kd.store.codecs.whole import refined, whole_of_views
from offline_kd.support.errors import TeacherError

MOST = 511  # |p|, |q| and |difference|
PARTS = 2**7  # of a unit that logits are rounded to, at least where they are not large
DEADZONE = 0.05  # sizes are rounded up from .55: shorter, and the error that matters is made finer
GROWTH, LOG_GROWTH = 1.25, 0.22314355131420976  # a step of what is made finer is so many times the one before
LEVELS = 8
RARE = 500
# Candidates, the steps in standard deviations of the logits. The last four: for KD at high T only the step gains.
STEPS, REFINE = (4, 3, 2, 1.2, 1.2, 0.7, 0.4, 0.2), (64, 96, 128, 160, 16, 16, 16, 16)
REFINE_STEPS = 1 / 36, 1 / 44, 1 / 55, 1 / 76, 1 / 16, 1 / 32, 1 / 32, 1 / 32

Whole = NDArray[np.int16]


class KltMeans(Codec):
    """Principal axes of the teacher's logits, the mean of each image's views, what each view adds to it, and the
    likeliest classes made finer: see `klt_means.py`.

    It learns from the teacher's answers when a store is begun. Smaller steps are better and longer; more views in a
    group make it shorter.
    """

    name: Literal["klt_means"]
    step: float = Field(3.6, gt=0, le=100, description="of what a view adds to its image's mean")
    finer: int = Field(4, ge=1, le=64, description="the mean's step is step / finer")
    refine: int = Field(96, ge=1, le=256, description="classes, the likeliest first, that are made finer at most")
    refine_step: float = Field(1 / 44, gt=0, le=10, description="of a class of probability 1")
    refine_spread: float = Field(
        2.2, gt=0, le=100, description="of a class e**-refine_spread times as likely it is e times that"
    )
    refine_coarsest: float = Field(
        0.44, gt=0, le=10, description="classes that would have a larger step are not refined"
    )
    axes: int = Field(1024, ge=1, le=2048, description="at most; there are no more than classes")
    fit_rows: int = Field(16384, ge=16, description="views that it learns from")
    row_bytes: int = Field(384, ge=64, le=8192, description="most that a view may take; it pays for what it needs")
    mean_bytes: int = Field(768, ge=64, le=8192, description="most that an image's mean may take")

    def arrays(self) -> dict[str, CodecArray]:
        what = "rANS codes of {}, those of a chunk one after the other: offline_kd/store/codecs/klt_means.py"
        means, views = ("byte", self.mean_bytes), ("byte", self.row_bytes)
        return {
            "means": CodecArray("|u1", 0, means, what.format("means over views"), of_image=True, ragged=True),
            "codes": CodecArray("|u1", 0, views, what.format("views"), ragged=True),
        }

    @property
    def learns_from(self) -> int:
        return self.fit_rows

    def tables(self, num_classes: int, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        axes, symbols = min(self.axes, num_classes), 2 * MOST + 1
        return {
            "axes": ("<i2", (axes, num_classes)),
            "mean": ("<i4", (num_classes,)),
            "share": ("<f4", (axes,)),
            "mean_frequency": ("<u2", (axes, symbols)),
            "view_frequency": ("<u2", (axes, symbols)),
            "level_frequency": ("<u2", (1, 2 * LEVELS - 1)),
            "refine_frequency": ("<u2", (LEVELS * min(self.refine, num_classes), symbols)),
        }

    def fit(self, logits: Floats) -> dict[str, NDArray[np.generic]]:
        """Axes, shares and frequencies from `[n, v, C]` logits of one teacher, v views of every image as in a group.

        With one view of an image there is no mean to predict from: shares are 0, and so are all its numbers.

        Returns:
            `axes` `[k, C]` int16 in 1/SCALE and `mean` `[C]` int32 in 1/SCALE of a unit; `share` `[k]`; frequencies
            uint16 of rans.TOTAL: `[k, 2 MOST + 1]` of means and of views, `[1, 2 LEVELS - 1]` of levels (and of
            negative ones, which do not exist), `[LEVELS m, 2 MOST + 1]` of what m ranks at each level are refined by.
        """
        num_images, num_views, num_classes = logits.shape
        if num_images * num_views < FEWEST_ROWS:
            raise TeacherError(
                f"codec klt_means learns its axes from {FEWEST_ROWS} rows at least, there are {num_images * num_views}."
            )
        rows = logits.reshape(-1, num_classes)
        tables = fit_axes(rows, step=self._unit, num_axes=min(self.axes, num_classes))
        x = self._on_axes(rows, tables).reshape(num_images, num_views, -1)
        mean = x.mean(axis=1)
        power = num_views * np.einsum("nk,nk->k", mean, mean)
        along = np.einsum("nvk,nk->k", x, mean)
        share = np.where(power > 0, along / np.where(power > 0, power, 1), 0).clip(0, 1) * (num_views > 1)
        tables["share"] = share.astype(np.float32)
        p = _short(_without_rare(_rounded(mean * tables["share"])), MOST_NORM / 2)
        tables["mean_frequency"] = _frequencies_of_axes(p)
        q = _without_rare(_rounded((x - p[:, None]) / self.finer).reshape(len(rows), -1))
        q = _short(q, MOST_NORM / 2 / self.finer)
        tables["view_frequency"] = _frequencies_of_axes(q)
        whole = self._in_units(q.reshape(x.shape), p[:, None], tables)
        level, differences = self._refined(rows, whole, self._everything(num_classes))
        tables["level_frequency"] = _level_frequencies(level)
        nothing = np.zeros((1, differences.shape[1]), dtype=np.int16)  # at a level that no row has
        at_level = [differences[level == one] if (level == one).any() else nothing for one in range(LEVELS)]
        tables["refine_frequency"] = np.concatenate([frequencies(one, MOST) for one in at_level])
        return tables

    def encode(self, logits: Floats, tables: Tables, of_images: Arrays | None = None) -> Arrays:
        """Of `[n, v, C]`. A mean or a row that does not fit into its bytes loses its finest axes.

        Raises TeacherError when it does not fit without any.
        """
        num_images, num_views, num_classes = logits.shape
        rows = np.ascontiguousarray(logits.reshape(-1, num_classes))
        coders = coders_of(tables)
        used = max(len(coders.means), len(coders.views))  # on other axes everything is 0
        tables = {**tables, **{name: tables[name][:used] for name in ("axes", "share", "view_frequency")}}
        x = self._on_axes(rows, tables).reshape(num_images, num_views, -1)
        if of_images is None:
            means = self._encode_means(_rounded(x.mean(axis=1) * tables["share"]), tables, coders)
        else:
            means = np.ascontiguousarray(of_images["means"], dtype=np.uint8)
        p = np.zeros((num_images, 1, used), dtype=np.int16)
        p[:, 0, : len(coders.means)] = decode_rows(means, coders.means)[0]
        q = self._of_views(x, p, coders)
        return {"means": means, "codes": self._encode_rows(rows, q, p, tables, coders).reshape(*q.shape[:2], -1)}

    def unpack(self, arrays: Arrays, tables: Tables) -> Arrays:
        """`t` `[n, v, k]` and `differences` `[n, v, m]` int16."""
        codes, means = (arrays[name].astype(np.uint8, copy=False) for name in ("codes", "means"))
        coders = coders_of(tables)
        more = coders.level, coders.refined, self.counts(tables["mean"].shape[0])
        q, differences = decode_rows(codes.reshape(-1, codes.shape[-1]), coders.views, more)
        p, _ = decode_rows(means.reshape(-1, means.shape[-1]), coders.means)
        t = np.pad(q, ((0, 0), (0, max(0, p.shape[1] - q.shape[1])))) if q.shape[1] < p.shape[1] else q
        t *= np.int16(self.finer)
        t = t.reshape(*codes.shape[:-1], t.shape[1])
        t[..., : p.shape[1]] += p.reshape(*means.shape[:-1], 1, p.shape[1])
        return {"t": t, "differences": differences.reshape(*codes.shape[:-1], differences.shape[1])}

    def unpacked_arrays(self) -> list[str]:
        return ["t", "differences"]

    def decode(self, arrays: Mapping[str, Tensor], num_classes: int, tables: Mapping[str, Tensor]) -> Tensor:
        t, differences = arrays["t"], arrays["differences"].flatten(0, -2)
        whole = whole_of_views(t, tables["axes"][: t.shape[-1]].float(), tables["mean"].float()).flatten(0, -2)
        classes, steps, _ = self._steps(whole, differences.shape[1])
        return refined(whole, self._unit / SCALE, classes, differences, steps).view(*t.shape[:-1], num_classes)

    def decoding_tables(self, tables: Tables) -> dict[str, Tensor]:
        return axes_and_mean(tables)

    def error_bound(self, logits: Floats) -> Floats:
        """Infinite everywhere: what it loses is measured."""
        return np.full_like(logits[..., :1], np.inf)

    def compare(
        self, stored: Tensor, again: Tensor, unpacked: Mapping[str, Tensor], tables: Tables, dtype: str
    ) -> Comparison:
        """Of the classes that are made finer, what is stored is within half a step of the teacher's answer."""
        axes, mean = (torch.from_numpy(tables[name].astype(np.float32)) for name in ("axes", "mean"))
        t, differences = unpacked["t"], unpacked["differences"]
        classes, steps, is_fine = self._steps(whole_logits(t, axes[: t.shape[1]], mean), differences.shape[1])
        # What was refined to the end of a table may have been further away.
        level = np.searchsorted(self.counts(again.shape[1]), is_fine.sum(dim=1).numpy())
        is_fine &= differences.abs() < torch.from_numpy(_reach(tables["refine_frequency"]).reshape(LEVELS, -1)[level])
        errors = (stored - again).abs()
        allowed = steps / 2 + ARITHMETIC[dtype] * max(1.0, again.abs().max().item())
        return Comparison(torch.where(is_fine, errors.gather(1, classes), 0), allowed, errors)

    def problem_of(self, tables: Tables) -> str:
        try:
            coders_of(tables)
        except ValueError as error:
            return str(error)
        return ""

    def label(self) -> str:
        default = self.model_fields_set <= {"name", "step"}
        more = f", 1/{self.finer}, {self.refine} by {self.refine_step:.3g} to {self.refine_coarsest:g}"
        return f"means {self.step:g}" + ("" if default else more)

    @classmethod
    def candidates(cls, logits: Floats) -> list[Self]:
        """By the spread of the logits; nothing for one view of an image, or for a few classes."""
        if logits.shape[-1] < FEWEST_CLASSES or logits.shape[-2] < 2:
            return []
        settings = zip((step_of(logits, one) for one in STEPS), REFINE, REFINE_STEPS, strict=True)
        return [cls(name="klt_means", step=step, refine=count, refine_step=fine) for step, count, fine in settings]

    # ---- numbers ---------------------------------------------------------------------------------------------------

    @property
    def _unit(self) -> float:
        return self.step / self.finer

    def _on_axes(self, logits: Floats, tables: Tables) -> Floats:
        """`[n, k]` in units, the same on every machine: of logits that are rounded so that all sums are exact."""
        from offline_kd.store.codecs.logit_loops import round_logits  # the compiler takes a second to import

        factor, mean = PARTS / self._unit, tables["mean"].astype(np.float64) * (PARTS / SCALE)
        short = np.empty(logits.shape, dtype=np.float32)
        squares = round_logits(logits, factor, mean, short)
        # |axis| is SCALE, and rounding adds up to 2 %: rows shorter than 2**24 / SCALE have sums below 2**24, and
        # longer ones are made coarser.
        shift = np.frexp(np.sqrt(squares) * (1.02 * SCALE / 2**24))[1].clip(min=0)
        long = np.flatnonzero(shift)
        if len(long):
            whole = np.rint(logits[long].astype(np.float64) * factor - mean)
            short[long] = np.rint(whole * np.ldexp(1.0, -shift[long])[:, None])
        axes = torch.from_numpy(tables["axes"].astype(np.float32))
        found: Floats = (torch.from_numpy(short) @ axes.T).numpy()
        found *= np.ldexp(np.float32(1), shift - (PARTS * SCALE).bit_length() + 1)[:, None]
        return found

    def _of_views(self, x: Floats, p: Whole, coders: Coders) -> Whole:
        """`[n, v, k]` what `x`, in units, adds to `p` `[n, 1, k]`: numbers that have a code and exact sums."""
        from offline_kd.store.codecs.logit_loops import round_views

        reach = np.zeros(x.shape[2], dtype=np.float32)
        reach[: len(coders.views)] = -coders.views.lowest
        q, most_norm = np.empty(x.shape, dtype=np.int16), MOST_NORM / 2 / self.finer
        largest = round_views(x, p, np.float32(self.finer), np.float32(0.5 - DEADZONE), reach, q)
        return _short(q, most_norm) if largest > 0.999 * most_norm**2 else q

    def _in_units(self, q: Whole, p: Whole, tables: Tables) -> Floats:
        """`[n v, C]` what numbers `[n, v, k]` of views, `[n, 1, k]` of means stand for, in 1/SCALE of a unit, exact."""
        axes, mean = axes_and_mean(tables).values()
        t = torch.from_numpy(q * np.int16(self.finer) + p)
        whole: Floats = whole_of_views(t, axes[: t.shape[2]], mean).flatten(0, 1).numpy()
        return whole

    def _steps(self, whole: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the `count` largest of `[n, C]`: which classes, their steps, and whether these are fine: see `likeliest`.

        A step is `refine_step` at a probability of 1, and e times that at e**-refine_spread.
        """
        eighth = max(1, round(SCALE / self._unit / 8))
        width = max(1, round(self.refine_spread * LOG_GROWTH / self._unit * SCALE))
        return likeliest(whole, count, eighth, width, self._table_of_steps())

    def _table_of_steps(self) -> tuple[float, ...]:
        steps = [self.refine_step]
        while steps[-1] * GROWTH <= self.refine_coarsest:
            steps.append(steps[-1] * GROWTH)
        return tuple(steps)

    def counts(self, num_classes: int) -> NDArray[np.int64]:
        """`[LEVELS]` how many classes are made finer at each level."""
        most = min(self.refine, num_classes)
        return np.rint(float(most) ** (np.arange(LEVELS) / (LEVELS - 1))).astype(np.int64)

    def _everything(self, num_classes: int) -> Whole:
        """`[LEVELS, m]`: how far from 0 differences may be before there are frequencies."""
        return np.full((LEVELS, self.counts(num_classes)[-1]), MOST, dtype=np.int16)

    def _refined(self, logits: Floats, whole: Floats, reach: Whole) -> tuple[Whole, Whole]:
        """`[n]` the level of each row, and `[n, m]` what is missing of its likeliest classes, in their steps."""
        from offline_kd.store.codecs.logit_loops import refine_rows

        counts = self.counts(logits.shape[1])
        found = tuple(one.numpy() for one in self._steps(torch.from_numpy(whole), int(counts[-1])))
        level, differences = np.empty(len(logits), dtype=np.int16), np.zeros((len(logits), counts[-1]), dtype=np.int16)
        refine_rows(logits, whole, np.float32(self._unit / SCALE), found, counts, reach, level, differences)
        return level, differences

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def _encode_means(self, p: Whole, tables: Tables, coders: Coders) -> NDArray[np.uint8]:
        p = _within(p[:, : len(coders.means)], tables["mean_frequency"][: len(coders.means)], MOST_NORM / 2)
        codes, too_long = encode_rows(p, coders.means, self.mean_bytes)
        kept = p.shape[1]
        while len(too_long):
            kept = _fewer(kept, "mean_bytes", self.mean_bytes)
            p[too_long, kept:] = 0
            codes[too_long], still = encode_rows(p[too_long], coders.means, self.mean_bytes)
            too_long = too_long[still]
        return codes

    def _encode_rows(self, logits: Floats, q: Whole, p: Whole, tables: Tables, coders: Coders) -> NDArray[np.uint8]:
        """`[n v, row_bytes]` of logits `[n v, C]`, of numbers `[n, v, k]` and of their images `[n, 1, k]`."""
        codes, too_long = self._encode_some(logits, q, p, tables, coders)
        kept, q_of_rows = q.shape[2], q.reshape(len(logits), 1, -1)
        while len(too_long):
            kept = _fewer(kept, "row_bytes", self.row_bytes)
            q_of_rows[too_long, :, kept:] = 0
            some = logits[too_long], q_of_rows[too_long], p[too_long // q.shape[1]]
            codes[too_long], still = self._encode_some(*some, tables, coders)
            too_long = too_long[still]
        return codes

    def _encode_some(
        self, logits: Floats, q: Whole, p: Whole, tables: Tables, coders: Coders
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        reach = -coders.refined.lowest.reshape(LEVELS, -1)
        level, differences = self._refined(logits, self._in_units(q, p, tables), reach)
        more = level, differences, coders.level, coders.refined, self.counts(logits.shape[1])
        values = q.reshape(len(logits), -1)[:, : len(coders.views)]
        return encode_rows(values, coders.views, self.row_bytes, more)


def _fewer(kept: int, setting: str, most: int) -> int:
    """Half as many axes; raises TeacherError where there are none to do without."""
    if not kept:
        raise TeacherError(
            f"codec klt_means: a code takes more than its {most} bytes of {setting} even without any axis. Larger ones "
            f"cost nothing where they are not needed: --set capture.codec.{setting}={min(4 * most, 8192)}"
        )
    return kept // 2


def _rounded(values: NDArray[np.floating]) -> Whole:
    size = np.floor(np.abs(values) + (0.5 - DEADZONE)).clip(0, MOST)
    return np.copysign(size, values).astype(np.int16)


def _without_rare(values: Whole) -> Whole:
    """`[n, k]` with 0 on the last axes, where fewer than one row in RARE has anything: not worth their time."""
    common = np.flatnonzero((values != 0).mean(axis=0) > 1 / RARE)
    values[:, common[-1] + 1 if len(common) else 0 :] = 0
    return values


def _frequencies_of_axes(values: Whole) -> NDArray[np.uint16]:
    """`[k, 2 MOST + 1]`; TOTAL for the 0 of axes on which nothing else was seen, so that they cost nothing."""
    found = frequencies(values, MOST)
    nothing = ~values.any(axis=0)
    found[nothing] = 0
    found[nothing, MOST] = TOTAL
    return found


def _reach(frequency: NDArray[np.generic]) -> NDArray[np.int16]:
    """`[s]`: how far from 0 numbers may be that have a frequency in `[s, 2 MOST + 1]`."""
    return (frequency.astype(bool).sum(axis=1) // 2).astype(np.int16)


def _within(values: Whole, frequency: NDArray[np.generic], most_norm: float) -> Whole:
    """`[..., k]` numbers that have a frequency in `[k, 2 MOST + 1]`, and are short enough for sums to be exact."""
    reach = _reach(frequency)
    return _short(values.clip(-reach, reach), most_norm)


def _short(values: Whole, most_norm: float) -> Whole:
    """`[..., k]` numbers of which none is longer than that; those that are lose of every number as much."""
    wide = values.astype(np.int32)
    norm = np.sqrt(np.einsum("...k,...k->...", wide, wide))[..., None]  # of whole numbers, so it depends on no order
    if (norm > most_norm).any():
        values = np.where(norm > most_norm, np.trunc(values * (most_norm / norm.clip(min=1))), values).astype(np.int16)
    return values


def _level_frequencies(level: Whole) -> NDArray[np.uint16]:
    """`[1, 2 LEVELS - 1]`, of which the coder uses those of levels that there are."""
    found = np.bincount(level, minlength=LEVELS) + 1.0
    share = np.maximum(np.floor(found / found.sum() * (TOTAL - LEVELS)), 0) + 1
    share[share.argmax()] += TOTAL - share.sum()
    return np.concatenate([np.zeros(LEVELS - 1), share])[None].astype(np.uint16)

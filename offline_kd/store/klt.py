"""Transform coding of logits: principal axes of one teacher's logits, whole numbers, and an entropy coder.

A row z `[C]` becomes q = round(axes (z - mean) / step), whole numbers of which most are 0; what the axes make of q is
z within about a third of a step. For the `refine` classes that are then the likeliest, the difference from z is kept
as well, in steps that are finest for the first. All these numbers go through one entropy coder (rANS, Duda 2013,
arXiv:1311.2540) whose frequencies, one table an axis and a rank, were counted on the logits that the axes come from.

Which classes are the likeliest must not depend on how a machine rounds sums: axes and mean are whole numbers of
1/SCALE, and all sums stay below 2**24, so that float32 is exact in any order of summation, on any device.

Rows are coded each by itself, but all rows of a block side by side: the loops below are over axes and ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCALE = 2**11  # axes are stored in 1/SCALE: exact in TF32, too
MOST = 1023  # |q|, and |difference| in its steps
MOST_NORM = 6000.0  # |q| of a row, so that sums stay below 2**24
DEADZONE = 0.1  # |q| is rounded up from .6: shorter, and the error that matters is refined
GROWTH, COARSEST = 0.7, 0.5  # the r-th rank's step is refine_step * r**GROWTH, at most COARSEST
BITS = 12  # of the coder's frequencies
TOTAL = 1 << BITS
LOW = 1 << 16  # the coder's states are LOW to 2**32 - 1

Floats = NDArray[np.float32]
Tables = dict[str, NDArray[np.generic]]


def refine_steps(refine: int, refine_step: float) -> Floats:
    """`[refine]` by rank."""
    ranks = np.arange(1, refine + 1, dtype=np.float64)
    return np.minimum(refine_step * ranks**GROWTH, max(COARSEST, refine_step)).astype(np.float32)


# ---- learning ------------------------------------------------------------------------------------------------------


def fit_klt(logits: Floats, *, step: float, num_axes: int, refine: int, refine_step: float) -> Tables:
    """Axes and frequencies from `[n, C]` logits of one teacher.

    Returns:
        `axes` `[k, C]` int16 and `mean` `[C]` int32 in 1/SCALE (the mean: of a step); `frequency` `[k, 2 MOST + 1]`
        and `refine_frequency` `[m, 2 MOST + 1]` uint16, of TOTAL, 0 for what is never written.
    """
    rows, classes = logits.shape
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
    tables: Tables = {"axes": torch.round(axes * SCALE).to(torch.int16).contiguous().numpy(), "mean": mean}
    q, centre = _transform(logits, tables, step)
    differences = _differences(logits, q, centre, tables, step, refine_steps(refine, refine_step))
    tables["frequency"] = _frequencies(q, MOST)
    tables["refine_frequency"] = _frequencies(differences, MOST)
    return tables


def _frequencies(values: NDArray[np.integer], most: int) -> NDArray[np.uint16]:
    """`[s, 2 most + 1]`: how often each value comes in each column of `[n, s]`, as shares of TOTAL."""
    columns = values.shape[1]
    frequencies = np.zeros((columns, 2 * most + 1), dtype=np.uint16)
    symbols = np.arange(-most, most + 1)
    for column in range(columns):
        counts = np.bincount(values[:, column].astype(np.int64) + most, minlength=2 * most + 1).astype(np.float64)
        # What was not seen may come: one step and an eighth beyond what was, and in between.
        reach = int(np.abs(values[:, column].astype(np.int64)).max(initial=0))
        allowed = np.abs(symbols) <= min(reach + 1 + reach // 8, most)
        spread = max(np.abs(values[:, column].astype(np.int64)).mean(), 0.05)
        prior = np.where(allowed, np.exp(-np.abs(symbols) / spread), 0)
        share = np.where(allowed, counts + 4 * prior / prior.sum(), 0)
        whole = np.where(allowed, np.maximum(np.floor(share / share.sum() * (TOTAL - allowed.sum())), 0) + 1, 0)
        whole[whole.argmax()] += TOTAL - whole.sum()
        frequencies[column] = whole.astype(np.uint16)
    return frequencies


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


def encode_klt(
    logits: Floats, tables: Tables, *, step: float, refine: int, refine_step: float, row_bytes: int
) -> NDArray[np.uint8]:
    """`[n, row_bytes]`: the code of every row of `[n, C]` logits, zeros behind it.

    A row that does not fit loses its finest axes.
    """
    q, centre = _transform(logits, tables, step)
    steps = refine_steps(refine, refine_step)
    coder = Coder.of(tables)
    codes, too_long = coder.encode(q, _differences(logits, q, centre, tables, step, steps), row_bytes)
    kept = q.shape[1]
    while len(too_long):
        kept //= 2
        q[too_long, kept:] = 0
        some = q[too_long]
        centre = whole_logits(
            torch.from_numpy(some),
            torch.from_numpy(tables["axes"].astype(np.float32)),
            torch.from_numpy(tables["mean"].astype(np.float32)),
        ).numpy()
        again, still = coder.encode(some, _differences(logits[too_long], some, centre, tables, step, steps), row_bytes)
        codes[too_long] = again
        too_long = too_long[still] if kept else still[:0]
    return codes


def decode_klt(
    q: Tensor, differences: Tensor, tables: dict[str, Tensor], *, step: float, refine: int, refine_step: float
) -> Tensor:
    """`[n, C]` float32 logits, on the device of q `[n, k]` and differences `[n, m]`."""
    whole = whole_logits(q, tables["axes"].float(), tables["mean"].float())
    steps = torch.from_numpy(refine_steps(refine, refine_step)).to(q.device)
    return (whole * (step / SCALE)).scatter_add_(1, ranked(whole, refine), differences.float() * steps)


# ---- the coder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coder:
    """rANS with 16-bit words, static frequencies, and one state for every row."""

    start: NDArray[np.uint32]  # [s, symbols] of each symbol of each place, in 0..TOTAL
    frequency: NDArray[np.uint32]
    symbol_at: NDArray[np.int16]  # [s, TOTAL] symbol, counted from -most
    frequency_at: NDArray[np.uint16]  # [s, TOTAL] its frequency
    rest_at: NDArray[np.uint16]  # [s, TOTAL] how far behind its start
    num_axes: int

    @staticmethod
    def of(tables: Tables) -> "Coder":
        """Kept for the tables that were used last: those of the few stores of a run."""
        frequency = tables["frequency"]
        if id(frequency) not in _coders:
            while len(_coders) >= KEPT_CODERS:
                del _coders[next(iter(_coders))]
            _coders[id(frequency)] = (frequency, Coder._build(tables))  # the array lives, so that its id stays its own
        return _coders[id(frequency)][1]

    @staticmethod
    def _build(tables: Tables) -> "Coder":
        axes, ranks = tables["frequency"].astype(np.uint32), tables["refine_frequency"].astype(np.uint32)
        wide = np.concatenate([axes, ranks])
        start = wide.cumsum(axis=1, dtype=np.uint32) - wide
        symbols = np.arange(-MOST, MOST + 1, dtype=np.int16)
        symbol_at = np.stack([np.repeat(symbols, row.astype(np.int64)) for row in wide])
        index = symbol_at.astype(np.int64) + MOST
        frequency_at = np.take_along_axis(wide, index, axis=1).astype(np.uint16)
        rest_at = (np.arange(TOTAL) - np.take_along_axis(start, index, axis=1).astype(np.int64)).astype(np.uint16)
        return Coder(start, wide, symbol_at, frequency_at, rest_at, len(axes))

    def encode(
        self, q: NDArray[np.int16], differences: NDArray[np.int16], row_bytes: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Codes `[n, row_bytes]`, and the rows whose code is longer than that."""
        values = np.ascontiguousarray(np.concatenate([q, differences], axis=1).T)
        places, rows = values.shape
        state = np.full(rows, LOW, dtype=np.uint64)
        words = np.zeros((rows, places + 2), dtype=np.uint16)
        used = np.zeros(rows, dtype=np.int64)
        shift, bits = np.uint64(16), np.uint64(BITS)
        for place in range(places - 1, -1, -1):
            symbol = values[place].astype(np.int64) + MOST
            frequency = self.frequency[place][symbol].astype(np.uint64)
            start = self.start[place][symbol]
            full = np.flatnonzero(state >= frequency << np.uint64(32 - BITS))
            if len(full):
                words[full, used[full]] = state[full].astype(np.uint16)
                used[full] += 1
                state[full] >>= shift
            whole = state // frequency
            state = (whole << bits) + (state - whole * frequency) + start
        words[np.arange(rows), used] = state.astype(np.uint16)
        words[np.arange(rows), used + 1] = (state >> shift).astype(np.uint16)
        used += 2
        width = int(used.max(initial=0))
        # The decoder reads what was written last first.
        order = (used[:, None] - 1 - np.arange(width)).clip(min=0)
        turned = np.where(np.arange(width) < used[:, None], np.take_along_axis(words[:, :width], order, axis=1), 0)
        content = turned.astype("<u2").view(np.uint8).reshape(rows, 2 * width)
        codes = np.zeros((rows, row_bytes), dtype=np.uint8)
        codes[:, : 2 * width] = content[:, :row_bytes]
        return codes, np.flatnonzero(2 * used > row_bytes)

    def decode(self, codes: NDArray[np.uint8]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """q `[n, k]` and differences `[n, m]` of codes `[n, row_bytes]`; nonsense for what no encoder wrote."""
        rows = len(codes)
        words = np.ascontiguousarray(codes).view("<u2").astype(np.uint32)
        words = np.concatenate([words, np.zeros((rows, 1), np.uint32)], axis=1)  # what a damaged code would read
        flat, width = words.ravel(), words.shape[1]
        first = np.arange(rows) * width
        state = (flat[first] << np.uint32(16)) | flat[first + 1]
        at, end = first + 2, first + width - 1
        places = len(self.symbol_at)
        values = np.empty((places, rows), dtype=np.int16)
        low, mask, bits, shift = np.uint32(LOW), np.uint32(TOTAL - 1), np.uint32(BITS), np.uint32(16)
        for place in range(places):
            slot = state & mask
            values[place] = self.symbol_at[place][slot]
            state = self.frequency_at[place][slot] * (state >> bits) + self.rest_at[place][slot]
            hungry = np.flatnonzero(state < low)
            if len(hungry):
                here = at[hungry]
                state[hungry] = (state[hungry] << shift) | flat[here]
                at[hungry] = np.minimum(here + 1, end[hungry])
        return (
            np.ascontiguousarray(values[: self.num_axes].T.astype(np.int16)),
            np.ascontiguousarray(values[self.num_axes :].T),
        )


KEPT_CODERS = 4
_coders: dict[int, tuple[object, Coder]] = {}

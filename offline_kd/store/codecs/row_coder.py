"""The entropy coder of `klt_means`: rANS (Duda 2013, arXiv:1311.2540) in bytes, static frequencies.

A row is a whole number for each of some places, every place with frequencies of its own; behind them there may be a
level, which says how many more numbers follow and by which frequencies. Every row is a code by itself, so that one view
of an image is read without the others. The loops are in `row_loops.py`.

Frequencies come from a store, and compiled code checks no bounds: `tables_of` refuses any that do not sum to TOTAL, and
nothing is read behind the end of a row. So damaged codes give other numbers, and nothing else.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline_kd.store.codecs.rans import BITS, BUCKET_BITS, TOTAL

KEPT = 8  # tables, of the few stores of a run


@dataclass(frozen=True)
class Tables:
    """Frequencies as the coder wants them. Symbols of a place are lowest, lowest + 1, ... without gaps."""

    lowest: NDArray[np.int16]  # [s] of each place
    base: NDArray[np.int64]  # [s] where its sums begin
    sums: NDArray[np.uint32]  # of all places: 0, the frequency of the lowest, ... TOTAL
    begin: NDArray[np.uint16]  # [s, 2**BUCKET_BITS] how many symbols end at or before each bucket

    def __len__(self) -> int:
        return len(self.lowest)


def tables_of(frequency: NDArray[np.generic]) -> Tables:
    """Of `[s, 2 most + 1]` frequencies of -most..most; the last few are kept, by content.

    Raises ValueError for frequencies that are not those of a coder.
    """
    return _build(frequency.shape[1], np.ascontiguousarray(frequency, dtype="<u2").tobytes())


@lru_cache(maxsize=KEPT)
def _build(symbols: int, content: bytes) -> Tables:
    frequency = np.frombuffer(content, dtype="<u2").reshape(-1, symbols).astype(np.int64)
    there = frequency > 0
    first, count = there.argmax(axis=1), there.sum(axis=1)
    last = symbols - 1 - there[:, ::-1].argmax(axis=1)
    if (frequency.sum(axis=1) != TOTAL).any() or (last - first + 1 != count).any():
        raise ValueError(f"frequencies of an entropy coder that do not sum to {TOTAL} in every row, or have gaps")
    base = np.concatenate([[0], np.cumsum(count + 1)])[:-1]
    sums = np.zeros(int((count + 1).sum()), dtype=np.uint32)
    begin = np.zeros((len(frequency), 1 << BUCKET_BITS), dtype=np.uint16)
    buckets = np.arange(1 << BUCKET_BITS) << (BITS - BUCKET_BITS)
    for place, (a, n, at) in enumerate(zip(first, count, base, strict=True)):
        ends = np.cumsum(frequency[place, a : a + n])
        sums[at + 1 : at + 1 + n] = ends
        begin[place] = np.searchsorted(ends, buckets, side="right")
    return Tables((first - symbols // 2).astype(np.int16), base, sums, begin)


NO_LEVELS = np.zeros(0, dtype=np.int64)


def encode(
    values: NDArray[np.int16],
    tables: Tables,
    row_bytes: int,
    more: tuple[NDArray[np.int16], NDArray[np.int16], Tables, Tables, NDArray[np.int64]] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Codes `[n, row_bytes]` of `[n, s]`, and the rows whose code is longer than that, which have none.

    A row of codes is how long its code is, in LENGTH_BYTES, the lowest first; the code; zeros.

    Args:
        more: what follows: levels `[n]`, numbers `[n, m]`, the tables of the level (of one place) and of the numbers
            (of m places for every level), and how many numbers each level has.
    """
    from offline_kd.store.codecs.row_loops import encode_rows  # the compiler takes a second to import

    level, numbers, of_level, of_numbers, counts = more or _nothing(len(values))
    codes = np.zeros((len(values), row_bytes), dtype=np.uint8)
    behind = np.ascontiguousarray(level), np.ascontiguousarray(numbers), _parts(of_level), _parts(of_numbers), counts
    too_long = encode_rows(np.ascontiguousarray(values), _parts(tables), behind, codes)
    return codes, np.flatnonzero(too_long)


def decode(
    codes: NDArray[np.uint8],
    tables: Tables,
    more: tuple[Tables, Tables, NDArray[np.int64]] | None = None,
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """`[n, s]` of codes `[n, row_bytes]`, and the numbers `[n, m]` that follow; nonsense for what no encoder wrote.

    Args:
        more: see `encode`: tables of the level and of the numbers, how many numbers each level has.
    """
    from offline_kd.store.codecs.row_loops import decode_more, decode_rows

    of_level, of_numbers, counts = more or _nothing(0)[2:]
    width = len(of_numbers) // len(counts) if len(counts) else 0
    values = np.empty((len(codes), len(tables)), dtype=np.int16)
    numbers = np.zeros((len(codes), width), dtype=np.int16)
    codes = np.ascontiguousarray(codes)
    states = np.empty(len(codes), dtype=np.uint32)
    ats, ends = np.empty(len(codes), dtype=np.int64), np.empty(len(codes), dtype=np.int64)
    decode_rows(codes, _parts(tables), values, states, ats, ends)
    if width:
        decode_more(codes, (_parts(of_level), _parts(of_numbers), counts), numbers, states, ats, ends)
    return values, numbers


def _parts(tables: Tables) -> tuple[NDArray[Any], ...]:
    return tables.lowest, tables.base, tables.sums, tables.begin


def _nothing(rows: int) -> tuple[NDArray[np.int16], NDArray[np.int16], Tables, Tables, NDArray[np.int64]]:
    none = Tables(
        np.zeros(0, np.int16), np.zeros(0, np.int64), np.zeros(0, np.uint32), np.zeros((0, 1 << BUCKET_BITS), np.uint16)
    )
    return np.zeros(rows, np.int16), np.zeros((rows, 0), np.int16), none, none, NO_LEVELS


# ---- coders of a store -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coders:
    """What the entropy coder wants of the tables of a store; axes that are never used have been left out."""

    means: Tables
    views: Tables
    level: Tables
    refined: Tables


_known: dict[int, tuple[weakref.ref[NDArray[np.generic]], Coders]] = {}


def coders_of(tables: Mapping[str, NDArray[np.generic]]) -> Coders:
    """Kept for as long as the tables are there: to compare them would cost more than to decode a block.

    Raises ValueError for frequencies that are not those of a coder.
    """
    frequency = tables["view_frequency"]
    known = _known.get(id(frequency))
    if known is None or known[0]() is not frequency:
        _refuse_strange(tables)
        found = Coders(
            _used(tables["mean_frequency"]),
            _used(frequency),
            tables_of(tables["level_frequency"]),
            tables_of(tables["refine_frequency"]),
        )
        number = id(frequency)

        def forget(_: object) -> None:
            _known.pop(number, None)

        known = weakref.ref(frequency, forget), found
        _known[number] = known
    return known[1]


def _refuse_strange(tables: Mapping[str, NDArray[np.generic]]) -> None:
    """Raises ValueError for frequencies of other numbers than the encoder looks for them."""
    for name in ("mean_frequency", "view_frequency", "refine_frequency"):
        if (tables[name].astype(bool) != tables[name][:, ::-1].astype(bool)).any():
            raise ValueError(f"{name} that reaches further on one side of 0 than on the other")
    level = tables["level_frequency"]
    if (level.astype(bool) != (np.arange(level.shape[1]) >= level.shape[1] // 2)).any():
        raise ValueError(f"level_frequency of other levels than 0 to {level.shape[1] // 2}")


def _used(frequency: NDArray[np.generic]) -> Tables:
    """Without the last axes, on which nothing but 0 was ever seen."""
    is_used = np.flatnonzero(frequency[:, frequency.shape[1] // 2] != TOTAL)
    return tables_of(frequency[: is_used[-1] + 1 if len(is_used) else 1])

"""The entropy coder of `klt_means`: rANS (Duda 2013, arXiv:1311.2540) in bytes, static frequencies, compiled by numba.

A row is a whole number for each of some places, every place with frequencies of its own; behind them there may be a
level, which says how many more numbers follow and by which frequencies. Every row is a code by itself, so that one view
of an image is read without the others. Four rows are decoded side by side, for each has to wait for itself.

Frequencies come from a store, and compiled code checks no bounds: `tables_of` refuses any that do not sum to TOTAL, and
what is read behind the end of a code is 0. So damaged codes give other numbers, and nothing else.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offline_kd.store.codecs.rans import BITS, TOTAL

LOW = 1 << 16  # the states are LOW to 2**24 - 1
STATE_BYTES = 3  # what the code of a row begins with
BUCKET_BITS = 6  # a search begins where the first symbol of one of so many parts of TOTAL lies
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
    """Codes `[n, row_bytes]` of `[n, s]`, zeros behind each, and the rows whose code is longer than that.

    Args:
        more: what follows: levels `[n]`, numbers `[n, m]`, the tables of the level (of one place) and of the numbers
            (of m places for every level), and how many numbers each level has.
    """
    level, numbers, of_level, of_numbers, counts = more or _nothing(len(values))
    codes = np.zeros((len(values), row_bytes), dtype=np.uint8)
    length = np.zeros(len(values), dtype=np.int64)
    most = 2 * (values.shape[1] + numbers.shape[1] + 2) + STATE_BYTES  # a number has BITS bits at most
    _encode(
        np.ascontiguousarray(values),
        *_parts(tables),
        np.ascontiguousarray(level),
        np.ascontiguousarray(numbers),
        *_parts(of_level),
        *_parts(of_numbers),
        counts,
        np.zeros(most, dtype=np.uint8),
        codes,
        length,
    )
    return codes, np.flatnonzero(length > row_bytes)


def decode(
    codes: NDArray[np.uint8],
    tables: Tables,
    more: tuple[Tables, Tables, NDArray[np.int64]] | None = None,
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """`[n, s]` of codes `[n, row_bytes]`, and the numbers `[n, m]` that follow; nonsense for what no encoder wrote.

    Args:
        more: see `encode`: tables of the level and of the numbers, how many numbers each level has.
    """
    of_level, of_numbers, counts = more or _nothing(0)[2:]
    width = len(of_numbers) // len(counts) if len(counts) else 0
    values = np.empty((len(codes), len(tables)), dtype=np.int16)
    numbers = np.zeros((len(codes), width), dtype=np.int16)
    codes = np.ascontiguousarray(codes)
    state, at = np.zeros(len(codes), dtype=np.uint32), np.zeros(len(codes), dtype=np.int64)
    _decode(codes, *_parts(tables), values, state, at)
    if width:
        _decode_more(codes, *_parts(of_level), *_parts(of_numbers), counts, numbers, state, at)
    return values, numbers


def _parts(tables: Tables) -> tuple[NDArray[Any], ...]:
    return tables.lowest, tables.base, tables.sums, tables.begin


def _nothing(rows: int) -> tuple[NDArray[np.int16], NDArray[np.int16], Tables, Tables, NDArray[np.int64]]:
    none = Tables(
        np.zeros(0, np.int16), np.zeros(0, np.int64), np.zeros(0, np.uint32), np.zeros((0, 1 << BUCKET_BITS), np.uint16)
    )
    return np.zeros(rows, np.int16), np.zeros((rows, 0), np.int16), none, none, NO_LEVELS


# ---- compiled ------------------------------------------------------------------------------------------------------

_compiled: Any = njit(cache=True, nogil=True)
_inlined: Any = njit(cache=True, nogil=True, inline="always")


@_inlined
def _found(slot, place, base, sums, begin):  # type: ignore[no-untyped-def]
    """Where the sum at the beginning of the symbol that a slot belongs to is."""
    at = base[place] + begin[place, slot >> (BITS - BUCKET_BITS)]
    while sums[at + 1] <= slot:
        at += 1
    return at


@_inlined
def _put(state, value, place, lowest, base, sums, buffer, at):  # type: ignore[no-untyped-def]
    """The state with one more number; what it has no room for goes before `at`."""
    symbol = base[place] + (value - lowest[place])
    start = np.int64(sums[symbol])
    frequency = np.int64(sums[symbol + 1]) - start
    while state >= frequency << (24 - BITS):
        at -= 1
        buffer[at] = state & 255
        state >>= 8
    whole = state // frequency
    return (whole << BITS) + (state - whole * frequency) + start, at


@_compiled
def _encode(  # type: ignore[no-untyped-def]
    values,
    lowest, base, sums, begin,
    level, numbers,
    level_lowest, level_base, level_sums, level_begin,
    more_lowest, more_base, more_sums, more_begin,
    counts,
    buffer, codes, length,
):  # fmt: skip
    for row in range(values.shape[0]):
        at, state = buffer.size, np.int64(LOW)
        if counts.size:  # what is read last is written first
            first = level[row] * numbers.shape[1]
            for number in range(counts[level[row]] - 1, -1, -1):
                value = numbers[row, number]
                state, at = _put(state, value, first + number, more_lowest, more_base, more_sums, buffer, at)
            state, at = _put(state, level[row], 0, level_lowest, level_base, level_sums, buffer, at)
        for place in range(values.shape[1] - 1, -1, -1):
            state, at = _put(state, values[row, place], place, lowest, base, sums, buffer, at)
        for _ in range(STATE_BYTES):
            at -= 1
            buffer[at] = state & 255
            state >>= 8
        length[row] = buffer.size - at
        for index in range(min(length[row], codes.shape[1])):
            codes[row, index] = buffer[at + index]


@_inlined
def _byte(codes, row, at):  # type: ignore[no-untyped-def]
    return np.uint32(codes[row, at]) if at < codes.shape[1] else np.uint32(0)


@_inlined
def _next(state, at, at_symbol, slot, sums, codes, row):  # type: ignore[no-untyped-def]
    """State and place in the code behind a number."""
    start = sums[at_symbol]
    state = (sums[at_symbol + 1] - start) * (state >> np.uint32(BITS)) + slot - start
    while state < np.uint32(LOW) and at < codes.shape[1] + 4:  # a state of 0 would never grow
        state = (state << np.uint32(8)) | _byte(codes, row, at)
        at += 1
    return state, at


@_inlined
def _first_state(codes, row):  # type: ignore[no-untyped-def]
    high, middle, low = _byte(codes, row, 0), _byte(codes, row, 1), _byte(codes, row, 2)
    return (high << np.uint32(16)) | (middle << np.uint32(8)) | low


@_compiled
def _decode(codes, lowest, base, sums, begin, values, state, at):  # type: ignore[no-untyped-def]
    rows, mask = codes.shape[0], np.uint32(TOTAL - 1)
    for row in range(rows):
        state[row], at[row] = _first_state(codes, row), STATE_BYTES
    whole = rows - rows % 4
    for row in range(0, whole, 4):
        a, b, c, d = state[row], state[row + 1], state[row + 2], state[row + 3]
        at_a, at_b, at_c, at_d = at[row], at[row + 1], at[row + 2], at[row + 3]
        for place in range(values.shape[1]):
            slot_a, slot_b, slot_c, slot_d = a & mask, b & mask, c & mask, d & mask
            found_a = _found(slot_a, place, base, sums, begin)
            found_b = _found(slot_b, place, base, sums, begin)
            found_c = _found(slot_c, place, base, sums, begin)
            found_d = _found(slot_d, place, base, sums, begin)
            first = base[place] - lowest[place]
            values[row, place] = found_a - first
            values[row + 1, place] = found_b - first
            values[row + 2, place] = found_c - first
            values[row + 3, place] = found_d - first
            a, at_a = _next(a, at_a, found_a, slot_a, sums, codes, row)
            b, at_b = _next(b, at_b, found_b, slot_b, sums, codes, row + 1)
            c, at_c = _next(c, at_c, found_c, slot_c, sums, codes, row + 2)
            d, at_d = _next(d, at_d, found_d, slot_d, sums, codes, row + 3)
        state[row], state[row + 1], state[row + 2], state[row + 3] = a, b, c, d
        at[row], at[row + 1], at[row + 2], at[row + 3] = at_a, at_b, at_c, at_d
    for row in range(whole, rows):
        for place in range(values.shape[1]):
            slot = state[row] & mask
            found = _found(slot, place, base, sums, begin)
            values[row, place] = found - base[place] + lowest[place]
            state[row], at[row] = _next(state[row], at[row], found, slot, sums, codes, row)


@_compiled
def _decode_more(  # type: ignore[no-untyped-def]
    codes,
    level_lowest, level_base, level_sums, level_begin,
    lowest, base, sums, begin,
    counts, numbers, states, ats,
):  # fmt: skip
    mask = np.uint32(TOTAL - 1)
    for row in range(codes.shape[0]):
        state, at = states[row], ats[row]
        slot = state & mask
        found = _found(slot, 0, level_base, level_sums, level_begin)
        level = found - level_base[0] + level_lowest[0]
        state, at = _next(state, at, found, slot, level_sums, codes, row)
        for number in range(counts[level]):
            place = level * numbers.shape[1] + number
            slot = state & mask
            found = _found(slot, place, base, sums, begin)
            numbers[row, number] = found - base[place] + lowest[place]
            state, at = _next(state, at, found, slot, sums, codes, row)

"""The loops of `row_coder.py`, compiled by numba when they are first called, and kept where that is possible.

Four rows are decoded side by side, for each has to wait for itself.

Compiled code checks no bounds: a symbol is looked for below the TOTAL that the sums of its place end with, a state is
always below 2**24, and of a code no more is read than there is. So damaged codes lead nowhere else.
"""

from functools import partial
from typing import Any

import numpy as np
from numba import njit

from offline_kd.store.codecs.rans import BITS, BUCKET_BITS, LOW, STATE_BYTES, TOTAL


def _compiled(function: Any, **options: Any) -> Any:
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # no folder may be written to: every process compiles for itself
        return njit(nogil=True, **options)(function)


_inlined: Any = partial(_compiled, inline="always")


@_inlined
def _found(slot, place, base, sums, begin):
    """Where the sum at the beginning of the symbol that a slot belongs to is."""
    at = base[place] + begin[place, slot >> (BITS - BUCKET_BITS)]
    while sums[at + 1] <= slot:
        at += 1
    return at


@_inlined
def _put(state, value, place, lowest, base, sums, buffer, at):
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
def encode_rows(
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
def _byte(codes, row, at):
    return np.uint32(codes[row, at]) if at < codes.shape[1] else np.uint32(0)


@_inlined
def _next(state, at, at_symbol, slot, sums, codes, row):
    """State and place in the code behind a number."""
    start = sums[at_symbol]
    state = (sums[at_symbol + 1] - start) * (state >> np.uint32(BITS)) + slot - start
    while state < np.uint32(LOW) and at < codes.shape[1] + 4:  # a state of 0 would never grow
        state = (state << np.uint32(8)) | _byte(codes, row, at)
        at += 1
    return state, at


@_inlined
def _first_state(codes, row):
    high, middle, low = _byte(codes, row, 0), _byte(codes, row, 1), _byte(codes, row, 2)
    return (high << np.uint32(16)) | (middle << np.uint32(8)) | low


@_compiled
def decode_rows(codes, lowest, base, sums, begin, values, state, at):
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
def decode_more(
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

"""The loops of `row_coder.py`, compiled by numba when first called, and kept where that is possible.

Four rows are decoded side by side, for each has to wait for itself.

Compiled code checks no bounds: a symbol is looked for below the TOTAL that the sums of its place end with, a state is
always below 2**24, and of a code no more is read than its row has. So damaged codes lead nowhere else.

What a code begins and ends with. The encoder's first state is 0, not LOW as usual, which would cost two bytes a row.
It gives bytes away while the state is frequency << 12 or more, puts the number into what is left, and writes the last
state in as many bytes as that has. The decoder takes a byte while its state is below LOW and the code has one more. It
takes those that were given away, and no other:

- A number before which bytes were given away leaves a state of LOW or more, since of the state frequency << 4 or more
  is left; and no number makes a state smaller. So all states from then on are LOW or more, three bytes, and what was
  given away before a number is what lifts the decoder's state to LOW again: rANS as usual.
- Before the first byte was given away, states may be below LOW. The decoder comes to these last, when it has taken all
  bytes: there is none that it could take in error.
- The first number for which bytes are given away may find a state below LOW. That is below 2**16, so one byte makes
  room; it is the last one of the code, and the decoder stops for want of another, where the state is.

The numbers that tell most go first into the encoder, for the first one costs 12 bits, whatever its frequency.
"""

from functools import partial
from typing import Any

import numpy as np
from numba import njit

from offline_kd.store.codecs.rans import BITS, BUCKET_BITS, LENGTH_BYTES, LOW, STATE_BYTES, TOTAL


def compiled(function: Any, **options: Any) -> Any:
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # no folder may be written to: every process compiles for itself
        return njit(nogil=True, **options)(function)


inlined: Any = partial(compiled, inline="always")


@inlined
def _found(slot, place, base, sums, begin):
    """Where the sum at the beginning of the symbol that a slot belongs to is."""
    at = base[place] + begin[place, slot >> (BITS - BUCKET_BITS)]
    while sums[at + 1] <= slot:
        at += 1
    return at


@inlined
def _put(state, value, place, tables, buffer, at):
    """The state with one more number; what it has no room for goes before `at`."""
    lowest, base, sums, _ = tables
    symbol = base[place] + (value - lowest[place])
    start = np.int64(sums[symbol])
    frequency = np.int64(sums[symbol + 1]) - start
    while state >= frequency << (24 - BITS):
        at -= 1
        buffer[at] = state & 255
        state >>= 8
    whole = state // frequency
    return (whole << BITS) + (state - whole * frequency) + start, at


@compiled
def encode_rows(values, tables, more, codes):
    """Fills `codes`, and says of which rows `[n]` the code was too long; of these nothing is written."""
    level, numbers, of_level, of_numbers, counts = more
    buffer = np.empty(2 * (values.shape[1] + numbers.shape[1] + 1) + STATE_BYTES, dtype=np.uint8)
    too_long = np.zeros(values.shape[0], dtype=np.bool_)
    for row in range(values.shape[0]):
        at, state = buffer.size, np.int64(0)
        if counts.size:  # what is read last is written first
            first = level[row] * numbers.shape[1]
            for number in range(counts[level[row]]):
                state, at = _put(state, numbers[row, number], first + number, of_numbers, buffer, at)
            state, at = _put(state, level[row], 0, of_level, buffer, at)
        for place in range(values.shape[1]):
            state, at = _put(state, values[row, place], place, tables, buffer, at)
        while state > 0:
            at -= 1
            buffer[at] = state & 255
            state >>= 8
        length = buffer.size - at
        too_long[row] = length > codes.shape[1] - LENGTH_BYTES
        if not too_long[row]:
            codes[row, 0], codes[row, 1] = length & 255, length >> 8
            for index in range(length):
                codes[row, LENGTH_BYTES + index] = buffer[at + index]
    return too_long


@inlined
def _begin(code):
    """The first state of a code, the place behind it, and where the code ends."""
    end = min(code.size, LENGTH_BYTES + np.int64(code[0]) + (np.int64(code[1]) << 8))
    at, state = np.int64(LENGTH_BYTES), np.uint32(0)
    while at < end and at < LENGTH_BYTES + STATE_BYTES:
        state = (state << np.uint32(8)) | np.uint32(code[at])
        at += 1
    return state, at, end


@inlined
def _next(state, at, end, at_symbol, slot, sums, code):
    """State and place in the code behind a number."""
    start = sums[at_symbol]
    state = (sums[at_symbol + 1] - start) * (state >> np.uint32(BITS)) + slot - start
    while state < np.uint32(LOW) and at < end:
        state = (state << np.uint32(8)) | np.uint32(code[at])
        at += 1
    return state, at


@compiled
def decode_rows(codes, tables, values, states, ats, ends):
    """Fills `values`; states, places in the codes and ends of these `[n]` are what `decode_more` goes on from."""
    lowest, base, sums, begin = tables
    rows, mask = codes.shape[0], np.uint32(TOTAL - 1)
    for row in range(rows):
        states[row], ats[row], ends[row] = _begin(codes[row])
    whole = rows - rows % 4
    for row in range(0, whole, 4):
        code_a, code_b, code_c, code_d = codes[row], codes[row + 1], codes[row + 2], codes[row + 3]
        a, b, c, d = states[row], states[row + 1], states[row + 2], states[row + 3]
        at_a, at_b, at_c, at_d = ats[row], ats[row + 1], ats[row + 2], ats[row + 3]
        end_a, end_b, end_c, end_d = ends[row], ends[row + 1], ends[row + 2], ends[row + 3]
        for place in range(values.shape[1] - 1, -1, -1):
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
            a, at_a = _next(a, at_a, end_a, found_a, slot_a, sums, code_a)
            b, at_b = _next(b, at_b, end_b, found_b, slot_b, sums, code_b)
            c, at_c = _next(c, at_c, end_c, found_c, slot_c, sums, code_c)
            d, at_d = _next(d, at_d, end_d, found_d, slot_d, sums, code_d)
        states[row], states[row + 1], states[row + 2], states[row + 3] = a, b, c, d
        ats[row], ats[row + 1], ats[row + 2], ats[row + 3] = at_a, at_b, at_c, at_d
    for row in range(whole, rows):
        for place in range(values.shape[1] - 1, -1, -1):
            slot = states[row] & mask
            found = _found(slot, place, base, sums, begin)
            values[row, place] = found - base[place] + lowest[place]
            states[row], ats[row] = _next(states[row], ats[row], ends[row], found, slot, sums, codes[row])


@compiled
def decode_more(codes, more, numbers, states, ats, ends):
    """Fills `numbers` with what follows in codes of which `decode_rows` has read the beginning."""
    of_level, (lowest, base, sums, begin), counts = more
    level_lowest, level_base, level_sums, level_begin = of_level
    mask = np.uint32(TOTAL - 1)
    for row in range(codes.shape[0]):
        code, state, at, end = codes[row], states[row], ats[row], ends[row]
        slot = state & mask
        found = _found(slot, 0, level_base, level_sums, level_begin)
        level = found - level_base[0] + level_lowest[0]
        state, at = _next(state, at, end, found, slot, level_sums, code)
        for number in range(counts[level] - 1, -1, -1):
            place = level * numbers.shape[1] + number
            slot = state & mask
            found = _found(slot, place, base, sums, begin)
            numbers[row, number] = found - base[place] + lowest[place]
            state, at = _next(state, at, end, found, slot, sums, code)

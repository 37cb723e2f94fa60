"""The entropy coder: rANS (Duda 2013, arXiv:1311.2540) with 16-bit words, static frequencies, one state for every row.

A row is a whole number for each of s places, every place with frequencies of its own. Rows are coded each by itself,
but all rows of a block side by side: the loops below are over places.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BITS = 12  # of the frequencies
TOTAL = 1 << BITS
LOW = 1 << 16  # the states are LOW to 2**32 - 1
# Of row_coder.py and row_loops.py, whose states are less than 2**24: what a row begins with, what its code begins with,
# and of how many parts of TOTAL each knows the first symbol.
LENGTH_BYTES, STATE_BYTES, BUCKET_BITS = 2, 3, 6
KEPT_CODERS = 4  # those of the few stores of a run


def frequencies(values: NDArray[np.integer], most: int) -> NDArray[np.uint16]:
    """`[s, 2 most + 1]`: how often each of -most..most comes in each column of `[n, s]`, as shares of TOTAL.

    0 for what is never to be written: further from 0 than what was seen, and an eighth of it, and one.
    """
    columns = values.shape[1]
    counted = np.zeros((columns, 2 * most + 1), dtype=np.uint16)
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
        counted[column] = whole.astype(np.uint16)
    return counted


@dataclass(frozen=True)
class Coder:
    """Rows of whole numbers `[n, s]` to bytes and back, by the frequencies of each place."""

    most: int  # numbers are -most..most
    start: NDArray[np.uint32]  # [s, symbols] of each symbol of each place, in 0..TOTAL
    frequency: NDArray[np.uint32]  # [s, symbols]
    symbol_at: NDArray[np.int16]  # [s, TOTAL] symbol, counted from -most
    frequency_at: NDArray[np.uint16]  # [s, TOTAL] its frequency
    rest_at: NDArray[np.uint16]  # [s, TOTAL] how far behind its start

    @staticmethod
    def of(frequency: NDArray[np.integer]) -> "Coder":
        """The coder of `[s, 2 most + 1]` frequencies that sum to TOTAL in every row; the last few are kept.

        They are kept by content: comparing the frequencies takes milliseconds, building a coder a hundred times that.
        """
        return _build(frequency.shape[1], np.ascontiguousarray(frequency, dtype="<u2").tobytes())

    def encode(self, values: NDArray[np.int16], row_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Codes `[n, row_bytes]` of `[n, s]`, zeros behind each, and the rows whose code is longer than that."""
        by_place = np.ascontiguousarray(values.T)
        places, rows = by_place.shape
        state = np.full(rows, LOW, dtype=np.uint64)
        words = np.zeros((rows, places + 2), dtype=np.uint16)
        used = np.zeros(rows, dtype=np.int64)
        shift, bits = np.uint64(16), np.uint64(BITS)
        for place in range(places - 1, -1, -1):
            symbol = by_place[place].astype(np.int64) + self.most
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

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.int16]:
        """`[n, s]` of codes `[n, row_bytes]`; nonsense for what no encoder wrote."""
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
        return values.T


@lru_cache(maxsize=KEPT_CODERS)
def _build(symbols: int, content: bytes) -> Coder:
    wide = np.frombuffer(content, dtype="<u2").reshape(-1, symbols).astype(np.uint32)
    most = symbols // 2
    start = wide.cumsum(axis=1, dtype=np.uint32) - wide
    symbol_at = np.stack([np.repeat(np.arange(-most, most + 1, dtype=np.int16), row.astype(np.int64)) for row in wide])
    index = symbol_at.astype(np.int64) + most
    frequency_at = np.take_along_axis(wide, index, axis=1).astype(np.uint16)
    rest_at = (np.arange(TOTAL) - np.take_along_axis(start, index, axis=1).astype(np.int64)).astype(np.uint16)
    return Coder(most, start, wide, symbol_at, frequency_at, rest_at)

"""Which image is shown when, and on which rank: decided by seed, epoch, keys and counts alone."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from offline_kd.support.counter_rng import counter_hash

LANES = 96  # ranks are a divisor of it
BLOCK_STREAM, LANE_STREAM = 0x626C6F636B, 0x6C616E65  # first counters of the draws made here


@dataclass(frozen=True)
class Order:
    """One pass over the data, a pure function of seed, epoch, keys and the manifest's counts.

    A pass shows `views_per_decode` epochs at once. Its rows are numbered by tar, in the pass's order of tars, by
    epoch and by a permutation of the tar; row i is in lane i % LANES. Slot s of the pass shows a row of the lane
    s % LANES, out of the same pool of tars. A rank takes whole lanes, and a step so many consecutive slots: so every
    rank knows its rows by itself, whatever is known of the other tars, and a pass that was stopped goes on with the
    slots that are left, with any number of ranks and workers.
    """

    seed: int
    first_epoch: int
    epochs: int
    counts: list[int]  # of the tars, by number
    pool_blocks: int

    @cached_property
    def tars(self) -> NDArray[np.int64]:
        """The numbers of the tars."""
        numbers = np.arange(len(self.counts), dtype=np.uint64)
        return counter_hash(BLOCK_STREAM, self.seed, self.first_epoch, numbers).argsort()

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The number of each tar's first row, by position; behind the last one, the number of rows."""
        return np.concatenate([[0], np.cumsum(np.array(self.counts)[self.tars])]) * self.epochs

    def pool_of(self, position: int) -> int:
        return position // self.pool_blocks

    def pool_slots(self, pool: int) -> range:
        first, end = (min(number * self.pool_blocks, len(self.tars)) for number in (pool, pool + 1))
        return range(int(self.starts[first]), int(self.starts[end]))

    def lanes(self, position: int, epoch: int, key_hash: NDArray[np.uint64]) -> NDArray[np.int64]:
        """`[n]` lane of every row of a tar, bad images included, in one of the pass's epochs."""
        place = np.empty(len(key_hash), dtype=np.int64)
        place[counter_hash(LANE_STREAM, self.seed, epoch, key_hash).argsort()] = np.arange(len(key_hash))
        first = self.starts[position] + (epoch - self.first_epoch) * len(key_hash)
        return (first + place) % LANES

    def slots(self, pool: int, lane: NDArray[np.int64], shuffle: NDArray[np.uint64]) -> NDArray[np.int64]:
        """`[n]` slot of all rows of a pool that are in some lanes."""
        slots = np.empty(len(lane), dtype=np.int64)
        first = self.pool_slots(pool).start
        for one in np.unique(lane):
            rows = np.flatnonzero(lane == one)
            slots[rows[shuffle[rows].argsort()]] = first + (one - first) % LANES + LANES * np.arange(len(rows))
        return slots

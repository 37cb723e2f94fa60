"""Which image is shown when, on which rank, and which worker reads it: decided by seed, epoch and counts alone."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from offline_kd.support.counter_rng import counter_hash

ORDER_VERSION = 3  # a run that was begun in another order cannot go on in this one
SMALL = 8  # a last batch of less than an eighth is not worth a step
BLOCK_STREAM, ROW_STREAM = 0x626C6F636B, 0x726F77  # first counters of the draws made here


@dataclass(frozen=True)
class Order:
    """One pass over the data, a pure function of seed, epoch and the manifest's counts.

    A pass shows `epochs` epochs at once; its rows are the images of all tars, once for each of them. Tars come in an
    order of the pass, so many at a time are a pool, and within a pool rows are shuffled: that gives every row a slot.
    Where pools grow, the first one is a single tar, and each is twice the one before until they have their size: the
    first batch waits for one tar, and the others are read while it and its followers are shown.
    A step shows a batch of consecutive slots, of which every rank takes each `world`-th. So whoever reads a tar knows
    when its rows are shown, and on which rank, whatever is known of the other tars; batches do not depend on how many
    ranks and workers there are; and a pass that was stopped goes on with the slots that are left, with any number.
    """

    seed: int
    first_epoch: int
    epochs: int
    counts: Sequence[int]  # of the tars, by number
    pool_blocks: int
    batch_size: int  # of all ranks together
    grows: bool = False

    @cached_property
    def tars(self) -> NDArray[np.int64]:
        """The numbers of the tars, by position."""
        numbers = np.arange(len(self.counts), dtype=np.uint64)
        return counter_hash(BLOCK_STREAM, self.seed, self.first_epoch, numbers).argsort(kind="stable")

    @cached_property
    def num_rows(self) -> int:
        return sum(self.counts) * self.epochs

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The first slot of each pool; behind the last one, the number of rows."""
        rows = np.concatenate([[0], np.cumsum(np.array(self.counts)[self.tars])]) * self.epochs
        return rows[[*(pool.start for pool in self._pools), len(self.tars)]]

    @cached_property
    def _pools(self) -> list[range]:
        """The positions of the tars of each pool."""
        found, start, size = list[range](), 0, 1 if self.grows else self.pool_blocks
        while start < len(self.tars):
            found.append(range(start, min(start + size, len(self.tars))))
            start, size = start + size, min(2 * size, self.pool_blocks)
        return found

    @property
    def num_pools(self) -> int:
        return len(self._pools)

    def positions(self, pool: int) -> range:
        """Of the tars of a pool."""
        return self._pools[pool]

    def slots(self, pool: int) -> list[NDArray[np.int64]]:
        """For every tar of a pool, `[epochs, count]`: the slots of its rows."""
        numbers = self.tars[self.positions(pool)].tolist()
        sizes = [self.epochs * self.counts[number] for number in numbers]
        draws = [
            counter_hash(ROW_STREAM, self.seed, self.first_epoch, number, np.arange(size, dtype=np.uint64))
            for number, size in zip(numbers, sizes, strict=True)
        ]
        slots = np.empty(sum(sizes), dtype=np.int64)
        slots[np.concatenate(draws).argsort(kind="stable")] = np.arange(self.starts[pool], self.starts[pool + 1])
        return [one.reshape(self.epochs, -1) for one in np.split(slots, np.cumsum(sizes)[:-1])]

    @cached_property
    def steps(self) -> int:
        """The last batch, if it is small or a single row, joins the one before."""
        full, rest = divmod(self.num_rows, self.batch_size)
        return max(full + (rest >= max(2, self.batch_size // SMALL)), 1)

    def batch(self, step: int) -> range:
        """The slots that a step shows on all ranks together; none behind the last step."""
        if step >= self.steps:
            return range(self.num_rows, self.num_rows)
        stop = self.num_rows if step == self.steps - 1 else (step + 1) * self.batch_size
        return range(step * self.batch_size, stop)

    def ranks(self, slots: NDArray[np.int64], world: int) -> NDArray[np.int64]:
        """Which of `world` ranks shows each slot: the shares of a batch differ by one row at most."""
        step = np.minimum(slots // self.batch_size, self.steps - 1)
        return (slots - step * self.batch_size) % world

    def workers(self, pool: int, homes: Sequence[int], uneven: float) -> list[int]:
        """Which worker reads each tar of a pool: the tar's home, or another where that is given too much.

        Args:
            homes: by tar, as `home_workers` gives them.
            uneven: how much of an even share of the pool's rows a worker may be given for its tars to stay with it.
        """
        together = self._read_together(pool)
        tars = self.tars[together].tolist()
        counts, num_workers = [self.counts[tar] for tar in tars], max(homes) + 1
        largest_first = sorted(range(len(tars)), key=lambda at: -counts[at])
        # No more than that, but what the best sharing gives to one worker it may always have.
        best = _shared(counts, largest_first, [0] * num_workers)
        shares = [sum(counts[at] for at in best if best[at] == worker) for worker in range(num_workers)]
        most = max(uneven * sum(counts) / num_workers, *shares)
        load, found = [0] * num_workers, {}
        for at in largest_first:
            home = homes[tars[at]]
            if load[home] + counts[at] <= most:
                found[at] = home
                load[home] += counts[at]
        found |= _shared(counts, [at for at in largest_first if at not in found], load)
        return [found[at - together.start] for at in self.positions(pool)]

    def _read_together(self, pool: int) -> range:
        """The positions that are shared out together: of a pool, or of all that are smaller because they grow.

        One worker would be given most of those, each of which has too few tars for all.
        """
        growing = min((self.pool_blocks - 1).bit_length() if self.grows else 0, self.num_pools)
        return range(self._pools[growing - 1].stop) if pool < growing else self.positions(pool)


def home_workers(counts: Sequence[int], num_workers: int) -> list[int]:
    """The worker that reads a tar, by number of the tar, in every pass as far as possible: it may have kept it."""
    if num_workers == 1:
        return [0] * len(counts)
    homes = _shared(counts, sorted(range(len(counts)), key=lambda tar: -counts[tar]), [0] * num_workers)
    return [homes[tar] for tar in range(len(counts))]


def _shared(counts: Sequence[int], which: Sequence[int], load: Sequence[int]) -> dict[int, int]:
    """Each of them, in this order, for the worker that has the least by then."""
    least = [(rows, worker) for worker, rows in enumerate(load)]
    heapq.heapify(least)
    given = {}
    for one in which:
        rows, given[one] = heapq.heappop(least)
        heapq.heappush(least, (rows + counts[one], given[one]))
    return given

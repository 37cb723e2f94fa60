"""Batches of rows: what the reader hands over, shuffled within pools, gathered and put on the device.

Reading and joining happen per tar, in worker processes if there are any; shuffling and batching happen afterwards in
the training process, so the batches do not depend on the number of workers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from offline_kd.data.manifest import Normalisation
from offline_kd.distill.reader import Options, Piece, Reader, Source
from offline_kd.distill.sampler import LANES, Order
from offline_kd.models.networks import normalise
from offline_kd.store.join import codec_tables_on
from offline_kd.store.reader import Store
from offline_kd.store.rows import Rows, StoredSignal, concatenate, gather
from offline_kd.support.console import say
from offline_kd.support.counter_rng import counter_uniform
from offline_kd.support.errors import RecipeError
from offline_kd.views.render import render

SMALL = 8  # a last batch of less than an eighth is not worth a step
LABEL_STREAM = 0x6C6162656C  # first counter of the draws made here, so that they are independent of all others


class Loader:
    """The batches of a training run.

    Order and views are pure functions of (seed, epoch, key): the same with and without a store, for any number of
    workers. Rows are shuffled within pools of `pool_blocks` tars, which are themselves in a new order every epoch.

    `for batch in loader` goes through one pass, and the next time through the one after it; `state_dict` says how far
    it is. A pass is an epoch, or `views_per_decode` epochs at once.

    Args:
        normalisation: give images as the float32 input of a network; None: as uint8 pixels.

    Raises RecipeError when batches cannot be shared evenly by the ranks.
    """

    def __init__(
        self, source: Source, options: Options, device: torch.device, normalisation: Normalisation | None = None
    ) -> None:
        self.source, self.options, self.device, self.normalisation = source, options, device, normalisation
        self.views_per_decode, self.bad = options.views_per_decode, set[str]()
        self.next_epoch = self.next_step = 0
        _check_ranks(source, options)
        self.reader = Reader(source, options)
        has_logits = len(source.stores) == 1 and source.wanted[0].logits
        self._decode = logits_decoder(source.stores[0], device) if has_logits else None
        self.pieces: DataLoader[Piece] | None = None
        is_remote = source.images.is_remote or any(store.place.is_remote for store in source.stores)
        if options.workers:
            self.pieces = DataLoader(
                self.reader,
                batch_size=None,
                num_workers=options.workers,
                persistent_workers=True,
                # The client of object stores has threads of its own, which do not survive a fork: children would hang.
                multiprocessing_context="spawn" if is_remote else None,
            )

    @property
    def steps_per_pass(self) -> int:
        """Steps of one call of `epoch`. The last batch, if it is small or a single row, joins the one before."""
        full, rest = divmod(self.source.images.split.count * self.views_per_decode, self.options.batch_size)
        return max(full + (rest >= max(2, self.options.batch_size // SMALL)), 1)

    def __len__(self) -> int:
        return self.steps_per_pass

    def __iter__(self) -> Iterator[Rows]:
        """What is left of the pass that is next: all of it, unless a saved state says otherwise."""
        epoch = self.next_epoch
        for batch in self.epoch(epoch, self.next_step):
            # Before the batch is handed out, so that a state saved after its step does not show it again.
            self.next_step = batch.step + 1
            if self.next_step == len(self):
                self.next_epoch, self.next_step = epoch + self.views_per_decode, 0
            yield batch
        self.next_epoch, self.next_step = epoch + self.views_per_decode, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch and the step that `for batch in loader` shows next."""
        return {"epoch": self.next_epoch, "step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was asked: with exactly the batches that were not shown."""
        self.next_epoch, self.next_step = state["epoch"], state["step"]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Rows]:
        """All samples once, or `views_per_decode` times with a view each, which is as many epochs.

        Args:
            epoch: counted from 0; a multiple of `views_per_decode`.
            first_step: go on from here, where another run, of however many workers and ranks, was stopped.
        """
        batch_size = self.options.batch_size
        self.reader.start[0], self.reader.start[1] = epoch, first_step * batch_size
        order = self.reader.order()
        step, left, pieces = first_step, _Slots.nothing(), iter(self.reader if self.pieces is None else self.pieces)
        waiting: dict[int, list[Piece]] = {}
        for pool in range(order.pool_of(len(order.tars) - 1) + 1):
            slots = order.pool_slots(pool)
            if slots.stop <= first_step * batch_size:
                continue
            missing = sum(order.pool_of(position) == pool for position in range(len(order.tars)))
            missing -= sum(piece.is_last for piece in waiting.get(pool, []))
            while missing:
                piece = next(pieces)
                waiting.setdefault(order.pool_of(piece.position), []).append(piece)
                self._report(piece.bad)
                missing -= piece.is_last and order.pool_of(piece.position) == pool
            together = self.source.views.is_exact
            left = left.from_slot(step * batch_size).and_pool(order, pool, waiting.pop(pool), together)
            while step < self.steps_per_pass:
                stop = (step + 1) * batch_size
                if step == self.steps_per_pass - 1:
                    stop = int(order.starts[-1])
                if stop > slots.stop:
                    break
                rows = left.between(step * batch_size, stop)
                if rows is not None:
                    yield self._on_device(rows, step)
                step += 1

    def _report(self, bad: Sequence[str]) -> None:
        for line in bad:
            if line not in self.bad:
                self.bad.add(line)
                say(f"left out: {line}")

    def _on_device(self, rows: Rows, step: int) -> Rows:
        known = torch.from_numpy(counter_uniform(LABEL_STREAM, rows.key_hash) < self.options.labelled_fraction)
        labels, other = (torch.where(known, one, -1) for one in (rows.labels, rows.other_labels))
        moved = replace(rows, labels=labels, other_labels=other).map(
            lambda tensor: tensor.to(self.device, non_blocking=True)
        )
        images = moved.images
        if moved.box is not None and moved.flip is not None:
            images = render(images, moved.box, moved.flip, self.source.views.outside)
        if self.normalisation is not None:
            images = normalise(images, self.normalisation)
        return replace(moved, pixels=images, box=None, flip=None, step=step, decode=self._decode)


def _check_ranks(source: Source, options: Options) -> None:
    world, batch_size = options.world, options.batch_size
    if LANES % world or batch_size % world:
        raise RecipeError(
            f"{world} ranks: their number must divide the batch size, {batch_size}, and {LANES}, so that every "
            "rank gets as many rows as any other."
        )
    rest = source.images.split.count * options.views_per_decode % batch_size
    if world > 1 and max(2, batch_size // SMALL) <= rest < 2 * world:
        raise RecipeError(
            f"the last batch of {rest} rows is too small for {world} ranks. Use another training.batch_size."
        )


def logits_decoder(store: Store, device: torch.device) -> Callable[[StoredSignal], Tensor]:
    """A function from the signal of a store, on `device`, to logits `[n, C]` float32."""
    identity, tables = store.identity, codec_tables_on(store, device)

    def logits(signal: StoredSignal) -> Tensor:
        assert signal.logits is not None, "the logits were not read"
        return identity.codec.decode(signal.logits, identity.num_classes, tables)

    return logits


# ---- batching ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slots:
    """Rows in the order of their slots, without having been moved: a batch is gathered from where they are."""

    parts: list[Rows]
    part: NDArray[np.int64]  # [n] which one
    row: NDArray[np.int64]  # [n] of it
    slots: NDArray[np.int64]  # [n] rising

    @staticmethod
    def nothing() -> "_Slots":
        return _Slots([], *(np.empty(0, dtype=np.int64) for _ in range(3)))

    def and_pool(self, order: Order, pool: int, pieces: list[Piece], together: bool) -> "_Slots":
        """With a pool behind them; `together`: small images are better moved, once."""
        lane = np.concatenate([piece.lane for piece in pieces])
        shuffle = np.concatenate([piece.shuffle for piece in pieces])
        slots = order.slots(pool, lane, shuffle)
        rows = [piece.rows for piece in pieces]
        rows = [concatenate(rows)] if together else rows
        lengths = [len(one) for one in rows]
        part = np.repeat(np.arange(len(rows)), lengths) + len(self.parts)
        row = np.concatenate([np.arange(length) for length in lengths])
        rising = slots.argsort()
        return _Slots(
            [*self.parts, *rows],
            np.concatenate([self.part, part[rising]]),
            np.concatenate([self.row, row[rising]]),
            np.concatenate([self.slots, slots[rising]]),
        )

    def between(self, start: int, stop: int) -> Rows | None:
        """The rows of these slots; None if all of them are bad images, which were left out."""
        some = slice(*np.searchsorted(self.slots, [start, stop]))
        return gather(self.parts, self.part[some], self.row[some]) if some.start < some.stop else None

    def from_slot(self, start: int) -> "_Slots":
        """Without the rows of earlier slots, and without the parts that only those are in."""
        first = int(np.searchsorted(self.slots, start))
        used, part = np.unique(self.part[first:], return_inverse=True)
        return _Slots([self.parts[one] for one in used], part, self.row[first:], self.slots[first:])

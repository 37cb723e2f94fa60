"""Batches of rows: what the reader hands over, shuffled within pools, gathered and put on the device.

Reading and joining happen per tar, in worker processes if there are any; shuffling and batching happen afterwards in
the training process, so the batches do not depend on the number of workers. For a GPU that is done in a thread, one
batch ahead, into pinned memory and on a stream of its own: no step waits for its batch to be gathered or copied.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from offline_kd.data.label_sets import hidden_where
from offline_kd.data.manifest import Normalisation
from offline_kd.distill.reader import Options, Piece, Reader, Source
from offline_kd.distill.resident import Resident
from offline_kd.distill.sampler import Order
from offline_kd.models.networks import normalise
from offline_kd.store.feature_reading import features_decoder
from offline_kd.store.join import Wanted
from offline_kd.store.logit_reading import logits_decoder
from offline_kd.store.reader import Store
from offline_kd.store.rows import Rows, concatenate, gather
from offline_kd.support.console import say
from offline_kd.support.errors import RecipeError
from offline_kd.views.render import render, size_of_boxes

T = TypeVar("T")


class Loader(IterableDataset[Rows]):
    """The batches of a training run.

    Order and views are pure functions of seed, epoch and dataset: the same with and without a store, for any number of
    workers and ranks. Rows are shuffled within pools of `pool_blocks` tars, which are themselves in a new order every
    epoch. Of several ranks each shows its share of every batch, which may be none of it: a batch of 0 rows. One process
    alone skips a batch of which no image can be decoded.

    `for batch in loader` goes through one pass, and the next time through the one after it; `state_dict` says how far
    it is. A pass is an epoch, or `views_per_decode` epochs at once. It is a dataset of whole batches, as torch's
    DataLoader takes it with `batch_size=None`.

    Args:
        normalisation: give images as the float32 input of a network; None: as uint8 pixels.
        resident: of the same source: the same batches are made from what it keeps on the device; None: they are read,
            pass by pass.
    """

    def __init__(
        self,
        source: Source,
        options: Options,
        device: torch.device,
        normalisation: Normalisation | None = None,
        resident: Resident | None = None,
    ) -> None:
        self.source, self.options, self.device, self.normalisation = source, options, device, normalisation
        self.resident = resident
        self.views_per_decode, self.bad = options.views_per_decode, set[str]()
        self.next_epoch = self.next_step = 0
        self.reader = Reader(source, options)
        has_logits = len(source.stores) == 1 and source.wanted[0].logits
        self._decode = logits_decoder(source.stores[0], device) if has_logits else None
        self._decode_features = all_features_decoder(source.stores, source.wanted, device)
        self._thread = ThreadPoolExecutor(1)  # only a GPU's batches are made in it: a CPU has enough to do
        is_remote = source.images.is_remote or any(store.place.is_remote for store in source.stores)
        # One loader of one process each: pieces are taken from the worker that has the next tar, and from no other.
        self.workers = [
            DataLoader(
                replace(self.reader, worker=worker),
                batch_size=None,
                num_workers=1,
                persistent_workers=True,
                prefetch_factor=self._ahead(),
                # The client of object stores has threads of its own, which do not survive a fork: children would hang.
                multiprocessing_context="spawn" if is_remote else None,
            )
            for worker in range(options.workers)
        ]

    def _ahead(self) -> int:
        """Pieces that a worker may have ready: its share of a pool, so that it reads while another pool is shown."""
        rows, tars = self.reader.rows_in_piece(), self.source.images.split.tars
        pieces = sum(-(-tar.count // rows) for tar in tars) * min(self.options.pool_blocks / len(tars), 1)
        return max(2, math.ceil(pieces / self.options.workers))

    @cached_property
    def steps_per_pass(self) -> int:
        """Steps of one call of `epoch`. The last batch, if it is small or a single row, joins the one before."""
        return self.reader.order().steps

    def __len__(self) -> int:
        return self.steps_per_pass

    def __iter__(self) -> Iterator[Rows]:
        """What is left of the pass that is next: all of it, unless a saved state says otherwise.

        Raises RecipeError in a worker of a DataLoader, each of which would show every batch.
        """
        if get_worker_info() is not None:
            raise RecipeError(
                "batches of a store in a worker process: every worker would show all of them. Give DataLoader "
                "num_workers=0, and the loader of the store workers=N."
            )
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

    def set_epoch(self, epoch: int) -> None:
        """Which epoch `for batch in loader` shows next, from 0; of the one it is in, what was shown stays shown."""
        if epoch != self.next_epoch:
            self.next_epoch, self.next_step = epoch, 0

    def pairs(self) -> DataLoader[Rows]:
        """The same batches for a loop that wants `(input, target)`, such as timm's: the target is the whole batch."""
        return DataLoader(self, batch_size=None, collate_fn=_pair)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Rows]:
        """All samples once, or `views_per_decode` times with a view each, which is as many epochs.

        Args:
            epoch: counted from 0; a multiple of `views_per_decode`.
            first_step: go on from here, where another run, of however many workers and ranks, was stopped.
        """
        if self.resident is not None:
            yield from self._of_resident(self.resident, epoch, first_step)
            return
        gathered = self._gathered(epoch, first_step)
        if self.device.type != "cuda":
            for rows in gathered:
                yield self._rendered(rows, rows.map(lambda tensor: tensor.to(self.device, non_blocking=True)))
            return
        new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        for rows, moved, arrived in one_ahead(_copied(gathered, new_stream(self.device)), self._thread):
            now = torch.cuda.current_stream(self.device)
            now.wait_event(arrived)
            for tensor in moved.fields():
                tensor.record_stream(now)  # else its memory were free for the next copy before it was computed with
            yield self._rendered(rows, moved)

    def _gathered(self, epoch: int, first_step: int) -> Iterator[Rows]:
        """This rank's rows of every step, on the host; images that are copied are still to be rendered."""
        self.reader.start[0] = epoch
        order = self.reader.order()
        step, done = first_step, order.batch(first_step).start
        self.reader.start[1] = done
        workers: list[Iterator[Piece]] = [iter(worker) for worker in self.workers] or [iter(self.reader)]
        left = _Slots.nothing()
        for pool in range(order.num_pools):
            if order.starts[pool + 1] <= done:
                continue
            left = left.and_pieces(self._pieces_of(order, pool, workers), together=self.source.views.is_exact)
            while step < order.steps and order.batch(step).stop <= order.starts[pool + 1]:
                rows = left.of(order.batch(step))
                if len(rows) or self.options.world > 1:
                    known = self.options.shows_label(rows.key_hash)
                    yield replace(_labelled(rows, torch.from_numpy(known)), step=step)
                step += 1
            left = left.after(order.batch(step).start)

    def _of_resident(self, resident: Resident, epoch: int, first_step: int) -> Iterator[Rows]:
        self.reader.start[0] = epoch
        order = self.reader.order()
        resident.load(order)
        self._report(resident.bad)
        for rows in resident.batches(order, self.options, first_step):
            pixels = rows.images if self.normalisation is None else normalise(rows.images, self.normalisation)
            yield replace(rows, pixels=pixels, decode=self._decode, decode_features=self._decode_features)

    def _pieces_of(self, order: Order, pool: int, workers: Sequence[Iterator[Piece]]) -> list[Piece]:
        """All pieces of a pool, and nothing of later ones."""
        pieces = []
        for worker in self.reader.workers(order, pool):
            is_last = False
            while not is_last:
                pieces.append(next(workers[worker]))
                is_last = pieces[-1].is_last
                self._report(pieces[-1].bad)
        return pieces

    def _report(self, bad: Sequence[str]) -> None:
        for line in bad:
            if line not in self.bad:
                self.bad.add(line)
                say(f"left out: {line}")

    def _rendered(self, rows: Rows, moved: Rows) -> Rows:
        """The batch, of rows on the host and the same on the device."""
        images = moved.images
        if rows.box is not None and moved.box is not None and moved.flip is not None and len(moved):
            images = render(images, moved.box, moved.flip, size_of_boxes(rows.box.numpy()), self.source.views.outside)
        if self.normalisation is not None:
            images = normalise(images, self.normalisation)
        return replace(
            moved, pixels=images, box=None, flip=None, decode=self._decode, decode_features=self._decode_features
        )


def _pair(batch: Any) -> tuple[Tensor, Rows]:  # Rows: of a loader without batches of its own, an item is no list
    return batch.images, batch


def all_features_decoder(
    stores: Sequence[Store], wanted: Sequence[Wanted], device: torch.device
) -> Callable[[Mapping[str, Mapping[str, Tensor]]], dict[str, Tensor]]:
    """A function from all the arrays of features that are wanted of stores, by name, to those features, decoded."""
    decoders = {
        name: features_decoder(store, name, device)
        for store, one in zip(stores, wanted, strict=True)
        for name in one.features
    }
    return lambda arrays: {name: decode(arrays[name]) for name, decode in decoders.items()}


def one_ahead(items: Iterator[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    """The same items: each is made in the thread while the one before it is used."""
    coming = thread.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = thread.submit(next, items, None)
        yield item


def _copied(gathered: Iterator[Rows], stream: torch.cuda.Stream) -> Iterator[tuple[Rows, Rows, torch.cuda.Event]]:
    """Rows on the host and on the stream's GPU, where they have arrived after the event."""
    for rows in gathered:
        with torch.cuda.stream(stream):  # of its GPU, too: in a thread the current one is another
            moved = rows.map(lambda tensor: tensor.pin_memory().to(stream.device, non_blocking=True))
            arrived = stream.record_event()
        yield rows, moved, arrived


def _labelled(rows: Rows, known: Tensor) -> Rows:
    """With the labels that are known `[n]`."""
    labels, other = (hidden_where(one, known) for one in (rows.labels, rows.other_labels))
    return replace(rows, labels=labels, other_labels=other)


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

    def and_pieces(self, pieces: Sequence[Piece], *, together: bool) -> "_Slots":
        """With the pieces of a pool behind them; `together`: small images are better moved, once."""
        rows, slots = [piece.rows for piece in pieces], np.concatenate([piece.slots for piece in pieces])
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

    def of(self, slots: range) -> Rows:
        """The rows of these slots: those of this rank, without bad images, which were left out; maybe none."""
        some = slice(*np.searchsorted(self.slots, [slots.start, slots.stop]))
        return gather(self.parts, self.part[some], self.row[some])

    def after(self, start: int) -> "_Slots":
        """The rows from a slot on, less than a batch of them, moved: a few rows would keep the memory of a pool."""
        first = int(np.searchsorted(self.slots, start))
        rows = gather(self.parts, self.part[first:], self.row[first:])
        return _Slots([rows], np.zeros(len(rows), dtype=np.int64), np.arange(len(rows)), self.slots[first:])

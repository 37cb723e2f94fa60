"""Joined rows into batches: read in order, shuffled, rendered.

Reading and joining happen per tar, in worker processes if there are any; shuffling and batching happen afterwards in
the training process, so the batches do not depend on the number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from offline_kd.data.blocks import BlockLoader, Decoder, ImageBlock
from offline_kd.distill.sampler import LANES, Order
from offline_kd.store.join import Joined, join_all, joined_arrays, left_out_of, without_store
from offline_kd.store.reader import Store
from offline_kd.support.console import say
from offline_kd.support.counter_rng import counter_hash, counter_uniform
from offline_kd.support.errors import RecipeError
from offline_kd.views.epochs import view_of_epoch
from offline_kd.views.kind import ViewSpec
from offline_kd.views.mixing import NO_PARTNER, PARTNERS
from offline_kd.views.render import render, render_choice

SMALL = 8  # a last batch of less than an eighth is not worth a step
READ_AHEAD = 4  # tars, from a remote store
ALONE = 8  # images that are decoded together where none is mixed with another
LIVE_IMAGES = "live:images"
PART_BYTES = 2**26  # of pixels that a worker hands over at once
# First counters of the draws made here, so that they are independent of each other and of those of the views.
ROW_STREAM, LABEL_STREAM = 0x726F77, 0x6C6162656C


@dataclass(frozen=True)
class Rows:
    """n samples with one view each, in the training process."""

    images: Tensor  # [n, 3, H, W] uint8: un-augmented where views are exact, otherwise the rendered views
    box: Tensor  # [n, 4] int16 and
    flip: Tensor  # [n] uint8: what is to be rendered of un-augmented images
    labels: Tensor  # [n] int64
    other_labels: Tensor  # [n] int64
    share: Tensor  # [n] float32
    key_hash: NDArray[np.uint64]  # [n]
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Rows":
        tensors = {name: _take(getattr(self, name), index) for name in TENSORS}
        targets = {name: _take(array, index) for name, array in self.targets.items()}
        return Rows(**tensors, key_hash=self.key_hash[index.numpy()], targets=targets)

    @staticmethod
    def concatenate(parts: list["Rows"]) -> "Rows":
        if len(parts) == 1:
            return parts[0]
        return Rows(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS},
            key_hash=np.concatenate([part.key_hash for part in parts]),
            targets={name: torch.cat([part.targets[name] for part in parts]) for name in parts[0].targets},
        )


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """Some rows. `index_select` copies them whole where memory is contiguous, tens of times as fast as indexing."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(0, index)


TENSORS = ("images", "box", "flip", "labels", "other_labels", "share")


@dataclass(frozen=True)
class Batch:
    """What one training step needs, on the student's device."""

    images: Tensor  # [B, 3, H, W] uint8, the rendered views
    labels: Tensor  # [B] int64; -1 where the label is hidden from the student
    targets: dict[str, Tensor]  # encoded teacher targets, [B, ...]; empty without a store
    key_hash: NDArray[np.uint64]  # [B]
    other_labels: Tensor  # [B] int64, of what is mixed in
    share: Tensor  # [B] float32, of the image itself; 1: nothing is mixed in
    step: int  # of the pass


# ---- reading in order ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some joined and rendered rows of one tar."""

    position: int  # of the tar in the epoch
    is_last: bool  # of this tar
    rows: Rows
    lane: NDArray[np.int64]  # [n]
    shuffle: NDArray[np.uint64]  # [n] by which the rows of a lane are ordered within their pool
    bad: list[str]  # what was left out, one line each


def _nothing_done() -> Tensor:
    return torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class _Reader(IterableDataset[Part]):
    """Tars in their order, joined and rendered part by part; runs in the worker processes."""

    loader: BlockLoader
    views: ViewSpec
    groups: list[range]
    stores: Sequence[Store]
    decisions: Sequence[Sequence[str]]
    seed: int
    pool_blocks: int
    views_per_decode: int
    rank: int
    world: int
    size: int
    live_size: int | None
    # First epoch and first slot of the next pass, in memory that workers share: they outlive a pass.
    start: Tensor = field(default_factory=_nothing_done)

    def order(self) -> Order:
        first_epoch = int(self.start[0])
        counts = [tar.count for tar in self.loader.split.tars]
        return Order(self.seed, first_epoch, self.views_per_decode, counts, self.pool_blocks)

    def __iter__(self) -> Iterator[Part]:
        order, info = self.order(), get_worker_info()
        done = int(self.start[1])
        positions = [at for at in range(len(order.tars)) if order.pool_slots(order.pool_of(at)).stop > done]
        mine = positions[info.id :: info.num_workers] if info else positions
        for index, position in enumerate(mine):
            for later in mine[index + 1 : index + 1 + READ_AHEAD]:
                self._fetch_ahead(order, int(order.tars[later]))
            yield from self._parts(order, position)

    def _fetch_ahead(self, order: Order, number: int) -> None:
        """Begin to fetch what a tar will need of remote stores, as far as a tar is known to be a block of theirs."""
        for epoch in range(order.first_epoch, order.first_epoch + order.epochs):
            group, _ = view_of_epoch(self.seed, np.empty(0, dtype=np.uint64), epoch, self.groups)
            for store, wanted in zip(self.stores, self.decisions, strict=True):
                block = store.block_of_tar.get(self.loader.split.tars[number].sha256)
                if store.place.is_remote and block is not None:
                    store.fetch_ahead(block, group, joined_arrays(store, wanted))

    def _parts(self, order: Order, position: int) -> Iterator[Part]:
        whole = self.loader[int(order.tars[position])]
        known_bad = left_out_of(self.stores, whole)
        block = whole.without(known_bad) if known_bad else whole
        good = np.array([row for row in range(len(whole)) if row not in known_bad], dtype=np.int64)
        joined, lanes, shuffles = [], [], []
        for epoch in range(order.first_epoch, order.first_epoch + order.epochs):
            group, at = view_of_epoch(self.seed, block.key_hash, epoch, self.groups)
            if self.stores:
                joined.append(join_all(self.stores, block, group, at, self.decisions))
            else:
                joined.append(without_store(self.views, self.groups, block, group, at))
            # A tar that was read for the first time may turn out to lack bad images; lanes go by what it holds.
            lanes.append(order.lanes(position, epoch, whole.key_hash)[good])
            shuffles.append(counter_hash(ROW_STREAM, self.seed, epoch, block.key_hash))
        decoder = Decoder(block)
        bad = [f"{block.path}: sample '{one.key}': {one.problem}" for one in block.left_out]
        step = self._rows_in_part(block)
        for first in range(0, max(len(block), 1), step):
            stop = min(first + step, len(block))
            chosen = [first + np.flatnonzero(lane[first:stop] % self.world == self.rank) for lane in lanes]
            some = [one.take(rows) for one, rows in zip(joined, chosen, strict=True)]
            lane, shuffle = (
                np.concatenate([values[rows] for values, rows in zip(all_values, chosen, strict=True)])
                for all_values in (lanes, shuffles)
            )
            if self.views.is_exact:
                rows, kept = self._copied(block, some), np.arange(len(lane))
            else:
                rows, rendered = self._rendered(decoder, some)
                kept = np.flatnonzero(rendered)
            bad += [f"{block.path}: sample '{block.keys[row]}': {problem}" for row, problem in decoder.bad.items()]
            decoder.bad.clear()
            yield Part(position, stop == len(block), rows, lane[kept], shuffle[kept], bad)
            bad = []

    def _rows_in_part(self, block: ImageBlock) -> int:
        side = self.size
        row_bytes = (block.pixels[0].nbytes if block.pixels is not None else 3 * side * side) * self.views_per_decode
        return max(PART_BYTES // row_bytes // PARTNERS, 1) * PARTNERS

    def _copied(self, block: ImageBlock, joined: list[Joined]) -> Rows:
        """Un-augmented images, which the training process renders, on its device."""
        row = torch.from_numpy(np.concatenate([one.choice.row for one in joined]))
        images = block.images if len(joined) == 1 and len(row) == len(block) else _take(block.images, row)
        box, flip = (
            torch.from_numpy(np.concatenate([one.choice.own[name] for one in joined])) for name in ("box", "flip")
        )
        return _as_rows(joined, images, box, flip)

    def _rendered(self, decoder: Decoder, joined: list[Joined]) -> tuple[Rows, NDArray[np.bool_]]:
        """Rendered views, and which of the joined rows could be rendered.

        Few images are held decoded at once, and all views of an image are rendered while it is.
        """
        window = PARTNERS if self.views.mixes else ALONE
        starts = np.cumsum([0, *(len(one.labels) for one in joined)])
        good = np.ones(starts[-1], dtype=bool)
        sizes = [self.size, *([self.live_size] if self.live_size else [])]
        images = [torch.empty((int(starts[-1]), n, n, 3), dtype=torch.uint8).permute(0, 3, 1, 2) for n in sizes]
        windows = np.unique(np.concatenate([one.choice.row // window for one in joined]))
        for number in windows:
            for one, start in zip(joined, starts, strict=False):
                begin, end = np.searchsorted(one.choice.row, [number * window, (number + 1) * window])
                some, place = one.take(slice(begin, end)), slice(start + begin, start + end)
                if not self.stores:
                    _drop_bad_partners(decoder, some)
                for size, out in zip(sizes, images, strict=True):
                    good[place] = render_choice(decoder, some.choice, self.views, size, out=out[place].numpy())[1]
            decoder.forget()
        kept = [one.take(good[start : start + len(one.labels)]) for one, start in zip(joined, starts, strict=False)]
        if not good.all():
            images = [_take(one, torch.from_numpy(good.nonzero()[0])) for one in images]
        live = {LIVE_IMAGES: images[1]} if self.live_size else {}
        box, flip = torch.zeros((len(images[0]), 4), dtype=torch.int16), torch.zeros(len(images[0]), dtype=torch.uint8)
        rows = _as_rows(kept, images[0], box, flip)
        return replace(rows, targets=rows.targets | live), good


def _as_rows(joined: list[Joined], images: Tensor, box: Tensor, flip: Tensor) -> Rows:
    return Rows(
        images=images,
        box=box,
        flip=flip,
        labels=torch.cat([one.labels for one in joined]),
        other_labels=torch.cat([one.other_labels for one in joined]),
        share=torch.cat([one.share for one in joined]),
        key_hash=np.concatenate([one.key_hash for one in joined]),
        targets={name: torch.cat([one.targets[name] for one in joined]) for name in joined[0].targets},
    )


def _drop_bad_partners(decoder: Decoder, joined: Joined) -> None:
    """As stage 1 does: nothing is mixed with what cannot be decoded. Changes what is given."""
    partner = joined.choice.partner_row
    for row in np.unique(partner[partner >= 0]).tolist():
        decoder(row)
    lost = np.isin(partner, list(decoder.bad))
    if lost.any():
        partner[lost] = NO_PARTNER
        joined.share[torch.from_numpy(lost)] = 1
        joined.other_labels[torch.from_numpy(lost)] = joined.labels[torch.from_numpy(lost)]


# ---- batching ------------------------------------------------------------------------------------------------------


class Stream:
    """The batches of a training run.

    Order and views are pure functions of (seed, epoch, key): the same with and without a store, for any number of
    workers. Rows are shuffled within pools of `pool_blocks` tars, which are themselves in a new order every epoch.

    Args:
        groups: the view groups that decide which view an epoch shows: the store's.
        stores: targets come from these; none for plain training and for a live teacher.
        batch_size: of all ranks together.
        decisions: names of the decisions that are wanted of each store.
        labelled_fraction: share of the samples, chosen by key, whose label a batch shows.
        views_per_decode: epochs that pass at once, so that an image is decoded once for all of them.
        size: of resampled views; by default that of the recipe's views.
        live_size: render resampled views in this size, too, as the target `live:images`: for a live teacher.
        rank: which of `world` processes this is; each gets its share of every batch.
    """

    def __init__(
        self,
        loader: BlockLoader,
        views: ViewSpec,
        groups: list[range],
        stores: Sequence[Store],
        *,
        seed: int,
        batch_size: int,
        pool_blocks: int,
        labelled_fraction: float = 1.0,
        workers: int = 0,
        decisions: Sequence[Sequence[str]] = (),
        views_per_decode: int = 1,
        size: int | None = None,
        live_size: int | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device,
    ) -> None:
        if LANES % world or batch_size % world:
            raise RecipeError(
                f"{world} ranks: their number must divide the batch size, {batch_size}, and {LANES}, so that every "
                "rank gets as many rows as any other."
            )
        self.loader, self.seed, self.batch_size, self.world = loader, seed, batch_size, world
        self.labelled_fraction, self.device, self.views = labelled_fraction, device, views
        self.views_per_decode, self.bad = views_per_decode, set[str]()
        view_size = size or views.output_size or 0
        self.reader = _Reader(
            loader=loader,
            views=views,
            groups=groups,
            stores=stores,
            decisions=decisions or [[] for _ in stores],
            seed=seed,
            pool_blocks=pool_blocks,
            views_per_decode=views_per_decode,
            rank=rank,
            world=world,
            size=view_size,
            live_size=live_size,
        )
        rest = loader.split.count * views_per_decode % batch_size
        if world > 1 and max(2, batch_size // SMALL) <= rest < 2 * world:
            raise RecipeError(
                f"the last batch of {rest} rows is too small for {world} ranks. Use another training.batch_size."
            )
        self.parts: DataLoader[Part] | None = None
        is_remote = any(store.place.is_remote for store in stores)
        if workers:
            self.parts = DataLoader(
                self.reader,
                batch_size=None,
                num_workers=workers,
                persistent_workers=True,
                # The client of object stores has threads of its own, which do not survive a fork: children would hang.
                multiprocessing_context="spawn" if is_remote else None,
            )

    @property
    def steps_per_pass(self) -> int:
        """Steps of one call of `epoch`. The last batch, if it is small or a single row, joins the one before."""
        full, rest = divmod(self.loader.split.count * self.views_per_decode, self.batch_size)
        return max(full + (rest >= max(2, self.batch_size // SMALL)), 1)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """All samples once, or `views_per_decode` times with a view each, which is as many epochs.

        Args:
            epoch: counted from 0; a multiple of `views_per_decode`.
            first_step: go on from here, where another run, of however many workers and ranks, was stopped.
        """
        self.reader.start[0], self.reader.start[1] = epoch, first_step * self.batch_size
        order = self.reader.order()
        step, left, parts = first_step, _Slots.nothing(), iter(self.reader if self.parts is None else self.parts)
        waiting: dict[int, list[Part]] = {}
        for pool in range(order.pool_of(len(order.tars) - 1) + 1):
            slots = order.pool_slots(pool)
            if slots.stop <= first_step * self.batch_size:
                continue
            missing = sum(order.pool_of(position) == pool for position in range(len(order.tars)))
            missing -= sum(part.is_last for part in waiting.get(pool, []))
            while missing:
                part = next(parts)
                waiting.setdefault(order.pool_of(part.position), []).append(part)
                self._report(part.bad)
                missing -= part.is_last and order.pool_of(part.position) == pool
            left = left.from_slot(step * self.batch_size).and_pool(order, pool, waiting.pop(pool), self.views.is_exact)
            while step < self.steps_per_pass:
                stop = (step + 1) * self.batch_size
                if step == self.steps_per_pass - 1:
                    stop = int(order.starts[-1])
                if stop > slots.stop:
                    break
                rows = left.between(step * self.batch_size, stop)
                if rows is not None:
                    yield self._to_device(rows, step)
                step += 1

    def _report(self, bad: Sequence[str]) -> None:
        for line in bad:
            if line not in self.bad:
                self.bad.add(line)
                say(f"left out: {line}")

    def _to_device(self, rows: Rows, step: int) -> Batch:
        known = torch.from_numpy(counter_uniform(LABEL_STREAM, rows.key_hash) < self.labelled_fraction)
        labels, other = (torch.where(known, one, -1) for one in (rows.labels, rows.other_labels))
        images, box, flip, labels, other, share = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (rows.images, rows.box, rows.flip, labels, other, rows.share)
        )
        targets = {name: array.to(self.device, non_blocking=True) for name, array in rows.targets.items()}
        if self.views.is_exact:
            images = render(images, box, flip, self.views.outside)
        return Batch(images, labels, targets, rows.key_hash, other, share, step)


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

    def and_pool(self, order: Order, pool: int, parts: list[Part], together: bool) -> "_Slots":
        """With a pool behind them; `together`: small images are better moved, once."""
        lane = np.concatenate([part.lane for part in parts])
        shuffle = np.concatenate([part.shuffle for part in parts])
        slots = order.slots(pool, lane, shuffle)
        rows = [part.rows for part in parts]
        rows = [Rows.concatenate(rows)] if together else rows
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
        part, row = self.part[some], self.row[some]
        used = np.unique(part)
        if not len(used):
            return None
        gathered = Rows.concatenate([self.parts[one].take(torch.from_numpy(row[part == one])) for one in used])
        if len(used) < 2:
            return gathered
        place = np.concatenate([np.flatnonzero(part == one) for one in used])
        return gathered.take(torch.from_numpy(place.argsort()))

    def from_slot(self, start: int) -> "_Slots":
        """Without the rows of earlier slots, and without the parts that only those are in."""
        first = int(np.searchsorted(self.slots, start))
        used, part = np.unique(self.part[first:], return_inverse=True)
        return _Slots([self.parts[one] for one in used], part, self.row[first:], self.slots[first:])

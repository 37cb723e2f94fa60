"""Image tars, read in the order of an epoch, joined with the stores and rendered: what the worker processes do."""

from collections import deque
from collections.abc import Iterator, Sequence
from ctypes import Array, c_int64
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from multiprocessing.sharedctypes import RawArray

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from offline_kd.data.blocks import BlockLoader, Decoder, ImageBlock
from offline_kd.distill.sampler import Order, home_workers
from offline_kd.store.join import Wanted, join_all, joined_arrays, left_out_of, without_store
from offline_kd.store.reader import Store
from offline_kd.store.rows import Rows, concatenate, take
from offline_kd.support.counter_rng import U64, counter_uniform
from offline_kd.support.errors import RecipeError
from offline_kd.support.strict import MAX_SEED
from offline_kd.views.epochs import view_of_epoch
from offline_kd.views.kind import ViewSpec
from offline_kd.views.mixing import NO_PARTNER, PARTNERS
from offline_kd.views.random_resized_crop import RandomCrop
from offline_kd.views.render import decode_for, render_choice

LABEL_STREAM = 0x6C6162656C  # first counter of the draws made here, so that they are independent of all others
READ_AHEAD = 4  # tars, from afar
# Of an even share of a pool, what a worker may have to read so that its tars stay with it: a tar that was kept decoded
# costs next to nothing, one that was kept encoded costs nearly as much as any other.
UNEVEN_DECODED, UNEVEN_ENCODED = 2.0, 1.25
ALONE = 8  # images that are decoded together where none is mixed with another
PIECE_BYTES = 2**26  # of pixels that a worker hands over at once


@dataclass(frozen=True)
class Source:
    """What there is to read."""

    images: BlockLoader
    views: ViewSpec
    groups: list[range]  # the view groups that decide which view an epoch shows: the store's
    stores: Sequence[Store] = ()  # the teacher signal comes from these; none for plain training and a live teacher
    wanted: Sequence[Wanted] = ()  # of every store


@dataclass(frozen=True)
class Options:
    """How it is read. Batches depend on all of this, except `workers`, `rank` and `world`.

    Of several processes (ranks), each gets its share of every batch.

    Raises RecipeError for a number that cannot be.
    """

    batch_size: int  # of all ranks together
    seed: int = 0
    pool_blocks: int = 16  # tars whose rows are shuffled together
    labelled_fraction: float = 1.0  # share of the samples, chosen by key, whose label a batch shows
    workers: int = 0
    views_per_decode: int = 1  # epochs that pass at once, so that an image is decoded once for all of them
    size: int | None = None  # of resampled views; by default that of the views
    live_size: int | None = None  # render resampled views in this size, too: for a live teacher
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.seed <= MAX_SEED:
            raise RecipeError(
                f"batches of {self.batch_size} with seed {self.seed}: give at least 1, and a seed of 0 to {MAX_SEED}."
            )
        if not 0 <= self.rank < self.world <= self.batch_size:
            raise RecipeError(
                f"rank {self.rank} of {self.world} with batches of {self.batch_size}: ranks are numbered from 0, and "
                "there can be as many as a batch has rows. Use fewer processes, or a larger training.batch_size."
            )

    def shows_label(self, key_hash: U64) -> NDArray[np.bool_]:
        """`[n]` whether the student may see the label of a sample."""
        return counter_uniform(LABEL_STREAM, key_hash) < self.labelled_fraction


@dataclass(frozen=True)
class Piece:
    """Some joined and rendered rows of one tar."""

    position: int  # of the tar in the epoch
    is_last: bool  # of this tar
    rows: Rows
    slots: NDArray[np.int64]  # [n]
    bad: list[str]  # what was left out, one line each


@dataclass(eq=False)
class Reader(IterableDataset[Piece]):
    """The tars of one worker in their order, joined and rendered piece by piece; runs in the worker processes."""

    source: Source
    options: Options
    worker: int = 0  # of `options.workers`, or the training process where there are none
    # First epoch and first slot of the next pass, in memory that workers share: they outlive a pass.
    start: "Array[c_int64]" = field(default_factory=partial(RawArray, c_int64, 2))

    def order(self) -> Order:
        first_epoch, options = self.start[0], self.options
        counts = [tar.count for tar in self.source.images.split.tars]
        # Images that are copied come with their tar, and cost no time that a smaller pool would save.
        grows = not self.source.views.is_exact
        epochs, pool, batch = options.views_per_decode, options.pool_blocks, options.batch_size
        return Order(options.seed, first_epoch, epochs, counts, pool, batch, grows)

    @cached_property
    def homes(self) -> list[int]:
        """The worker that reads a tar whenever it can, by number of the tar: it keeps what it has read."""
        return home_workers([tar.count for tar in self.source.images.split.tars], max(self.options.workers, 1))

    def workers(self, order: Order, pool: int) -> list[int]:
        """Which worker reads each tar of a pool."""
        uneven = UNEVEN_DECODED if self.source.views.is_exact else UNEVEN_ENCODED
        return order.workers(pool, self.homes, uneven)

    def __iter__(self) -> Iterator[Piece]:
        order, done = self.order(), self.start[1]
        mine = self._mine(order, done)
        coming = deque(islice(mine, READ_AHEAD))
        known, slots = -1, list[NDArray[np.int64]]()
        while coming:
            pool, position = coming.popleft()
            coming.extend(islice(mine, 1))
            for _, later in coming:
                self._fetch_ahead(order, int(order.tars[later]))
            if pool != known:
                known, slots = pool, order.slots(pool)
            yield from self._pieces(order, position, slots[position - order.positions(pool).start], done)

    def _mine(self, order: Order, done: int) -> Iterator[tuple[int, int]]:
        """Pool and position of the tars that this worker reads."""
        for pool in range(order.num_pools):
            if order.starts[pool + 1] > done:
                for position, worker in zip(order.positions(pool), self.workers(order, pool), strict=True):
                    if worker == self.worker:
                        yield pool, position

    def _fetch_ahead(self, order: Order, number: int) -> None:
        """Begin to fetch a tar that lies afar, and what it needs of remote stores, as far as it is a block of them."""
        source = self.source
        source.images.fetch_ahead(number)
        for epoch in range(order.first_epoch, order.first_epoch + order.epochs):
            group, _ = view_of_epoch(order.seed, np.empty(0, dtype=np.uint64), epoch, source.groups)
            for store, wanted in zip(source.stores, source.wanted, strict=True):
                block = store.block_of_tar.get(source.images.split.tars[number].sha256)
                if store.place.is_remote and block is not None:
                    store.fetch_ahead(block, group, joined_arrays(store, wanted))

    def _pieces(self, order: Order, position: int, slots: NDArray[np.int64], done: int) -> Iterator[Piece]:
        """This rank's rows of a tar whose rows have the `slots` `[epochs, count]`, without those before slot `done`."""
        source, options = self.source, self.options
        whole = source.images[int(order.tars[position])]
        known_bad = left_out_of(source.stores, whole)
        block = whole.without(known_bad) if known_bad else whole
        # A tar that lacks bad images has fewer rows than its count: then the last slots show nothing.
        good = np.array([row for row in range(len(whole)) if row not in known_bad], dtype=np.int64)
        slots = slots[:, good]
        wanted = (slots >= done) & (order.ranks(slots, options.world) == options.rank)
        joined = [self._joined(block, epoch) for epoch in range(order.first_epoch, order.first_epoch + order.epochs)]
        decoder = Decoder(block)
        bad = [f"{block.where}: sample '{one.key}': {one.problem}" for one in block.left_out]
        step = self.rows_in_piece(0 if block.pixels is None else block.pixels[0].nbytes)
        for first in range(0, max(len(block), 1), step):
            stop = min(first + step, len(block))
            chosen = [first + np.flatnonzero(one[first:stop]) for one in wanted]
            # All rows of a piece are taken as a slice, which copies nothing.
            some = [
                one.take(slice(first, stop) if len(rows) == stop - first else rows)
                for one, rows in zip(joined, chosen, strict=True)
            ]
            places = np.concatenate([of_epoch[rows] for of_epoch, rows in zip(slots, chosen, strict=True)])
            if source.views.is_exact:
                rows = _copied(block, some)
            else:
                rows, rendered = self.rendered(decoder, some)
                places = places[rendered]
            bad += [f"{block.where}: sample '{block.keys[row]}': {problem}" for row, problem in decoder.bad.items()]
            decoder.bad.clear()
            yield Piece(position, stop == len(block), rows, places, bad)
            bad = []

    def _joined(self, block: ImageBlock, epoch: int) -> Rows:
        source = self.source
        group, at = view_of_epoch(self.options.seed, block.key_hash, epoch, source.groups)
        if source.stores:
            return join_all(source.stores, block, group, at, source.wanted)
        return without_store(source.views, source.groups, block, group, at)

    @property
    def size(self) -> int:
        """The side of resampled views; 0 where views are exact copies."""
        views = self.source.views
        return self.options.size or views.output_size or 0

    def rows_in_piece(self, image_bytes: int = 0) -> int:
        """How many rows of a tar are handed over at once, those of other ranks included; 0 bytes: of resampled views.

        Where images are copied, and are not known yet, a piece is a tar.
        """
        row_bytes = (image_bytes or 3 * self.size * self.size or 1) * self.options.views_per_decode
        return max(PIECE_BYTES * self.options.world // row_bytes // PARTNERS, 1) * PARTNERS

    def rendered(self, decoder: Decoder, joined: list[Rows]) -> tuple[Rows, NDArray[np.bool_]]:
        """Rendered views, and which of the joined rows could be rendered.

        Few images are held decoded at once, and all views of an image are rendered while it is.
        """
        views, live_size = self.source.views, self.options.live_size
        mixes = isinstance(views, RandomCrop) and views.mixing is not None
        window = PARTNERS if mixes else ALONE
        starts = np.cumsum([0, *(len(one) for one in joined)])
        good = np.ones(starts[-1], dtype=bool)
        sizes = [self.size, *([live_size] if live_size else [])]
        images = [torch.empty((int(starts[-1]), n, n, 3), dtype=torch.uint8).permute(0, 3, 1, 2) for n in sizes]
        windows = np.unique(np.concatenate([one.view.row // window for one in joined]))
        for number in windows:
            for one, start in zip(joined, starts, strict=False):
                begin, end = np.searchsorted(one.view.row, [number * window, (number + 1) * window])
                some, place = one.take(slice(begin, end)), slice(start + begin, start + end)
                if not self.source.stores:
                    decode_for(decoder, some.view, views, sizes[0])
                    _drop_bad_partners(decoder, some)
                for size, out in zip(sizes, images, strict=True):
                    good[place] = render_choice(decoder, some.view, views, size, out=out[place].numpy())[1]
            decoder.forget()
        kept = joined
        if not good.all():
            kept = [one.take(good[start : start + len(one)]) for one, start in zip(joined, starts, strict=False)]
            images = [take(one, torch.from_numpy(good.nonzero()[0])) for one in images]
        return replace(concatenate(kept), pixels=images[0], live_images=images[1] if live_size else None), good


def _copied(block: ImageBlock, joined: list[Rows]) -> Rows:
    """Un-augmented images, which the training process renders, on its device."""
    row = torch.from_numpy(np.concatenate([one.view.row for one in joined]))
    images = block.images if len(joined) == 1 and len(row) == len(block) else take(block.images, row)
    box, flip = (torch.from_numpy(np.concatenate([one.view.own[name] for one in joined])) for name in ("box", "flip"))
    return replace(concatenate(joined), pixels=images, box=box, flip=flip)


def _drop_bad_partners(decoder: Decoder, joined: Rows) -> None:
    """As stage 1 does: nothing is mixed with what cannot be decoded. Changes what is given."""
    partner = joined.view.partner_row
    lost = np.isin(partner, list(decoder.bad))
    if lost.any():
        partner[lost] = NO_PARTNER
        joined.share[torch.from_numpy(lost)] = 1
        joined.other_labels[torch.from_numpy(lost)] = joined.labels[torch.from_numpy(lost)]

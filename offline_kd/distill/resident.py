"""Images, views and what stores say of them, kept on the device: batches are made there, by index, from tables.

Everything is read once, by the join of a streamed run and with all its checks. Batches are those of a streamed run, bit
by bit: the same order decides which rows a step shows, and the same functions render and decode them. All batches of a
pass but the last have one size, where no image was left out; the last has the same size in every pass.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.blocks import Decoder, ImageBlock
from offline_kd.data.label_sets import hidden_where
from offline_kd.distill.reader import Options, Reader, Source
from offline_kd.distill.sampler import Order
from offline_kd.store.join import as_stored, join_all, left_out_of, without_store
from offline_kd.store.rows import Rows, take
from offline_kd.support.console import say
from offline_kd.support.errors import RecipeError
from offline_kd.training_recipe import Residence
from offline_kd.views.epochs import view_of_epoch
from offline_kd.views.kind import Outside
from offline_kd.views.render import render, size_of_boxes

FREE_SHARE = 0.5  # of the free memory; the rest is for the student, its gradients and activations
BOX_BYTES = 9  # of a box and a flip


class Resident:
    """Tables of all rows of a source, filled as far as passes have needed them.

    Runs with other seeds may use it one after the other: what differs between them is only which rows a step shows.

    Rows are numbered through all tars, by the counts of the manifest, and views through all rows: `row * num_views +
    view`. What was left out, because it is a bad image, has places that no batch shows.

    Args:
        size: of resampled views; what is kept of them are their pixels, and of exact ones the images as they are.
    """

    def __init__(self, source: Source, size: int, device: torch.device) -> None:
        self.source, self.size, self.device = source, size, device
        self.starts = np.cumsum([0, *(tar.count for tar in source.images.split.tars)])  # first row of every tar
        self.num_rows, self.num_views = int(self.starts[-1]), max(group.stop for group in source.groups)
        self.key_hash = np.zeros(self.num_rows, dtype=np.uint64)
        self.is_here = np.zeros(self.num_rows * self.num_views, dtype=bool)  # by view: can it be shown?
        self.loaded = set[tuple[int, int]]()  # tars and view groups
        self.bad = list[str]()  # what was left out, one line each
        self.images: Tensor | None = None  # [rows, 3, H, W] uint8
        self.table: Rows | None = None  # [rows * views]; of exact views with boxes and flips, of others with pixels
        self.view_size = (size, size)
        self._reader = Reader(source, Options(batch_size=1, size=size or None))

    def bytes_needed(self) -> int:
        """On the device, for all tables: so many rows as the first tar has bytes for one of them."""
        block = self.source.images[0]
        for store in self.source.stores:
            block = as_stored(store, block)
        rows = self._joined(block, 0)
        of_view = sum(one.nbytes for one in rows.fields()) // len(rows)
        if self.source.views.is_exact:
            return self.num_rows * (block.images[0].nbytes + self.num_views * (of_view + BOX_BYTES))
        return self.num_rows * self.num_views * (of_view + 3 * self.size * self.size)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def load(self, order: Order) -> None:
        """Read what a pass shows and is not here yet.

        Raises what a stream raises for a tar that is damaged, or a sample that is not the one the teacher saw.
        """
        epochs = range(order.first_epoch, order.first_epoch + order.epochs)
        groups = {
            view_of_epoch(order.seed, np.empty(0, dtype=np.uint64), epoch, self.source.groups)[0] for epoch in epochs
        }
        tars = range(len(self.source.images))
        missing = {number: [one for one in sorted(groups) if (number, one) not in self.loaded] for number in tars}
        for number, whole in self.source.images.in_order(number for number in tars if missing[number]):
            for group in missing[number]:
                self._load(number, whole, group)
                self.loaded.add((number, group))

    def _load(self, number: int, whole: ImageBlock, group: int) -> None:
        known_bad, views = left_out_of(self.source.stores, whole), self.source.groups[group]
        block = whole.without(known_bad) if known_bad else whole
        self.bad += [f"{block.where}: sample '{one.key}': {one.problem}" for one in block.left_out]
        good = np.array([row for row in range(len(whole)) if row not in known_bad], dtype=np.int64)
        row = self.starts[number] + good
        self.key_hash[row] = block.key_hash
        place = (row[:, None] * self.num_views + np.arange(views.start, views.stop)).ravel()
        joined = self._joined(block, group)
        if self.source.views.is_exact:
            if self.images is None:
                self.images = _room_for(self.num_rows, block.images, self.device)
            self.images.index_copy_(0, torch.from_numpy(row).to(self.device), block.images.to(self.device))
            own = joined.view.own
            self.view_size = size_of_boxes(own["box"])
            box, flip = (torch.from_numpy(own[name]) for name in ("box", "flip"))
            self._put(place, replace(joined, choice=None, box=box, flip=flip))
            return
        decoder = Decoder(block)
        step = self._reader.rows_in_piece(3 * self.size * self.size * len(views))
        for first in range(0, len(block), step):
            piece = slice(first * len(views), (first + step) * len(views))
            rows, rendered = self._reader.rendered(decoder, [joined.take(piece)])
            self._put(place[piece][rendered], rows)
            self.bad += [f"{block.where}: sample '{block.keys[one]}': {why}" for one, why in decoder.bad.items()]
            decoder.bad.clear()

    def _joined(self, block: ImageBlock, group: int) -> Rows:
        """All views of a group, of every row of a tar: all of the first row first."""
        source = self.source
        views = np.arange(len(source.groups[group]))
        position = np.broadcast_to(views, (len(block), len(views)))
        if source.stores:
            return join_all(source.stores, block, group, position, source.wanted)
        return without_store(source.views, source.groups, block, group, position)

    def _put(self, place: NDArray[np.int64], rows: Rows) -> None:
        if self.table is None:
            self.table = rows.map(lambda one: _room_for(self.num_rows * self.num_views, one, self.device))
        at = torch.from_numpy(place).to(self.device)
        for table, one in zip(self.table.fields(), rows.fields(), strict=True):
            table.index_copy_(0, at, one.to(self.device))
        self.is_here[place] = True

    # ---- batches -----------------------------------------------------------------------------------------------------

    def batches(self, order: Order, options: Options, first_step: int) -> Iterator[Rows]:
        """This rank's rows of every batch of a pass that was loaded, from a step on.

        What a step needs of the host was copied before the first: the device need not be waited for.
        """
        assert self.table is not None, "nothing was loaded"
        slots, place = self._shown(order, options)
        key_hash = self.key_hash[place // self.num_views]
        at, known = (torch.from_numpy(one).to(self.device) for one in (place, options.shows_label(key_hash)))
        row = at // self.num_views
        steps = range(first_step, order.steps)
        ends = np.searchsorted(slots, [(order.batch(step).start, order.batch(step).stop) for step in steps])
        for step, (start, stop) in zip(steps, ends.reshape(-1, 2).tolist(), strict=True):
            if start == stop and options.world == 1:
                continue  # nothing but bad images
            some = slice(start, stop)
            rows = rows_at(
                self.table, self.images, at[some], row[some], known[some], self.view_size, self.source.views.outside
            )
            yield replace(rows, key_hash=key_hash[some], step=step)

    def _shown(self, order: Order, options: Options) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The slots of this rank in a pass, rising, and the view that each shows: `[n]`, `[n]`."""
        place = np.empty(order.num_rows, dtype=np.int64)
        slots_of = {
            number: slots
            for pool in range(order.num_pools)
            for number, slots in zip(order.tars[order.positions(pool)].tolist(), order.slots(pool), strict=True)
        }
        for index in range(order.epochs):
            epoch = order.first_epoch + index
            group, position = view_of_epoch(order.seed, self.key_hash, epoch, self.source.groups)
            view = np.arange(self.num_rows) * self.num_views + self.source.groups[group].start + position
            place[np.concatenate([slots_of[number][index] for number in range(len(slots_of))])] = view
        slots = np.arange(order.num_rows)
        mine = self.is_here[place] & (order.ranks(slots, options.world) == options.rank)
        return slots[mine], place[mine]


def rows_at(
    table: Rows,
    images: Tensor | None,
    place: Tensor,
    row: Tensor,
    known: Tensor,
    view_size: tuple[int, int],
    outside: Outside,
) -> Rows:
    """Rows of the tables, rendered, all on their device; nothing is read back from it.

    Args:
        table: `[rows * views]`, with pixels where there are no `images` `[rows, 3, H, W]`.
        place: `[n]` int64 in the table.
        row: `[n]` int64 in the images.
        known: `[n]` bool, whether the student may see the label.
        view_size: height and width of all views.
    """
    rows = table.map(lambda one: take(one, place))
    labels, other = (hidden_where(one, known) for one in (rows.labels, rows.other_labels))
    pixels = rows.pixels if images is None else take(images, row)
    if pixels is not None and rows.box is not None and rows.flip is not None and len(place):
        pixels = render(pixels, rows.box, rows.flip, view_size, outside)
    return replace(rows, labels=labels, other_labels=other, pixels=pixels, box=None, flip=None)


def _room_for(count: int, like: Tensor, device: torch.device) -> Tensor:
    """For so many rows like these, in their memory format."""
    shape = (count, *like.shape[1:])
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return torch.zeros([shape[0], *shape[2:], shape[1]], dtype=like.dtype, device=device).permute(0, 3, 1, 2)
    return torch.zeros(shape, dtype=like.dtype, device=device)


# ---- does it fit? ----------------------------------------------------------------------------------------------------


def resident_if_it_fits(choice: Residence, source: Source, options: Options, device: torch.device) -> Resident | None:
    """Empty tables, or None where a run is streamed.

    By `auto` that is everywhere but on a GPU with exact views: on a CPU both are as fast, and resampled views would all
    be rendered, by this process alone, before the first is shown.

    Raises RecipeError where `always` was asked for and the tables do not fit.
    """
    exact = source.views.is_exact
    if choice == "never" or (choice == "auto" and (device.type != "cuda" or not exact)):
        return None
    if options.live_size and not exact:
        say("training.resident: views in the size of a live teacher are not kept, so this run is streamed")
        return None
    resident = Resident(source, Reader(source, options).size, device)
    needed, free = resident.bytes_needed(), free_bytes(device)
    if device.type != "cuda":
        free //= options.world  # ranks of one machine share its memory
    figures = f"{needed:,} bytes, {FREE_SHARE:.0%} of what is free on {device} are {int(FREE_SHARE * free):,}"
    if needed <= FREE_SHARE * free:
        say(f"images, views and targets are kept on {device}: {needed:,} bytes")
        return resident
    if choice == "always":
        raise RecipeError(
            f"training.resident is 'always', but images, views and targets need {figures}: use fewer views or tars, or "
            "stream them with --set training.resident=auto."
        )
    say(f"images, views and targets are streamed: on the device they would need {figures}")
    return None


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, what this process holds there without using it included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: what can be said is how much there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

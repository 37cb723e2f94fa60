"""Images, views and stored targets, joined sample by sample, into batches.

The join goes by key, never by position: a re-sharded, re-ordered or partial copy of the dataset gets the right rows.
Every sample is checked on key hash, image bytes and label each time it is joined, and the stored probe pixels are
rendered again. Reading and joining happen per tar, in worker processes if there are any; shuffling, batching and
rendering happen afterwards in the training process, so the batches do not depend on the number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from offline_kd.data import BlockLoader, Decoder, ImageBlock
from offline_kd.errors import RecipeError, StoreCorrupt, StoreMismatch, did_you_mean
from offline_kd.progress import say
from offline_kd.rendering import Choice, choose, decoder_versions, render, render_choice, render_some
from offline_kd.store.codec import codec_arrays, unpack
from offline_kd.store.reader import Arrays, Store
from offline_kd.templates import SubclassDecisions
from offline_kd.views import (
    NO_PARTNER,
    PARTNERS,
    WHOLE,
    AnyViews,
    NoAugmentation,
    PadCropFlip,
    Parameters,
    RandomCrop,
    counter_hash,
    counter_uniform,
    draw,
    is_exact,
    outside,
    view_arrays,
    view_of_epoch,
)

SMALL = 8  # a last batch of less than an eighth is not worth a step
READ_AHEAD = 4  # tars, from a remote store
MOST_DRIFT = 0.5  # mean difference of pixels, in 1/255, that other versions of libraries may make
ALONE = 8  # images that are decoded together where none is mixed with another
LANES = 96  # ranks are a divisor of it
LIVE_IMAGES = "live:images"
PART_BYTES = 2**26  # of pixels that a worker hands over at once
# First counters of the draws made here, so that they are independent of each other and of those of views.py.
BLOCK_STREAM, ROW_STREAM, LABEL_STREAM, LANE_STREAM = 0x626C6F636B, 0x726F77, 0x6C6162656C, 0x6C616E65


@dataclass(frozen=True)
class Joined:
    """n samples of a tar with one view each: what it is, and what stores say of it; without pixels."""

    choice: Choice
    labels: Tensor  # [n] int64
    other_labels: Tensor  # [n] of the image that is mixed in; where there is none, as `labels`
    share: Tensor  # [n] float32, of the image itself
    key_hash: NDArray[np.uint64]  # [n]
    targets: dict[str, Tensor]  # by codec array or `decisions/...`, [n, ...]; empty without a store

    def take(self, index: NDArray[Any] | slice) -> "Joined":
        return Joined(
            self.choice.take(index),
            self.labels[index],
            self.other_labels[index],
            self.share[index],
            self.key_hash[index],
            {name: array[index] for name, array in self.targets.items()},
        )


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
        tensors = {name: getattr(self, name)[index] for name in TENSORS}
        targets = {name: array[index] for name, array in self.targets.items()}
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


# ---- joining -------------------------------------------------------------------------------------------------------


def join(
    store: Store, block: ImageBlock, group: int, position: NDArray[np.int64], decisions: Sequence[str] = ()
) -> Joined:
    """Give each sample of an image tar what the store says of one of its views.

    Args:
        group: the view group, common to all samples.
        position: `[n]` view within the group, for each sample of the tar.
        decisions: names of the decisions that are wanted beside the logits.

    Raises:
        StoreMismatch: a sample is not in the store, or is there with other image bytes or another label.
        StoreCorrupt: stored probe pixels are not what the stored parameters render.
    """
    return join_all([store], block, group, position, [decisions])


def join_all(
    stores: Sequence[Store],
    block: ImageBlock,
    group: int,
    position: NDArray[np.int64],
    decisions: Sequence[Sequence[str]],
) -> Joined:
    """The same from several stores; targets of the second one have `1:` before their names, and so on.

    Raises StoreMismatch, too, when the stores mean different crops by one view.
    """
    first, *others = [
        _join_one(store, block, group, position, wanted) for store, wanted in zip(stores, decisions, strict=True)
    ]
    targets = dict(first.targets)
    for number, (store, rows) in enumerate(zip(stores[1:], others, strict=True), start=1):
        for name, array in first.choice.own.items():
            other = rows.choice.own[name]
            # A store of its own may have left out other rows, so that partners are numbered in another way.
            if name == "partner":
                array, other = first.choice.partner_row, rows.choice.partner_row
            different = (array != other).reshape(len(array), -1).any(axis=1)
            if different.any():
                index = int(different.nonzero()[0][0])
                raise StoreMismatch(
                    f"{store.place}: view {store.identity.groups[group][int(position[index])]} of sample "
                    f"'{block.keys[index]}' has {name} {other[index].tolist()}, in {stores[0].place} it is "
                    f"{array[index].tolist()}. Stores that are mixed must hold the same views: capture both with the "
                    "same views (kind, seed and views_per_group)."
                )
        targets |= {f"{number}:{name}": array for name, array in rows.targets.items()}
    return replace(first, targets=targets)


def _join_one(
    store: Store, block: ImageBlock, group: int, position: NDArray[np.int64], decisions: Sequence[str]
) -> Joined:
    names = joined_arrays(store, decisions)
    store_rows = _find_rows(store, block)
    store_blocks, offsets = np.divmod(store_rows, store.identity.rows_per_block)
    found: Arrays = {}
    partner_row = np.full(len(block), NO_PARTNER, dtype=np.int64)
    partner: Parameters = {}
    slabs = []
    for number in np.unique(store_blocks):
        arrays = store.read(int(number), group, names)
        here = np.flatnonzero(store_blocks == number)
        slabs.append((int(number), arrays, here))
        for name in names:
            if name.startswith("probe/"):
                continue
            per_view = name.startswith(("view/", "logits/", "decisions/"))
            values = arrays[name][offsets[here], position[here]] if per_view else arrays[name][offsets[here]]
            _put(found, name, here, values, len(block))
        if "view/partner" in arrays:
            at = found["view/partner"][here].astype(np.int64)
            for name in view_arrays(store.identity.views):
                _put(partner, name, here, arrays[f"view/{name}"][at.clip(min=0), position[here]], len(block))
            partner_row[here] = _rows_in_tar(store, block, arrays["key_hash"], at)
    _check_samples(store, block, found)
    for number, arrays, here in slabs:
        _check_probes(store, block, number, arrays, here, offsets[here])
    logits = {name: found[f"logits/{name}"] for name in codec_arrays(store.identity.codec)}
    decided = {name: array for name, array in found.items() if name.startswith("decisions/")}
    targets = {
        name: _tensor(array)
        for name, array in (unpack(store.identity.codec, logits, store.codec_tables) | decided).items()
    }
    own = {name: found[f"view/{name}"] for name in view_arrays(store.identity.views)}
    return _joined(block, Choice(np.arange(len(block)), own, partner_row, partner or own), targets)


def _put(found: dict[str, NDArray[Any]], name: str, here: NDArray[np.int64], values: NDArray[Any], count: int) -> None:
    if name not in found:
        found[name] = np.empty((count, *values.shape[1:]), dtype=values.dtype)
    found[name][here] = values


def _rows_in_tar(
    store: Store, block: ImageBlock, key_hash: NDArray[Any], partner: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Which rows of a tar are the rows `partner` of a store's block, by key; NO_PARTNER stays what it is."""
    mixed = partner >= 0
    wanted = key_hash[partner[mixed]]
    order = block.key_hash.argsort()
    place = np.searchsorted(block.key_hash, wanted, sorter=order).clip(max=len(block) - 1)
    rows = order[place]
    absent = np.flatnonzero(block.key_hash[rows] != wanted)
    if len(absent):
        raise StoreMismatch(
            f"{block.name}: {len(absent)} of its images are mixed with images of other tars (the first has key hash "
            f"{wanted[absent[0]]:016x}). Mixed views of {store.place} need the tars that it was made from."
        )
    found = np.full(len(partner), NO_PARTNER, dtype=np.int64)
    found[mixed] = rows
    return found


def _joined(block: ImageBlock, choice: Choice, targets: dict[str, Tensor]) -> Joined:
    labels = torch.from_numpy(block.labels[choice.row]).long()
    mixed = torch.from_numpy(choice.partner_row >= 0)
    other = torch.from_numpy(block.labels[choice.partner_row.clip(min=0)]).long()
    share = torch.ones(len(labels))
    if "share" in choice.own:
        share = torch.from_numpy(choice.own["share"].astype(np.float32) / WHOLE)
    return Joined(choice, labels, torch.where(mixed, other, labels), share, block.key_hash[choice.row], targets)


def joined_arrays(store: Store, decisions: Sequence[str]) -> list[str]:
    """The arrays that a join reads."""
    views = store.identity.views
    names = [
        "image_crc",
        "label",
        "probe/row",
        "probe/view",
        "probe/pixels",
        *(f"view/{n}" for n in view_arrays(views)),
    ]
    if "partner" in view_arrays(views):
        names.append("key_hash")
    names += [f"logits/{name}" for name in codec_arrays(store.identity.codec)]
    return names + [name for one in decisions for name in decision_arrays(store, one)]


def decision_arrays(store: Store, name: str) -> list[str]:
    """The arrays that a loss on these decisions reads; raises StoreMismatch when the store has none of that name."""
    if name not in store.identity.decisions:
        raise StoreMismatch(
            f"{store.place}: holds no decisions '{name}', which the objective asks for."
            f"{did_you_mean(name, store.identity.decisions)} Capture them with capture.decisions in the recipe."
        )
    config = store.identity.decisions[name].config
    if isinstance(config, SubclassDecisions):
        return [f"decisions/{name}/subclass"]
    return [f"decisions/{name}/{part}" for part in (("id", "prob") if config.top > 1 else ("id",))]


def tables_on(store: Store, name: str, device: torch.device) -> dict[str, Tensor]:
    """Templates (or LDA and sub-classes) of decisions, by the last part of their name."""
    return {part: _tensor(array).to(device) for part, array in store.read_tables(name).items()}


def codec_tables_on(store: Store, device: torch.device) -> dict[str, Tensor]:
    """What the codec of a store needs to decode logits; nothing for most."""
    return {part: _tensor(array).to(device) for part, array in (store.codec_tables or {}).items()}


def _tensor(array: NDArray[Any]) -> Tensor:
    """Torch knows uint16 but can do little with it."""
    return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)


def without_store(
    views: AnyViews, groups: list[range], block: ImageBlock, group: int, position: NDArray[np.int64]
) -> Joined:
    """The same rows with the same views as `join`, drawn here and without targets."""
    parameters = draw(views, block.key_hash, block.sizes())
    choice = choose(parameters, np.arange(len(block)), groups[group].start + position)
    return _joined(block, choice, {})


def _find_rows(store: Store, block: ImageBlock) -> NDArray[np.int64]:
    """The store's row of every sample: of the block that was made from this tar, or by an index of all keys."""
    number = store.block_of_tar.get(block.sha256)
    if number is not None:
        hashes = store.read(number, 0, ["key_hash"])["key_hash"]
        if np.array_equal(hashes, block.key_hash):
            return number * store.identity.rows_per_block + np.arange(len(block))
    hashes, rows = store.row_index
    place = np.searchsorted(hashes, block.key_hash).clip(max=len(hashes) - 1)
    absent = np.flatnonzero(hashes[place] != block.key_hash)
    if len(absent):
        raise StoreMismatch(
            f"{block.name}: sample '{block.keys[absent[0]]}' (and {len(absent) - 1} more) is not in the store "
            f"{store.place}, which was made from {store.identity.dataset.name}/{store.identity.dataset.split}. "
            "Use the dataset the store was made from, or a part of it."
        )
    return rows[place]


def as_stored(store: Store, block: ImageBlock) -> ImageBlock:
    """A tar without the bad images that the store left out of it."""
    bad = left_out_of([store], block)
    return block.without(bad) if bad else block


def left_out_of(stores: Sequence[Store], block: ImageBlock) -> dict[int, str]:
    """Rows of a tar that the stores left out, because they were bad images, and why."""
    bad: dict[int, str] = {}
    for store in stores:
        number = store.block_of_tar.get(block.sha256)
        if number is not None and (left_out := store.entry("", number, 0).left_out):
            bad |= {row: left_out[key] for row, key in enumerate(block.keys) if key in left_out}
    return bad


def _check_samples(store: Store, block: ImageBlock, found: Arrays) -> None:
    changed = np.flatnonzero(found["image_crc"] != block.image_crc)
    if len(changed):
        first = changed[0]
        raise StoreMismatch(
            f"{block.name}: the image of sample '{block.keys[first]}' (and {len(changed) - 1} more) has crc32c "
            f"{block.image_crc[first]:08x}, the one the teacher saw had {found['image_crc'][first]:08x} (store "
            f"{store.place}). The images were changed since: use the original dataset, or capture it again."
        )
    relabelled = np.flatnonzero(found["label"] != block.labels)
    if len(relabelled):
        first = relabelled[0]
        raise StoreMismatch(
            f"{block.name}: sample '{block.keys[first]}' (and {len(relabelled) - 1} more) has label "
            f"{block.labels[first]}, in the store {store.place} it has {found['label'][first]}. "
            "The labels were changed since: use the original dataset, or capture it again."
        )
    if (found["view/flip"].astype(int) > 1).any():
        raise StoreCorrupt(f"{store.place}: a view that was never written is in use. Copy or capture the store again.")


def _check_probes(
    store: Store,
    block: ImageBlock,
    number: int,
    arrays: Arrays,
    local: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> None:
    """Render the probes of a store block again, as far as their samples are in this tar."""
    at = np.full(store.identity.rows_per_block, -1)
    at[offsets] = local
    here = at[arrays["probe/row"].astype(np.int64)] >= 0
    if not here.any():
        return
    row, view = arrays["probe/row"][here].astype(np.int64), arrays["probe/view"][here].astype(np.int64)
    parameters = {name: arrays[f"view/{name}"] for name in view_arrays(store.identity.views)}
    choice = choose(parameters, row, view)
    partner_row = (
        _rows_in_tar(store, block, arrays["key_hash"], choice.partner_row) if "partner" in parameters else None
    )
    choice = replace(choice, row=at[row], partner_row=choice.partner_row if partner_row is None else partner_row)
    pixels = render_some(block, choice, store.identity.views, store.created.seen_size[0])
    seen = arrays["probe/pixels"][here]
    wrong = np.flatnonzero((pixels != seen).any(axis=(1, 2, 3)))
    if len(wrong):
        first = wrong[0]
        difference = np.abs(pixels[first].astype(int) - seen[first].astype(int))
        changed = _other_versions(store)
        if changed and np.abs(pixels.astype(int) - seen).mean() <= MOST_DRIFT:
            say(
                f"{store.place}: views differ from what the teacher saw by up to {difference.max()} of 255 (mean "
                f"{difference.mean():.2g}), in block {number}: {changed}. Training goes on with these views."
            )
            return
        raise StoreCorrupt(
            f"{store.place}: block {number}, sample '{block.keys[at[row[first]]]}': the stored view (box "
            f"{choice.own['box'][first].tolist()}, flip {int(choice.own['flip'][first])}) renders to pixels that "
            f"differ from those the teacher saw, by up to {difference.max()} of 255 in "
            f"{np.count_nonzero(difference.any(axis=0))} places (mean {difference.mean():.2g}). Parameters and targets "
            "do not belong together, or images are decoded differently here: capture the store again."
        )


def _other_versions(store: Store) -> str:
    """What resamples and decodes here, where it is not what the store was made with; '' for views that are exact."""
    if is_exact(store.identity.views):
        return ""
    here = {"pillow": PIL.__version__, "torchvision": version("torchvision")} | decoder_versions()
    there = store.created.versions
    return ", ".join(
        f"{name} {here[name]} here, {there[name]} there" for name in here if there.get(name, here[name]) != here[name]
    )


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


@dataclass(frozen=True)
class Plan:
    """The order of one pass over the data, a pure function of seed, epoch, keys and the manifest's counts.

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
    def order(self) -> NDArray[np.int64]:
        """The numbers of the tars."""
        numbers = np.arange(len(self.counts), dtype=np.uint64)
        return counter_hash(BLOCK_STREAM, self.seed, self.first_epoch, numbers).argsort()

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The number of each tar's first row, by position; behind the last one, the number of rows."""
        return np.concatenate([[0], np.cumsum(np.array(self.counts)[self.order])]) * self.epochs

    def pool_of(self, position: int) -> int:
        return position // self.pool_blocks

    def pool_slots(self, pool: int) -> range:
        first, end = (min(number * self.pool_blocks, len(self.order)) for number in (pool, pool + 1))
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


class _Reader(IterableDataset[Part]):
    """Tars in a plan's order, joined and rendered part by part; runs in the worker processes."""

    def __init__(
        self,
        loader: BlockLoader,
        views: AnyViews,
        groups: list[range],
        stores: Sequence[Store],
        decisions: Sequence[Sequence[str]],
        seed: int,
        pool_blocks: int,
        views_per_decode: int,
        rank: int,
        world: int,
        size: int,
        live_size: int | None,
    ) -> None:
        self.loader, self.views, self.groups, self.stores, self.seed = loader, views, groups, stores, seed
        self.decisions, self.pool_blocks, self.views_per_decode = decisions, pool_blocks, views_per_decode
        self.rank, self.world, self.size, self.live_size = rank, world, size, live_size
        # What the next pass begins with, in memory that workers share: they outlive a pass.
        self.start = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        # first epoch, first slot

    def plan(self) -> Plan:
        first_epoch = int(self.start[0])
        counts = [tar.count for tar in self.loader.split.tars]
        return Plan(self.seed, first_epoch, self.views_per_decode, counts, self.pool_blocks)

    def __iter__(self) -> Iterator[Part]:
        plan, info = self.plan(), get_worker_info()
        done = int(self.start[1])
        positions = [at for at in range(len(plan.order)) if plan.pool_slots(plan.pool_of(at)).stop > done]
        mine = positions[info.id :: info.num_workers] if info else positions
        for index, position in enumerate(mine):
            for later in mine[index + 1 : index + 1 + READ_AHEAD]:
                self._fetch_ahead(plan, int(plan.order[later]))
            yield from self._parts(plan, position)

    def _fetch_ahead(self, plan: Plan, number: int) -> None:
        """Begin to fetch what a tar will need of remote stores, as far as a tar is known to be a block of theirs."""
        for epoch in range(plan.first_epoch, plan.first_epoch + plan.epochs):
            group, _ = view_of_epoch(self.seed, np.empty(0, dtype=np.uint64), epoch, self.groups)
            for store, wanted in zip(self.stores, self.decisions, strict=True):
                block = store.block_of_tar.get(self.loader.split.tars[number].sha256)
                if store.place.is_remote and block is not None:
                    store.fetch_ahead(block, group, joined_arrays(store, wanted))

    def _parts(self, plan: Plan, position: int) -> Iterator[Part]:
        whole = self.loader[int(plan.order[position])]
        known_bad = left_out_of(self.stores, whole)
        block = whole.without(known_bad) if known_bad else whole
        good = np.array([row for row in range(len(whole)) if row not in known_bad], dtype=np.int64)
        joined, lanes, shuffles = [], [], []
        for epoch in range(plan.first_epoch, plan.first_epoch + plan.epochs):
            group, at = view_of_epoch(self.seed, block.key_hash, epoch, self.groups)
            if self.stores:
                joined.append(join_all(self.stores, block, group, at, self.decisions))
            else:
                joined.append(without_store(self.views, self.groups, block, group, at))
            # A tar that was read for the first time may turn out to lack bad images; lanes go by what it holds.
            lanes.append(plan.lanes(position, epoch, whole.key_hash)[good])
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
            if is_exact(self.views):
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
        images = block.images if len(joined) == 1 and len(row) == len(block) else block.images[row]
        box, flip = (
            torch.from_numpy(np.concatenate([one.choice.own[name] for one in joined])) for name in ("box", "flip")
        )
        return _as_rows(joined, images, box, flip)

    def _rendered(self, decoder: Decoder, joined: list[Joined]) -> tuple[Rows, NDArray[np.bool_]]:
        """Rendered views, and which of the joined rows could be rendered.

        Few images are held decoded at once, and all views of an image are rendered while it is.
        """
        mixes = isinstance(self.views, RandomCrop) and self.views.mixing is not None
        window = PARTNERS if mixes else ALONE
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
            images = [one[torch.from_numpy(good)] for one in images]
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
        views: AnyViews,
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
        view_size = size or (0 if isinstance(views, NoAugmentation | PadCropFlip) else views.size)
        decisions = decisions or [[] for _ in stores]
        self.reader = _Reader(
            *(
                loader,
                views,
                groups,
                stores,
                decisions,
                seed,
                pool_blocks,
                views_per_decode,
                rank,
                world,
                view_size,
                live_size,
            )
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
        plan = self.reader.plan()
        step, left, parts = first_step, _Slots.nothing(), iter(self.reader if self.parts is None else self.parts)
        waiting: dict[int, list[Part]] = {}
        for pool in range(plan.pool_of(len(plan.order) - 1) + 1):
            slots = plan.pool_slots(pool)
            if slots.stop <= first_step * self.batch_size:
                continue
            missing = sum(plan.pool_of(position) == pool for position in range(len(plan.order)))
            missing -= sum(part.is_last for part in waiting.get(pool, []))
            while missing:
                part = next(parts)
                waiting.setdefault(plan.pool_of(part.position), []).append(part)
                self._report(part.bad)
                missing -= part.is_last and plan.pool_of(part.position) == pool
            left = left.from_slot(step * self.batch_size).and_pool(plan, pool, waiting.pop(pool), is_exact(self.views))
            while step < self.steps_per_pass:
                stop = (step + 1) * self.batch_size
                if step == self.steps_per_pass - 1:
                    stop = int(plan.starts[-1])
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
        if is_exact(self.views):
            images = render(images, box, flip, outside(self.views))
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

    def and_pool(self, plan: Plan, pool: int, parts: list[Part], together: bool) -> "_Slots":
        """With a pool behind them; `together`: small images are better moved, once."""
        lane = np.concatenate([part.lane for part in parts])
        shuffle = np.concatenate([part.shuffle for part in parts])
        slots = plan.slots(pool, lane, shuffle)
        rows = [part.rows for part in parts]
        rows = [Rows.concatenate(rows)] if together else rows
        lengths = [len(one) for one in rows]
        part = np.repeat(np.arange(len(rows)), lengths) + len(self.parts)
        row = np.concatenate([np.arange(length) for length in lengths])
        order = slots.argsort()
        return _Slots(
            [*self.parts, *rows],
            np.concatenate([self.part, part[order]]),
            np.concatenate([self.row, row[order]]),
            np.concatenate([self.slots, slots[order]]),
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

"""Images, views and stored targets, joined sample by sample, into batches.

The join goes by key, never by position: a re-sharded, re-ordered or partial copy of the dataset gets the right rows.
Every sample is checked on key hash, image bytes and label each time it is joined, and the stored probe pixels are
rendered again. Reading and joining happen per tar, in worker processes if there are any; shuffling, batching and
rendering happen afterwards in the training process, so the batches do not depend on the number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from offline_kd.data import BlockLoader, ImageBlock
from offline_kd.errors import StoreCorrupt, StoreMismatch, did_you_mean
from offline_kd.store.codec import codec_arrays
from offline_kd.store.reader import Arrays, Store
from offline_kd.templates import SubclassDecisions
from offline_kd.views import AnyViews, counter_hash, counter_uniform, draw, render, view_of_epoch

# First counters of the draws made here, so that they are independent of each other and of those of views.py.
READ_AHEAD = 4  # tars, from a remote store
BLOCK_STREAM, ROW_STREAM, LABEL_STREAM = 0x626C6F636B, 0x726F77, 0x6C6162656C


@dataclass(frozen=True)
class Rows:
    """n samples with one view each, not yet rendered."""

    images: Tensor  # [n, 3, H, W] uint8, un-augmented
    box: Tensor  # [n, 4] int16
    flip: Tensor  # [n] uint8
    labels: Tensor  # [n] int64
    key_hash: NDArray[np.uint64]  # [n]
    targets: dict[str, Tensor]  # by codec array or `decisions/...`, [n, ...]; empty without a store

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Rows":
        targets = {name: array[index] for name, array in self.targets.items()}
        key_hash = self.key_hash[index.numpy()]
        return Rows(self.images[index], self.box[index], self.flip[index], self.labels[index], key_hash, targets)

    @staticmethod
    def concatenate(parts: list["Rows"]) -> "Rows":
        if len(parts) == 1:
            return parts[0]
        tensors = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(Rows)
            if field.name not in ("key_hash", "targets")
        }
        return Rows(
            **tensors,
            key_hash=np.concatenate([part.key_hash for part in parts]),
            targets={name: torch.cat([part.targets[name] for part in parts]) for name in parts[0].targets},
        )


@dataclass(frozen=True)
class Batch:
    """What one training step needs, on the student's device."""

    images: Tensor  # [B, 3, H, W] uint8, the rendered views
    labels: Tensor  # [B] int64; -1 where the label is hidden from the student
    targets: dict[str, Tensor]  # encoded teacher targets, [B, ...]; empty without a store
    key_hash: NDArray[np.uint64]  # [B]


# ---- joining -------------------------------------------------------------------------------------------------------


def join(
    store: Store, block: ImageBlock, group: int, position: NDArray[np.int64], decisions: Sequence[str] = ()
) -> Rows:
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
) -> Rows:
    """The same from several stores; targets of the second one have `1:` before their names, and so on.

    Raises StoreMismatch, too, when the stores mean different crops by one view.
    """
    first, *others = [
        _join_one(store, block, group, position, wanted) for store, wanted in zip(stores, decisions, strict=True)
    ]
    targets = dict(first.targets)
    for number, (store, rows) in enumerate(zip(stores[1:], others, strict=True), start=1):
        different = (rows.box != first.box).any(dim=1) | (rows.flip != first.flip)
        if different.any():
            index = int(different.nonzero()[0])
            raise StoreMismatch(
                f"{store.place}: view {store.identity.groups[group][int(position[index])]} of sample "
                f"'{block.keys[index]}' is box {rows.box[index].tolist()}, flip {int(rows.flip[index])}, in "
                f"{stores[0].place} it is {first.box[index].tolist()}, {int(first.flip[index])}. Stores that are mixed "
                "must hold the same views: capture both with the same views (kind, seed and views_per_group)."
            )
        targets |= {f"{number}:{name}": array for name, array in rows.targets.items()}
    return replace(first, targets=targets)


def _join_one(
    store: Store, block: ImageBlock, group: int, position: NDArray[np.int64], decisions: Sequence[str]
) -> Rows:
    names = joined_arrays(store, decisions)
    store_rows = _find_rows(store, block)
    store_blocks, offsets = np.divmod(store_rows, store.identity.rows_per_block)
    found: Arrays = {}
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
            if name not in found:
                found[name] = np.empty((len(block), *values.shape[1:]), dtype=values.dtype)
            found[name][here] = values
    _check_samples(store, block, found)
    for number, arrays, here in slabs:
        _check_probes(store, block, number, arrays, here, offsets[here])
    targets = {
        # Torch knows uint16 but can do little with it.
        name.removeprefix("logits/"): torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)
        for name, array in found.items()
        if name.startswith(("logits/", "decisions/"))
    }
    return Rows(
        images=block.images,
        box=torch.from_numpy(found["view/box"]),
        flip=torch.from_numpy(found["view/flip"]),
        labels=torch.from_numpy(block.labels).long(),
        key_hash=block.key_hash,
        targets=targets,
    )


def joined_arrays(store: Store, decisions: Sequence[str]) -> list[str]:
    """The arrays that a join reads."""
    names = ["image_crc", "label", "view/box", "view/flip", "probe/row", "probe/view", "probe/pixels"]
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
    return {part: torch.from_numpy(array).to(device) for part, array in store.read_tables(name).items()}


def without_store(
    views: AnyViews, groups: list[range], block: ImageBlock, group: int, position: NDArray[np.int64]
) -> Rows:
    """The same rows with the same views as `join`, drawn here and without targets."""
    parameters = draw(views, block.key_hash, block.images.shape[2], block.images.shape[3])
    sample, view = np.arange(len(block)), groups[group].start + position
    return Rows(
        images=block.images,
        box=torch.from_numpy(parameters.box[sample, view]),
        flip=torch.from_numpy(parameters.flip[sample, view]),
        labels=torch.from_numpy(block.labels).long(),
        key_hash=block.key_hash,
        targets={},
    )


def _find_rows(store: Store, block: ImageBlock) -> NDArray[np.int64]:
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
    box, flip = arrays["view/box"][row, view], arrays["view/flip"][row, view]
    images = block.images[torch.from_numpy(at[row])]
    pixels = render(images, torch.from_numpy(box), torch.from_numpy(flip), store.identity.views.fill).numpy()
    seen = arrays["probe/pixels"][here]
    wrong = np.flatnonzero((pixels != seen).any(axis=(1, 2, 3)))
    if len(wrong):
        first = wrong[0]
        difference = np.abs(pixels[first].astype(int) - seen[first].astype(int))
        raise StoreCorrupt(
            f"{store.place}: block {number}, sample '{block.keys[at[row[first]]]}': the stored view (box "
            f"{box[first].tolist()}, flip {int(flip[first])}) renders to pixels that differ from those the teacher "
            f"saw, by up to {difference.max()} of 255 in {np.count_nonzero(difference.any(axis=0))} places. Parameters "
            "and targets do not belong together, or images are decoded differently here: capture the store again."
        )


# ---- batching ------------------------------------------------------------------------------------------------------


class _Pool(Dataset[Rows]):
    """Joined tars, by (epoch, block number); runs in the worker processes."""

    def __init__(
        self,
        loader: BlockLoader,
        views: AnyViews,
        groups: list[range],
        stores: Sequence[Store],
        decisions: Sequence[Sequence[str]],
        seed: int,
    ) -> None:
        self.loader, self.views, self.groups, self.stores, self.seed = loader, views, groups, stores, seed
        self.decisions = decisions

    def fetch_ahead(self, place: tuple[int, int]) -> None:
        """Begin to fetch what a tar will need of remote stores, as far as a tar is known to be a block of theirs."""
        epoch, number = place
        group, _ = view_of_epoch(self.seed, np.empty(0, dtype=np.uint64), epoch, self.groups)
        for store, wanted in zip(self.stores, self.decisions, strict=True):
            block = store.block_of_tar.get(self.loader.split.tars[number].sha256)
            if store.place.is_remote and block is not None:
                store.fetch_ahead(block, group, joined_arrays(store, wanted))

    def __getitem__(self, place: tuple[int, int]) -> Rows:
        epoch, number = place
        block = self.loader[number]
        group, position = view_of_epoch(self.seed, block.key_hash, epoch, self.groups)
        if not self.stores:
            return without_store(self.views, self.groups, block, group, position)
        return join_all(self.stores, block, group, position, self.decisions)


class Stream:
    """The batches of a training run.

    Order and views are pure functions of (seed, epoch, key): the same with and without a store, for any number of
    workers. Rows are shuffled within pools of `pool_blocks` tars, which are themselves in a new order every epoch.

    Args:
        groups: the view groups that decide which view an epoch shows: the store's.
        stores: targets come from these; none for plain training and for a live teacher.
        decisions: names of the decisions that are wanted of each store.
        labelled_fraction: share of the samples, chosen by key, whose label a batch shows.
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
        device: torch.device,
    ) -> None:
        self.loader, self.seed, self.batch_size, self.pool_blocks = loader, seed, batch_size, pool_blocks
        self.labelled_fraction, self.device = labelled_fraction, device
        self.fill = views.fill
        self.places: list[tuple[int, int]] = []  # what the loader fetches next; replaced for every epoch
        self.pool = _Pool(loader, views, groups, stores, decisions, seed)
        self.rows_loader: DataLoader[Rows] | None = None
        is_remote = any(store.place.is_remote for store in stores)
        if workers:
            self.rows_loader = DataLoader(
                self.pool,
                batch_size=None,
                sampler=self.places,
                num_workers=workers,
                persistent_workers=True,
                # The client of object stores has threads of its own, which do not survive a fork: children would hang.
                multiprocessing_context="spawn" if is_remote else None,
            )

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.loader.split.count, self.batch_size)
        return max(full + (rest > 1), 1)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """All samples once. A last batch of one sample, which batch normalisation cannot use, joins the one before."""
        order = counter_hash(BLOCK_STREAM, self.seed, epoch, np.arange(len(self.loader), dtype=np.uint64)).argsort()
        self.places[:] = [(epoch, int(number)) for number in order]
        blocks = iter(self.rows_loader) if self.rows_loader else self._in_this_process()
        left: Rows | None = None  # rows of the pool before that did not fill a batch
        for first in range(0, len(order), self.pool_blocks):
            is_last = first + self.pool_blocks >= len(order)
            pool = Rows.concatenate([next(blocks) for _ in self.places[first : first + self.pool_blocks]])
            pool = pool.take(torch.from_numpy(counter_hash(ROW_STREAM, self.seed, epoch, pool.key_hash).argsort()))
            if left is not None:
                pool = Rows.concatenate([left, pool])
            start = 0
            # Two batches' worth is kept back until the last pool, so that a single last sample has one to join.
            while start < len(pool) and (is_last or len(pool) - start > self.batch_size + 1):
                stop = start + self.batch_size
                if len(pool) - stop <= 1:
                    stop = len(pool)
                yield self._render(pool.take(torch.arange(start, stop)))
                start = stop
            left = pool.take(torch.arange(start, len(pool)))

    def _in_this_process(self) -> Iterator[Rows]:
        """The places' rows. What they need of remote stores is fetched ahead, while the student trains."""
        for index, place in enumerate(self.places):
            for later in self.places[index + 1 : index + 1 + READ_AHEAD]:
                self.pool.fetch_ahead(later)
            yield self.pool[place]

    def _render(self, rows: Rows) -> Batch:
        known = counter_uniform(LABEL_STREAM, rows.key_hash) < self.labelled_fraction
        labels = torch.where(torch.from_numpy(known), rows.labels, -1)
        images, box, flip, labels = (
            tensor.to(self.device, non_blocking=True) for tensor in (rows.images, rows.box, rows.flip, labels)
        )
        targets = {name: array.to(self.device, non_blocking=True) for name, array in rows.targets.items()}
        return Batch(render(images, box, flip, self.fill), labels, targets, rows.key_hash)

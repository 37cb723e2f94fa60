"""Images, views and stored targets, joined sample by sample.

The join goes by key, never by position: a re-sharded, re-ordered or partial copy of the dataset gets the right rows.
Every sample is checked on key hash, image bytes and label each time it is joined, and the stored probe pixels are
rendered again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.blocks import ImageBlock
from offline_kd.data.label_sets import label_tensor
from offline_kd.data.tars import pack_keys
from offline_kd.store.decisions import SubclassDecisions
from offline_kd.store.feature_reading import feature_arrays
from offline_kd.store.layout import probe_pixels
from offline_kd.store.reader import Arrays, Store
from offline_kd.store.row_labels import refuse_other_labels, stored_labels
from offline_kd.store.rows import Rows, StoredSignal
from offline_kd.store.schema import StoreIdentity
from offline_kd.support.console import say
from offline_kd.support.errors import StoreCorrupt, StoreMismatch, did_you_mean
from offline_kd.views.choice import Choice, choose, draw_choice, side_by_side
from offline_kd.views.kind import Parameters, ViewSpec
from offline_kd.views.mixing import NO_PARTNER, WHOLE
from offline_kd.views.render import decoder_versions, render_some

MOST_DRIFT = 0.5  # mean difference of any probe, in 1/255, that other versions of libraries may make


@dataclass(frozen=True)
class Wanted:
    """What a reader wants of a store beside the views: an objective on decisions alone needs no logits."""

    logits: bool = True
    decisions: Sequence[str] = ()  # by name
    features: Sequence[str] = ()  # by name


# ---- joining -------------------------------------------------------------------------------------------------------


def join(store: Store, block: ImageBlock, group: int, position: NDArray[np.int64], wanted: Wanted = Wanted()) -> Rows:
    """Give each sample of an image tar what the store says of one of its views, or of several.

    Args:
        group: the view group, common to all samples.
        position: `[n]` view within the group, for each sample of the tar; or `[n, v]`: then there are `n * v` rows, all
            of the first sample first.

    Raises:
        StoreMismatch: a sample is not in the store, or is there with other image bytes or another label.
        StoreCorrupt: stored probe pixels are not what the stored parameters render.
    """
    arrays = joined_arrays(store, wanted)
    store_rows = _find_rows(store, block)
    store_blocks, offsets = np.divmod(store_rows, store.identity.rows_per_block)
    position = position.reshape(len(block), -1)
    found: Arrays = {}
    partner_row = np.full(position.shape, NO_PARTNER, dtype=np.int64)
    partner: Parameters = {}
    pieces = []
    for number in np.unique(store_blocks):
        read = store.read(int(number), group, arrays)
        here = np.flatnonzero(store_blocks == number)
        pieces.append((int(number), read, here))
        for name in arrays:
            if name.startswith("probe/"):
                continue
            per_view = store.arrays[name][1].extent == "group"
            values = read[name][offsets[here, None], position[here]] if per_view else read[name][offsets[here]]
            _put(found, name, here, values, len(block))
        if "view/partner" in read:
            at = found["view/partner"][here].astype(np.int64)
            for name in store.identity.views.arrays():
                _put(partner, name, here, read[f"view/{name}"][at.clip(min=0), position[here]], len(block))
            partner_row[here] = _rows_in_tar(store, block, read["key_hash"], at)
    _check_samples(store, block, found)
    for number, read, here in pieces:
        _check_probes(store, block, number, read, here, offsets[here])
    own = {name: _by_row(found[f"view/{name}"]) for name in store.identity.views.arrays()}
    its = {name: _by_row(array) for name, array in partner.items()}
    row = np.arange(len(block)).repeat(position.shape[1])
    choice = Choice(row, own, partner_row.ravel(), its or own)
    return _rows(block, choice, [_signal(store, found, wanted)])


def join_all(
    stores: Sequence[Store],
    block: ImageBlock,
    group: int,
    position: NDArray[np.int64],
    wanted: Sequence[Wanted],
) -> Rows:
    """Give each sample of an image tar what several stores say of one of its views, or several, a signal of each.

    Raises what `join` does, and StoreMismatch when the stores mean different crops by one view.
    """
    first, *others = [join(store, block, group, position, one) for store, one in zip(stores, wanted, strict=True)]
    for store, rows in zip(stores[1:], others, strict=True):
        for name, array in first.view.own.items():
            other = rows.view.own[name]
            # A store of its own may have left out other rows, so that partners are numbered in another way.
            if name == "partner":
                array, other = first.view.partner_row, rows.view.partner_row
            different = (array != other).reshape(len(array), -1).any(axis=1)
            if different.any():
                index = int(different.nonzero()[0][0])
                view, key = position.ravel()[index], block.keys[rows.view.row[index]]
                raise StoreMismatch(
                    f"{store.place}: view {store.identity.groups[group][int(view)]} of sample '{key}' has {name} "
                    f"{other[index].tolist()}, in {stores[0].place} it is {array[index].tolist()}. Stores that are "
                    "mixed must hold the same views: capture both with the same views (kind, seed and views_per_group)."
                )
    return replace(first, signal=[signal for rows in (first, *others) for signal in rows.signal])


def _signal(store: Store, found: Arrays, wanted: Wanted) -> StoredSignal:
    logits = None
    if wanted.logits:
        encoded = {name: found[f"logits/{name}"] for name in store.identity.codec.arrays()}
        unpacked = store.identity.codec.unpack(encoded, store.codec_tables)
        logits = {name: _tensor(_by_row(array)) for name, array in unpacked.items()}
    decisions = {
        name: {array: _tensor(_by_row(found[f"decisions/{name}/{array}"])) for array in decision_arrays(store, name)}
        for name in wanted.decisions
    }
    features = {
        name: {array: _tensor(_by_row(found[f"features/{name}/{array}"])) for array in feature_arrays(store, name)}
        for name in _features_read(store, wanted)
    }
    return StoredSignal(logits, decisions, features)


def _by_row(array: NDArray[Any]) -> NDArray[Any]:
    """`[n * v, ...]` of `[n, v, ...]`."""
    return array.reshape(-1, *array.shape[2:])


def _put(found: dict[str, NDArray[Any]], name: str, here: NDArray[np.int64], values: NDArray[Any], count: int) -> None:
    if len(here) == count:  # of one block of the store, as nearly always: already where they should be
        found[name] = values
        return
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
    found = np.full(partner.shape, NO_PARTNER, dtype=np.int64)
    found[mixed] = rows
    return found


def _rows(block: ImageBlock, choice: Choice, signal: list[StoredSignal]) -> Rows:
    labels = label_tensor(block.labels[choice.row])
    mixed = torch.from_numpy(choice.partner_row >= 0).reshape(-1, *[1] * (labels.dim() - 1))
    other = label_tensor(block.labels[choice.partner_row.clip(min=0)])
    share = torch.ones(len(labels))
    if "share" in choice.own:
        share = torch.from_numpy(choice.own["share"].astype(np.float32) / WHOLE)
    return Rows(block.key_hash[choice.row], labels, torch.where(mixed, other, labels), share, signal, choice)


def row_arrays(identity: StoreIdentity, block: ImageBlock) -> Arrays:
    """What a store says of the rows of a tar whatever their view, `[n, ...]`: which samples, and their labels."""
    label = stored_labels(block)
    if not identity.keeps_digests:
        return {"key_hash": block.key_hash, "image_crc": block.image_crc, "label": label}
    keys = pack_keys(block.keys)
    return {"key_hash": block.key_hash, "key": keys, "image_digest": block.image_digest, "label": label}


def proof_of_images(identity: StoreIdentity) -> str:
    """What comparing an image with such a store proves, for people."""
    if identity.keeps_digests:
        return "the sha256 of every image (128 bits of it) is compared with what the teacher saw"
    return (
        f"a store of schema version {identity.schema_version} has a crc32c of every image, which can be forged: that "
        "an image is the one that the teacher saw is proven where the manifest has the sha256 of its tar"
    )


def joined_arrays(store: Store, wanted: Wanted) -> list[str]:
    """The arrays that a join reads."""
    views = store.identity.views
    names = [
        "image_digest" if store.created.keeps_digests else "image_crc",
        "label",
        "probe/row",
        "probe/view",
        "probe/pixels",
        *(f"view/{n}" for n in views.arrays()),
    ]
    if "partner" in views.arrays():
        names.append("key_hash")
    if wanted.logits:
        names += [f"logits/{name}" for name in store.identity.codec.arrays()]
    names += [f"decisions/{name}/{array}" for name in wanted.decisions for array in decision_arrays(store, name)]
    of_features = _features_read(store, wanted)
    return names + [f"features/{name}/{array}" for name in of_features for array in feature_arrays(store, name)]


def _features_read(store: Store, wanted: Wanted) -> list[str]:
    """The features that are wanted, and those that logits are computed from."""
    of = store.identity.codec.of_features if wanted.logits else ""
    return list(dict.fromkeys([*wanted.features, *([of] if of else [])]))


def decision_arrays(store: Store, name: str) -> list[str]:
    """The arrays that a loss on these decisions reads, by the last part of their names.

    Raises StoreMismatch when the store has none of that name.
    """
    if name not in store.identity.decisions:
        raise StoreMismatch(
            f"{store.place}: holds no decisions '{name}', which the objective asks for."
            f"{did_you_mean(name, store.identity.decisions)} Capture them with capture.decisions in the recipe."
        )
    config = store.identity.decisions[name].config
    if isinstance(config, SubclassDecisions):
        return ["subclass"]
    return ["id", "prob"] if config.top > 1 else ["id"]


def tables_on(store: Store, name: str, device: torch.device) -> dict[str, Tensor]:
    """Templates (or LDA and sub-classes) of decisions or features, by the last part of their name."""
    return {part: _tensor(array).to(device) for part, array in store.read_tables(name).items()}


def _tensor(array: NDArray[Any]) -> Tensor:
    """Torch knows uint16 but can do little with it."""
    return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)


def without_store(
    views: ViewSpec, groups: list[range], block: ImageBlock, group: int, position: NDArray[np.int64]
) -> Rows:
    """Rows of a tar with the views that `join` would give them, drawn here: no store is read."""
    sizes = block.sizes()
    drawn = [
        draw_choice(views, block.key_hash, sizes, groups[group].start + one)
        for one in position.reshape(len(block), -1).T
    ]
    return _rows(block, side_by_side(drawn), [])


def _find_rows(store: Store, block: ImageBlock) -> NDArray[np.int64]:
    """The store's row of every sample: of the block that was made from this tar, or by an index of all keys."""
    number = store.block_of_tar.get(block.sha256)
    if number is not None:
        hashes = store.read(number, 0, ["key_hash"])["key_hash"]
        if np.array_equal(hashes, block.key_hash):
            return number * store.identity.rows_per_block + np.arange(len(block))
        order = hashes.argsort()  # some of the tar's samples, as a subset has them
        place = order[np.searchsorted(hashes, block.key_hash, sorter=order).clip(max=len(hashes) - 1)]
        if np.array_equal(hashes[place], block.key_hash):
            return number * store.identity.rows_per_block + place
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
    by_digest = store.created.keeps_digests
    stored: NDArray[Any] = found["image_digest" if by_digest else "image_crc"]
    here: NDArray[Any] = block.image_digest if by_digest else block.image_crc
    changed = np.flatnonzero((stored != here).reshape(len(block), -1).any(axis=1))
    if len(changed):
        first = changed[0]
        # Bytes in their order; a number with its largest digit first.
        is_now, was = (one[first].astype(one.dtype.newbyteorder(">")).tobytes().hex() for one in (here, stored))
        raise StoreMismatch(
            f"{block.name}: the image of sample '{block.keys[first]}' (and {len(changed) - 1} more) has "
            f"{'sha256' if by_digest else 'crc32c'} {is_now}, the one the teacher saw had {was} (store {store.place}). "
            "The images were changed since: use the original dataset, or capture it again."
        )
    refuse_other_labels(store, block, found["label"])
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
    parameters = {name: arrays[f"view/{name}"] for name in store.identity.views.arrays()}
    choice = choose(parameters, row, view)
    partner_row = (
        _rows_in_tar(store, block, arrays["key_hash"], choice.partner_row) if "partner" in parameters else None
    )
    choice = replace(choice, row=at[row], partner_row=choice.partner_row if partner_row is None else partner_row)
    rendered = render_some(block, choice, store.identity.views, store.created.seen_size[0])
    pixels = probe_pixels(store.created, rendered)
    seen = arrays["probe/pixels"][here]
    wrong = np.flatnonzero((pixels != seen).any(axis=(1, 2, 3)))
    if len(wrong):
        first = wrong[0]
        difference = np.abs(pixels[first].astype(int) - seen[first].astype(int))
        changed = _other_versions(store)
        if changed and np.abs(pixels.astype(int) - seen).mean(axis=(1, 2, 3)).max() <= MOST_DRIFT:
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
    if store.identity.views.is_exact:
        return ""
    here = {name: version(name) for name in ("torch", "torchvision", "pillow")} | decoder_versions()
    there = store.created.versions
    return ", ".join(
        f"{name} {here[name]} here, {there[name]} there" for name in here if there.get(name, here[name]) != here[name]
    )

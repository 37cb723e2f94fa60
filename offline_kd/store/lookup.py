"""Random access: what a store says of samples that are named by key, in any order.

Whole blocks are read, as always, with every byte checked; what was read stays in memory while it fits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.fetching import Root
from offline_kd.data.manifest import locate
from offline_kd.data.tars import hash_key, read_tar, tars_in, unpack_keys
from offline_kd.store.decisions import unpack_probs
from offline_kd.store.feature_reading import features_decoder, held_features
from offline_kd.store.logit_reading import logit_arrays, stored_decoder
from offline_kd.store.reader import Arrays, Store
from offline_kd.support.errors import StoreCorrupt, StoreMismatch, did_you_mean

MOST_COMPARED = 100_000  # keys, with one that is not there: a second


def rows_of(store: Store, keys: Sequence[str], known: Callable[[], Iterable[str]] = list) -> NDArray[np.int64]:
    """`[n]` the store's row of every key; raises StoreMismatch for a key that it does not have.

    Args:
        known: gives keys that it does have, for the message; called only when it is needed.
    """
    hashes, rows = store.row_index
    wanted = np.array([hash_key(key) for key in keys], dtype=np.uint64)
    place = np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)
    absent = np.flatnonzero(hashes[place] != wanted)
    if len(absent):
        key, about = keys[absent[0]], store.identity.dataset
        near = get_close_matches(key, known(), n=1) if len(hashes) <= MOST_COMPARED else []
        hint = did_you_mean(key, near)
        raise StoreMismatch(
            f"{store.place}: has no sample '{key}' (and {len(absent) - 1} more): its {len(hashes):,} rows are those of "
            f"{about.name}/{about.split}.{hint} See its keys: `store.keys()`."
        )
    return rows[place]


def read_rows(
    store: Store, rows: NDArray[np.int64], views: Sequence[int], names: Sequence[str]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Arrays]]:
    """Arrays of some rows and views, block by block and group by group.

    Yields which of `rows` `[n]` and of `views` `[v]` these are, and the arrays: `[n, v, ...]`, or `[n, ...]` what is of
    rows. Raises StoreMismatch for a view that is not stored, before anything is read.
    """
    num_views, per_group = store.identity.views.num_views, store.identity.views_per_group
    for view in views:
        if not 0 <= view < num_views:
            raise StoreMismatch(
                f"{store.place}: has no view {view}, it holds {num_views} of every image: 0 to {num_views - 1}."
            )
    blocks, offsets = np.divmod(rows, store.identity.rows_per_block)
    groups, positions = np.divmod(np.array(views, dtype=np.int64), per_group)
    for block in np.unique(blocks):
        of_rows = np.flatnonzero(blocks == block)
        for group in np.unique(groups):
            of_views = np.flatnonzero(groups == group)
            at_rows = offsets[of_rows]
            chosen: dict[str, Any] = {"block": at_rows, "group": np.ix_(at_rows, positions[of_views])}
            arrays = store.read(int(block), int(group), names)
            yield (
                of_rows,
                of_views,
                {name: array[chosen[store.arrays[name][1].extent]] for name, array in arrays.items()},
            )


def logits_of(store: Store, rows: NDArray[np.int64], views: Sequence[int]) -> Tensor:
    """`[n, v, C]` float32 logits of `[n]` rows in v views, as far as the codec kept them."""
    names, decode = logit_arrays(store), stored_decoder(store)
    out = torch.empty(len(rows), len(views), store.identity.num_classes)
    for of_rows, of_views, arrays in read_rows(store, rows, views, list(names.values())):
        at = torch.from_numpy(of_rows)[:, None], torch.from_numpy(of_views)[None]
        out[at] = decode({part: arrays[name] for part, name in names.items()})
    return out


def decisions_of(store: Store, name: str, rows: NDArray[np.int64], views: Sequence[int]) -> Arrays:
    """What the teacher decided at every location, in `[n]` rows and v views.

    Returns:
        of `templates`: `id` `[n, v, H, W, m]` uint16, `prob` float32 of the same shape (where more than one template
        is kept) and `dropped` `[n, v]` float32, the largest mass of what is not kept; of `subclasses`: `subclass`
        `[n, v, H, W]` uint8. Templates behind the ids: `Store.read_tables(name)`.

    Raises StoreMismatch when the store has no decisions of that name.
    """
    if name not in store.identity.decisions:
        raise StoreMismatch(
            f"{store.place}: holds no decisions '{name}'.{did_you_mean(name, store.identity.decisions)} "
            "Capture them with capture.decisions."
        )
    prefix = f"decisions/{name}/"
    found: Arrays = {}
    for of_rows, of_views, arrays in read_rows(
        store, rows, views, [one for one in store.arrays if one.startswith(prefix)]
    ):
        for array_name, array in arrays.items():
            part = array_name.removeprefix(prefix)
            values = unpack_probs(torch.from_numpy(array.astype(np.int32))).numpy() if part == "prob" else array
            if part not in found:
                found[part] = np.empty((len(rows), len(views), *values.shape[2:]), dtype=values.dtype)
            found[part][np.ix_(of_rows, of_views)] = values
    return found


def features_of(store: Store, name: str, rows: NDArray[np.int64], views: Sequence[int]) -> Tensor:
    """`[n, v, D]` or `[n, v, D, H, W]` float32 features of `[n]` rows in v views, as far as their code kept them.

    Raises StoreMismatch when the store has no features of that name.
    """
    decode, prefix = features_decoder(store, name, torch.device("cpu")), f"features/{name}/"
    out = torch.empty(len(rows), len(views), *held_features(store, name).shape)
    names = [one for one in store.arrays if one.startswith(prefix)]
    for of_rows, of_views, arrays in read_rows(store, rows, views, names):
        coded = {
            one.removeprefix(prefix): torch.from_numpy(array.reshape(-1, *array.shape[2:]))
            for one, array in arrays.items()
        }
        at = torch.from_numpy(of_rows)[:, None], torch.from_numpy(of_views)[None]
        out[at] = decode(coded).view(len(of_rows), len(of_views), *out.shape[2:])
    return out


def stored_keys(store: Store) -> list[str]:
    """The key of every row of a store that keeps them, in its order; raises StoreCorrupt for one of another hash."""
    keys: list[str] = []
    for block in store.blocks:
        arrays = store.read(block, 0, ["key", "key_hash"])
        some = unpack_keys(arrays["key"].astype(np.uint8, copy=False))
        if problem := problem_of_keys(some, arrays["key_hash"].astype(np.uint64, copy=False)):
            raise StoreCorrupt(
                f"{store.place}: block {block}: {problem}. This is not what a capture wrote: capture the store again."
            )
        keys += some
    return keys


def problem_of_keys(keys: Sequence[str], key_hash: NDArray[np.uint64]) -> str:
    """Says which of a block's keys are not those of the hashes `[n]`; '' if all are."""
    wrong = [row for row, key in enumerate(keys) if hash_key(key) != key_hash[row]]
    return f"{len(wrong)} keys are not those that were hashed, the first is {keys[wrong[0]]!r}" if wrong else ""


def keys_from_tars(store: Store, folder: Root) -> list[str]:
    """The key of every row of a store before schema 3, which has hashes only, from the dataset's tars in `folder`.

    Raises StoreMismatch when the tars lack the key of a row.
    """
    named = [store.identity.dataset.tars[block].file for block in store.blocks]
    if isinstance(folder, Path) and not all((folder / name).is_file() for name in named):
        files = tars_in(folder)  # another packing of the same samples has the same keys
    else:
        files = [locate(name, [folder]) for name in named]
    keys = {hash_key(sample.key): sample.key for file in files for sample in read_tar(file)[0]}
    hashes, rows = store.row_index
    ordered = hashes[np.argsort(rows)].tolist()
    lacking = sum(one not in keys for one in ordered)
    if lacking:
        about = store.identity.dataset
        raise StoreMismatch(
            f"{folder}: its {len(files)} tars lack the keys of {lacking:,} of {len(ordered):,} rows of {store.place}, "
            f"which was made from {about.name}/{about.split}. Name the folder of those tars."
        )
    return [keys[one] for one in ordered]

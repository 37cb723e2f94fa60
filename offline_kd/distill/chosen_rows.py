"""Which rows of the training split a student trains on, and which are cut off to choose by.

`data.validation` cuts first, by key; `data.subset` says which of the others are trained on, by their names or by what a
store's teacher said of them. Neither depends on the order of rows, on how they are packed, or on the number of ranks.
"""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.labels import need_labels
from offline_kd.data.manifest import Tar
from offline_kd.data.tars import hash_key
from offline_kd.data_recipe import Data, ScoredRows
from offline_kd.recipe import CaptureRecipe
from offline_kd.store.figures import Figures, Summary, read_figures
from offline_kd.store.lookup import MOST_COMPARED
from offline_kd.store.reader import Store
from offline_kd.support.console import progress, say
from offline_kd.support.counter_rng import U64, counter_uniform
from offline_kd.support.errors import RecipeError, did_you_mean, shorten
from offline_kd.support.ranks import from_first

VALIDATION_STREAM = 0x76616C6964  # first counter of the draws made here, so that they are independent of all others
FIELDS = {"teacher_entropy": "entropy", "teacher_confidence": "top1_probability"}  # of figures, by name of the score


@dataclass(frozen=True)
class ChosenRows:
    """Rows by the hashes of their keys, `[n]` for every tar, which may be none of it."""

    trained: list[U64]
    validation: list[U64]

    @cached_property
    def sha256(self) -> str:
        """Of the rows that are trained on, in whatever tars they are."""
        return hashlib.sha256(np.sort(np.concatenate(self.trained)).astype("<u8").tobytes()).hexdigest()


def is_validation(key_hash: U64, share: float | None) -> NDArray[np.bool_]:
    """`[n]` whether a row is one of the share that is cut off; None: there is none."""
    return counter_uniform(VALIDATION_STREAM, key_hash) < (share or 0)


@dataclass(frozen=True)
class ChosenImages:
    """The images of the training split that a run is about."""

    trained: BlockLoader
    validation: BlockLoader | None = None  # as they are evaluated
    sha256: str = ""  # of the rows that are trained on, where they are not all


def chosen_images(recipe: CaptureRecipe, images: BlockLoader, stores: Sequence[Store] = ()) -> ChosenImages:
    """What `data.subset` and `data.validation` make of the whole training split; of several ranks the first one
    chooses.

    Args:
        stores: those of a run; the first one scores.

    Raises what `choose_rows` does, and DataError where the validation rows would have no labels.
    """
    data = recipe.data
    if data.validation is not None:
        need_labels(images.split.labels, f"{data.dataset}/{data.train}", "data.validation")
    rows = from_first(lambda: choose_rows(data, images, stores))
    if rows is None:
        return ChosenImages(images)
    validation = None
    if data.validation is not None:
        validation = images.only(rows.validation, decode=recipe.evaluation_crop is None)
    return ChosenImages(images.only(rows.trained), validation, rows.sha256)


def choose_rows(data: Data, images: BlockLoader, stores: Sequence[Store] = ()) -> ChosenRows | None:
    """The rows of the training split that are trained on and those that are cut off; None where that is all and none.

    Keys come from the stores, and from the tars that no store was made from, which are read once for them.

    Raises RecipeError for a file that cannot be read or names a key that is not there, for a score without a store or
    without labels, and where nothing is left.
    """
    if data.subset is None and data.validation is None:
        return None
    hashes = _key_hashes(images, stores)
    together = np.concatenate(hashes)
    cut = is_validation(together, data.validation)
    trained = ~cut
    if isinstance(data.subset, ScoredRows):
        trained &= np.isin(together, _scored(data.subset, stores, together[trained]))
    elif data.subset is not None:
        trained &= np.isin(together, _named(Path(data.subset), together, images))
    rows = f"of the {len(together):,} rows of {data.dataset}/{data.train}"
    if data.validation is not None and not cut.any():
        raise RecipeError(f"data.validation: {data.validation:g} {rows} is not one. Use a larger share.")
    if trained.sum() < 2:
        raise RecipeError(f"data: {trained.sum()} {rows} are left to train on. Choose more of them.")
    say(f"trained on {trained.sum():,} {rows}" + (f"; {cut.sum():,} are validation rows" if cut.any() else ""))
    edges = np.cumsum([len(one) for one in hashes])[:-1]
    return ChosenRows(
        *([one[which] for one, which in zip(hashes, np.split(mask, edges), strict=True)] for mask in (trained, cut))
    )


# ---- keys ----------------------------------------------------------------------------------------------------------


def _key_hashes(images: BlockLoader, stores: Sequence[Store]) -> list[U64]:
    """Of all samples of every tar, bad images included; a store has them in another order than the tar."""
    found = []
    with progress("keys of the rows", len(images), "tars") as meter:
        for number, tar in enumerate(images.split.tars):
            hashes = next(_stored(tar, stores), None)
            if hashes is None:
                hashes = np.array([hash_key(key) for key in images.keys(number)], dtype=np.uint64)
            found.append(hashes)
            meter.advance()
    return found


def _stored(tar: Tar, stores: Sequence[Store]) -> Iterator[U64]:
    """What each store that was made from this very tar knows of its keys."""
    for store in stores:
        block = None if tar.sha256 is None else store.block_of_tar.get(tar.sha256)
        if block is None:
            continue
        left_out = [hash_key(key) for key in store.entry("", block, 0).left_out or ()]
        hashes = store.read(block, 0, ["key_hash"])["key_hash"].astype(np.uint64)
        if len(hashes) + len(left_out) == tar.count:
            yield np.concatenate([hashes, np.array(left_out, dtype=np.uint64)])


def _named(file: Path, known: U64, images: BlockLoader) -> U64:
    """The hashes of the keys in a file."""
    keys = _keys_in(file)
    hashes = np.array([hash_key(key) for key in keys], dtype=np.uint64)
    absent = np.flatnonzero(~np.isin(hashes, known))
    if len(absent):
        key = keys[absent[0]]
        near: list[str] = []
        if len(known) <= MOST_COMPARED:
            near = get_close_matches(key, (one for number in range(len(images)) for one in images.keys(number)), n=1)
        raise RecipeError(
            f"{file}: '{shorten(key)}' (and {len(absent) - 1:,} more) is no key of the {len(known):,} training rows."
            f"{did_you_mean(key, near)} `offline-kd store explore` writes the keys of a store."
        )
    return hashes


def _keys_in(file: Path) -> list[str]:
    """One in every line, or those of the column `key` of a CSV with names of columns; raises RecipeError."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            if file.suffix != ".csv":
                return [key for line in opened.read().split("\n") if (key := line.removesuffix("\r"))]
            reader = csv.DictReader(opened)
            if "key" not in (reader.fieldnames or ()):
                raise RecipeError(
                    f"{file}: has no column 'key', as the CSV of `store explore` has. Name one that does."
                )
            return [key for row in reader if (key := row["key"])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(
            f"{file}: cannot be read ({error}). Name a text file that has a key in every line."
        ) from error


# ---- scores --------------------------------------------------------------------------------------------------------


def _scored(wanted: ScoredRows, stores: Sequence[Store], among: U64) -> U64:
    """The hashes of those of some rows `[n]` that a store's teacher scores highest or lowest.

    Rows that it scores alike come in the order of their hashes.
    """
    if not stores:
        raise RecipeError(
            f"data.subset: {wanted.score} is what a store says of its rows. Give --store, to plain training too."
        )
    store, name = stores[0], FIELDS.get(wanted.score, wanted.score)
    hashes, scores = [np.empty(0, dtype=np.uint64)], [np.empty(0)]
    with progress("what the teacher says", len(among), "samples") as meter:
        for some in read_figures(store, Summary(store.identity.num_classes)):
            hashes.append(_hashes_of(store, some))
            scores.append(getattr(some, name))
            meter.advance(len(some.row))
    hash_of, score = np.concatenate(hashes), np.concatenate(scores)
    there = np.isin(hash_of, among)
    hash_of, score = hash_of[there], score[there]
    if np.isnan(score).any():
        raise RecipeError(
            f"data.subset: {wanted.score} is about labels, and {store.place} has none. Use another score."
        )
    order = np.lexsort([hash_of, -score if wanted.order == "highest" else score])
    return hash_of[order[: round(wanted.keep * len(order))]]


def _hashes_of(store: Store, some: Figures) -> U64:
    """Of the rows of a block."""
    numbers, offsets = np.divmod(some.row, store.identity.rows_per_block)
    return store.read(int(numbers[0]), 0, ["key_hash"])["key_hash"].astype(np.uint64)[offsets]

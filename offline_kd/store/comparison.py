"""A store beside what its contents must follow from: views from keys and the view spec, rows from images."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from offline_kd.data.blocks import ImageBlock, load_block
from offline_kd.data.fetching import Root
from offline_kd.data.labels import labels_of
from offline_kd.data.manifest import Manifest, folders_of, locate
from offline_kd.store.join import as_stored, join, left_out_of
from offline_kd.store.reader import Arrays, Store
from offline_kd.support.counter_rng import U64
from offline_kd.support.errors import OfflineKDError, StoreMismatch
from offline_kd.views.kind import Parameters, ViewSpec
from offline_kd.views.mixing import NO_PARTNER, PARTNERS, Mixing, without_rows

DRAWN_AT_ONCE = 2**20  # numbers of one array, whatever a store says of its rows and views
# What goes through scipy's inverse of the incomplete beta function, whose last digits other versions may round.
ROUNDED = ("share", "mix_box")


def images_of(store: Store, manifest: Manifest, roots: Sequence[Root]) -> Callable[[int], ImageBlock]:
    """The images of each block of a store: those tars that it was made from, whatever a recipe says.

    Raises StoreMismatch when the dataset of the manifest has other classes.
    """
    about = store.identity.dataset
    dataset = manifest.dataset(about.name)
    if dataset.classes != about.classes:
        named = zip(about.classes, dataset.classes, strict=False)
        other = next((f"'{one}' there is '{two}' here" for one, two in named if one != two), "the first are the same")
        raise StoreMismatch(
            f"{store.place}: was made of {len(about.classes)} classes, the manifest's '{about.name}' has "
            f"{len(dataset.classes)}; {other}. Labels would not mean the same: use the manifest that the store was "
            "made with."
        )

    folders, labels = folders_of(dataset, roots), labels_of(about.labels, about.classes)

    def images(block: int) -> ImageBlock:
        tar = about.tars[block]
        return load_block(
            locate(tar.file, folders),
            tar,
            store.identity.num_classes,
            decode=store.identity.views.is_exact,
            on_bad="skip" if store.entry("", block, 0).left_out else "fail",
            labels=labels,
        )

    return images


# ---- views ---------------------------------------------------------------------------------------------------------


def view_problem(store: Store, stored: Arrays, views: range, num_left_out: int) -> tuple[str, str] | None:
    """The first array of view parameters that is not what keys and view spec say, and what is wrong with it.

    Nothing can be wrong with imported views, which follow from nothing. What follows from more than the store knows is
    left to `compare_block`: boxes where images have different sizes, and who is mixed in where samples of the tar have
    no row.

    Args:
        stored: `key_hash` `[n]` and `view/...` `[n, v, ...]` of one block and view group.
        num_left_out: samples of the tar that have no row.
    """
    spec, dataset = store.created.views, store.created.dataset
    if not spec.is_drawn:
        return None
    key_hash = stored["key_hash"].astype(np.uint64)
    sizes = np.full((len(key_hash), 2), (dataset.height or 1, dataset.width or 1), dtype=np.int64)
    try:
        drawn = _draw(spec, key_hash, sizes, views)
    except (OfflineKDError, ArithmeticError, ValueError) as error:
        return "view/box", f"views of this view spec cannot be drawn: {error}"
    unknown = {"box"} if dataset.height is None else set()
    unknown |= set(Mixing().arrays()) if num_left_out else set()
    return _difference(stored, {name: array for name, array in drawn.items() if name not in unknown}, views)


def _draw(spec: ViewSpec, key_hash: U64, sizes: NDArray[np.int64], views: range) -> Parameters:
    """What `draw` gives for these views, a part of the rows after the other: memory does not depend on the store."""
    at_once = max(DRAWN_AT_ONCE // max(spec.num_distinct, len(views)) // PARTNERS, 1) * PARTNERS
    parts = []
    for start in range(0, len(key_hash), at_once):
        some = slice(start, start + at_once)
        with np.errstate(all="ignore"):  # a stranger's view spec may have numbers that lead to no views
            part = spec.draw_views(key_hash[some], sizes[some], np.array(views, dtype=np.int64)[None])
        if "partner" in part:  # is chosen among the row's PARTNERS neighbours, and numbered within the block
            part["partner"] = np.where(part["partner"] == NO_PARTNER, NO_PARTNER, part["partner"] + start)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _difference(stored: Arrays, drawn: Parameters, views: range) -> tuple[str, str] | None:
    for name, expected in drawn.items():
        found = stored[f"view/{name}"][:, : len(views)]
        different = found != expected
        if name in ROUNDED:
            different = np.abs(found.astype(np.int64) - expected.astype(np.int64)) > 1
        wrong = different.reshape(*different.shape[:2], -1).any(axis=2)
        if wrong.any():
            row, view = (int(index) for index in np.argwhere(wrong)[0])
            return f"view/{name}", (
                f"{np.count_nonzero(wrong):,} of {wrong.size:,} views are not those that follow from their keys and "
                f"the view spec, the first at row {row}, view {views[view]}: stored is {found[row, view].tolist()}, "
                f"drawn {expected[row, view].tolist()}"
            )
    return None


# ---- images --------------------------------------------------------------------------------------------------------


def compare_block(store: Store, number: int, images: ImageBlock) -> str:
    """What is wrong with a block beside its images; "" if nothing is.

    It is joined with them as stage 2 does, which compares every sample and renders the probes again, and its views are
    drawn anew for images of these sizes.

    Raises what `join` does.
    """
    block, names = as_stored(store, images), [f"view/{name}" for name in store.created.views.arrays()]
    for group, views in enumerate(store.identity.groups):
        join(store, block, group, np.zeros(len(block), dtype=np.int64))
        stored = store.read(number, group, ["key_hash", *names])
        if store.created.views.is_drawn and np.array_equal(stored["key_hash"], block.key_hash):
            drawn = _draw(store.created.views, images.key_hash, images.sizes(), views)
            drawn = without_rows(drawn, left_out_of([store], images))
            if problem := _difference(stored, drawn, views):
                return f"{problem[0]}: {problem[1]}"
    return ""

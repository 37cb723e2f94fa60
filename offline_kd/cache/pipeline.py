"""STAGE 1, whole: images -> views -> teacher -> codec -> committed blocks -> a finished store.

Run again, it goes on where it stopped: what is committed is left alone, whatever was open is done again. Run by several
processes, on any machines, it is shared: a block belongs to whoever has its lease, and the last writer finishes.
"""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from offline_kd.cache.engines import DEFAULT_ENGINE, EngineOption, find_engine
from offline_kd.cache.finish import finish_if_complete
from offline_kd.cache.job import Capture, announce, identify, refuse_uneven_views
from offline_kd.cache.tables import fit_tables
from offline_kd.cache.teacher import load_teacher, with_fastest_batches
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import CaptureRecipe
from offline_kd.store.layout import parts_of
from offline_kd.store.leases import Leases, leases_at
from offline_kd.store.schema import StoreManifest
from offline_kd.store.writer import commit_tables, committed_tables
from offline_kd.support.errors import LeaseLost
from offline_kd.support.files import scratch_prefix
from offline_kd.support.places import Folder, Place, place_at


@dataclass(frozen=True)
class Worker:
    """Which of `count` writers this one is."""

    index: int = 0
    count: int = 1
    own_blocks_only: bool = False  # as in a job array, where the others may run tomorrow

    def blocks(self, num_blocks: int) -> list[int]:
        """The blocks that this writer tries, in its order: its own, or all, beginning elsewhere than the others."""
        if self.own_blocks_only:
            return list(range(self.index, num_blocks, self.count))
        first = self.index * num_blocks // self.count
        return [*range(first, num_blocks), *range(first)]


class CaptureOptions(TypedDict, total=False):
    """What a capture may be told besides what it is about."""

    teacher: Teacher | None  # one that is in memory, on the device; None: the one that the recipe names
    worker: Worker | None  # which of several writers this is; None: the only one, or one that shares all blocks
    engine: str  # a name of `cache.engines.ENGINES`: how the blocks reach the processes that do them
    engine_options: Mapping[str, EngineOption]  # of that engine, by the names of its keyword parameters
    add: bool  # another teacher's targets may be added to a store, under the recipe's name


def cache_teacher(
    recipe: CaptureRecipe,
    manifest: Manifest,
    roots: Sequence[Root],
    location: Place | str | Path,
    device: torch.device,
    **options: Unpack[CaptureOptions],
) -> StoreManifest | None:
    """Make, go on making, or add to the teacher store of a recipe.

    A store grows by itself when the recipe has more views, or more decisions or features of the same teacher.

    Returns:
        The manifest of the finished store; None when other writers have blocks to do yet.
    """
    run_engine = find_engine(options.get("engine", DEFAULT_ENGINE), options.get("engine_options"))
    place = location if not isinstance(location, str | Path) else place_at(location)
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    loader = BlockLoader(
        dataset, split, roots, keep_bytes=0, decode=recipe.views.is_exact, on_bad=recipe.data.bad_images
    )
    teacher = options.get("teacher") or load_teacher(recipe, manifest, roots, len(dataset.classes), device)
    teacher = with_fastest_batches(teacher, recipe, loader, device)
    wanted = identify(recipe, manifest, roots, loader, teacher, place, device)
    created, additions, own_parts = announce(place, wanted, recipe, options.get("add", False))
    capture = Capture(recipe, loader, teacher, device, place, created, additions, own_parts, recipe.views.num_views)
    refuse_uneven_views(capture)
    blocks = (options.get("worker") or Worker()).blocks(created.num_blocks)
    with leases_at(place) as leases:
        for name in own_parts:
            _commit_missing_tables(capture, name, leases)
            run_engine(capture, name, blocks)
        return finish_if_complete(capture, leases)


def _commit_missing_tables(capture: Capture, addition: str, leases: Leases) -> None:
    """Fit and commit the tables that blocks of an addition refer to, unless they are, or another writer does."""
    place, part = capture.place, parts_of(capture.created, capture.additions)[addition]

    def missing() -> list[str]:
        return [name for name in part.tables if committed_tables(place, addition, name) is None]

    lease = f"{addition or 'first'}-templates"
    while leases.wait_for(lease, lambda: not missing()):
        identity = capture.identity_of(addition)
        with tempfile.TemporaryDirectory(prefix=scratch_prefix(), dir=_scratch_folder(place)) as scratch:
            fitted = fit_tables(capture.asked, identity, missing(), capture.loader, Path(scratch), capture.device)
        with contextlib.suppress(LeaseLost):  # another writer fits them now: wait for it
            for name, (arrays, statistics) in fitted.items():
                commit_tables(place, part, name, arrays, statistics, partial(leases.is_mine, lease))
        leases.release(lease)


def _scratch_folder(place: Place) -> Path | None:
    """Features may be large: beside the store, where there is room for it, rather than in /tmp."""
    return place.path if isinstance(place, Folder) else None

"""What `bench` measures of stage 1: all of it, with and without decisions and features, and what it is made of."""

import shutil
from collections.abc import Callable

import torch
from zarr.storage import LocalStore

from offline_kd.cache.engines import DEFAULT_ENGINE, find_engine
from offline_kd.cache.job import Capture
from offline_kd.cli.bench_material import Bench
from offline_kd.cli.bench_timing import Timed
from offline_kd.data.blocks import BlockLoader, Decoder
from offline_kd.store.layout import create_array, parts_of
from offline_kd.store.reader import Store
from offline_kd.store.schema import StoreIdentity
from offline_kd.store.writer import commit, commit_tables, create_or_resume
from offline_kd.support.places import Folder
from offline_kd.views.kind import draw
from offline_kd.views.render import plain_images, view_batches


def stage_1_parts(this: Bench) -> dict[str, Timed]:
    """Seconds per batch of one view of every image."""
    views = this.batches * this.store.identity.views.num_views
    parts = {"bare teacher": Timed(_bare_teacher(this), this.batches)}
    parts["stage 1"] = Timed(*_stage_1(this, this.store.identity, views))
    if this.store.identity.tapped:
        logits_only = this.store.identity.model_copy(update={"decisions": {}, "features": {}})
        parts["stage 1, logits only"] = Timed(*_stage_1(this, logits_only, views))
    if not this.recipe.views.is_exact:
        parts["decoding alone"] = Timed(_decoding(this), views)
    return parts | _writing(this)


def _bare_teacher(this: Bench) -> Callable[[], None]:
    """The network alone, in batches of its usual size, on images that are on the device."""
    pixels = torch.cat([plain_images(block, this.teacher.crop, 0, len(block))[0] for block in this.images])
    batches = torch.split(pixels.to(this.device), this.teacher.batch_size)

    def work() -> None:
        for batch in batches:
            this.teacher.logits(batch)

    return work


def _stage_1(
    this: Bench, identity: StoreIdentity, batches: float
) -> tuple[Callable[[], None], float, Callable[[], None]]:
    """From the first tar to the last ledger entry, as `cache-teacher` does it for this identity; the tables are there.

    Every time into a store of its own, which is created before.
    """
    place, run = Folder(this.folder / "stage-1"), find_engine(DEFAULT_ENGINE)
    images = BlockLoader(
        this.images.dataset, this.images.split, [this.folder], keep_bytes=0, decode=this.recipe.views.is_exact
    )
    num_views = identity.views.num_views
    capture = Capture(this.recipe, images, this.teacher, this.device, place, identity, [], [""], num_views)

    def create() -> None:
        if place.path.exists():
            shutil.rmtree(place.path)
        create_or_resume(place, identity)
        _copy_tables(this.store, place, identity)

    def work() -> None:
        run(capture, "", range(identity.num_blocks))

    return work, batches, create


def _copy_tables(store: Store, place: Folder, identity: StoreIdentity) -> None:
    """What blocks refer to, as far as this identity has it."""
    part = parts_of(identity)[""]
    for name, specs in part.tables.items():
        tables = store.read_tables(name)
        arrays = {spec.name: tables[spec.name.rpartition("/")[2]] for spec in specs}
        commit_tables(place, part, name, arrays, store.tables_statistics(name))


def _decoding(this: Bench) -> Callable[[], None]:
    """The pixels of all views, as stage 1 renders them for the teacher."""
    views, identity = this.recipe.views, this.store.identity
    images = BlockLoader(this.images.dataset, this.images.split, [this.folder], keep_bytes=0, decode=False)

    def work() -> None:
        for block in images:
            parameters = draw(views, block.key_hash, block.sizes())
            size, batch_size = identity.seen_size[0], this.teacher.batch_size
            for _ in view_batches(block, Decoder(block), parameters, views, size, batch_size, this.device):
                pass

    return work


def _writing(this: Bench) -> dict[str, Timed]:
    """Committing the first block and view group, and writing the same arrays with zarr alone."""
    store, folder = this.store, this.folder
    part, entry, place = store.parts[""], store.entry("", 0, 0), Folder(folder / "committed")
    arrays = store.read(0, 0, [spec.name for spec in part.specs])
    batches = this.batches * entry.rows / this.images.split.count * len(store.identity.groups[0])

    def empty() -> None:
        if place.path.exists():
            shutil.rmtree(place.path)

    def commit_block() -> None:
        commit(place, part, 0, entry, arrays)

    created = LocalStore(folder / "bare.zarr")
    bare = {spec.name: create_array(created, spec) for spec in part.specs}

    def write_bare() -> None:
        for spec in part.specs:
            values = arrays[spec.name]
            values = values[None, None] if spec.name.startswith("probe/") else values
            bare[spec.name][tuple(slice(size) for size in values.shape)] = values

    return {"commit": Timed(commit_block, batches, empty), "bare zarr writes": Timed(write_bare, batches)}

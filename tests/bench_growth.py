"""What the time of loading and of steps grows with: rows, classes, views, ranks, blocks. Prints a table of each.

    .venv/bin/python tests/bench_growth.py [--rounds 5] [--only rows classes classes-int views ranks blocks]

Real tars of random 32x32 images and real stores of made-up logits (f16, or int of 8 bits); the student is one
layer, so that nothing hides what a step does with the teacher's logits. Sizes are timed in turn, round after round, and
medians are shown. `per unit` is the time per row, class, ... against that of the first line: 1 is linear, less is
better; where the time grew faster than what grows, since the line above, an exclamation mark stands.

loading: an epoch of batches from a store that is opened for it, images being decoded; first batch: the first of them.
steps: forward, KD and backward on an epoch of loaded batches, targets decoded; plain steps: with cross-entropy.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from made_stores import declare, made_up_identity
from torch import nn
from torch.nn import functional as F

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import Dataset, Split
from offline_kd.data.packing import encode_png, pack
from offline_kd.data.tars import Sample
from offline_kd.distill.loader import Loader
from offline_kd.distill.reader import Options, Source
from offline_kd.objectives import kd
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.join import Wanted, row_arrays
from offline_kd.store.layout import parts_of, probe_pixels
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.store.schema import LedgerEntry, StoreIdentity
from offline_kd.store.writer import commit, create_or_resume
from offline_kd.support.console import say, show_table
from offline_kd.support.places import Folder
from offline_kd.views.choice import choose
from offline_kd.views.kind import draw
from offline_kd.views.pad_crop_flip import PadCropFlip
from offline_kd.views.render import render_some

CPU = torch.device("cpu")
SIDE, BATCH, POOL = 32, 64, 4
F16, INT8 = Float16(name="f16"), Int(name="int")
Works = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Size:
    """Of a store, and of who reads it."""

    rows: int = 128  # of a block
    blocks: int = 4
    views: int = 1
    classes: int = 10
    world: int = 1
    codec: AnyCodec = F16


# ---- making --------------------------------------------------------------------------------------------------------


def make(folder: Path, size: Size) -> tuple[Store, BlockLoader]:
    """Tars of random images, and a store of random logits for them, written as stage 1 writes one."""
    rng = np.random.default_rng(0)
    samples = []
    for row in range(size.rows * size.blocks):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        samples.append(Sample(f"{row:06d}", row % size.classes, encode_png(pixels), "png"))
    split = Split(tars=pack(samples, folder / "images", "train", size.rows))
    dataset = Dataset(folder="images", classes=[f"class {n}" for n in range(size.classes)], splits={"train": split})
    images = BlockLoader(dataset, split, [folder], keep_bytes=2**30, prove="never")
    views = PadCropFlip(kind="pad_crop_flip", count=size.views)
    identity = made_up_identity(split.tars, views, size.codec, size.classes, SIDE, size.views)
    place = Folder(folder / "store")
    create_or_resume(place, identity)
    names = [commit_block(place, identity, images, number, rng) for number in range(size.blocks)]
    declare(place, identity, {name: hashlib.sha256(place.read(f"ledger/{name}")).digest() for name in names})
    return open_store(place), images


def commit_block(
    place: Folder, identity: StoreIdentity, images: BlockLoader, number: int, rng: np.random.Generator
) -> str:
    """All views of a block; returns the name of its ledger entry."""
    block, num_views = images[number], identity.views.num_views
    parameters = draw(identity.views, block.key_hash, block.sizes())
    rows, views = np.arange(4), np.zeros(4, dtype=np.int64)
    probes = render_some(block, choose(parameters, rows, views), identity.views, SIDE)
    arrays = {**row_arrays(identity, block), **{f"view/{name}": array for name, array in parameters.items()}}
    arrays |= {"probe/row": rows, "probe/view": views, "probe/pixels": probe_pixels(identity, probes)}
    logits = rng.normal(0, 3, (len(block), num_views, identity.num_classes)).astype(np.float32)
    arrays |= {f"logits/{name}": array for name, array in identity.codec.encode(logits, {}).items()}
    about = LedgerEntry(
        block=number, first_view=0, end_view=num_views, rows=len(block), tar=block.name, tar_sha256=block.sha256,
        objects={},
    )  # fmt: skip
    return commit(place, parts_of(identity)[""], 0, about, arrays).file_name


# ---- measuring -----------------------------------------------------------------------------------------------------


def works(folder: Path, size: Size) -> Works:
    """Everything that is timed at one size."""
    store, images = make(folder, size)
    source = Source(images, store.identity.views, store.identity.groups, [store], [Wanted()])
    loader = Loader(source, Options(batch_size=BATCH, pool_blocks=POOL, world=size.world), CPU)
    student = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * (SIDE // 8) ** 2, size.classes))
    batches = list(loader.epoch(0))

    def load() -> None:
        for _ in opened_again().epoch(0):
            pass

    def step() -> None:
        for batch in batches:
            assert batch.decode is not None
            kd(student(batch.images.float()), batch.decode(batch.signal[0]), temperature=4.0).backward()

    def plain_step() -> None:
        for batch in batches:
            F.cross_entropy(student(batch.images.float()), batch.labels).backward()

    def opened_again() -> Loader:
        again = Source(images, source.views, source.groups, [open_store(store.place)], source.wanted)
        return Loader(again, loader.options, CPU)

    def first_batch() -> object:
        return next(opened_again().epoch(0))

    return {"loading": load, "steps": step, "plain steps": plain_step, "first batch": first_batch}


def in_turn(sizes: Mapping[int, Works], rounds: int) -> dict[str, dict[int, float]]:
    """Median seconds of every part, by size; the first round warms up."""
    times: dict[str, dict[int, list[float]]] = {}
    for number in range(rounds + 1):
        for size, parts in sizes.items():
            for name, work in parts.items():
                started = time.perf_counter()
                work()
                if number:
                    times.setdefault(name, {}).setdefault(size, []).append(time.perf_counter() - started)
    return {name: {size: statistics.median(one) for size, one in by_size.items()} for name, by_size in times.items()}


def per_unit(seconds: Mapping[int, float], units: Mapping[int, float]) -> dict[int, str]:
    """By size: seconds per unit against those of the first size; with an exclamation mark where the time grew by more
    than a tenth faster than the units did since the size before.

    Args:
        units: by size, how much there is of what grows.
    """
    each = {size: one / units[size] for size, one in seconds.items()}
    first = before = next(iter(each.values()))
    found = {}
    for size, one in each.items():
        found[size] = f"{one / first:.3g}" + (" !" if one > 1.1 * before else "")
        before = one
    return found


# ---- the tables ----------------------------------------------------------------------------------------------------

GROWING = {
    "rows": {4 * 128 * times: Size(rows=128 * times) for times in (1, 4, 16)},
    "classes": {classes: Size(classes=classes) for classes in (10, 100, 1000, 21_841)},
    "classes-int": {classes: Size(classes=classes, codec=INT8) for classes in (10, 100, 1000, 21_841)},
    "views": {views: Size(views=views) for views in (1, 4, 16)},
    # Every rank shows its share of the rows, and reads all tars of which it has some.
    "ranks": {world: Size(world=world) for world in (1, 2)},
    "blocks": {blocks: Size(rows=32, blocks=blocks) for blocks in (4, 16, 64)},
}


def show(what: str, seconds: Mapping[str, Mapping[int, float]]) -> None:
    """A line of every size: milliseconds of each part, and what they are per unit. Of ranks, a unit is a row shown."""
    lines: dict[int, list[str]] = {}
    for by_size in seconds.values():
        relative = per_unit(by_size, {size: 1 / size if what == "ranks" else size for size in by_size})
        for size, one in by_size.items():
            lines.setdefault(size, [f"{size:,}"]).extend([f"{1e3 * one:.1f}", relative[size]])
    columns = [column for name in seconds for column in (f"{name}, ms", "per unit")]
    show_table(f"an epoch, by {what}", [what, *columns], list(lines.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(GROWING), default=list(GROWING))
    options = parser.parse_args()
    for what in options.only:
        with tempfile.TemporaryDirectory() as folder:
            say(f"{what}: {', '.join(f'{size:,}' for size in GROWING[what])}")
            sizes = {number: works(Path(folder) / str(number), size) for number, size in GROWING[what].items()}
            show(what, in_turn(sizes, options.rounds))


if __name__ == "__main__":
    main()

"""What reading costs: joined samples against webdataset alone, with and without decoding; several views; workers.

    OFFLINE_KD_DATA=FOLDER python tests/bench_stream.py [--rounds 5] [--workers-only]

One core (loaders with workers: all), one run: parts are timed in turn, round after round, and the median of the ratios
within a round is printed.
Real photographs (imagenet_sample); their targets are made up, which changes no time.
"""

import argparse
import hashlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from made_stores import declare
from PIL import Image

from offline_kd.cli.main import keep_freed_memory
from offline_kd.data import manifest as data
from offline_kd.data.blocks import BlockLoader, Decoder
from offline_kd.data.decoding import decode_image
from offline_kd.data.manifest import Dataset, EvaluationCrop, Normalisation, Split, Tar
from offline_kd.data.packing import pack
from offline_kd.data.tars import read_tar
from offline_kd.distill.loader import Loader
from offline_kd.distill.reader import Options, Source
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.identity import DatasetIdentity, TeacherIdentity
from offline_kd.store.join import Wanted, join
from offline_kd.store.layout import entry_names, parts_of, probe_pixels
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.store.schema import SCHEMA_VERSION, LedgerEntry, StoreIdentity
from offline_kd.store.writer import commit, create_or_resume
from offline_kd.support.places import Folder
from offline_kd.views.choice import choose
from offline_kd.views.epochs import view_groups
from offline_kd.views.kind import draw
from offline_kd.views.pad_crop_flip import PadCropFlip
from offline_kd.views.random_resized_crop import RandomCrop
from offline_kd.views.render import render_choice, render_view

CPU = torch.device("cpu")
VIEWS = RandomCrop(kind="random_resized_crop", size=224, count=4)


def make_store(folder: Path, loader: BlockLoader, views: RandomCrop, codec: Float16 | Int) -> Store:
    """Of made-up logits for the real images: what `cache_teacher` writes, without a teacher."""
    from offline_kd.cache.asking import Inquiry, ask_teacher
    from offline_kd.models.teacher import Teacher

    classes = loader.dataset.classes
    about = {"normalisation": Normalisation(mean=(0, 0, 0), std=(1, 1, 1)), "crop": EvaluationCrop(size=8, resize=8)}

    class MadeUp(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.randn(len(images), len(classes))

    identity = StoreIdentity(
        schema_version=SCHEMA_VERSION,
        name="bench",
        dataset=DatasetIdentity(
            name="bench", split="train", fingerprint="0" * 64, classes=classes, height=None, width=None,
            tars=loader.split.tars, licence="",
        ),
        teacher=TeacherIdentity(
            name="t", model="m", model_args={}, weights_sha256="0" * 64, dtype="float32", evaluated_on="",
            measured_top1=0.0, licence="", **about,
        ),
        views=views,
        codec=codec,
        rows_per_block=max(tar.count for tar in loader.split.tars),
        views_per_group=views.count,
        versions={},
    )  # fmt: skip
    teacher = Teacher(
        "t", "m", {}, "0" * 64, dtype="float32", expected=None, licence="", network=MadeUp(), batch_size=64, **about
    )
    place = Folder(folder)
    create_or_resume(place, identity)
    part = parts_of(identity)[""]
    inquiry, entries = Inquiry(teacher, identity, {}, CPU), {}
    for number, block in enumerate(loader):
        arrays, _ = ask_teacher(inquiry, block, draw(views, block.key_hash, block.sizes()), number, 0)
        about = LedgerEntry(
            block=number, first_view=0, end_view=views.count, rows=len(block), tar=block.name, tar_sha256=block.sha256,
            objects={},
        )  # fmt: skip
        entry = commit(place, part, 0, about, arrays)
        entries[entry.file_name] = entry
    contents = {name: place.read(f"ledger/{name}") for name in entries}
    finish(place, identity, contents)
    return open_store(folder)


def finish(place: Folder, identity: StoreIdentity, contents: dict[str, bytes]) -> None:
    declare(place, identity, {name: hashlib.sha256(content).digest() for name, content in contents.items()})


def seconds(work: Callable[[], int]) -> float:
    """Per sample."""
    started = time.perf_counter()
    count = work()
    return (time.perf_counter() - started) / count


def in_turn(parts: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, work in parts.items():
            one = seconds(work)
            if number:  # the first round warms up
                times[name].append(one)
    for name, one in times.items():
        middle = statistics.median(one)
        print(f"  {name:30} {middle * 1e6:9.1f} us a sample, {1 / middle:8,.0f} a second")
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def reading(store: Store, loader: BlockLoader, rounds: int) -> None:
    position = np.zeros(len(loader[0]), dtype=np.int64)
    urls = [str(path) for path in loader.files]

    def alone() -> int:
        return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))

    def joined() -> int:
        store.memory.kept.clear()
        store.memory.kept_bytes = 0
        total = 0
        for block in loader:
            total += len(join(store, block, 0, position[: len(block)]).labels)
        return total

    def decoded_alone() -> int:
        total = 0
        for block in loader:
            choice = choose(draw(VIEWS, block.key_hash, block.sizes()), np.arange(len(block)), position[: len(block)])
            total += len(render_choice(Decoder(block), choice, VIEWS, VIEWS.size)[0])
        return total

    def decoded_joined() -> int:
        store.memory.kept.clear()
        store.memory.kept_bytes = 0
        total = 0
        for block in loader:
            choice = join(store, block, 0, position[: len(block)]).view
            total += len(render_choice(Decoder(block), choice, VIEWS, VIEWS.size)[0])
        return total

    print("tars read, without decoding images")
    times = in_turn({"webdataset alone": alone, "read and joined": joined}, rounds)
    print(f"joined / webdataset alone, samples per second: {ratio(times, 'webdataset alone', 'read and joined'):.2f}")
    print("with decoding and a random crop to 224 pixels")
    times = in_turn({"no targets": decoded_alone, "with targets, joined": decoded_joined}, max(rounds // 2, 2))
    extra = ratio(times, "with targets, joined", "no targets") - 1
    print(f"targets and join: {extra:+.1%}")


def several_views(store: Store, loader: BlockLoader, rounds: int, size: int) -> None:
    def epochs(views_per_decode: int) -> Callable[[], int]:
        source = Source(loader, VIEWS, store.identity.groups, [store], [Wanted()])
        options = Options(batch_size=100, pool_blocks=4, views_per_decode=views_per_decode, size=size)
        stream = Loader(source, options, CPU)
        return lambda: sum(len(batch.labels) for batch in stream.epoch(0))

    print(f"a loader-bound run: images per second of the stream, crops to {size} pixels")
    times = in_turn({"views_per_decode: 1": epochs(1), "views_per_decode: 4": epochs(4)}, rounds)
    print(f"4 views of a decode / 1: {ratio(times, 'views_per_decode: 1', 'views_per_decode: 4'):.2f} times the images")


def with_workers(name: str, source: Source, rounds: int, workers: int, **options: int) -> None:
    """Whole passes, the first of which finds nothing kept."""
    stream = Loader(source, Options(workers=workers, **options), CPU)

    def a_pass(epoch: int) -> int:
        return sum(len(batch.labels) for batch in stream.epoch(epoch))

    first, *later = (1 / seconds(lambda epoch=epoch: a_pass(epoch)) for epoch in range(rounds + 1))
    print(f"  {name}, workers {workers}: {first:8,.0f} images a second in the first epoch, then", end=" ")
    print(f"{statistics.median(later):8,.0f} ({min(later):,.0f} to {max(later):,.0f})")


def resizing(loader: BlockLoader, rounds: int) -> None:
    """Why crops are resized by torch."""
    block = loader[0]
    images = [decode_image(encoded) for encoded in block.encoded[:100]]
    arrays = [np.array(image) for image in images]
    boxes = draw(VIEWS, block.key_hash[:100], block.sizes()[:100])["box"][:, 0]
    for name, filter in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):

        def by_torch(name: str = name) -> int:
            for pixels, box in zip(arrays, boxes, strict=True):
                render_view(pixels, {"box": box, "flip": 0}, VIEWS.size, name)
            return len(arrays)

        def by_pillow(filter: Image.Resampling = filter) -> int:
            for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
                cut = image.crop((left, top, left + width, top + height))
                np.asarray(cut.resize((VIEWS.size, VIEWS.size), filter))
            return len(images)

        print(f"decoded images to random crops of {VIEWS.size}, {name}")
        times = in_turn({"torch, as views are": by_torch, "Pillow": by_pillow}, rounds)
        print(f"Pillow / torch: {ratio(times, 'Pillow', 'torch, as views are'):.1f} times the seconds")


def large_photographs(folder: Path, loader: BlockLoader, scale: float = 1.75) -> BlockLoader:
    """The same photographs at ImageNet's usual size (short side about 420 pixels here)."""
    import io

    samples = []
    for sample in read_tar(loader.files[0])[0][:400]:
        image = decode_image(sample.encoded)
        size = (round(image.width * scale), round(image.height * scale))
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=97
        )  # which makes them as heavy, too: about 110 kB
        samples.append(type(sample)(sample.key, sample.label, buffer.getvalue(), "jpg"))
    print(f"photographs of {sum(len(one.encoded) for one in samples) / len(samples) / 1e3:.0f} kB")
    tars = pack(samples, folder / "large", "train", 200)
    dataset = Dataset(folder="large", classes=loader.dataset.classes, splits={"train": Split(tars=tars)})
    return BlockLoader(dataset, dataset.splits["train"], [folder], keep_bytes=0, decode=False, prove="never")


def worker_memory(store: Store, loader: BlockLoader, folder: Path) -> None:
    """Peak memory of a worker process whose store says it has 1.28 million rows with 50 views of each."""
    blocks, views, rows = 1_280, 50, 1_000
    tars = [loader.split.tars[0]] + [Tar(file=f"{i}.tar", count=rows, sha256=f"{i:064x}") for i in range(1, blocks)]
    identity = store.created.model_copy(
        update={
            "dataset": store.created.dataset.model_copy(update={"tars": tars}),
            "views": VIEWS.model_copy(update={"count": views}),
            "views_per_group": 1,
            "rows_per_block": rows,
        }
    )
    place = Folder(folder)
    create_or_resume(place, identity)
    part = parts_of(identity)[""]
    block = loader[0]
    parameters = draw(VIEWS.model_copy(update={"count": 1}), block.key_hash, block.sizes())
    first = store.read(0, 0, [spec.name for spec in store.parts[""].specs])
    arrays = {name: array[:, :1] if name.startswith(("view/", "logits/")) else array for name, array in first.items()}
    arrays |= {f"view/{name}": array for name, array in parameters.items()}
    arrays["probe/view"] = np.zeros_like(first["probe/view"])
    from offline_kd.views.render import render_some

    probes = choose(parameters, first["probe/row"].astype(np.int64), np.zeros(len(first["probe/row"]), dtype=np.int64))
    arrays["probe/pixels"] = probe_pixels(store.created, render_some(block, probes, VIEWS, store.created.seen_size[0]))
    contents = {}
    names = entry_names(identity, {"": views})
    for view in range(views):
        about = LedgerEntry(
            block=0, first_view=view, end_view=view + 1, rows=len(block), tar=block.name, tar_sha256=block.sha256,
            objects={},
        )  # fmt: skip
        entry = commit(place, part, view, about, arrays)
        contents[entry.file_name] = place.read(f"ledger/{entry.file_name}")
    # The rest of the index: the worker must hold it, but reads none of these blocks.
    contents |= {name: name.encode() for name in names if name not in contents}
    finish(place, identity, contents)
    print(f"a worker process, store of {blocks:,} blocks x {views} views ({blocks * views:,} ledger entries), in MB:")
    for kind in ("forked, as for folders", "spawned, as for buckets"):
        private, shared_out, resident = _most_memory(folder, loader, kind.startswith("forked"))
        print(f"  {kind:25} {private:.0f} of its own, {shared_out:.0f} with its part of what is shared,", end=" ")
        print(f"{resident:.0f} with all that is shared")


def _most_memory(folder: Path, loader: BlockLoader, forked: bool) -> tuple[float, float, float]:
    """The most that a worker holds, watched from outside: private pages, these and its part of shared ones, all."""
    # The parent is a fresh process: what this one holds of other measurements is not a worker's.
    target = _parent if forked else _one_worker
    process = multiprocessing.get_context("spawn").Process(target=target, args=(folder, loader))
    process.start()
    most = [0.0, 0.0, 0.0]
    while process.is_alive():
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in children if forked else [process.pid]:
            try:
                pages = dict(_pages(Path(f"/proc/{pid}/smaps_rollup").read_text()))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if pages:
                private = pages["Private_Clean"] + pages["Private_Dirty"]
                most = [max(a, b) for a, b in zip(most, (private, pages["Pss"], pages["Rss"]), strict=True)]
        time.sleep(0.02)
    assert process.exitcode == 0
    return most[0], most[1], most[2]


def _pages(rollup: str) -> Iterator[tuple[str, float]]:
    for line in rollup.splitlines()[1:]:
        name, size = line.split()[:2]
        yield name.rstrip(":"), int(size) / 1024


def _stream(folder: Path, loader: BlockLoader, workers: int) -> Loader:
    torch.set_num_threads(1)
    store = open_store(folder)
    first = Split(tars=loader.split.tars[:1])
    one = BlockLoader(loader.dataset, first, [loader.files[0].parent.parent], keep_bytes=0, decode=False, prove="never")
    source = Source(one, store.identity.views, store.identity.groups, [store], [Wanted()])
    return Loader(source, Options(batch_size=100, pool_blocks=1, size=224, workers=workers), CPU)


def _parent(folder: Path, loader: BlockLoader) -> None:
    """A run with two workers."""
    multiprocessing.set_start_method("fork", force=True)  # a spawned process would spawn its own
    stream = _stream(folder, loader, 2)
    for epoch in range(5):
        for _ in stream.epoch(epoch):
            pass


def _one_worker(folder: Path, loader: BlockLoader) -> None:
    """What a worker does: its parts go elsewhere."""
    stream = _stream(folder, loader, 0)
    for epoch in range(5):
        stream.reader.start[0] = epoch
        for _ in stream.reader:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers-only", action="store_true", help="loaders with 0 and 2 workers, and nothing else")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    keep_freed_memory()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    manifest = data.load_manifest(Path(__file__).parent.parent / "data_manifest.yaml")
    dataset, split = manifest.dataset("imagenet_sample"), manifest.split("imagenet_sample", "val")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Plain tars of 500, as people have them.
        samples = read_tar(data.locate(f"{dataset.folder}/{split.tars[0].file}", data.data_roots()))[0]
        tars = pack(samples, folder / "photos", "train", 500)
        plain = Dataset(folder="photos", classes=dataset.classes, splits={"train": Split(tars=tars)})
        print("loaders on all cores: CIFAR-10 (10 tars, padded crops), photographs (10 tars, crops to 224)")
        os.sched_setaffinity(0, cores)
        for workers in (0, 2):
            cifar, split10 = manifest.dataset("cifar10"), manifest.split("cifar10", "train")
            kept = BlockLoader(cifar, split10, data.data_roots(), keep_bytes=2**30 // max(workers, 1), prove="once")
            padded = PadCropFlip(kind="pad_crop_flip")
            source = Source(kept, padded, view_groups(padded.num_views, 54))
            with_workers("CIFAR-10", source, rounds, workers, batch_size=128, pool_blocks=4)
            few = Split(tars=pack(samples, folder / "photos", "few", 100))
            kept = BlockLoader(plain, few, [folder], keep_bytes=2**30, decode=False, prove="once")
            source = Source(kept, VIEWS, [range(VIEWS.count)])
            with_workers("photographs", source, rounds, workers, batch_size=64, pool_blocks=4)
        if arguments.workers_only:
            return
        os.sched_setaffinity(0, {max(cores)})
        loader = BlockLoader(plain, plain.splits["train"], [folder], keep_bytes=0, decode=False, prove="never")
        store = make_store(folder / "store", loader, VIEWS, Float16(name="f16"))
        reading(store, loader, rounds)
        large = large_photographs(folder, loader)
        resizing(large, rounds)
        large_store = make_store(folder / "large-store", large, VIEWS, Float16(name="f16"))
        for size in (224, 128):
            several_views(large_store, large, rounds, size)
        os.sched_setaffinity(0, cores)
        worker_memory(store, loader, folder / "index")


if __name__ == "__main__":
    main()

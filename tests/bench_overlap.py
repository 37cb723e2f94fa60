"""How much of stage 1 is hidden behind the slower of decoding and the teacher, and what lies in its queues.

    python tests/bench_overlap.py [--images 2048] [--rounds 3]

A teacher that sleeps, releasing the interpreter lock, takes half as long as decoding, as long, and twice as long: one
on a device of its own, where pixels are normalised, too. Decoding alone and each capture are timed in turn, round after
round; ratios are taken within a round. The images are made-up JPEGs of about 300 pixels, seen at 224, 128 in a tar.
What lies in the queues is counted while the capture runs.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from pictures import encoded, photograph, photographs

from offline_kd.cache import work as work_module
from offline_kd.cache.asking import Answer, Batch, Portion, rendered
from offline_kd.cache.engines.local import run
from offline_kd.cache.job import Capture, describe_capture
from offline_kd.cache.teacher import Measured, load_teacher
from offline_kd.cache.work import open_work
from offline_kd.cli.main import keep_freed_memory
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.tars import Sample
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.store.writer import create_or_resume
from offline_kd.support.places import Folder
from offline_kd.views.kind import draw

CPU = torch.device("cpu")
SPEEDS = {"twice as fast as decoding": 0.5, "as fast as decoding": 1.0, "twice as slow as decoding": 2.0}


@dataclass(frozen=True)
class Elsewhere(Teacher):
    """A teacher on a device of its own: takes so long for every image, and nothing of the CPU."""

    seconds_per_image: float = 0.0

    def logits_and_maps(self, images: Tensor, points: Sequence[TapPoint]) -> tuple[Tensor, list[Tensor]]:
        time.sleep(len(images) * self.seconds_per_image)
        return torch.zeros(len(images), 3), []


def jpegs(count: int, side: int) -> list[Sample]:
    """So many, of few different contents and different names."""
    rng = np.random.default_rng(1)
    sizes = [rng.integers(side * 3 // 4, side * 5 // 4, 2).tolist() for _ in range(16)]
    contents = [encoded(photograph(index, *size), quality=90) for index, size in enumerate(sizes)]
    return [Sample(f"{index:06d}", index % 3, contents[index % 16], "jpg") for index in range(count)]


def make_capture(folder: Path, samples: list[Sample], size: int, per_tar: int = 40) -> Capture:
    """Of these samples by a sleeping teacher; nothing of it is stored yet."""
    views = {"kind": "random_resized_crop", "size": size, "count": 1}
    recipe, manifest = photographs(folder, samples, per_tar=per_tar, views=views)
    loader = BlockLoader(manifest.dataset("photos"), manifest.split("photos", "train"), [folder], 0, decode=False)
    teacher = load_teacher(recipe, manifest, [folder], 3, CPU)
    crop = teacher.crop.model_copy(update={"size": size, "resize": size})
    teacher = Elsewhere(**{**vars(teacher), "crop": crop})
    identity = describe_capture(recipe, loader, teacher, Measured("nothing", 0.0), None, None, CPU)
    return Capture(recipe, loader, teacher, CPU, Folder(folder / "store"), identity, [], [""], 1)


def decode(capture: Capture) -> float:
    """Seconds of reading, decoding and rendering all views, and of nothing else."""
    place = Folder(capture.place.path.parent / f"decoded-{time.monotonic_ns()}")
    create_or_resume(place, capture.created)
    blocks = list(range(capture.created.num_blocks))
    inquiry = open_work(replace(capture, place=place), "", blocks).inquiry
    started = time.perf_counter()
    for number, block in capture.loader.in_order(blocks):
        parameters = draw(inquiry.identity.views, block.key_hash, block.sizes())
        for _ in rendered(inquiry, Portion(block, parameters, number, 0)):
            pass
    return time.perf_counter() - started


def stage_1(capture: Capture, seconds_per_image: float) -> float:
    """Seconds of all of stage 1, with a teacher that takes so long for every image, into a new store."""
    place = Folder(capture.place.path.parent / f"store-{time.monotonic_ns()}")
    capture = replace(capture, place=place, teacher=replace(capture.teacher, seconds_per_image=seconds_per_image))
    create_or_resume(capture.place, capture.created)
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        run(capture, "", list(range(capture.created.num_blocks)))
    return time.perf_counter() - started


@contextlib.contextmanager
def counting(monkey: object) -> Iterator[dict[str, int]]:
    """The most bytes of pixels that were rendered and not asked about, and of answers that were not encoded."""
    most, now = {"pixels": 0, "answers": 0}, {"pixels": 0, "answers": 0}
    before = {name: getattr(monkey, name) for name in ("rendered", "answer", "_up_to_none")}

    def add(kind: str, amount: int) -> None:
        now[kind] += amount
        most[kind] = max(most[kind], now[kind])

    def counted_views(*about: object) -> Iterator[Batch]:
        for batch in before["rendered"](*about):
            add("pixels", batch.pixels.nbytes)
            yield batch

    def counted_answer(inquiry: object, portion: object, batch: Batch) -> Answer:
        one = before["answer"](inquiry, portion, batch)
        add("pixels", -batch.pixels.nbytes)
        add("answers", one.logits.nbytes)
        return one

    def counted_taken(*about: object) -> Iterator[Answer]:
        for one in before["_up_to_none"](*about):
            add("answers", -one.logits.nbytes)
            yield one

    for name, counted in zip(before, (counted_views, counted_answer, counted_taken), strict=True):
        setattr(monkey, name, counted)
    try:
        yield most
    finally:
        for name, original in before.items():
            setattr(monkey, name, original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        capture = make_capture(Path(name), jpegs(options.images, 300), 224, per_tar=128)
        decode(capture)
        ratios: dict[str, list[float]] = {speed: [] for speed in SPEEDS}
        for _ in range(options.rounds):
            for speed, factor in SPEEDS.items():
                alone = (decode(capture) + decode(capture)) / 2
                wall = stage_1(capture, factor * alone / options.images)
                ratios[speed].append(wall / (max(1.0, factor) * alone))
        with counting(work_module) as most:
            stage_1(capture, 4 * alone / options.images)
        batch = capture.teacher.batch_size
        print(
            f"{options.images} JPEGs, decoding alone {1e3 * alone / options.images:.2f} ms an image, batches of {batch}"
        )
        for speed, found in ratios.items():
            spread = ", ".join(f"{one:.3f}" for one in sorted(found))
            print(f"teacher {speed}: stage 1 / the slower of both {statistics.median(found):.3f} ({spread})")
        print(f"most in the queues: {most['pixels'] / 1e6:.1f} MB of pixels, {most['answers'] / 1e6:.3f} MB of logits")


if __name__ == "__main__":
    main()

"""What a capture will cost, before anything is spent: bytes, objects, teacher passes, time, and when it pays."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from offline_kd.cache.asking import Inquiry, ask_teacher
from offline_kd.cache.job import describe_capture
from offline_kd.cache.sample import sampled_logits
from offline_kd.cache.teacher import Measured, expected_accuracy, load_teacher
from offline_kd.data.blocks import BlockLoader, ImageBlock
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import Recipe
from offline_kd.store.chunks import encode_chunk
from offline_kd.store.codecs import CODEC_TABLES
from offline_kd.store.codecs.codec import tensors_of
from offline_kd.store.layout import num_entries, num_pages, parts_of
from offline_kd.store.reader import Arrays
from offline_kd.store.schema import StoreIdentity, kind_of
from offline_kd.support.console import say
from offline_kd.views.kind import draw
from offline_kd.views.render import plain_images

MAX_SAMPLES, MIN_SECONDS = 512, 3.0  # of the first tar; of the warm-up


@dataclass(frozen=True)
class Plan:
    """Estimates from a measured warm-up on the first tar."""

    rows: int
    objects: int
    bytes: dict[str, int]  # by kind of array
    teacher_passes: int  # images through the teacher
    seconds_per_view: float  # of stage 1
    teacher_seconds_per_view: float  # of the bare teacher
    capture_seconds: float
    student_teacher_seconds: float  # what one student would wait for a live teacher, all epochs
    break_even_students: int


def plan(recipe: Recipe, manifest: Manifest, roots: Sequence[Root], device: torch.device) -> Plan:
    """Ask the teacher about some views of the first tar, pack them, and work out the whole capture."""
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    loader = BlockLoader(dataset, split, roots, 2**30, decode=recipe.views.is_exact, on_bad=recipe.data.bad_images)
    teacher = load_teacher(recipe, manifest, roots, len(dataset.classes), device)
    identity = describe_capture(recipe, loader, teacher, _not_asked(teacher), None, None, device)
    part = parts_of(identity)[""]
    block = _first(loader[0], MAX_SAMPLES)
    views = identity.groups[0]
    parameters = draw(recipe.views, block.key_hash, block.sizes())
    chosen = {name: array[:, : views.stop] for name, array in parameters.items()}
    tables = _stand_ins(identity, device)
    if identity.codec.learns_from:  # of fewer answers than a capture learns from: how big it is depends on them
        logits = sampled_logits(teacher, identity.views, loader, len(block), len(views), device, 1)
        tables[CODEC_TABLES] = tensors_of(identity.codec.fit(logits))
    inquiry = Inquiry(teacher, identity, tables, device)

    def stage_1() -> Arrays:
        return ask_teacher(inquiry, block, chosen, 0, 0)[0]

    arrays = stage_1()
    size_per_kind: dict[str, float] = {}
    samples = sum(tar.count for tar in split.tars)
    started = time.perf_counter()
    for spec in part.specs:
        values = arrays[spec.name]
        if spec.name.startswith("probe/"):
            total = len(encode_chunk(spec, values[None, None])) * identity.num_blocks * len(identity.groups)
        else:
            content = encode_chunk(replace(spec, chunks=values.shape), values)
            times = len(identity.groups) if spec.extent == "group" else 1
            total = math.ceil(len(content) / len(block) * samples) * times
        size_per_kind[kind_of(spec.name)] = size_per_kind.get(kind_of(spec.name), 0) + total
    packing = (time.perf_counter() - started) / (len(block) * len(views))
    for specs in part.tables.values():
        size_per_kind["templates"] = size_per_kind.get("templates", 0) + sum(spec.chunk_bytes for spec in specs)

    images, _ = plain_images(block, teacher.crop, 0, len(block))
    bare = _seconds(lambda: _bare(teacher, images, len(views), device), "teacher alone") / (len(images) * len(views))
    whole = _seconds(stage_1, "stage 1") / (len(block) * len(views)) + packing
    num_views = identity.views.num_views
    passes = samples * num_views + (samples if part.tables else 0) + _evaluation_images(recipe, manifest)
    capture = samples * num_views * whole + (passes - samples * num_views) * bare
    one_student = recipe.training.epochs * samples * bare
    objects = sum(
        identity.num_blocks * (len(identity.groups) if spec.extent == "group" else 1) for spec in part.specs
    ) + sum(len(specs) + 1 for specs in part.tables.values())
    objects += num_entries(identity, {"": num_views}) + num_pages(identity, {"": num_views})
    return Plan(
        rows=samples * num_views,
        objects=objects,
        bytes={kind: int(size) for kind, size in sorted(size_per_kind.items())},
        teacher_passes=passes,
        seconds_per_view=whole,
        teacher_seconds_per_view=bare,
        capture_seconds=capture,
        student_teacher_seconds=one_student,
        break_even_students=math.ceil(capture / one_student),
    )


def _not_asked(teacher: Teacher) -> Measured:
    """In the place of what its gate would find."""
    is_classifier, is_of_sets = teacher.kind == "classifier", teacher.kind == "multilabel"
    return Measured("not asked", top1=0.0 if is_classifier else None, map=0.0 if is_of_sets else None)


def _first(block: ImageBlock, count: int) -> ImageBlock:
    return replace(
        block,
        keys=block.keys[:count],
        key_hash=block.key_hash[:count],
        image_digest=block.image_digest[:count],
        image_crc=block.image_crc[:count],
        labels=block.labels[:count],
        encoded=block.encoded[:count],
        pixels=None if block.pixels is None else block.pixels[:count],
    )


def _bare(teacher: Teacher, images: Tensor, num_views: int, device: torch.device) -> None:
    for start in range(0, len(images) * num_views, teacher.batch_size):
        index = torch.arange(start, min(start + teacher.batch_size, len(images) * num_views)) % len(images)
        teacher.logits(images[index].to(device))


def _seconds(work: Callable[[], object], title: str) -> float:
    """Median time of one call, repeated for MIN_SECONDS and three times at least."""
    say(f"measuring: {title}")
    times: list[float] = []
    while sum(times) < MIN_SECONDS or len(times) < 3:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def _stand_ins(identity: StoreIdentity, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Templates of the right shapes: their values decide what is stored, hardly how long it takes or how big it is."""
    draw_one = torch.Generator().manual_seed(0)
    return {
        name: {
            spec.name.rsplit("/", 1)[-1]: torch.rand(spec.shape, generator=draw_one).to(device)
            if spec.dtype == "<f4"
            else torch.zeros(spec.shape, device=device)
            for spec in specs
        }
        for name, specs in parts_of(identity)[""].tables.items()
        if name != CODEC_TABLES
    }


def _evaluation_images(recipe: Recipe, manifest: Manifest) -> int:
    """How many images the gate asks about."""
    expected = expected_accuracy(recipe, manifest)
    named = (expected.dataset, expected.split) if expected else (recipe.data.dataset, recipe.data.evaluation)
    return manifest.split(*manifest.evaluation(*named)).count

"""What a first recipe is planned by: what its teacher begins with, its pictures, and what this machine has time for."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from offline_kd.data.decoding import decode, is_scalable
from offline_kd.data.folders import Photos, Picture, training_split
from offline_kd.data.tars import hash_key
from offline_kd.models.checkpoints import read_state_dict
from offline_kd.models.networks import Input, build, head_of, input_of
from offline_kd.models.pretrained import fetch_pretrained
from offline_kd.models.weights import begin_from
from offline_kd.support.console import counted
from offline_kd.support.errors import ModelError
from offline_kd.views.kind import draw
from offline_kd.views.random_resized_crop import RandomCrop
from offline_kd.views.render import decoding_scales, render_view

SIZES = (224, 192, 160, 128, 96, 64)  # of views, in pixels; the largest that there is time for is taken
SMALL = 64  # pictures of one size and at most so many pixels a side are shifted, not resampled
TIMED_AT = 128  # pixels; networks take as long as they have pixels, nearly
TIMED_BATCH, TIMED_PICTURES = 8, 8
OF_A_THREAD = 0.7  # n threads are so many as n to this power
FEW, ENOUGH, MANY = 4, 8, 20  # rounds: a view of every picture that is stored, and the epochs that belong to it
MOST = 100
TEACHER_EPOCHS, EPOCHS = 2, 3  # of a round
SHOWN = 100_000  # pictures that a student should see at least: more rounds for fewer pictures
STUDENTS = 2  # objectives of the recipe
PROBED = 2_000  # pictures; with fewer the last layer of a teacher that knows others learns more if it learns alone
FEW_PICTURES = 10_000  # from which a teacher that knew nothing may not learn more than a student
SIDE = 512  # pixels: a view of a quarter of a picture still has more of them than the largest of SIZES


@dataclass(frozen=True)
class Start:
    """What the teacher begins with."""

    model: str
    weights: str | None  # as recipes name them
    new_head: bool
    trains: bool
    why: str
    sees: Input | None  # what its library knows of it
    warning: str = ""  # of what is to be expected of it
    head_alone: bool = False  # it learns its new last layer and nothing else


@dataclass(frozen=True)
class Seconds:
    """What one picture costs on this machine, the networks at TIMED_AT pixels."""

    teaching: float  # a training step of the teacher; 0: it is not trained
    answering: float
    learning: float  # a training step of the student
    reading: float  # decoding it, and rendering a view
    asked_at: int | None = None  # pixels that the teacher sees and learns at, whatever the student's are


@dataclass(frozen=True)
class Plan:
    """What there is time for."""

    size: int  # of views, in pixels
    rounds: int
    seconds: float


# ---- the teacher ---------------------------------------------------------------------------------------------------


def teacher_start(model: str, weights: str, photos: Photos) -> Start:
    """What a teacher begins with.

    Args:
        weights: a file; "none"; or "pretrained" ("auto": where they can be had), which fetches them.

    Raises ModelError for networks nobody knows and for weights that do not fit or cannot be had.
    """
    start = _start(model, weights, len(photos.classes))
    pictures = len(photos.splits[train_of(photos)])
    if start.new_head and pictures < PROBED:
        return replace(
            start, head_alone=True, why=start.why.replace("and all of it, learns", "and nothing else, learns")
        )
    if start.weights is not None or pictures >= FEW_PICTURES:
        return start
    warning = (
        f"a teacher that begins with nothing and learns from {counted(pictures, 'pictures')} may know no more than its "
        "students, and then they gain nothing. Better is one with pretrained weights: a --teacher such as "
        "timm:resnet50, where there is a network, or --weights FILE"
    )
    return replace(start, warning=warning)


def _start(model: str, weights: str, num_classes: int) -> Start:
    network, sees = build(model, num_classes), input_of(model, None)
    if weights == "none":
        return Start(model, None, False, True, "it learns from nothing, as --weights none says", sees)
    if weights not in ("auto", "pretrained"):
        state = read_state_dict(Path(weights))
        if begin_from(network, state, head_of(model, num_classes, {}), None, "teacher.head"):
            why = f"its last layer has not {num_classes} outputs: a new one, and all of it, learns from the pictures"
            return Start(model, weights, True, True, why, sees)
        return Start(model, weights, False, False, f"it has {num_classes} outputs, and is used as it is", sees)
    named, problem = fetch_pretrained(model)
    if named is not None:
        return Start(model, named, True, True, "it knows other pictures; a new last layer, and all of it, learns", sees)
    if weights == "pretrained":
        raise ModelError(f"'{model}': {problem}. Give --weights FILE, or --weights none to train it from nothing.")
    return Start(model, None, False, True, f"it learns from nothing: {problem}", sees)


# ---- what follows from the pictures --------------------------------------------------------------------------------


def train_of(photos: Photos) -> str:
    """The split to learn from."""
    return training_split(photos.splits) or next(iter(photos.splits))


def one_size(pictures: Sequence[Picture]) -> int | None:
    """The longer side, in pixels, of pictures that are small and all of one size; None for others."""
    sizes = {picture.size for picture in pictures}
    side = max(max(size) for size in sizes)
    return side if len(sizes) == 1 and side <= SMALL else None


def short_side(pictures: Sequence[Picture]) -> int:
    """In pixels; half of the pictures have at least so many."""
    return sorted(min(picture.size) for picture in pictures)[len(pictures) // 2]


def view_sizes(pictures: Sequence[Picture]) -> list[int]:
    """Sizes that views may have, the largest first: none is larger than the pictures are."""
    side, short = one_size(pictures), short_side(pictures)
    return [side] if side else [size for size in SIZES if size <= short] or [max(short // 8 * 8, 16)]


def side_for(start: Start) -> int:
    """Pixels that the shorter side of a picture needs: SIDE, or twice what the teacher sees where that is more."""
    return max(SIDE, 2 * start.sees.crop.size) if start.sees else SIDE


def decoding_for(pictures: Sequence[Picture], size: int) -> Literal["full", "scaled"]:
    """Pictures that are several times larger than their views need not be decoded whole."""
    return "scaled" if short_side(pictures) >= 4 * size else "full"


def batch_size_for(rows: int) -> int:
    """Of 16 to 128 pictures: some 30 steps an epoch, where there are pictures enough."""
    return int(2 ** min(max(round(math.log2(rows / 30)), 4), 7))


# ---- time ----------------------------------------------------------------------------------------------------------


def seconds_of_network(model: str, num_classes: int, size: int, device: torch.device) -> tuple[float, float]:
    """Of a training step and of an answer, for one image, as if it had TIMED_AT pixels a side.

    Raises ModelError where images of that size do not fit.
    """
    network = build(model, num_classes).to(device)
    images = torch.rand(TIMED_BATCH, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(TIMED_BATCH, dtype=torch.long, device=device)

    def step() -> None:
        torch.autograd.backward(F.cross_entropy(network(images), labels))

    def answer() -> None:
        with torch.inference_mode():
            network(images)

    def fastest(work: Callable[[], None]) -> float:
        return min(timed(work, device) for _ in range(3)) / TIMED_BATCH * (TIMED_AT / size) ** 2

    try:
        taught = fastest(step)
        network.eval()
        return taught, fastest(answer)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"'{model}' does not take {size}x{size} pixels: {reason}") from error


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds on this machine when nothing else is going on there, whatever is going on.

    On a CPU the time of one thread is taken, which other programs do not change much: waiting for each other, several
    threads would take many times as long on a busy machine.
    """
    if device.type == "cuda":
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.thread_time()
        work()
        return (time.thread_time() - started) / threads**OF_A_THREAD
    finally:
        torch.set_num_threads(threads)


def read(picture: Picture, encoded: bytes, views: RandomCrop) -> None:
    """Decode a picture as it is packed, and render a view of it."""
    drawn = draw(views, np.array([hash_key(picture.key)], dtype=np.uint64), np.array([picture.size]))
    view = {name: values[0, 0] for name, values in drawn.items()}
    scale = int(decoding_scales(views, view["box"], views.size)) if is_scalable(encoded) else 1
    decoded = decode(encoded, scale)
    render_view(decoded.pixels, view | {"box": decoded.box(view["box"])}, views.size, views.interpolation)


def seconds_of_all(start: Start, student: str, photos: Photos, device: torch.device) -> tuple[Seconds, list[int]]:
    """What one picture costs, and the sizes that both networks take; raises ModelError where there are none."""
    pictures, classes = photos.splits[train_of(photos)], len(photos.classes)
    sizes, exact = view_sizes(pictures), one_size(pictures) is not None
    first = min(TIMED_AT, sizes[0])
    own = start.sees.crop.size if start.sees and not exact else first
    keeps_size = start.head_alone or not start.trains  # what it knows, it knows of pictures of that size
    at = own if keeps_size else first
    try:
        taught, answered = seconds_of_network(start.model, classes, at, device)
    except ModelError:
        if at == own:
            raise
        sizes, first = [own], own  # transformers take one size
        taught, answered = seconds_of_network(start.model, classes, own, device)
    taught = answered if start.head_alone else taught  # no gradients but those of the last layer
    learned, _ = seconds_of_network(student, classes, first, device)
    views = RandomCrop(kind="random_resized_crop", size=first, decoding=decoding_for(pictures, first), count=1)
    some = [] if exact else pictures[:: max(len(pictures) // TIMED_PICTURES, 1)][:TIMED_PICTURES]
    reading = [timed(partial(read, picture, picture.encoded(), views), torch.device("cpu")) for picture in some]
    mean = sum(reading) / max(len(reading), 1)
    return Seconds(taught * start.trains, answered, learned, mean, own if keeps_size else None), sizes


def plan(seconds: Seconds, rows: int, held_out: int, sizes: Sequence[int], budget: float) -> Plan:
    """The largest size for which there is time for ENOUGH rounds, or else the smallest; and how many rounds.

    Args:
        rows: pictures to learn from.
        held_out: pictures to measure on, after every epoch.
        sizes: of views, the largest first.
        budget: in seconds.
    """
    most = min(max(MANY, math.ceil(SHOWN / (EPOCHS * rows))), MOST)

    def of_a_round(size: int) -> float:
        larger, asked = ((one / TIMED_AT) ** 2 for one in (size, seconds.asked_at or size))

        def epoch(step: float) -> float:  # an answer takes a third of a training step
            return rows * (step + seconds.reading) + held_out * (step / 3 + seconds.reading)

        teacher = TEACHER_EPOCHS * epoch(seconds.teaching * asked) if seconds.teaching else 0
        answers = rows * (seconds.answering * asked + seconds.reading)
        return teacher + answers + STUDENTS * EPOCHS * epoch(seconds.learning * larger)

    size = next((size for size in sizes if of_a_round(size) * ENOUGH <= budget), sizes[-1])
    rounds = int(min(max(budget / of_a_round(size), FEW), most))
    return Plan(size, rounds, rounds * of_a_round(size))

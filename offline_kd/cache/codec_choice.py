"""`codec: {name: auto}`: the smallest codec that loses no more than a budget of this teacher's own logits."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from offline_kd.cache.distortion import distortion, sigmoid_errors
from offline_kd.cache.sample import sampled_logits
from offline_kd.data.blocks import BlockLoader
from offline_kd.models.teacher import Teacher
from offline_kd.objectives.gradient import example_student, gradient, relative_change
from offline_kd.objectives.needs import Needs
from offline_kd.recipe import AutoCodec, GradientBudget
from offline_kd.store.chunks import encode_chunk
from offline_kd.store.codecs import CODECS, Codec
from offline_kd.store.codecs.codec import Arrays, Tables
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.layout import ArraySpec
from offline_kd.support.console import progress, say
from offline_kd.views.kind import ViewSpec

# Few tars: this happens before anything is stored.
MAX_SAMPLES, MAX_VIEWS, MAX_ROWS, MAX_TARS = 1024, 16, 8192, 64
MAX_TRIES = 32  # settings near the best one, each with tables of its own
# What fields are multiplied by to look for a smaller setting: coarser, or what one gains paid for by another.
DIRECTIONS: tuple[dict[str, float], ...] = (
    {"step": 1.12},
    {"refine_step": 1.3},
    {"refine": 0.7},
    {"refine_coarsest": 0.8},
    {"step": 1.12, "refine_step": 0.77},
    {"step": 1.12, "refine": 1.4, "refine_coarsest": 1.25},
    {"step": 0.89, "refine_step": 1.3},
    {"step": 0.89, "refine": 0.7, "refine_coarsest": 0.8},
    {"finer": 0.75},
    {"finer": 1.34},
)
EVERYTHING = Needs(offset=True, labels=True)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """A codec, what it takes and what it changes."""

    codec: Codec
    bytes_per_view: float  # as stored
    change: float  # what the budget is about


def candidates(logits: Floats) -> list[Codec]:
    """Settings of every codec for `[..., v, C]` logits like these, v views of every image in a view group."""
    return [setting for codec in CODECS.values() for setting in codec.candidates(logits)]


def pack_logits(codec: Codec, logits: Floats, tables: Tables) -> dict[str, tuple[ArraySpec, bytes]]:
    """The objects that `[rows, views, C]` logits become, with what describes them, by array."""
    return pack_arrays(codec, codec.encode(logits, tables))


def pack_arrays(codec: Codec, arrays: Arrays) -> dict[str, tuple[ArraySpec, bytes]]:
    """The same for what the codec made of them."""
    packed = {}
    for name, array in arrays.items():
        about, axes = codec.arrays()[name], tuple(f"axis {index}" for index in range(array.ndim))
        spec = ArraySpec(
            name, about.dtype, array.shape, array.shape, axes, about.fill, "whole", "", ragged=about.ragged
        )
        packed[name] = (spec, encode_chunk(spec, array))
    return packed


def choose_codec(
    wanted: AutoCodec,
    teacher: Teacher,
    views: ViewSpec,
    views_per_group: int,
    loader: BlockLoader,
    device: torch.device,
) -> Codec:
    """Ask the teacher about some views of images of many tars and take the codec with the fewest bytes within budget.

    Codecs that do not serve every objective, such as `topk`, are not among them. Where nothing else is good enough,
    f32 is.
    """
    in_group, num_groups = min(views_per_group, MAX_VIEWS), views.num_views // views_per_group
    asked = in_group * min(num_groups, MAX_VIEWS // in_group)
    num_rows = min(loader.split.count, MAX_SAMPLES, MAX_ROWS // asked)
    logits = sampled_logits(teacher, views, loader, num_rows, asked, device, MAX_TARS)
    grouped = logits.reshape(len(logits), -1, in_group, logits.shape[-1])
    sets = teacher.kind == "multilabel"
    return smallest_within(wanted.error_budget, grouped, num_groups, views.num_views, sets=sets)


def smallest_within(
    budget: float | GradientBudget, logits: Floats, num_groups: int, num_views: int, *, sets: bool = False
) -> Codec:
    """The codec with the fewest bytes a view within the budget, by logits `[n, g, v, C]`: g view groups of v views.

    Args:
        num_groups, num_views: of every image of the capture; these may be more than there are logits of.
        sets: whether a sigmoid of every class follows, not a softmax: then a number is about its mean absolute error,
            and codecs that are only right for a softmax are left out.
    """
    # Every fifth image, of those of all tars, is measured; tables are learned from the others.
    is_measured = np.arange(len(logits)) % 5 == 0
    learn_from, measured_on = logits[~is_measured].reshape(-1, *logits.shape[2:]), logits[is_measured]
    z_t = torch.from_numpy(measured_on).flatten(0, 2)
    by_number = _by_sigmoids if sets else _by_total_variation
    change_of = _by_gradient(budget, z_t) if isinstance(budget, GradientBudget) else by_number(z_t)

    def measure(codec: Codec) -> Choice:
        size, z = _measured(codec, learn_from, measured_on, num_groups, num_views)
        return Choice(codec, size, change_of(z))

    allowed = budget.change if isinstance(budget, GradientBudget) else budget
    serving = [one for one in candidates(learn_from) if not one.serves(EVERYTHING) and (one.serves_sets or not sets)]
    with progress("codec auto", len(serving), "codecs") as meter:
        found = []
        for codec in serving:
            found.append(measure(codec))
            meter.advance()
    within = [one for one in found if one.change <= allowed]
    best = _improved(min(within, key=lambda one: one.bytes_per_view), allowed, measure) if within else None
    if best is None:
        say(f"codec auto: nothing but f32 is within the budget: {_said(budget, allowed, sets)}")
        return Float32()
    say(
        f"codec auto: {best.codec.label()}, {best.bytes_per_view:.1f} bytes per view, "
        f"{_said(budget, best.change, sets)} (allowed: {allowed:g}), on {len(z_t):,} views"
    )
    return best.codec


def _said(budget: float | GradientBudget, change: float, sets: bool) -> str:
    if not isinstance(budget, GradientBudget):
        if sets:
            return f"mean error of a probability {change:.2g} at the worst of T = 1, 2, 4"
        return f"total variation {change:.2g} at the worst of T = 1, 2, 4"
    fields = budget.objective.model_dump(exclude={"term"}, exclude_unset=True)
    setting = ", ".join([budget.objective.term, *(f"{name} {value}" for name, value in fields.items())])
    return f"the gradient of {setting} changes by {change:.2g}"


def _by_total_variation(z_t: Tensor) -> Callable[[Tensor], float]:
    return lambda z: max(distortion(z_t, z)["total_variation"].values())


def _by_sigmoids(z_t: Tensor) -> Callable[[Tensor], float]:
    return lambda z: max(errors.mean().item() for errors in sigmoid_errors(z_t, z).values())


def _by_gradient(budget: GradientBudget, z_t: Tensor) -> Callable[[Tensor], float]:
    """Labels beside the teacher are its own first choice."""
    student, labels = example_student(z_t), z_t.argmax(dim=1)
    true = gradient(budget.objective, student, z_t, labels)
    return lambda z: relative_change(gradient(budget.objective, student, z, labels), true)


def _measured(
    codec: Codec, learn_from: Floats, logits: Floats, num_groups: int, num_views: int
) -> tuple[float, Tensor]:
    """Bytes a view of the capture, and `[n g v, C]` what is decoded of `[n, g, v, C]`."""
    tables = codec.fit(learn_from)
    of_image = [name for name, array in codec.arrays().items() if array.of_image]
    count, groups, in_group, classes = logits.shape
    # The first group speaks for itself, the others for all others: these are predicted from its means.
    speaks_for = [num_groups] if groups == 1 else [1, *[(num_groups - 1) / (groups - 1)] * (groups - 1)]
    means, code, decoded = 0.0, 0.0, []
    kept: Arrays | None = None
    for group in range(groups):
        arrays = codec.encode(logits[:, group], tables, kept)
        sizes = {name: len(content) / count for name, (_, content) in pack_arrays(codec, arrays).items()}
        kept = {name: arrays[name] for name in of_image} or None
        means = sum(sizes.pop(name) for name in of_image)  # of an image, whatever the group
        code += speaks_for[group] * sum(sizes.values()) / (num_groups * in_group)
        decoded.append(codec.decode_stored(arrays, tables, classes))
    return code + means / num_views, torch.stack(decoded, dim=1).flatten(0, 2)


def _improved(best: Choice, allowed: float, measure: Callable[[Codec], Choice]) -> Choice:
    """From the best setting on, what is near it, smaller and within the budget, until nothing is."""
    tries = MAX_TRIES
    for pace in (1.0, 0.4):
        move = failed = 0
        while tries and failed < len(near := _nearby(best.codec, pace)):
            one = measure(near[move % len(near)])
            if one.change <= allowed and one.bytes_per_view < best.bytes_per_view:
                best, failed = one, 0  # and the same way again
            else:
                move, failed = move + 1, failed + 1
            tries -= 1
    return best


def _nearby(codec: Codec, pace: float) -> list[Codec]:
    """A step from a setting into every direction that it knows and that is allowed."""
    known: dict[str, float] = codec.model_dump()
    found = []
    for factors in DIRECTIONS:
        if factors.keys() <= known.keys():
            with suppress(ValidationError):  # further than a field may be
                found.append(
                    codec.model_validate(known | {name: _times(known[name], factors[name] ** pace) for name in factors})
                )
    return found


def _times(value: float, factor: float) -> float:
    return max(1, round(value * factor)) if isinstance(value, int) else float(f"{value * factor:.3g}")

"""`codec: {name: auto}`: the smallest codec whose distortion on this teacher's own logits stays within a budget."""

import numpy as np
import torch
from numpy.typing import NDArray

from offline_kd.cache.fidelity import distortion
from offline_kd.cache.sample import sampled_logits
from offline_kd.data.blocks import BlockLoader
from offline_kd.models.teacher import Teacher
from offline_kd.objectives.needs import Needs
from offline_kd.recipe import AutoCodec
from offline_kd.store.chunks import encode_chunk
from offline_kd.store.codecs import CODECS, Codec
from offline_kd.store.codecs.codec import Arrays, Tables
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.layout import ArraySpec
from offline_kd.support.console import say
from offline_kd.views.kind import ViewSpec

MAX_SAMPLES, MAX_VIEWS, MAX_TARS = 1024, 4, 64  # few tars: this happens before anything is stored
EVERYTHING = Needs(offset=True, labels=True)


def candidates(logits: NDArray[np.float32]) -> list[Codec]:
    """Settings of every codec for `[..., C]` logits like these."""
    return [setting for codec in CODECS.values() for setting in codec.candidates(logits)]


def pack_logits(codec: Codec, logits: NDArray[np.float32], tables: Tables) -> dict[str, tuple[ArraySpec, bytes]]:
    """The objects that `[rows, views, C]` logits become, with what describes them, by array."""
    return pack_arrays(codec, codec.encode(logits, tables))


def pack_arrays(codec: Codec, arrays: Arrays) -> dict[str, tuple[ArraySpec, bytes]]:
    """The same for what the codec made of them."""
    declared, packed = codec.arrays(), {}
    for name, array in arrays.items():
        axes = tuple(f"axis {index}" for index in range(array.ndim))
        spec = ArraySpec(name, declared[name].dtype, array.shape, array.shape, axes, declared[name].fill, "whole", "")
        packed[name] = (spec, encode_chunk(spec, array))
    return packed


def choose_codec(
    wanted: AutoCodec, teacher: Teacher, views: ViewSpec, loader: BlockLoader, device: torch.device
) -> Codec:
    """Ask the teacher about some views of images of many tars and take the codec with the fewest bytes within budget.

    Codecs that do not serve every objective, such as `topk`, are not among them. Where nothing else is good enough,
    f32 is.
    """
    num_rows, num_views = min(loader.split.count, MAX_SAMPLES), min(views.num_views, MAX_VIEWS)
    logits = sampled_logits(teacher, views, loader, num_rows, num_views, device, MAX_TARS)
    serving = [codec for codec in candidates(logits) if not codec.serves(EVERYTHING)]
    # Every fifth image, of those of all tars, is measured; tables are learned from the others.
    measured_on = np.arange(len(logits)) % 5 == 0
    learn_from, logits = logits[~measured_on].reshape(-1, logits.shape[-1]), logits[measured_on]
    z_t = torch.from_numpy(logits).flatten(0, 1)
    best: tuple[float, Codec, float] | None = None
    for codec in serving:
        tables = codec.fit(learn_from)
        decoded = codec.decode_stored(codec.encode(logits, tables), tables, logits.shape[-1])
        measured = distortion(z_t, decoded.flatten(0, 1))
        worst = max(measured["total_variation"].values())
        size = sum(len(content) for _, content in pack_logits(codec, logits, tables).values()) / len(z_t)
        if worst <= wanted.error_budget and (best is None or size < best[0]):
            best = (size, codec, worst)
    if best is None:
        say(f"codec auto: nothing but f32 is within a total variation of {wanted.error_budget:g}")
        return Float32()
    size, codec, worst = best
    say(
        f"codec auto: {codec.label()}, {size:.1f} bytes per row, total variation {worst:.2g} at the worst of "
        f"T = 1, 2, 4 (allowed: {wanted.error_budget:g}), on {len(z_t):,} views"
    )
    return codec

"""`codec: {name: auto}`: the smallest codec whose distortion on this teacher's own logits stays within a budget."""

import numpy as np
import torch
from numpy.typing import NDArray

from offline_kd.cache.fidelity import distortion
from offline_kd.data.blocks import Decoder, ImageBlock
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import AutoCodec
from offline_kd.store.chunks import encode_chunk
from offline_kd.store.codec import (
    AnyCodec,
    Float16,
    Float32,
    Int,
    Klt,
    TopK,
    codec_arrays,
    decode_stored,
    encode,
    fit_codec,
)
from offline_kd.store.klt import Tables
from offline_kd.store.schema import ArraySpec
from offline_kd.support.console import say
from offline_kd.views.kind import ViewSpec, draw
from offline_kd.views.render import view_batches

FEWEST_CLASSES = 64
MAX_SAMPLES, MAX_VIEWS = 1024, 4  # of the first tar


def integer_codecs(num_classes: int) -> list[AnyCodec]:
    """Every width of `int`, with and without the largest logits apart."""
    return [
        Int(name="int", bits=bits, exact_top=top) for top in (0, 8) if top < num_classes for bits in range(8, 2, -1)
    ]


def transform_codecs(logits: NDArray[np.float32]) -> list[AnyCodec]:
    """`klt` in five steps, by the spread of the logits; nothing for a few classes, where it gains nothing."""
    if logits.shape[-1] < FEWEST_CLASSES:
        return []
    spread = float(logits.std())
    return [Klt(name="klt", step=float(f"{factor * spread:.2g}")) for factor in (0.5, 1, 1.5, 2, 3)]


def pack_logits(
    codec: AnyCodec, logits: NDArray[np.float32], tables: Tables | None = None
) -> dict[str, tuple[ArraySpec, bytes]]:
    """The objects that `[rows, views, C]` logits become, with what describes them, by array."""
    declared, packed = codec_arrays(codec), {}
    for name, array in encode(codec, logits, tables).items():
        axes = tuple(f"axis {index}" for index in range(array.ndim))
        spec = ArraySpec(name, declared[name].dtype, array.shape, array.shape, axes, declared[name].fill, "whole", "")
        packed[name] = (spec, encode_chunk(spec, array))
    return packed


def describe_codec(codec: AnyCodec) -> str:
    match codec:
        case Int():
            return f"int {codec.bits}" + (f" + top {codec.exact_top}" if codec.exact_top else "")
        case Float32() | Float16():
            return codec.name
        case TopK():
            return f"topk {codec.k}" + ("" if codec.tail_temperature == 1 else f" at T = {codec.tail_temperature}")
        case Klt():
            default = codec.model_fields_set <= {"name", "step"}
            return f"klt {codec.step:g}" + ("" if default else f", {codec.refine} by {codec.refine_step:.3g}")


def choose_codec(
    wanted: AutoCodec, teacher: Teacher, views: ViewSpec, block: ImageBlock, device: torch.device
) -> AnyCodec:
    """Ask the teacher about some views of a block and take the codec with the fewest bytes within the budget.

    `topk` is not among them, because it serves few objectives. Where nothing else is good enough, f32 is.
    """
    logits = _ask(teacher, views, block, device)
    # Tables are learned from other images than those that are measured.
    learned = len(logits) * 4 // 5
    candidates: list[AnyCodec] = [Float16(name="f16"), *integer_codecs(logits.shape[-1]), *transform_codecs(logits)]
    learn_from, logits = logits[:learned].reshape(-1, logits.shape[-1]), logits[learned:]
    z_t = torch.from_numpy(logits).flatten(0, 1)
    best: tuple[float, AnyCodec, float] | None = None
    for codec in candidates:
        tables = fit_codec(codec, learn_from)
        decoded = decode_stored(codec, encode(codec, logits, tables), tables, logits.shape[-1])
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
        f"codec auto: {describe_codec(codec)}, {size:.1f} bytes per row, total variation {worst:.2g} at the worst of "
        f"T = 1, 2, 4 (allowed: {wanted.error_budget:g}), on {len(z_t):,} views of {block.name}"
    )
    return codec


def _ask(teacher: Teacher, views: ViewSpec, block: ImageBlock, device: torch.device) -> NDArray[np.float32]:
    """`[rows, views, C]` logits of the first samples and views of a block."""
    count, num_views = min(len(block), MAX_SAMPLES), min(views.num_views, MAX_VIEWS)
    parameters = {name: array[:count, :num_views] for name, array in draw(views, block.key_hash, block.sizes()).items()}
    decoder, size = Decoder(block), teacher.crop.size if teacher.crop else 0
    batches = view_batches(block, decoder, parameters, views, size, teacher.batch_size, device)
    logits = torch.cat([teacher.logits(pixels).cpu() for _, _, pixels in batches])
    return logits.view(-1, num_views, logits.shape[1]).numpy()

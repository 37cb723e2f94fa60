"""Rate against distortion: what each codec makes of a real teacher's logits, read from a store."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_kd.cache.codec_choice import candidates, pack_logits
from offline_kd.cache.fidelity import Distortion, distortion
from offline_kd.objectives import example_terms
from offline_kd.objectives.gradient import example_student, gradient, relative_change
from offline_kd.store.chunks import decode_chunk
from offline_kd.store.codecs import Codec
from offline_kd.store.codecs.codec import Tables
from offline_kd.store.reader import Store
from offline_kd.support.console import progress
from offline_kd.support.errors import StoreMismatch

MOST_LEARNED = 16384  # rows


@dataclass(frozen=True)
class CodecResult:
    """One codec on the same rows as all others."""

    codec: str
    bytes_per_row: float  # as stored, entropy coding included
    encode_rows_per_second: float
    decode_rows_per_second: float  # on the CPU, unpacking included
    distortion: Distortion  # as in `Fidelity`
    change: dict[str, float]  # of the gradient on the student's logits, relative, by objective


def bench_codecs(store: Store, num_rows: int, codecs: Sequence[Codec] = ()) -> list[CodecResult]:
    """Encode whole stored blocks of a store of f32 or f16 with every candidate, or these codecs, and decode them again.

    Raises StoreMismatch when the store's own codec has lost more than rounding.
    """
    identity = store.identity
    if not identity.codec.keeps_whole:
        raise StoreMismatch(
            f"{store.place}: its codec is {identity.codec.model_dump(mode='json')}; codecs are compared on logits that "
            "were kept whole: capture with codec f32 or f16."
        )
    blocks, labels = _read(store, num_rows)
    # The tables of klt are learned from four fifths of the images; all codecs are measured on the others.
    learn_from = np.concatenate([block[: len(block) * 4 // 5].reshape(-1, block.shape[-1]) for block in blocks])
    labels = [one[len(block) * 4 // 5 :].flatten() for one, block in zip(labels, blocks, strict=True)]
    blocks = [block[len(block) * 4 // 5 :] for block in blocks]
    z_t = torch.cat([torch.from_numpy(block).flatten(0, 1) for block in blocks])
    y = torch.cat(labels)
    student = example_student(z_t)
    true = _gradients(student, z_t, y)
    results = []
    chosen = codecs or candidates(learn_from)
    with progress("codecs", len(chosen), "codecs") as meter:
        for codec in chosen:
            results.append(_measure(codec, blocks, codec.fit(learn_from[:MOST_LEARNED]), z_t, student, y, true))
            meter.advance()
    return results


def _read(store: Store, num_rows: int) -> tuple[list[Any], list[Tensor]]:
    """Logits `[rows, views, C]` of whole blocks and view groups until there are enough rows, and labels of all rows."""
    blocks, labels, rows, codec = [], [], 0, store.identity.codec
    for block in store.blocks:
        for group in range(len(store.identity.groups)):
            arrays = store.read(block, group, ["label", *(f"logits/{name}" for name in codec.arrays())])
            stored = {name: arrays[f"logits/{name}"] for name in codec.arrays()}
            logits = codec.decode_stored(stored, store.codec_tables, store.identity.num_classes).numpy()
            blocks.append(logits)
            label = torch.from_numpy(arrays["label"].astype(np.int64))
            labels.append(label[:, None].expand(-1, logits.shape[1]))
            rows += logits.shape[0] * logits.shape[1]
            if rows >= num_rows:
                return blocks, labels
    return blocks, labels


def _gradients(student: Tensor, teacher: Tensor, y: Tensor) -> dict[str, Tensor]:
    """`[B, C]`: of every objective on logits, at its usual setting, on the student's logits `[B, C]`."""
    terms = {name: term for name, term in example_terms().items() if term.needs.logits}
    return {name: gradient(term, student, teacher, y) for name, term in terms.items()}


def _measure(
    codec: Codec,
    blocks: list[Any],
    tables: Tables,
    z_t: Tensor,
    student: Tensor,
    y: Tensor,
    true: dict[str, Tensor],
) -> CodecResult:
    stored, decoded, encoding, decoding = 0, [], 0.0, 0.0
    for logits in blocks:
        started = time.perf_counter()
        objects = pack_logits(codec, logits, tables)
        encoding += time.perf_counter() - started
        stored += sum(len(content) for _, content in objects.values())
        started = time.perf_counter()
        unpacked = {name: decode_chunk(spec, content, name) for name, (spec, content) in objects.items()}
        decoded.append(codec.decode_stored(unpacked, tables, logits.shape[-1]).flatten(0, 1))
        decoding += time.perf_counter() - started
    z = torch.cat(decoded)
    change = {name: relative_change(found, true[name]) for name, found in _gradients(student, z, y).items()}
    return CodecResult(
        codec=codec.label(),
        bytes_per_row=stored / len(z),
        encode_rows_per_second=len(z) / encoding,
        decode_rows_per_second=len(z) / decoding,
        distortion=distortion(z_t, z),
        change=change,
    )


def write_plot(results: Sequence[CodecResult], file: Path, title: str) -> None:
    """Total variation at T = 1 and 4 against bytes per row, one line per family, as SVG or PNG by the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    families: dict[str, list[CodecResult]] = {}
    for one in results:
        setting, *more = one.codec.split(" + ")
        family = " + ".join([setting.split(" ")[0], *more])
        families.setdefault(family, []).append(one)
    for axes, t in zip(figure.subplots(1, 2), ("1", "4"), strict=True):
        for family, members in families.items():
            members = sorted(members, key=lambda one: one.bytes_per_row)
            values = [max(one.distortion["total_variation"][t], 1e-6) for one in members]
            axes.plot([one.bytes_per_row for one in members], values, "o-", label=family)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("bytes per row")
        axes.set_ylabel(f"total variation at T = {t}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)

"""Rate against distortion: what each codec makes of a real teacher's logits, read from a store."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numcodecs.blosc
import numpy as np
import torch
from torch import Tensor

from offline_kd.cache.codec_choice import candidates, pack_arrays
from offline_kd.cache.distortion import Distortion, distortion
from offline_kd.cli.bench_entropy import ideal_bytes
from offline_kd.cli.bench_last_layer import coded_features
from offline_kd.objectives import example_terms
from offline_kd.objectives.gradient import example_student, gradient, relative_change
from offline_kd.store.chunks import decode_chunk, encode_chunk
from offline_kd.store.codecs import Codec
from offline_kd.store.codecs.codec import CODEC_TABLES, Arrays, Floats, Tables
from offline_kd.store.layout import table_specs
from offline_kd.store.logit_reading import keeps_whole, logit_arrays, stored_decoder
from offline_kd.store.reader import Store
from offline_kd.store.schema import StoreIdentity
from offline_kd.support.console import progress
from offline_kd.support.errors import StoreMismatch

MOST_LEARNED = 16384  # rows
WARM_UP = 8  # images: compiled code is compiled, tables are brought into the form that coders want
FAMILIES = {"klt": "alone (klt)", "means": "means (klt_means)"}  # by the first word of a label


@dataclass(frozen=True)
class CodecResult:
    """One codec on the same rows as all others."""

    codec: str
    bytes_per_row: float  # as stored: all arrays, of images too, in the store's own compression; without tables
    stored: dict[str, float]  # the same by array
    ideal: dict[str, float]  # bytes per row of an ideal entropy coder, by part: see `ideal_bytes`
    table_bytes: int  # of one store, as stored
    table_bytes_per_row: float  # of this one, with all its images and views
    encode_rows_per_second: float  # logits to arrays
    unpack_rows_per_second: float  # objects to what `decode` takes, decompression included: a worker's part
    decode_rows_per_second: float  # to logits, on the CPU: the part of the student's device
    distortion: Distortion  # as in `Fidelity`
    change: dict[str, float]  # of the gradient on the student's logits, relative, by objective


@dataclass(frozen=True)
class Block:
    """Some images of a store."""

    groups: list[Floats]  # `[n, v, C]` logits of each view group
    labels: Tensor  # [n]
    features: list[Floats] = field(default_factory=list)  # `[n, v, D]` likewise, where logits are computed from these

    def take(self, images: slice | np.ndarray[tuple[int], np.dtype[np.bool_]]) -> "Block":
        return Block(
            [group[images] for group in self.groups],
            self.labels[images],
            [group[images] for group in self.features],
        )

    def of_features(self) -> "Block":
        """Features in the place of logits."""
        return Block(self.features, self.labels)


@dataclass(frozen=True)
class Material:
    """What all codecs are measured on: N rows of blocks, in their order, group by group."""

    blocks: list[Block]
    z_t: Tensor  # [N, C] the teacher's logits
    y: Tensor  # [N] labels
    student: Tensor  # [N, C] logits of a student
    gradients: dict[str, Tensor]  # [N, C] on these, by objective


def bench_codecs(
    store: Store, num_rows: int, codecs: Sequence[Codec] = (), num_views: int | None = None
) -> list[CodecResult]:
    """Encode stored answers of a store of f32 or f16 with every candidate, or these codecs, and decode them again.

    Where logits are computed from features, these are encoded in every code, too.

    What codecs learn is learned from four of every five images; all of them are measured on every fifth, on one core.

    Args:
        num_rows: how many rows are read at least, in whole blocks and view groups.
        num_views: the first so many views of an image are one view group; None: view groups are those of the store.

    Raises StoreMismatch when the store's own codec has lost more than rounding, or has fewer views, and for a store of
    a multi-label teacher.
    """
    identity = store.identity
    if identity.teacher.kind == "multilabel":
        raise StoreMismatch(
            f"{store.place}: is of a multi-label teacher, and codecs are compared here by what a softmax makes of "
            "them. `capture.codec: {name: auto}` chooses one by sigmoids."
        )
    if not keeps_whole(store):
        raise StoreMismatch(
            f"{store.place}: its codec is {identity.codec.model_dump(mode='json')}; codecs are compared on logits that "
            "were kept whole: capture with codec f32 or f16, or last_layer of features in f32 or f16."
        )
    if num_views is not None and num_views > identity.views.num_views:
        raise StoreMismatch(
            f"{store.place}: has {identity.views.num_views} views of an image, {num_views} were asked for: ask for "
            "fewer, or capture more."
        )
    blocks = list(_read(store, num_rows, num_views))
    learn_from = _learned_from(blocks)
    material = _material([block.take(_is_measured(block)) for block in blocks])
    results = []
    chosen = codecs or candidates(learn_from)
    with progress("codecs", len(chosen), "codecs") as meter:
        for codec in chosen:
            results.append(_measure(codec, codec.fit(learn_from), material, identity))
            meter.advance()
    return [*results, *_of_features(store, blocks, material)]


def _of_features(store: Store, blocks: Sequence[Block], material: Material) -> Iterator[CodecResult]:
    """Codes of the features that logits are computed from, if they are, on the same rows."""
    of = store.identity.codec.of_features
    if not of:
        return
    features = [block.of_features() for block in blocks]
    learn_from = _learned_from(features)
    measured = replace(material, blocks=[block.take(_is_measured(block)) for block in features])
    for codec in coded_features(store.identity.features[of], of):
        yield _measure(codec, {**store.codec_tables, **codec.fit(learn_from)}, measured, store.identity)


# ---- what is measured on ---------------------------------------------------------------------------------------------


def _read(store: Store, num_rows: int, num_views: int | None) -> Iterator[Block]:
    rows, of = 0, store.identity.codec.of_features
    names, decode = logit_arrays(store), stored_decoder(store)
    for block in store.blocks:
        groups: list[Floats] = []
        features: list[Floats] = []
        for number, views in enumerate(store.identity.groups):
            if rows >= num_rows if num_views is None else views.start >= num_views:
                break
            arrays = store.read(block, number, ["label", *names.values()])
            groups.append(decode({part: arrays[name] for part, name in names.items()}).numpy())
            if of:  # numbers, since nothing was lost
                features.append(arrays[names["values"]].astype(np.float32))
            rows += groups[-1].shape[0] * groups[-1].shape[1]
        if num_views is not None:
            groups = [np.concatenate(groups, axis=1)[:, :num_views]]
            features = [np.concatenate(features, axis=1)[:, :num_views]] if of else []
        yield Block(groups, torch.from_numpy(arrays["label"].astype(np.int64)), features)
        if rows >= num_rows:
            return


def _is_measured(block: Block) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Every fifth image, wherever in a tar it lies: tars may be sorted by class."""
    return np.arange(len(block.labels)) % 5 == 0


def _learned_from(blocks: Sequence[Block]) -> Floats:
    """`[n, v, C]` of the other images, of all blocks and view groups, MOST_LEARNED rows at most."""
    of_groups = [group for block in blocks for group in block.take(~_is_measured(block)).groups]
    num_views = of_groups[0].shape[1]  # the last group may have fewer
    together = np.concatenate([group for group in of_groups if group.shape[1] == num_views])
    most = max(1, MOST_LEARNED // num_views)
    if len(together) > most:
        together = together[np.linspace(0, len(together) - 1, most).astype(np.int64)]
    return together


def _material(blocks: list[Block]) -> Material:
    of_groups = [(torch.from_numpy(group), block.labels) for block in blocks for group in block.groups]
    z_t = torch.cat([group.flatten(0, 1) for group, _ in of_groups])
    y = torch.cat([labels.repeat_interleave(group.shape[1]) for group, labels in of_groups])
    student = example_student(z_t)
    return Material(blocks, z_t, y, student, _gradients(student, z_t, y))


def _gradients(student: Tensor, teacher: Tensor, y: Tensor) -> dict[str, Tensor]:
    """`[B, C]`: of every objective on logits, at its usual setting, on the student's logits `[B, C]`."""
    terms = {name: term for name, term in example_terms().items() if term.needs.logits and term.needs.label == "one"}
    return {name: gradient(term, student, teacher, y) for name, term in terms.items()}


# ---- measuring -------------------------------------------------------------------------------------------------------


class _Tally:
    """Bytes and seconds of one codec, added up over view groups."""

    def __init__(self, codec: Codec, tables: Tables) -> None:
        self.codec, self.tables = codec, tables
        self.tensors = codec.decoding_tables(tables)
        self.stored = dict.fromkeys(codec.arrays(), 0)
        self.ideal: dict[str, float] = {}
        self.encoding = self.unpacking = self.decoding = 0.0
        self.decoded: list[Tensor] = []

    def add(self, logits: Floats, of_images: Arrays | None) -> Arrays:
        """`[n, v, C]` of one view group; returns what was coded of its images, for their other groups."""
        declared, num_classes = self.codec.arrays(), logits.shape[-1]
        times = [time.perf_counter()]
        arrays = self.codec.encode(logits, self.tables, of_images)
        times.append(time.perf_counter())
        objects = pack_arrays(self.codec, arrays)
        times.append(time.perf_counter())
        read = {name: decode_chunk(spec, content, name) for name, (spec, content) in objects.items()}
        unpacked = self.codec.unpack(read, self.tables)
        times.append(time.perf_counter())
        tensors = {name: _tensor(array) for name, array in unpacked.items()}
        self.decoded.append(self.codec.decode(tensors, num_classes, self.tensors).flatten(0, 1))
        times.append(time.perf_counter())
        for name, (_, content) in objects.items():
            if of_images is None or not declared[name].of_image:
                self.stored[name] += len(content)
        for part, size in ideal_bytes(self.codec, arrays, self.tables).items():
            if of_images is None or part != "means":
                self.ideal[part] = self.ideal.get(part, 0.0) + size
        encoding, _, unpacking, decoding = np.diff(times).tolist()
        self.encoding += encoding
        self.unpacking += unpacking
        self.decoding += decoding
        return {name: arrays[name] for name, array in declared.items() if array.of_image}


def _measure(codec: Codec, tables: Tables, material: Material, identity: StoreIdentity) -> CodecResult:
    with _one_core():
        _Tally(codec, tables).add(material.blocks[0].groups[0][:WARM_UP], None)
        tally = _Tally(codec, tables)
        for block in material.blocks:
            of_images: Arrays | None = None
            for group in block.groups:
                of_images = tally.add(group, of_images) or None
    z = torch.cat(tally.decoded)
    gradients = _gradients(material.student, z, material.y)
    change = {name: relative_change(found, material.gradients[name]) for name, found in gradients.items()}
    table_bytes = _table_bytes(codec, tables, identity)
    return CodecResult(
        codec=codec.label(),
        bytes_per_row=sum(tally.stored.values()) / len(z),
        stored={name: size / len(z) for name, size in tally.stored.items()},
        ideal={part: size / len(z) for part, size in tally.ideal.items()},
        table_bytes=table_bytes,
        table_bytes_per_row=table_bytes / (sum(tar.count for tar in identity.dataset.tars) * identity.views.num_views),
        encode_rows_per_second=len(z) / tally.encoding,
        unpack_rows_per_second=len(z) / tally.unpacking,
        decode_rows_per_second=len(z) / tally.decoding,
        distortion=distortion(material.z_t, z),
        change=change,
    )


def _table_bytes(codec: Codec, tables: Tables, identity: StoreIdentity) -> int:
    if not tables:
        return 0
    specs = table_specs(identity.model_copy(update={"codec": codec}), CODEC_TABLES)
    return sum(len(encode_chunk(spec, tables[spec.name.rsplit("/", 1)[-1]])) for spec in specs)


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    # Torch knows uint16 but can do little with it.
    return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else np.array(array))


@contextmanager
def _one_core() -> Iterator[None]:
    threads, packing = torch.get_num_threads(), numcodecs.blosc.set_nthreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        numcodecs.blosc.set_nthreads(packing)


# ---- a picture -------------------------------------------------------------------------------------------------------


def write_plot(results: Sequence[CodecResult], file: Path, title: str) -> None:
    """Total variation at T = 1 and 4 against bytes per row, one line per family, as SVG or PNG by the file's name.

    Beside it, hollow, what an ideal entropy coder would take; plain numbers are a line at their size.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    families: dict[str, list[CodecResult]] = {}
    for one in results:
        setting, *more = one.codec.split(" + ")
        word = setting.split(",")[0].split(" ")[0]
        families.setdefault(" + ".join([FAMILIES.get(word, word), *more]), []).append(one)
    plots = figure.subplots(1, 2)
    for axes, t in zip(plots, ("1", "4"), strict=True):
        for colour, (family, members) in enumerate(families.items()):
            members = sorted(members, key=lambda one: one.bytes_per_row)
            values = [max(one.distortion["total_variation"][t], 1e-6) for one in members]
            if family in ("f16", "f32"):
                axes.axvline(members[0].bytes_per_row, color=f"C{colour}", linestyle="--", label=family)
                continue
            axes.plot([one.bytes_per_row for one in members], values, "o-", color=f"C{colour}", label=family)
            if all(one.ideal for one in members):
                ideal = [sum(one.ideal.values()) for one in members]
                axes.plot(ideal, values, "o:", color=f"C{colour}", fillstyle="none", label=f"{family}, ideal entropy")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("bytes per row")
        axes.set_ylabel(f"total variation at T = {t}")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)

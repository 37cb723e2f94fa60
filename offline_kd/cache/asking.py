"""One block and view group: draw -> render -> ask the teacher -> encode. What comes out is ready to be committed.

`rendered`, `answer` and `ask_teacher` are three stages that may run in three threads, as `work.py` has them. On a GPU
none but the last waits for it: what is copied either way is pinned, and events say when it has arrived.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.blocks import BadImage, Decoder, ImageBlock
from offline_kd.data.label_sets import label_tensor
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.store.codecs import CODEC_TABLES
from offline_kd.store.codecs.codec import Tables
from offline_kd.store.decisions import pack
from offline_kd.store.features import FeaturesIdentity, pack_features, pooled
from offline_kd.store.join import row_arrays
from offline_kd.store.layout import PROBES_PER_GROUP, probe_pixels
from offline_kd.store.reader import Arrays
from offline_kd.store.schema import StoreIdentity, Tapped
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import DataError, StoreMismatch, TeacherError
from offline_kd.views.choice import choose
from offline_kd.views.kind import Parameters
from offline_kd.views.mixing import without_rows
from offline_kd.views.render import render_some, sent, view_batches

ENCODE_BYTES = 2**24
PROBE_STREAM = 0x70726F6265  # first counter of the draws made here


@dataclass(frozen=True)
class Inquiry:
    """Who is asked, and for what."""

    teacher: Teacher
    identity: StoreIdentity  # says what is kept of the answers, and how
    tables: Mapping[str, dict[str, Tensor]]  # on the device, by name and array; CODEC_TABLES are the codec's
    device: torch.device

    @cached_property
    def codec_tables(self) -> Tables:
        """As the codec wants them, where it encodes."""
        return {name: table.cpu().numpy() for name, table in self.tables.get(CODEC_TABLES, {}).items()}


@dataclass
class Portion:
    """One block and view group on its way through stage 1."""

    block: ImageBlock
    parameters: Parameters  # [n, v, ...] of the views of this group, as `draw` gives them
    number: int  # of the block in its split
    group: int
    is_last: bool = True  # of those of its block that are asked about
    decoder: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.decoder = Decoder(self.block)


@dataclass(frozen=True)
class Batch:
    """Some views of a portion, rendered."""

    row: NDArray[np.int64]  # [m]
    view: NDArray[np.int64]  # [m]
    pixels: Tensor  # [m, 3, H, W] uint8, on the device
    labels: Tensor  # [m] int64, on the device
    is_there: torch.cuda.Event | None  # happens when both have arrived on a GPU


@dataclass(frozen=True)
class Answer:
    """What the teacher says of a batch, on its way to the CPU."""

    row: NDArray[np.int64]  # [m]
    view: NDArray[np.int64]  # [m]
    logits: Tensor  # [m, C] float32
    finite: Tensor  # [1 + taps] bool: whether the logits are, and each map and what is kept of it
    decided: dict[str, Tensor]  # [m, ...] by full name of the array: decisions and features
    is_there: torch.cuda.Event | None  # happens when all of it has come from a GPU


def ask_teacher(
    inquiry: Inquiry,
    block: ImageBlock,
    parameters: Parameters,
    number: int,
    group: int,
    asked: tuple[Decoder, Iterator[Answer]] | None = None,
    of_images: Arrays | None = None,
) -> tuple[Arrays, list[BadImage]]:
    """Every array of the store for one block and view group, by asking the teacher about every view.

    Args:
        parameters: `[n, v, ...]` of the views of this group, as `draw` gives them.
        number: of the block in its split.
        asked: the answers about all these views, which come from another thread, and what decoded the images for
            them; None: everything is done here, one after the other.
        of_images: what the codec has kept of these images, `[n, ...]` by full name, with their first view group, and
            their `key_hash` where the store has it with that; None: this is the first, or it keeps nothing of images.

    Returns:
        The arrays by full name, rows first; and the samples of the tar that have no row, because their images cannot
        be decoded.

    Raises:
        DataError: when images have not the store's size, or none can be decoded.
        StoreMismatch: when these are not the images that `of_images` is about.
        TeacherError: when the teacher's answers are not finite or not of the store's shape.
    """
    if asked is None:
        portion = Portion(block, parameters, number, group)
        asked = portion.decoder, (answer(inquiry, portion, batch) for batch in rendered(inquiry, portion))
    decoder, answers = asked
    logits = _Logits(inquiry, block.where, parameters["flip"].shape[1], of_images)
    decided: dict[str, list[Tensor]] = {}
    for one in answers:
        if one.is_there is not None:
            one.is_there.synchronize()
        _refuse_not_finite(inquiry, block, group, one)
        logits.add(one.logits.numpy())
        for name, values in one.decided.items():
            # Of all answers of a block too much for pinned memory, which a GPU writes to.
            decided.setdefault(name, []).append(values if one.is_there is None else values.clone())
    kept, parameters = (
        (block.without(decoder.bad), without_rows(parameters, decoder.bad)) if decoder.bad else (block, parameters)
    )
    if of_images and not np.array_equal(of_images.get("key_hash", kept.key_hash), kept.key_hash):
        raise _other_images(block.where)
    per_view = {name: torch.cat(pieces).numpy() for name, pieces in decided.items()}
    count, num_views = parameters["flip"].shape
    arrays: Arrays = {
        **row_arrays(inquiry.identity, kept),
        **{f"view/{name}": array for name, array in parameters.items()},
        **probes(inquiry.identity, kept, parameters, number, group),
        **logits.encoded(),
        **{name: array.reshape(count, num_views, *array.shape[1:]) for name, array in per_view.items()},
    }
    return arrays, kept.left_out


# ---- rendering -----------------------------------------------------------------------------------------------------


def rendered(inquiry: Inquiry, portion: Portion) -> Iterator[Batch]:
    """All views of a portion in batches on the device; on a GPU they get there while it works on others.

    Raises DataError when images have not the store's size, when none can be decoded, or keys cannot be stored.
    """
    identity, block, decoder = inquiry.identity, portion.block, portion.decoder
    _refuse_other_size(identity, block)
    row_arrays(identity, block)  # refuses keys that cannot be stored before the teacher is asked
    size = identity.seen_size[0]  # of resampled views, which are square
    found = view_batches(
        block, decoder, portion.parameters, identity.views, size, inquiry.teacher.batch_size, inquiry.device
    )
    batches = (
        Batch(row, view, pixels, sent(label_tensor(block.labels[row]), inquiry.device), None)
        for row, view, pixels in found
    )
    yield from _on_own_stream(batches, inquiry.device) if inquiry.device.type == "cuda" else batches
    if len(decoder.bad) == len(block):
        raise DataError(f"{block.where}: none of its {len(block)} images can be decoded. Fetch or pack the file again.")


def _on_own_stream(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copies and kernels of `batches` wait for nothing that the GPU does otherwise; nothing waits for them here."""
    stream = _stream_of_views(device)
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            if batch is None:
                return
            batch = replace(batch, is_there=stream.record_event())
        yield batch


@cache
def _stream_of_views(device: torch.device) -> torch.cuda.Stream:
    """One for all portions: memory is kept by stream."""
    new: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
    return new(device)


def _refuse_other_size(identity: StoreIdentity, block: ImageBlock) -> None:
    dataset = identity.dataset
    if dataset.height is not None and block.images.shape[2:] != (dataset.height, dataset.width):
        raise DataError(
            f"tar {block.name}: images are {block.images.shape[3]}x{block.images.shape[2]}, the store is for "
            f"{dataset.width}x{dataset.height}. Images of one dataset must have one size, or views that resize them."
        )


# ---- asking --------------------------------------------------------------------------------------------------------


def answer(inquiry: Inquiry, portion: Portion, batch: Batch) -> Answer:
    """Ask the teacher about a batch. Nothing waits for a GPU: its answers are there when `is_there` has happened.

    Raises TeacherError when logits or maps are not of the store's shape.
    """
    teacher, identity, pixels = inquiry.teacher, inquiry.identity, batch.pixels
    if batch.is_there is not None:
        stream = torch.cuda.current_stream(inquiry.device)
        stream.wait_event(batch.is_there)
        for one in (pixels, batch.labels):
            one.record_stream(stream)  # their memory is another stream's, which must not use it again before
    points: list[TapPoint] = [about.config for about in identity.tapped.values()]
    logits, maps = teacher.logits_and_maps(pixels, points)
    if logits.shape[1] != (0 if teacher.kind == "embedding" else identity.num_classes):
        raise TeacherError(
            f"teacher '{teacher.name}' gives {logits.shape[1]} logits, dataset '{identity.dataset.name}' has "
            f"{identity.num_classes} classes."
        )
    decided, maps_are = _of_taps(inquiry, portion.block.name, batch.labels, maps)
    finite = torch.stack([logits.isfinite().all(), *maps_are])
    return Answer(
        batch.row,
        batch.view,
        logits.to("cpu", non_blocking=True),  # into pinned memory
        finite.to("cpu", non_blocking=True),
        {name: values.to("cpu", non_blocking=True) for name, values in decided.items()},
        None if batch.is_there is None else torch.cuda.current_stream(inquiry.device).record_event(),
    )


def _of_taps(
    inquiry: Inquiry, where: str, labels: Tensor, maps: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The arrays of all decisions and features for these rows, by full name; and of every map whether all is finite."""
    kept: dict[str, Tensor] = {}
    finite = []
    for (name, about), features in zip(inquiry.identity.tapped.items(), maps, strict=True):
        if tuple(features.shape[1:]) != (about.channels, about.height, about.width):
            raise _other_map(about, features.shape, where)
        tables = inquiry.tables.get(name, {})
        if isinstance(about, FeaturesIdentity):
            of_tap = pack_features(about.config, pooled(about.config, features), tables)
        else:
            of_tap = pack(about.config, features, labels, tables)
        kind = "features" if isinstance(about, FeaturesIdentity) else "decisions"
        kept |= {f"{kind}/{name}/{array}": values for array, values in of_tap.items()}
        numbers = [features, *(values for values in of_tap.values() if values.is_floating_point())]
        finite.append(torch.stack([one.isfinite().all() for one in numbers]).all())
    return kept, finite


def _other_map(about: Tapped, shape: Sequence[int], where: str) -> TeacherError:
    expected = [about.channels, about.height, about.width]
    is_short = isinstance(about, FeaturesIdentity) and about.config.code.name == "f16"
    too_large = ", or larger than the 65504 of f16" if is_short else ""
    return TeacherError(
        f"{about.config.named}: gave a map of {list(shape[1:])} for {where}, the store is for "
        f"{expected}, or features that are not finite{too_large}. The block was not committed. Check weights and "
        "images."
    )


# ---- keeping -------------------------------------------------------------------------------------------------------


def _refuse_not_finite(inquiry: Inquiry, block: ImageBlock, group: int, one: Answer) -> None:
    identity = inquiry.identity
    logits_are, *maps_are = one.finite.tolist()
    if not logits_are:
        at, column = (~one.logits.isfinite()).nonzero()[0].tolist()
        raise TeacherError(
            f"teacher '{inquiry.teacher.name}': logit {column} is {one.logits[at, column].item()} for sample "
            f"'{block.keys[one.row[at]]}' of {block.name}, view {identity.groups[group][one.view[at]]}. "
            "The block was not committed. Check the weights, and the dtype if it is not float32."
        )
    for about, is_finite in zip(identity.tapped.values(), maps_are, strict=True):
        if not is_finite:
            raise _other_map(about, (0, about.channels, about.height, about.width), block.name)


class _Logits:
    """Logits on their way into the codec: those of some images are encoded together, never a whole block."""

    def __init__(self, inquiry: Inquiry, where: str, num_views: int, of_images: Arrays | None) -> None:
        self.codec, self.tables, self.where = inquiry.identity.codec, inquiry.codec_tables, where
        self.num_views, self.of_images = num_views, of_images
        self.waiting: list[NDArray[np.float32]] = []
        self.pieces: dict[str, list[NDArray[np.generic]]] = {}
        self.images = 0  # that were encoded

    def add(self, logits: NDArray[np.float32]) -> None:
        self.waiting.append(logits)
        if sum(one.nbytes for one in self.waiting) >= ENCODE_BYTES:
            self._encode()

    def encoded(self) -> Arrays:
        """What was added, `[n, v, ...]`, or `[n, ...]` what is of images, by full name."""
        self._encode()
        return {f"logits/{name}": np.concatenate(pieces) for name, pieces in self.pieces.items()}

    def _encode(self) -> None:
        if not self.waiting:
            return
        rows = np.concatenate(self.waiting)
        whole = len(rows) - len(rows) % self.num_views
        if whole:
            logits = rows[:whole].reshape(whole // self.num_views, self.num_views, rows.shape[1])
            these = slice(self.images, self.images + len(logits))
            kept = None if self.of_images is None else _without_prefix(self.of_images, these, self.where)
            for name, array in self.codec.encode(logits, self.tables, kept).items():
                self.pieces.setdefault(name, []).append(array)
            self.images += len(logits)
        self.waiting = [rows[whole:]] if whole < len(rows) else []


def _without_prefix(arrays: Arrays, rows: slice, where: str) -> Arrays:
    """Of some rows, as the codec calls them; raises StoreMismatch where there are fewer."""
    if any(len(array) < rows.stop for array in arrays.values()):
        raise _other_images(where)
    return {name.removeprefix("logits/"): array[rows] for name, array in arrays.items() if name != "key_hash"}


def _other_images(where: str) -> StoreMismatch:
    return StoreMismatch(
        f"{where}: the images that can be decoded are not those of which the store has other views already. Use the "
        "images that it was begun with, or capture another store."
    )


def probes(identity: StoreIdentity, block: ImageBlock, parameters: Parameters, number: int, group: int) -> Arrays:
    """Some views that are stored as pixels, by which a later renderer shows that it renders the same."""
    count, num_views = parameters["flip"].shape
    draws = counter_hash(PROBE_STREAM, number, group, np.arange(PROBES_PER_GROUP, dtype=np.uint64))
    row, view = np.divmod(np.sort(draws % (count * num_views)).astype(np.int64), num_views)
    seen = render_some(block, choose(parameters, row, view), identity.views, identity.seen_size[0])
    return {
        "probe/row": row.astype(np.int32),
        "probe/view": view.astype(np.int32),
        "probe/pixels": probe_pixels(identity, seen),
    }

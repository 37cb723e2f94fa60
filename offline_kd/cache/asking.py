"""One block and view group: draw -> render -> ask the teacher -> encode. What comes out is ready to be committed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.blocks import BadImage, Decoder, ImageBlock
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.store.codecs import CODEC_TABLES
from offline_kd.store.decisions import pack
from offline_kd.store.join import row_arrays
from offline_kd.store.layout import PROBES_PER_GROUP, probe_pixels
from offline_kd.store.reader import Arrays
from offline_kd.store.schema import DecisionsIdentity, StoreIdentity
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import DataError, TeacherError
from offline_kd.views.choice import choose
from offline_kd.views.kind import Parameters
from offline_kd.views.mixing import without_rows
from offline_kd.views.render import render_some, view_batches

ENCODE_BYTES = 2**24
PROBE_STREAM = 0x70726F6265  # first counter of the draws made here


@dataclass(frozen=True)
class Inquiry:
    """Who is asked, and for what."""

    teacher: Teacher
    identity: StoreIdentity  # says what is kept of the answers, and how
    tables: Mapping[str, dict[str, Tensor]]  # on the device, by decisions and array; CODEC_TABLES are the codec's
    device: torch.device


def ask_teacher(
    inquiry: Inquiry, block: ImageBlock, parameters: Parameters, number: int, group: int
) -> tuple[Arrays, list[BadImage]]:
    """Every array of the store for one block and view group, by asking the teacher about every view.

    Args:
        parameters: `[n, v, ...]` of the views of this group, as `draw` gives them.
        number: of the block in its split.

    Returns:
        The arrays by full name, rows first; and the samples of the tar that have no row, because their images cannot
        be decoded.

    Raises:
        DataError: when images have not the store's size, or none can be decoded.
        TeacherError: when the teacher's answers are not finite or not of the store's shape.
    """
    _refuse_other_size(inquiry.identity, block)
    row_arrays(inquiry.identity, block)  # refuses keys that cannot be stored before the teacher is asked
    decoder = Decoder(block)
    logits = _Logits(inquiry)
    decided: dict[str, list[Tensor]] = {}
    for row, answer, maps in _answers(inquiry, block, decoder, parameters, group):
        logits.add(answer)
        for name, values in _decisions(inquiry, block, row, maps):
            decided.setdefault(name, []).append(values.cpu())
    kept, parameters = _without_bad_rows(block, decoder, parameters)
    per_view = logits.encoded() | {name: torch.cat(pieces).numpy() for name, pieces in decided.items()}
    count, num_views = parameters["flip"].shape
    arrays: Arrays = {
        **row_arrays(inquiry.identity, kept),
        **{f"view/{name}": array for name, array in parameters.items()},
        **_probes(inquiry.identity, kept, parameters, number, group),
        **{name: array.reshape(count, num_views, *array.shape[1:]) for name, array in per_view.items()},
    }
    return arrays, kept.left_out


def _refuse_other_size(identity: StoreIdentity, block: ImageBlock) -> None:
    dataset = identity.dataset
    if dataset.height is not None and block.images.shape[2:] != (dataset.height, dataset.width):
        raise DataError(
            f"tar {block.name}: images are {block.images.shape[3]}x{block.images.shape[2]}, the store is for "
            f"{dataset.width}x{dataset.height}. Images of one dataset must have one size, or views that resize them."
        )


def _answers(
    inquiry: Inquiry, block: ImageBlock, decoder: Decoder, parameters: Parameters, group: int
) -> Iterator[tuple[NDArray[np.int64], Tensor, list[Tensor]]]:
    """Row `[m]`, logits `[m, C]` and maps `[m, D, H, W]` by decisions, of all views of all rows, in that order."""
    teacher, identity = inquiry.teacher, inquiry.identity
    points: list[TapPoint] = [about.config for about in identity.decisions.values()]
    size = identity.seen_size[0]  # of resampled views, which are square
    for row, view, pixels in view_batches(
        block, decoder, parameters, identity.views, size, teacher.batch_size, inquiry.device
    ):
        logits, maps = teacher.logits_and_maps(pixels, points)
        if logits.shape[1] != identity.num_classes:
            raise TeacherError(
                f"teacher '{teacher.name}' gives {logits.shape[1]} logits, dataset '{identity.dataset.name}' has "
                f"{identity.num_classes} classes."
            )
        if not logits.isfinite().all():
            at, column = (~logits.isfinite()).nonzero()[0].tolist()
            raise TeacherError(
                f"teacher '{teacher.name}': logit {column} is {logits[at, column].item()} for sample "
                f"'{block.keys[row[at]]}' of {block.name}, view {identity.groups[group][view[at]]}. "
                "The block was not committed. Check the weights, and the dtype if it is not float32."
            )
        yield row, logits, maps


class _Logits:
    """Logits on their way into the codec: some batches are encoded together, never those of a whole block."""

    def __init__(self, inquiry: Inquiry) -> None:
        self.codec = inquiry.identity.codec
        self.tables = {name: table.cpu().numpy() for name, table in inquiry.tables.get(CODEC_TABLES, {}).items()}
        self.waiting: list[NDArray[np.float32]] = []
        self.pieces: dict[str, list[NDArray[np.generic]]] = {}

    def add(self, logits: Tensor) -> None:
        self.waiting.append(logits.cpu().numpy())
        if sum(one.nbytes for one in self.waiting) >= ENCODE_BYTES:
            self._encode()

    def encoded(self) -> Arrays:
        """What was added, `[n * v, ...]` by full name."""
        self._encode()
        return {f"logits/{name}": np.concatenate(pieces) for name, pieces in self.pieces.items()}

    def _encode(self) -> None:
        if self.waiting:
            for name, array in self.codec.encode(np.concatenate(self.waiting), self.tables).items():
                self.pieces.setdefault(name, []).append(array)
        self.waiting.clear()


def _decisions(
    inquiry: Inquiry, block: ImageBlock, row: NDArray[np.int64], maps: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The arrays of all decisions for these rows, by full name, from the maps of the taps."""
    labels = torch.from_numpy(block.labels[row]).long().to(inquiry.device)
    for (name, about), features in zip(inquiry.identity.decisions.items(), maps, strict=True):
        _refuse_other_map(about, features, block.name)
        for array, values in pack(about.config, features, labels, inquiry.tables[name]).items():
            yield f"decisions/{name}/{array}", values


def _refuse_other_map(about: DecisionsIdentity, features: Tensor, where: str) -> None:
    expected = (about.channels, about.height, about.width)
    if tuple(features.shape[1:]) != expected or not features.isfinite().all():
        raise TeacherError(
            f"tap '{about.config.module}': gave a map of {list(features.shape[1:])} for {where}, the store is for "
            f"{list(expected)}, or features that are not finite. The block was not committed. Check weights and images."
        )


def _without_bad_rows(block: ImageBlock, decoder: Decoder, parameters: Parameters) -> tuple[ImageBlock, Parameters]:
    """Block and parameters without the rows that could not be decoded; partners are numbered anew."""
    if len(decoder.bad) == len(block):
        raise DataError(f"{block.where}: none of its {len(block)} images can be decoded. Fetch or pack the file again.")
    if not decoder.bad:
        return block, parameters
    return block.without(decoder.bad), without_rows(parameters, decoder.bad)


def _probes(identity: StoreIdentity, block: ImageBlock, parameters: Parameters, number: int, group: int) -> Arrays:
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

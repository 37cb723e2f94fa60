"""A batch of rows: n samples with one view each, from the join to the training step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.support.errors import StoreMismatch
from offline_kd.views.choice import Choice

Index = NDArray[np.integer] | NDArray[np.bool_] | slice


@dataclass(frozen=True)
class StoredSignal:
    """What one store says of n rows, encoded as it is stored."""

    logits: dict[str, Tensor] | None = None  # [n, ...] by array of the codec, unpacked; None: not asked for
    decisions: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # [n, ...] by name, then by array
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # likewise

    def map(self, change: Callable[[Tensor], Tensor]) -> "StoredSignal":
        """`change` done to every array."""
        return StoredSignal(
            None if self.logits is None else {name: change(array) for name, array in self.logits.items()},
            *(
                {name: {part: change(array) for part, array in one.items()} for name, one in of_taps.items()}
                for of_taps in (self.decisions, self.features)
            ),
        )


@dataclass(frozen=True)
class Rows:
    """What is known of n rows. The join knows no pixels yet; rendered rows have dropped their view parameters."""

    key_hash: NDArray[np.uint64]  # [n]
    labels: Tensor  # [n] int64; -1 where the label is hidden from the student; [n, bytes] uint8: packed sets
    other_labels: Tensor  # likewise of the image that is mixed in; where there is none, as `labels`
    share: Tensor  # [n] float32, of the image itself; 1: nothing is mixed in
    signal: list[StoredSignal] = field(default_factory=list)  # one of every store
    choice: Choice | None = None  # which view of which row of the tar; None once there are pixels
    pixels: Tensor | None = None  # [n, 3, H, W] uint8; float32 where a loader normalises
    box: Tensor | None = None  # [n, 4] int16 and
    flip: Tensor | None = None  # [n] uint8: what is still to be rendered of un-augmented pixels
    live_images: Tensor | None = None  # [n, 3, h, w] uint8: the same views in the size of a live teacher
    step: int = 0  # of the pass
    decode: Callable[[StoredSignal], Tensor] | None = None  # of the only store: from encoded arrays to logits [n, C]
    decode_features: Callable[[Mapping[str, Mapping[str, Tensor]]], dict[str, Tensor]] | None = None  # of all stores

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """`[n, 3, H, W]`."""
        assert self.pixels is not None, "these rows were joined and not rendered"
        return self.pixels

    @property
    def view(self) -> Choice:
        """Which view of which row of the tar."""
        assert self.choice is not None, "these rows were rendered: their parameters were dropped"
        return self.choice

    @cached_property
    def teacher_logits(self) -> Tensor:
        """`[n, C]` float32, decoded when they are first asked for, on the device of the batch.

        Raises StoreMismatch where there are none, as of a teacher without classes.
        """
        if self.decode is None:
            raise StoreMismatch("these batches have no logits of one store. Take their features or decisions.")
        return self.decode(self.signal[0])

    @property
    def decisions(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By name, then by array, of all stores."""
        return {name: one for signal in self.signal for name, one in signal.decisions.items()}

    @property
    def features(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By name, then by array, of all stores: as they are coded. Of several stores with features of one name, of
        which later ones are read for their logits, those of the first."""
        return {name: one for signal in reversed(self.signal) for name, one in signal.features.items()}

    @cached_property
    def teacher_features(self) -> Mapping[str, Tensor]:
        """`[n, D]` or `[n, D, H, W]` float32 by name, decoded when first asked for, on the device of the batch."""
        return self.decode_features(self.features) if self.decode_features else {}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """`change` done to every tensor."""

        def maybe(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self,
            labels=change(self.labels),
            other_labels=change(self.other_labels),
            share=change(self.share),
            signal=[signal.map(change) for signal in self.signal],
            pixels=maybe(self.pixels),
            box=maybe(self.box),
            flip=maybe(self.flip),
            live_images=maybe(self.live_images),
        )

    def to(self, device: str | torch.device, non_blocking: bool = False) -> "Rows":
        """These rows on a device, as tensors go there: frameworks ask every batch. Logits go there decoded."""
        moved = self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if moved.labels.device == self.labels.device:
            return self
        if self.decode is None:
            return moved
        logits = self.teacher_logits.to(device, non_blocking=non_blocking)  # its tables are where the rows were
        return replace(moved, decode=lambda signal: logits)

    def take(self, index: Index) -> "Rows":
        """Some of the rows; a slice copies nothing."""
        at = torch.from_numpy(index) if isinstance(index, np.ndarray) and index.dtype != bool else index
        some = self.map(lambda tensor: take(tensor, at))
        choice = None if self.choice is None else self.choice.take(index)
        return replace(some, key_hash=self.key_hash[index], choice=choice)

    def fields(self) -> list[Tensor]:
        """Every tensor, in an order that rows of one loader share."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(keep)
        return found


def take(tensor: Tensor, index: Tensor | Index) -> Tensor:
    """Some rows. `index_select` copies them whole where memory is contiguous, tens of times as fast as indexing."""
    if not isinstance(index, Tensor):
        return tensor[torch.from_numpy(index) if isinstance(index, np.ndarray) else index]
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(0, index)


def gather(parts: Sequence[Rows], part: NDArray[np.int64], row: NDArray[np.int64]) -> Rows:
    """Rows `row` `[n]` of the parts `part` `[n]`, in that order; there is a part at least, and they lack a `choice`."""
    used = [(parts[one], np.flatnonzero(part == one)) for one in np.unique(part)]
    if len(used) <= 1:
        return (used[0][0] if used else parts[0]).take(row)
    others = [iter(one.fields()) for one, _ in used]
    at = [(torch.from_numpy(row[place]), torch.from_numpy(place)) for _, place in used]

    def gathered(first: Tensor) -> Tensor:
        channels_last = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
        shape = first.shape[1:]
        if channels_last:
            out = torch.empty((len(row), *shape[1:], shape[0]), dtype=first.dtype).permute(0, 3, 1, 2)
        else:
            out = torch.empty((len(row), *shape), dtype=first.dtype)
        for tensors, (source, place) in zip(others, at, strict=True):
            out[place] = take(next(tensors), source)
        return out

    key_hash = np.empty(len(row), dtype=np.uint64)
    for one, place in used:
        key_hash[place] = one.key_hash[row[place]]
    return replace(used[0][0].map(gathered), key_hash=key_hash)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows of all parts, one part after the other; without their `choice`."""
    if len(parts) == 1:
        return replace(parts[0], choice=None)
    others = [iter(part.fields()) for part in parts]
    joined = parts[0].map(lambda _: torch.cat([next(tensors) for tensors in others]))
    return replace(joined, key_hash=np.concatenate([part.key_hash for part in parts]), choice=None)

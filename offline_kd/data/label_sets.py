"""Labels that are sets of classes, one set an image: packed into bits, in stores and in batches.

A packed set has `num_classes // 8 + 1` bytes. Class c is bit c % 8 of byte c // 8; the bit behind the last class is 1
where the set is known. So a set without any class differs from a set that is hidden, or was never written: those are
zeros.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def packed_bytes(num_classes: int) -> int:
    """Of one packed set."""
    return num_classes // 8 + 1


def pack_sets(sets: Sequence[Sequence[int]], num_classes: int) -> NDArray[np.uint8]:
    """`[n, num_classes // 8 + 1]`: the class indices of every image, all of them known."""
    bits = np.zeros((len(sets), num_classes + 1), dtype=np.uint8)
    for row, classes in enumerate(sets):
        bits[row, list(classes)] = 1
    bits[:, num_classes] = 1
    return np.packbits(bits, axis=1, bitorder="little")


def unpack_sets(packed: Tensor, num_classes: int) -> Tensor:
    """`[n, num_classes]` float32 of packed sets `[n, bytes]`, on their device: 1 for a class of the set, else 0."""
    bits = packed[:, :, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, :num_classes].float()


def are_known(packed: Tensor) -> Tensor:
    """`[n]` bool: which of the packed sets `[n, bytes]` are known."""
    return (packed != 0).any(dim=1)


def names_in(packed: NDArray[np.uint8], classes: Sequence[str]) -> list[str]:
    """The names of the classes of one packed set `[bytes]`."""
    bits = np.unpackbits(packed, bitorder="little")[: len(classes)]
    return [name for name, bit in zip(classes, bits, strict=True) if bit]


def problem_of_sets(packed: NDArray[np.uint8], num_classes: int) -> str:
    """Why stored sets `[n, bytes]` cannot be; '' where all are sets of classes."""
    last = packed[:, -1]
    unknown, beyond = last >> (num_classes % 8) == 0, last >> (num_classes % 8) > 1
    if unknown.any():
        return f"{np.count_nonzero(unknown):,} sets of labels were never written, the first at row {unknown.argmax()}"
    if beyond.any():
        return f"{np.count_nonzero(beyond):,} sets have classes beyond the last, the first at row {beyond.argmax()}"
    return ""


def one_label(labels: NDArray[np.generic]) -> NDArray[np.int64]:
    """`[n]`: the class of every image; -1 where it has a set, which is packed in `[n, bytes]`."""
    return labels.astype(np.int64) if labels.ndim == 1 else np.full(len(labels), -1, dtype=np.int64)


def label_tensor(labels: NDArray[np.integer]) -> Tensor:
    """Labels of images as batches have them: `[n]` int64, or packed sets `[n, bytes]` uint8."""
    found = torch.from_numpy(labels)
    return found if labels.ndim == 2 else found.long()


def hidden_where(labels: Tensor, known: Tensor) -> Tensor:
    """The labels of a batch that the student may see, by `known` `[n]` bool: others are -1, or sets that are hidden."""
    if labels.dim() == 2:
        return labels * known[:, None].to(labels.dtype)
    return torch.where(known, labels, -1)

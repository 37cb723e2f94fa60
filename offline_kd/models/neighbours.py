"""What a network without classes gives for every image of a split, and how good that is without labels to learn from.

k-NN top-1: every image is classified by the K images of the same split, without itself, whose vectors are nearest by
cosine. Each has one vote, and among classes with as many votes the one with the smallest index wins, as scikit-learn's
KNeighborsClassifier has it (metric cosine, weights uniform).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import EvaluationCrop
from offline_kd.models.evaluation import answers_of
from offline_kd.support.errors import ModelError
from offline_kd.support.ranks import of_all

NEIGHBOURS = 20
AT_ONCE = 2**26  # similarities, a matrix of float32


@dataclass(frozen=True)
class Embedded:
    """What a network gives for the images of a split, those of all ranks, in the order of their keys' hashes."""

    key_hash: NDArray[np.uint64]  # [N]
    labels: Tensor  # [N] int64; -1 where there is none
    vectors: Tensor  # [N, D] float32, on the CPU


@torch.inference_mode()
def embed(
    network: Callable[[Tensor], Tensor],
    loader: BlockLoader,
    batch_size: int,
    device: torch.device,
    title: str,
    crop: EvaluationCrop | None = None,
) -> Embedded:
    """Run `network` (`[B, 3, H, W]` uint8 -> `[B, D]`) over every image of a split, un-augmented; ranks share them.

    Args:
        crop: of images of different sizes; None: they are taken as they are.

    Raises ModelError for vectors that are not finite.
    """
    found = answers_of(network, loader, batch_size, device, title, crop)
    if not found.logits.isfinite().all():
        row, column = (~found.logits.isfinite()).nonzero()[0].tolist()
        raise ModelError(
            f"{title}: number {column} of the vector of image {row} is {found.logits[row, column].item()}. Check the "
            "weights."
        )
    parts = of_all((found.key_hash, found.labels, found.logits))
    key_hash = np.concatenate([one for one, _, _ in parts])
    order = torch.from_numpy(np.argsort(key_hash, kind="stable"))
    labels = torch.cat([one for _, one, _ in parts])
    vectors = torch.cat([one for _, _, one in parts if len(one)] or [torch.empty(0, 0)])
    return Embedded(key_hash[order.numpy()], labels[order], vectors[order])


def knn_top1(vectors: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Percent of images that are of the class that most of their nearest neighbours are of.

    Args:
        vectors: `[N, D]` float32; at least two.
        labels: `[N]` int64, on the same device.
        neighbours: of the other images; all of them, where they are fewer.
    """
    unit = F.normalize(vectors, dim=1)
    k, num_classes, right = min(neighbours, len(unit) - 1), int(labels.max()) + 1, 0
    rows = max(1, AT_ONCE // len(unit))
    for start in range(0, len(unit), rows):
        similarities = unit[start : start + rows] @ unit.T
        own = torch.arange(len(similarities), device=unit.device)
        similarities[own, start + own] = -torch.inf
        nearest = labels[similarities.topk(k, dim=1).indices]
        votes = torch.zeros(len(nearest), num_classes, device=unit.device)
        votes.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=votes.dtype))
        right += int((votes.argmax(dim=1) == labels[start : start + rows]).sum())
    return 100 * right / len(unit)

"""Sub-classes of features: LDA, K-means within each class, and how the sub-classes relate (letKD-2)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.cache.kmeans import Vectors, kmeans
from offline_kd.store.decisions import SubclassDecisions
from offline_kd.support.errors import DataError

# ---- sub-classes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subclasses:
    """What letKD-2 keeps of an intermediate map; S = classes x sub-classes per class."""

    scalings: Tensor  # [D, r] float32, columns of the LDA projection
    xbar: Tensor  # [D] float32
    centers: Tensor  # [C, s, r] float32
    table: Tensor  # [S, S] float32; row i: as which sub-classes vectors of sub-class i are seen


def fit_lda(vectors: Vectors, labels: NDArray[np.int64], components: int) -> tuple[Tensor, Tensor]:
    """LDA from class sums and second moments, read in chunks: scalings `[D, r]` and xbar `[D]`, float64.

    The pooled within-class covariance (divided by n) of `(x - xbar) @ scalings` is the identity; signs are arbitrary.
    Directions without within-class variance are left out, so r may be smaller than `components`.
    """
    num_classes, dimensions = int(labels.max()) + 1, vectors.shape[1]
    sums, second = np.zeros((num_classes, dimensions)), np.zeros((dimensions, dimensions))
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    for start in range(0, len(vectors), 2**16):
        chunk = vectors[start : start + 2**16].astype(np.float64)
        one_hot = np.zeros((len(chunk), num_classes))
        one_hot[np.arange(len(chunk)), labels[start : start + len(chunk)]] = 1
        sums += one_hot.T @ chunk
        second += chunk.T @ chunk
    means = sums / np.maximum(counts, 1)[:, None]
    xbar = sums.sum(axis=0) / len(vectors)
    within = (second - (means * counts[:, None]).T @ means) / len(vectors)
    variances, axes = np.linalg.eigh((within + within.T) / 2)
    kept = variances > variances.max() * 1e-10
    whitening = axes[:, kept] / np.sqrt(variances[kept])
    between = np.sqrt(counts / len(vectors))[:, None] * (means - xbar) @ whitening
    _, strength, directions = np.linalg.svd(between, full_matrices=False)
    rank = min(int((strength > strength[0] * 1e-4).sum()), components)
    return torch.from_numpy(whitening @ directions[:rank].T), torch.from_numpy(xbar)


def fit_subclasses(
    vectors: Vectors,
    labels: NDArray[np.int64],
    config: SubclassDecisions,
    num_classes: int,
    device: torch.device,
    step: Callable[[], None] = lambda: None,
) -> Subclasses:
    """LDA, K-means within every class, and the table of how sub-classes are confused; one class in memory at a time.

    `step` is called once per class and pass, 2 * `num_classes` times. Raises DataError for a class with too few.
    """
    per_class = config.per_class
    scalings, xbar = (tensor.float() for tensor in fit_lda(vectors, labels, config.components))
    by_class = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    rows_of = np.split(by_class, ends[:-1])

    def projected(label: int) -> Tensor:
        return (torch.from_numpy(vectors[rows_of[label]]) - xbar) @ scalings

    centers = torch.empty(num_classes, per_class, scalings.shape[1])
    prototypes = torch.empty_like(centers)
    assigned: list[Tensor] = []
    for label in range(num_classes):
        own = projected(label)
        if len(own) < per_class:
            raise DataError(f"class {label} has {len(own)} feature vectors for {per_class} sub-classes: take fewer.")
        seed = config.seed + label
        found = kmeans(own.numpy(), per_class, iterations=config.iterations, seed=seed, device=device)
        centers[label] = found.centroids
        assigned.append(torch.cdist(own, found.centroids).argmin(dim=1))
        prototypes[label] = class_means(own, assigned[-1], per_class, found.centroids)
        step()
    table = torch.zeros(num_classes * per_class, num_classes * per_class)
    for label in range(num_classes):
        seen = nearest_prototype(projected(label), prototypes.flatten(0, 1))
        rows = label * per_class + assigned[label]
        table.index_put_((rows, seen), torch.ones(len(rows)), accumulate=True)
        step()
    return Subclasses(scalings, xbar, centers, normalised_table(table))


def class_means(x: Tensor, assigned: Tensor, num: int, empty: Tensor) -> Tensor:
    """`[num, r]` means of the rows of `x` by `assigned`; where there is none, the row of `empty`."""
    sums = torch.zeros(num, x.shape[1], dtype=torch.float64).index_add_(0, assigned, x.double())
    counts = torch.bincount(assigned, minlength=num)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], empty.double()).to(x.dtype)


def nearest_prototype(x: Tensor, prototypes: Tensor) -> Tensor:
    """`[n]` int64."""
    half_squares = prototypes.square().sum(dim=1) / 2
    return torch.cat([torch.addmm(-half_squares, part, prototypes.T).argmax(dim=1) for part in torch.split(x, 2**14)])


def normalised_table(counts: Tensor) -> Tensor:
    """Rows that sum to 1; a sub-class without vectors is seen as itself."""
    totals = counts.sum(dim=1, keepdim=True)
    return torch.where(totals > 0, counts / totals.clamp(min=1), torch.eye(len(counts)).to(counts))

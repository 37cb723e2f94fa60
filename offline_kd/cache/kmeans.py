"""K-means of vectors that do not fit into memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.store.decisions import CHUNK_ELEMENTS, NEAREST
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import DataError

KMEANS_STREAM = 0x6B6D65616E73  # first counter of the draws made here
TOLERANCE = 1e-4  # Lloyd stops when the centroids move less than this share of the data's variance

Vectors = NDArray[np.float32]  # [n, D], a memory map where there are many


@dataclass(frozen=True)
class KMeans:
    """Centroids and how well they cover the vectors."""

    centroids: Tensor  # [K, D] float32, on the CPU
    counts: Tensor  # [K] int64 vectors of each
    inertia: float  # sum of squared distances to the nearest centroid
    iterations: int
    nearest: NDArray[
        np.int64
    ]  # [K, NEAREST] rows of the vectors closest to each, closest first; -1 where there are fewer
    distance_percentiles: dict[str, float]  # of the squared distance to the nearest centroid

    @property
    def dead(self) -> int:
        return int((self.counts == 0).sum())


def kmeans(
    vectors: Vectors,
    num_templates: int,
    *,
    iterations: int,
    init: Literal["k-means++", "random"] = "k-means++",
    seed: int = 0,
    device: torch.device,
    step: Callable[[], None] = lambda: None,
) -> KMeans:
    """Lloyd's algorithm over vectors that are read in chunks; the same on one device for one seed.

    A centroid that loses all its vectors moves to the vector that is furthest from its own. `step` is called after
    every pass over the vectors (`iterations` + 1 of them, fewer on convergence).

    Raises DataError when there are fewer vectors than templates.
    """
    if len(vectors) < num_templates:
        raise DataError(
            f"{num_templates} templates from {len(vectors)} feature vectors: take fewer templates or more images."
        )
    centroids = _initial(vectors, num_templates, init, seed).to(device)
    spread = float(np.var(vectors[:: max(len(vectors) // 100_000, 1)], axis=0).mean()) * TOLERANCE
    done = 0
    while done < iterations:
        done += 1
        sums, counts, distances, _ = _assign_all(vectors, centroids, device)
        furthest = _furthest(distances, len(centroids))
        moved = sums / counts.clamp(min=1)[:, None]
        for centroid, row in zip((counts == 0).nonzero()[:, 0].tolist(), furthest, strict=False):
            moved[centroid] = torch.from_numpy(np.array(vectors[row])).to(moved)
        shift = (moved - centroids).square().sum()
        centroids = moved.float()
        step()
        if shift <= spread * centroids.numel() / num_templates and not (counts == 0).any():
            break
    _, counts, distances, assigned = _assign_all(vectors, centroids, device)
    step()
    levels = (1, 10, 50, 90, 99)
    return KMeans(
        centroids=centroids.cpu(),
        counts=counts.cpu(),
        inertia=float(distances.sum(dtype=np.float64)),
        iterations=done,
        nearest=_nearest(assigned, distances, len(centroids)),
        distance_percentiles={
            f"{level}": float(value) for level, value in zip(levels, np.percentile(distances, levels), strict=True)
        },
    )


def _initial(vectors: Vectors, num_templates: int, init: str, seed: int) -> Tensor:
    order = counter_hash(KMEANS_STREAM, seed, np.arange(len(vectors), dtype=np.uint64)).argsort()
    if init == "random":
        return torch.from_numpy(vectors[np.sort(order[:num_templates])])
    # k-means++ (Arthur and Vassilvitskii 2007), greedy, on a sample that fits in memory.
    sample = torch.from_numpy(vectors[np.sort(order[: max(20 * num_templates, 2**16)])])
    trials = 2 + int(np.log(num_templates))
    uniform = np.random.Generator(np.random.Philox(key=seed))
    squares = sample.square().sum(dim=1)
    chosen = [int(uniform.integers(len(sample)))]
    nearest = (sample - sample[chosen[0]]).square().sum(dim=1)
    for _ in range(num_templates - 1):
        levels = torch.from_numpy(uniform.random(trials)) * nearest.sum(dtype=torch.float64)
        candidates = torch.searchsorted(nearest.cumsum(0, dtype=torch.float64), levels).clamp(max=len(sample) - 1)
        distances = (squares[candidates][:, None] + squares - 2 * sample[candidates] @ sample.T).clamp(min=0)
        distances = torch.minimum(distances, nearest)  # [trials, n]
        best = int(distances.sum(dim=1).argmin())
        chosen.append(int(candidates[best]))
        nearest = distances[best]
    return sample[chosen]


def _assign_all(
    vectors: Vectors, centroids: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, NDArray[np.float32], NDArray[np.int64]]:
    """One pass: sums `[K, D]` and counts `[K]` of each centroid; squared distance and centroid `[n]` of each vector."""
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=device)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=device)
    distances, assigned = np.empty(len(vectors), dtype=np.float32), np.empty(len(vectors), dtype=np.int64)
    half_squares = centroids.square().sum(dim=1) / 2
    for start, chunk in _chunks(vectors, len(centroids), device):
        closeness, nearest = _highest(torch.addmm(-half_squares, chunk, centroids.T))
        distances[start : start + len(chunk)] = (chunk.square().sum(dim=1) - 2 * closeness).clamp(min=0).cpu().numpy()
        assigned[start : start + len(chunk)] = nearest.cpu().numpy()
        # index_put_ sorts on a GPU, so that sums come out the same each time; atomic additions would not.
        if device.type == "cpu":
            sums.index_add_(0, nearest, chunk.double())
        else:
            sums.index_put_((nearest,), chunk.double(), accumulate=True)
        counts += torch.bincount(nearest, minlength=len(centroids))
    return sums, counts, distances, assigned


def _highest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The highest value of every row of `[n, K]` and its column, `[n]` each; of equal ones the first."""
    rows, columns = values.shape
    if columns % 64 or columns < 2048:
        highest, column = values.max(dim=1)
        return highest, column
    # max with its column is scalar code on a CPU, amax is not: first the group, then the column within.
    grouped = values.view(rows, 64, columns // 64)
    groups = grouped.amax(dim=2).argmax(dim=1)
    highest, place = grouped[torch.arange(rows, device=values.device), groups].max(dim=1)
    return highest, groups * (columns // 64) + place


def _furthest(distances: NDArray[np.float32], num: int) -> list[int]:
    """Rows of the `num` vectors that are furthest from their centroid, furthest first."""
    rows = np.argpartition(distances, -min(num, len(distances)))[-num:]
    return [int(row) for row in rows[distances[rows].argsort(kind="stable")[::-1]]]


def _nearest(assigned: NDArray[np.int64], distances: NDArray[np.float32], num_templates: int) -> NDArray[np.int64]:
    order = np.lexsort((distances, assigned))
    starts = np.searchsorted(assigned[order], np.arange(num_templates + 1))
    nearest = np.full((num_templates, NEAREST), -1, dtype=np.int64)
    for template, (start, end) in enumerate(pairwise(starts)):
        rows = order[start : min(end, start + NEAREST)]
        nearest[template, : len(rows)] = rows
    return nearest


def _chunks(vectors: Vectors, num_templates: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    size = max(CHUNK_ELEMENTS[device.type] // num_templates, 64)
    for start in range(0, len(vectors), size):
        yield start, torch.from_numpy(np.array(vectors[start : start + size])).to(device)

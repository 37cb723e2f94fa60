"""Templates: K-means over a tap's feature vectors, and the teacher's decisions - which template each location chose.

letKD-1 (penultimate map): K templates; a location's decision is softmax(-temperature * squared distance), of which the
m likeliest are kept. letKD-2 (intermediate map): vectors are projected by LDA, each class has its own sub-classes, and
the decision is the nearest sub-class of the image's own class. arXiv:2309.02843, its supplement and code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from offline_kd.errors import DataError
from offline_kd.taps import TapPoint
from offline_kd.views import counter_hash

KMEANS_STREAM = 0x6B6D65616E73  # first counter of the draws made here
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # distances held at a time; on a CPU they should stay in its cache
TOLERANCE = 1e-4  # Lloyd stops when the centroids move less than this share of the data's variance

NEAREST = 8  # vectors that are remembered of each template
PROB_LEVELS = (
    2**14 - 1
)  # stored probabilities are multiples of 1 / PROB_LEVELS; two more bits cost 64 bytes for an 8x8 map

Vectors = NDArray[np.float32]  # [n, D], a memory map where there are many


class TemplateDecisions(TapPoint):
    """letKD-1: K templates of a tap, and the `top` likeliest at every location (1: hard ids)."""

    kind: Literal["templates"]
    templates: int = Field(4096, ge=2, le=8192)
    top: int = Field(4, ge=1, le=16)
    temperature: float = Field(1.0, gt=0, description="of softmax(-temperature * squared distance)")
    iterations: int = Field(20, ge=1)
    init: Literal["k-means++", "random"] = "k-means++"
    seed: int = Field(0, ge=0)
    max_vectors: int = Field(4_000_000, ge=1, description="feature vectors that K-means sees; images are sampled")

    def num_templates(self, num_classes: int) -> int:
        return self.templates


class SubclassDecisions(TapPoint):
    """letKD-2: sub-classes of every class on the LDA coordinates of a tap, one id at every location."""

    kind: Literal["subclasses"]
    per_class: int = Field(8, ge=1, le=255)
    components: int = Field(60, ge=1)
    iterations: int = Field(20, ge=1)
    seed: int = Field(0, ge=0)
    max_vectors: int = Field(4_000_000, ge=1)

    def num_templates(self, num_classes: int) -> int:
        return num_classes * self.per_class


AnyDecisions = TemplateDecisions | SubclassDecisions
DecisionsConfig = Annotated[AnyDecisions, Field(discriminator="kind")]


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
        closeness, nearest = torch.addmm(-half_squares, chunk, centroids.T).max(dim=1)
        distances[start : start + len(chunk)] = (chunk.square().sum(dim=1) - 2 * closeness).clamp(min=0).cpu().numpy()
        assigned[start : start + len(chunk)] = nearest.cpu().numpy()
        # index_put_ sorts on a GPU, so that sums come out the same each time; atomic additions would not.
        if device.type == "cpu":
            sums.index_add_(0, nearest, chunk.double())
        else:
            sums.index_put_((nearest,), chunk.double(), accumulate=True)
        counts += torch.bincount(nearest, minlength=len(centroids))
    return sums, counts, distances, assigned


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


# ---- decisions on templates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decisions:
    """What a teacher decided at every location, the likeliest template first."""

    ids: Tensor  # [B, H, W, m] int64
    probs: Tensor  # [B, H, W, m], as computed over all K: they add up to 1 - dropped
    dropped: Tensor  # [B, H, W] mass of the templates that are not kept


def pack_decisions(decisions: Decisions) -> dict[str, Tensor]:
    """What the store keeps: `id` and `prob` as integers, and the largest dropped mass `[B]`.

    A template whose probability rounds to 0 is replaced by the first, which packs better and means the same.
    """
    levels = (decisions.probs.double() * PROB_LEVELS).round().long()
    ids = torch.where(levels > 0, decisions.ids, decisions.ids[..., :1])
    return {"id": ids, "prob": levels, "dropped": decisions.dropped.flatten(1).amax(dim=1).float()}


def pack(config: AnyDecisions, features: Tensor, labels: Tensor, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything the store keeps of the decisions on a batch of maps, by the last part of the array's name.

    Args:
        features: `[B, D, H, W]`.
        labels: `[B]` int64; sub-classes are those of the label.
        tables: by the last part of their name, on the device of `features`.
    """
    if isinstance(config, SubclassDecisions):
        projected = project(features, tables["scalings"], tables["xbar"], config.components)
        return {"subclass": subclass_ids(projected, labels, tables["centers"])}
    decided = decide(features, tables["centroids"], top=config.top, temperature=config.temperature)
    packed = pack_decisions(decided)
    return packed if config.top > 1 else {"id": packed["id"], "dropped": packed["dropped"]}


def unpack_probs(levels: Tensor) -> Tensor:
    return levels.float() / PROB_LEVELS


def decide(features: Tensor, centroids: Tensor, *, top: int, temperature: float) -> Decisions:
    """The `top` likeliest templates of softmax(-temperature * squared distance) at every location.

    Args:
        features: `[B, D, H, W]`.
        centroids: `[K, D]`, on the same device.
    """
    batch, _, height, width = features.shape
    x = features.permute(0, 2, 3, 1).flatten(0, 2)
    centroids = centroids.to(x.dtype)
    half_squares = centroids.square().sum(dim=1) / 2
    size = max(CHUNK_ELEMENTS[x.device.type] // len(centroids), 64)
    # Two buffers for all chunks: fresh memory for every chunk takes longer to map than to fill.
    workspace = x.new_empty(2, min(size, len(x)), len(centroids))
    parts = [
        _decide(x[start : start + size], centroids, half_squares, min(top, len(centroids)), temperature, workspace)
        for start in range(0, len(x), size)
    ]
    ids, probs, dropped = (
        torch.cat(part).view(batch, height, width, *part[0].shape[1:]) for part in zip(*parts, strict=True)
    )
    return Decisions(ids, probs, dropped)


def _decide(
    x: Tensor, centroids: Tensor, half_squares: Tensor, top: int, temperature: float, workspace: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    closeness, shares = workspace[:, : len(x)]  # [n, K] each
    scale = 2 * temperature  # closeness: temperature * (|x|^2 - distance), the exponent but for a constant of the row
    torch.addmm(half_squares, x, centroids.T, beta=-scale, alpha=scale, out=closeness)
    # Expanded squares lose digits: take some candidates more, and measure their distances again, exactly.
    candidates = _largest(closeness, min(top + 4, len(centroids)))
    exact = -temperature * (x[:, None] - centroids[candidates]).square().sum(dim=2)  # [n, candidates]
    exact, order = exact.sort(dim=1, descending=True, stable=True)
    # The share of the others is small, so that their expanded squares are good enough. softmax is one fused pass over
    # all templates; logsumexp takes eight times as long, most of it on exponentials that underflow.
    torch.softmax(closeness, dim=1, out=shares)
    others = (1 - shares.gather(1, candidates).sum(dim=1)).clamp(min=0)
    log_total = torch.logsumexp(exact, dim=1) - torch.log1p(-others)
    probs = (exact[:, :top] - log_total[:, None]).exp()
    dropped = (exact[:, top:] - log_total[:, None]).exp().sum(dim=1) + others
    return candidates.gather(1, order[:, :top]), probs, dropped


def _largest(values: Tensor, num: int) -> Tensor:
    """Columns `[n, num]` of the largest values of every row.

    On a CPU, by way of the largest of each group of 64: the `num` largest lie in the `num` groups of largest maxima.
    """
    rows, columns = values.shape
    if columns % 64 or columns < 128 * num or values.is_cuda:
        return values.topk(num, dim=1).indices
    grouped = values.view(rows, columns // 64, 64)
    groups = grouped.amax(dim=2).topk(num, dim=1).indices
    place = grouped.gather(1, groups[:, :, None].expand(-1, -1, 64)).flatten(1).topk(num, dim=1).indices
    return groups.gather(1, place // 64) * 64 + place % 64


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


def project(features: Tensor, scalings: Tensor, xbar: Tensor, components: int) -> Tensor:
    """`[B, D, H, W]` -> `[B, r, H, W]`: the LDA coordinates of every location."""
    x = features.permute(0, 2, 3, 1) - xbar.to(features.dtype)
    return (x @ scalings[:, :components].to(features.dtype)).permute(0, 3, 1, 2)


def subclass_ids(projected: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """`[B, H, W]` int64 in 0..s-1: the nearest of the s sub-classes of each image's own class.

    Args:
        projected: `[B, r, H, W]`.
        labels: `[B]` int64.
        centers: `[C, s, r]`.
    """
    own = centers.to(projected.dtype)[labels]  # [B, s, r]
    distances = torch.cdist(projected.flatten(2).transpose(1, 2), own, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(dim=2).view(len(labels), *projected.shape[2:])


def fit_subclasses(
    vectors: Vectors,
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    per_class: int,
    components: int,
    iterations: int,
    seed: int,
    device: torch.device,
    step: Callable[[], None] = lambda: None,
) -> Subclasses:
    """LDA, K-means within every class, and the table of how sub-classes are confused; one class in memory at a time.

    `step` is called once per class and pass, 2 * `num_classes` times. Raises DataError for a class with too few.
    """
    scalings, xbar = (tensor.float() for tensor in fit_lda(vectors, labels, components))
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
        found = kmeans(own.numpy(), per_class, iterations=iterations, seed=seed + label, device=device)
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
    return torch.cat([torch.addmm(-half_squares, part, prototypes.T).argmax(dim=1) for part in x.split(2**14)])  # type: ignore[no-untyped-call]


def normalised_table(counts: Tensor) -> Tensor:
    """Rows that sum to 1; a sub-class without vectors is seen as itself."""
    totals = counts.sum(dim=1, keepdim=True)
    return torch.where(totals > 0, counts / totals.clamp(min=1), torch.eye(len(counts)).to(counts))

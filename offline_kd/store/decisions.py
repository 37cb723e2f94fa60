"""Templates: K-means over a tap's feature vectors, and the teacher's decisions - which template each location chose.

letKD-1 (penultimate map): K templates; a location's decision is softmax(-temperature * squared distance), of which the
m likeliest are kept. letKD-2 (intermediate map): vectors are projected by LDA, each class has its own sub-classes, and
the decision is the nearest sub-class of the image's own class. arXiv:2309.02843, its supplement and code.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from offline_kd.models.taps import TapPoint
from offline_kd.support.strict import Seed

NEAREST = 8  # vectors that are remembered of each template
PROB_LEVELS = (
    2**14 - 1
)  # stored probabilities are multiples of 1 / PROB_LEVELS; two more bits cost 64 bytes for an 8x8 map


class TemplateDecisions(TapPoint):
    """letKD-1: K templates of a tap, and the `top` likeliest at every location (1: hard ids)."""

    kind: Literal["templates"]
    templates: int = Field(4096, ge=2, le=8192, description="K, of K-means over the feature vectors of training images")
    top: int = Field(4, ge=1, le=16, description="likeliest templates that are kept of a location; 1: ids alone")
    temperature: float = Field(1.0, gt=0, description="of softmax(-temperature * squared distance)")
    iterations: int = Field(20, ge=1, description="of K-means")
    init: Literal["k-means++", "random"] = Field("k-means++", description="where K-means begins")
    seed: Seed = Field(0, description="of where K-means begins")
    max_vectors: int = Field(4_000_000, ge=1, description="feature vectors that K-means sees; images are sampled")

    @model_validator(mode="after")
    def _top_are_templates(self) -> Self:
        if self.top > self.templates:
            raise ValueError(f"the {self.top} likeliest of {self.templates} templates: top must not be more")
        return self

    def num_templates(self, num_classes: int) -> int:
        return self.templates


class SubclassDecisions(TapPoint):
    """letKD-2: sub-classes of every class on the LDA coordinates of a tap, one id at every location."""

    kind: Literal["subclasses"]
    per_class: int = Field(8, ge=1, le=255, description="sub-classes of a class")
    components: int = Field(60, ge=1, description="directions of LDA that are used")
    iterations: int = Field(20, ge=1, description="of K-means")
    seed: Seed = Field(0, description="of where K-means begins")
    max_vectors: int = Field(4_000_000, ge=1, description="feature vectors that are seen; images are sampled")

    def num_templates(self, num_classes: int) -> int:
        return num_classes * self.per_class


AnyDecisions = TemplateDecisions | SubclassDecisions
DecisionsConfig = Annotated[AnyDecisions, Field(discriminator="kind")]


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

    Of templates at the very same distance (up to `top` + 4 of them) that with the lower id comes first. Nothing here
    makes the host wait for a GPU.

    Args:
        features: `[B, D, H, W]`.
        centroids: `[K, D]`, on the same device.
    """
    batch, _, height, width = features.shape
    top = min(top, len(centroids))
    x = features.permute(0, 2, 3, 1).flatten(0, 2)
    centroids = centroids.to(x.dtype)
    half_squares = centroids.square().sum(dim=1, keepdim=True) / 2
    weights = 2 * temperature * torch.cat([centroids, -half_squares], dim=1).T
    # Two buffers for all chunks: fresh memory for every chunk takes longer to map than to fill.
    size = max(CHUNK_ELEMENTS[x.device.type] // len(centroids), 64)
    workspace = x.new_empty(2, min(size, len(x)), len(centroids))
    parts = [_candidates(x[i : i + size], centroids, weights, top, workspace) for i in range(0, len(x), size)]
    candidates, distances, others = (torch.cat(part) for part in zip(*parts, strict=True))
    exact, order = (-temperature * distances).sort(dim=1, descending=True, stable=True)
    log_total = torch.logsumexp(exact, dim=1) - torch.log1p(-others)
    probs = (exact - log_total[:, None]).exp()
    ids, dropped = candidates.gather(1, order[:, :top]), probs[:, top:].sum(dim=1) + others
    grid = (batch, height, width)
    return Decisions(ids.view(*grid, top), probs[:, :top].reshape(*grid, top), dropped.view(grid))


def _candidates(
    x: Tensor, centroids: Tensor, weights: Tensor, top: int, workspace: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `x` `[n, D]`: ids `[n, c]`, ascending, of some templates more than the `top` closest, and their squared
    distances; the share `[n]` of all others, by the expanded squares that `weights` `[D + 1, K]` give.
    """
    closeness, shares = workspace[:, : len(x)]  # [n, K] each
    # closeness: temperature * (|x|^2 - distance), the exponent but for a constant of the row
    torch.mm(*_as_float32(F.pad(x, (0, 1), value=1.0), weights), out=closeness)
    # Expanded squares lose digits: take some candidates more, and measure their distances again, exactly.
    candidates = largest(closeness, min(top + 4, len(centroids)))
    highest = closeness.gather(1, candidates[:, :1])
    # The share of the others is small, so that their expanded squares are good enough. softmax is one fused pass over
    # all templates, five times as long where exponentials underflow: what is raised to e^-60 adds no bit to the sum.
    torch.maximum(closeness, highest - 60, out=closeness)
    torch.softmax(closeness, dim=1, out=shares)
    others = (1 - shares.gather(1, candidates).sum(dim=1)).clamp(min=0)
    candidates = candidates.sort(dim=1).values  # so that a stable sort by distance decides ties
    differences = centroids.index_select(0, candidates.flatten()).view(*candidates.shape, -1).sub_(x[:, None])
    return candidates, differences.square_().sum(dim=2), others


def _as_float32(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factors `[n, d]`, `[d, K]` whose product has float32's digits even where a GPU is allowed to round to TF32.

    An exponent that is off by |x| |centroid| / 1024 would be another probability.
    """
    if rows.is_cuda and rows.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return split_for_tf32(rows, columns)
    return rows, columns


def split_for_tf32(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factors `[n, 3d]`, `[3d, K]` float32 of the same product, which keep its digits when rounded to TF32.

    Every number is one of TF32's 10 stored bits plus a rest; of the four products only rest times rest is left out,
    2^-22 of the whole.
    """
    high_rows, high_columns = rounded_to_tf32(rows), rounded_to_tf32(columns)
    low_rows, low_columns = rows - high_rows, columns - high_columns
    return (
        torch.cat([high_rows, high_rows, low_rows], dim=1),
        torch.cat([high_columns, low_columns, high_columns], dim=0),
    )


def rounded_to_tf32(values: Tensor) -> Tensor:
    return ((values.contiguous().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)


def largest(values: Tensor, num: int) -> Tensor:
    """Columns `[n, num]` of the largest values `[n, K]` of every row, the largest first.

    On a long row topk is slow. Its `num` largest values lie in those `num` of 64 groups that have the largest maxima,
    and there at those `num` places that have the largest maxima over these groups.
    """
    rows, columns = values.shape
    size = columns // 64
    if columns % 64 or size < 32 or num > 32:
        return values.topk(num, dim=1).indices
    grouped = values.view(rows * 64, size)
    groups = grouped.amax(dim=1).view(rows, 64).topk(num, dim=1).indices
    first = torch.arange(0, rows * 64, 64, device=values.device)[:, None]
    inside = F.embedding(first + groups, grouped)  # [n, num, size]; gather takes four times as long
    places = inside.amax(dim=1).topk(num, dim=1).indices
    found = inside.gather(2, places[:, None, :].expand(-1, num, -1)).flatten(1).topk(num, dim=1).indices
    return groups.gather(1, found // num) * size + places.gather(1, found % num)


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


CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}  # distances held at a time; on a CPU they should stay in its cache

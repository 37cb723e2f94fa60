"""Relational knowledge distillation (RKD): Park et al., CVPR 2019, arXiv:1904.05068, section 3.2."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.features import FeatureTerm, unit
from offline_kd.objectives.term import LossBatch, Signal


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Match the distances between the images of a batch, relative to their mean.

        mean over pairs (i, j) of  huber( |s_i - s_j| / mu_s, |t_i - t_j| / mu_t )

    mu is the mean of the distances that are not 0, and huber(x, y) = (x - y)**2 / 2 where |x - y| < 1, else
    |x - y| - 1/2. As in the published code, all B**2 pairs count, those of an image with itself too. Unchanged when
    either is moved, turned or made longer; the widths may differ.

    Args:
        student: `[B, D_s]`, float32 or float64.
        teacher: `[B, D_t]`, constant.

    Returns:
        The loss, a scalar without unit; 0 for a single row.
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Match the angles of all triangles of images of a batch.

        mean over triples (i, j, k) of  huber( cos of the angle at s_i between s_j and s_k, the same of t )

    As in the published code, all B**3 triples count; where two of the images are one, or are the same vector, the
    cosine is 0. Unchanged when either is moved, turned or made longer. Arguments and result as for `rkd_distance`.
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _relative_distances(x: Tensor) -> Tensor:
    """`[B, B]`: between rows of `[B, D]`, over the mean of those that are not 0."""
    distances = torch.linalg.vector_norm(x[:, None] - x, dim=2)  # whose gradient at 0 is 0
    apart = (distances > 0).sum().clamp(min=1)
    mean = distances.sum() / apart
    return distances / torch.where(mean > 0, mean, 1)


def _cosines(x: Tensor) -> Tensor:
    """`[B, B, B]`: at row i, between the directions to rows j and k."""
    directions = unit(x[:, None] - x)
    return directions @ directions.transpose(1, 2)


class Relational(FeatureTerm):
    """Match distances and angles between the images of a batch, whatever the widths of the features."""

    paper: ClassVar[str] = "Park et al., CVPR 2019, arXiv:1904.05068"
    example: ClassVar = {"features": "penultimate"}

    term: Literal["relational"]
    distance_weight: float = Field(25.0, ge=0, description="how much distances count")
    angle_weight: float = Field(50.0, ge=0, description="how much angles count; their memory grows as the batch cubed")

    def memory(self, batch_size: int, num_rows: int) -> int:
        """The cosines of student and teacher, their differences, and the gradients of these: float32 `[B, B, B]`."""
        return 5 * 4 * batch_size**3 if self.angle_weight else 0

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """The weighted sum of `rkd_distance` and, where it counts, `rkd_angle`, over the batch of all ranks."""
        student, teacher = self.vectors(signal, batch)
        value = self.distance_weight * rkd_distance(student, teacher)
        return value + self.angle_weight * rkd_angle(student, teacher) if self.angle_weight else value

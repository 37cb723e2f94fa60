"""Match a vector of the teacher directly: what students of embedding models are trained with."""

from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.features import FeatureTerm, Projection, unit
from offline_kd.objectives.term import DatasetRows, Head, LossBatch, Signal
from offline_kd.support.errors import RecipeError

Distance = Literal["cosine", "l2", "smooth_l1"]


def embedding(student: Tensor, teacher: Tensor, *, distance: Distance) -> Tensor:
    """How far the student's vectors are from the teacher's.

        cosine     mean over the batch of 1 - cos(s, t)
        l2         mean over batch and channels of (s - t)**2
        smooth_l1  the same of (s - t)**2 / 2 where |s - t| < 1, and of |s - t| - 1/2 elsewhere

    Args:
        student: `[B, D]`, float32 or float64.
        teacher: `[B, D]`, constant.

    Returns:
        The loss, a scalar; 0 at equal vectors, and of `cosine` at equal directions. A zero vector has cosine 0.
    """
    if distance == "cosine":
        return 1 - (unit(student) * unit(teacher)).sum(dim=1).mean()
    if distance == "l2":
        return F.mse_loss(student, teacher)
    return F.smooth_l1_loss(student, teacher)


class Embedding(FeatureTerm):
    """Match a vector of the teacher, through a projection that is trained beside the student."""

    example: ClassVar = {"features": "penultimate"}

    term: Literal["embedding"]
    distance: Distance = Field("cosine", description="cosine, l2 or smooth_l1")
    projection: bool = Field(True, description="a linear map of the student's vector; false: both are equally wide")

    def head(self, student_width: int, teacher_width: int, rows: Callable[[], DatasetRows]) -> Head | None:
        """Raises RecipeError for different widths without a projection."""
        if not self.projection and student_width != teacher_width:
            raise RecipeError(
                f"term 'embedding': the student's features are {student_width} wide, '{self.features}' of the teacher "
                f"{teacher_width}. Leave out `projection: false`, or name another student_module."
            )
        return Projection(student_width, teacher_width) if self.projection else None

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """As `embedding` says, over the batch of all ranks."""
        student, teacher = self.vectors(signal, batch)
        return embedding(student if batch.head is None else batch.head(student), teacher, distance=self.distance)

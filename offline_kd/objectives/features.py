"""Features as terms take them: the student's and the teacher's vectors of a batch, and a projection between them."""

import torch
from pydantic import Field
from torch import Tensor, nn

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import Head, LossBatch, Signal, Term
from offline_kd.support.ranks import whole_batch

SHORTEST = 1e-12  # length below which a vector has no direction


def unit(x: Tensor) -> Tensor:
    """`[..., D]` over its length along the last axis; what has none becomes 0, and gets no gradient."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length < SHORTEST, torch.inf)


class Projection(Head):
    """A linear map with bias, `[B, student width]` -> `[B, teacher width]`, that is trained with the student."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(student_width, teacher_width)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.embed(features)
        return projected


class FeatureTerm(Term):
    """A term on features of the student and the teacher, which may compare the images of a batch with each other.

    It sees the batch of all ranks, so that a student does not depend on how many train it, and so that what the ranks
    train beside it stays the same on all of them without being shared.
    """

    term: str
    features: str = Field(description="name in capture.features, of the teacher")
    student_module: str | None = Field(
        None,
        description="module of the student whose output, averaged over its places, is compared; by default what "
        "comes into its classifier",
    )

    @property
    def needs(self) -> Needs:
        return Needs(logits=False, features=True, label="either")

    def count(self, batch: LossBatch) -> Tensor | int:
        return 1

    def vectors(self, signal: Signal, batch: LossBatch) -> tuple[Tensor, Tensor]:
        """`[B, D_s]` of the student, with gradient, and `[B, D_t]` of the teacher: rows of all ranks, maps averaged."""
        teacher = signal.features[self.features]
        teacher = teacher.mean(dim=(2, 3)) if teacher.dim() == 4 else teacher
        return whole_batch(batch.features[self.student_module]), whole_batch(teacher)

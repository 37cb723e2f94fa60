"""Binary cross-entropy on sets of labels: every class is a question of its own."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Signal, Term


def bce(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Is the image of each class? A student's sigmoids against its labels.

        mean over images and classes of  - y log s(z) - (1 - y) log(1 - s(z)),  s(z) = 1 / (1 + exp(-z))

    Args:
        student_logits: `[B, C]`, float32 or float64.
        labels: `[B, C]` of the same type: 1 for a class of the image, else 0; or a share of it.

    Returns:
        The loss in nats, a scalar; finite for logits of any size.
    """
    return F.binary_cross_entropy_with_logits(student_logits, labels)


class BCE(Term):
    """Binary cross-entropy on sets of labels that are known, with training.label_smoothing."""

    example: ClassVar = {}

    term: Literal["bce"]

    @property
    def needs(self) -> Needs:
        return Needs(logits=False, label="set")

    def count(self, batch: LossBatch) -> Tensor | int:
        return (batch.labels[:, 0] >= 0).sum()

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """Mean over the classes of the samples whose labels are known, 0 if there is none.

        Of a mixture the labels are those of both images by their shares. Smoothing s makes them y (1 - s) + s / 2.
        """
        known = batch.labels[:, 0] >= 0
        labels = batch.labels.clamp(min=0) * (1 - batch.label_smoothing) + batch.label_smoothing / 2
        values = F.binary_cross_entropy_with_logits(student_logits, labels, reduction="none").mean(dim=1)
        return (values * known).sum() / known.sum().clamp(min=1)

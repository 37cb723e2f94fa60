"""Cross-entropy on the labels, which no other objective contains."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Signal, Term


class CE(Term):
    """Cross-entropy on the labels that are known, with training.label_smoothing."""

    term: Literal["ce"]

    @property
    def needs(self) -> Needs:
        return Needs(logits=False)

    def count(self, batch: LossBatch) -> Tensor | int:
        return (batch.labels >= 0).sum()

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """Mean over the samples whose label is known, 0 if there is none; of a mixture, both labels by their shares."""
        known = (batch.labels >= 0).sum().clamp(min=1)
        smoothing = batch.label_smoothing
        if batch.mixing:
            other, share = batch.mixing
            values = [
                F.cross_entropy(student_logits, one, ignore_index=-1, reduction="none", label_smoothing=smoothing)
                for one in (batch.labels, other)
            ]
            return (share * values[0] + (1 - share) * values[1]).sum() / known
        total = F.cross_entropy(
            student_logits, batch.labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing
        )
        return total / known

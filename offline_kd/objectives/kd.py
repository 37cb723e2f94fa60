"""Hinton's knowledge distillation."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Positive, Signal, Term, logits_of


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Match the tempered student to the tempered teacher.

        T**2 * mean over the batch of  KL( softmax(z_t / T) || softmax(z_s / T) )

    Hinton et al. 2015, arXiv:1503.02531, section 2. Unchanged when a constant is added to a row of logits.

    Args:
        student_logits: `[B, C]`, float32 or float64.
        teacher_logits: `[B, C]`, constant.

    Returns:
        The loss in nats, a scalar; 0 at equal logits.
    """
    log_p_s = F.log_softmax(student_logits / temperature, dim=1)
    log_p_t = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


class KD(Term):
    """Match the tempered student to the tempered teacher."""

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    example: ClassVar = {"temperature": 4.0}

    term: Literal["kd"]
    temperature: Positive = Field(description="of both softmaxes; the value is times its square")

    @property
    def needs(self) -> Needs:
        return Needs(tail_temperature=self.temperature)

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        return kd(student_logits, logits_of(signal), temperature=self.temperature)

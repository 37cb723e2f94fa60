"""Knowledge distillation class by class, for teachers whose classes do not exclude each other."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Positive, Signal, Term, logits_of


def binary_kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Match the student's tempered sigmoid of every class to the teacher's.

        T**2 * mean over images and classes of  KL( [p, 1 - p] || [q, 1 - q] )
        p = s(z_t / T),  q = s(z_s / T),  s(z) = 1 / (1 + exp(-z))

    The one-against-all divergence of multi-label logit distillation, Yang et al. 2023, arXiv:2308.06453, with the
    temperature and its square as of Hinton et al. 2015, arXiv:1503.02531, and the mean over classes as of binary
    cross-entropy. A constant that is added to a row of logits changes it: no softmax takes it away.

    Args:
        student_logits: `[B, C]`, float32 or float64.
        teacher_logits: `[B, C]`, constant.

    Returns:
        The loss in nats, a scalar; 0 at equal logits, finite for logits of any size.
    """
    z_s, z_t = student_logits / temperature, teacher_logits / temperature
    p, not_p = z_t.sigmoid(), (-z_t).sigmoid()
    of_class = p * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
    of_others = not_p * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
    return temperature**2 * (of_class + of_others).mean()


class BinaryKD(Term):
    """Match the student's tempered sigmoid of every class to the teacher's."""

    paper: ClassVar[str] = "Yang et al. 2023, arXiv:2308.06453"
    example: ClassVar = {"temperature": 2.0}

    term: Literal["binary_kd"]
    temperature: Positive = Field(description="of both sigmoids; the value is times its square")

    @property
    def needs(self) -> Needs:
        return Needs(offset=True, label="set")

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        return binary_kd(student_logits, logits_of(signal), temperature=self.temperature)

"""Normalised knowledge distillation (NKD): Yang et al., ICCV 2023, arXiv:2303.13005."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Positive, Signal, Term, label_beside_teacher, logits_of


def nkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, gamma: float, temperature: float) -> Tensor:
    """Soft cross-entropy on the label, and on the other classes renormalised among themselves.

        - mean p_y log q_y  -  gamma T**2 mean sum over i != y of  p'_i log q'_i

    p and q are the un-tempered softmax, p' and q' the softmax over the C - 1 other classes at T. To be added to the
    ordinary cross-entropy. A cross-entropy itself: it does not reach 0.

    Args:
        student_logits: `[B, C]`, float32 or float64.
        teacher_logits: `[B, C]`, constant.
        labels: `[B]` int64.

    Returns:
        The loss in nats, a scalar.
    """
    label = labels[:, None]
    log_q_label = F.log_softmax(student_logits, dim=1).gather(1, label)
    p_label = F.softmax(teacher_logits, dim=1).gather(1, label)
    # Numbers of the other classes in their order: a mask would have to be read before the size of the result is known.
    below = torch.arange(student_logits.shape[1] - 1, device=labels.device)
    others = below + (below >= label)  # [B, C - 1]
    z_s, z_t = (logits.gather(1, others) / temperature for logits in (student_logits, teacher_logits))
    shared = (F.softmax(z_t, dim=1) * F.log_softmax(z_s, dim=1)).sum(dim=1)
    return -(p_label * log_q_label).mean() - gamma * temperature**2 * shared.mean()


class NKD(Term):
    """Soft cross-entropy on the label, and on the other classes renormalised among themselves."""

    paper: ClassVar[str] = "Yang et al., ICCV 2023, arXiv:2303.13005"
    example: ClassVar = {"gamma": 1.5, "temperature": 1.0}

    term: Literal["nkd"]
    gamma: float = Field(ge=0, description="how much the other classes count beside the label")
    temperature: Positive = Field(description="of the other classes' softmaxes; their part is times its square")

    @property
    def needs(self) -> Needs:
        return Needs(labels=True)

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        labels = label_beside_teacher(signal, batch)
        return nkd(student_logits, logits_of(signal), labels, gamma=self.gamma, temperature=self.temperature)

"""Decoupled knowledge distillation (DKD): Zhao et al., CVPR 2022, arXiv:2203.08679."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Positive, Signal, Term, label_beside_teacher, logits_of

EXCLUDED = 1000.0  # what the published code subtracts from the label's tempered logit to take it out of the softmax


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Match (label, rest) and the distribution over the other classes apart, each times T**2.

        alpha T**2 mean KL( (p_y, 1 - p_y) || (q_y, 1 - q_y) )  +  beta T**2 mean KL( p without y || q without y )

    p and q are softmax(z / T). With alpha 1 and beta 1 - p_y this is KD (equation 5 of the paper). The two-way
    probabilities are made by log-sum-exp, since the published sum of a softmax can be log 0.

    Args:
        student_logits: `[B, C]`, float32 or float64.
        teacher_logits: `[B, C]`, constant.
        labels: `[B]` int64.

    Returns:
        The loss in nats, a scalar; 0 at equal logits.
    """
    z_s, z_t = student_logits / temperature, teacher_logits / temperature
    label = labels[:, None]
    is_label = torch.zeros_like(z_s, dtype=torch.bool).scatter_(1, label, True)
    target = F.kl_div(
        _label_or_rest(z_s, label, is_label), _label_or_rest(z_t, label, is_label), reduction="none", log_target=True
    )
    log_q_s = F.log_softmax(z_s - EXCLUDED * is_label, dim=1)
    log_q_t = F.log_softmax(z_t - EXCLUDED * is_label, dim=1)
    others = F.kl_div(log_q_s, log_q_t, reduction="none", log_target=True)
    return temperature**2 * (alpha * target.sum(dim=1).mean() + beta * others.sum(dim=1).mean())


def _label_or_rest(z: Tensor, label: Tensor, is_label: Tensor) -> Tensor:
    """`[B, 2]` log-probabilities of the label and of everything else."""
    of_label = z.gather(1, label).squeeze(1)
    of_rest = torch.logsumexp(z.masked_fill(is_label, -torch.inf), dim=1)
    return F.log_softmax(torch.stack([of_label, of_rest], dim=1), dim=1)


class DKD(Term):
    """Match (label, rest) and the distribution over the other classes apart."""

    paper: ClassVar[str] = "Zhao et al., CVPR 2022, arXiv:2203.08679"
    example: ClassVar = {"alpha": 1.0, "beta": 2.0, "temperature": 4.0}

    term: Literal["dkd"]
    alpha: float = Field(ge=0, description="how much (label, rest) counts")
    beta: float = Field(ge=0, description="how much the other classes among themselves count")
    temperature: Positive = Field(description="of both softmaxes; the value is times its square")

    @property
    def needs(self) -> Needs:
        return Needs(labels=True)

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        labels = label_beside_teacher(signal, batch)
        return dkd(
            student_logits,
            logits_of(signal),
            labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )

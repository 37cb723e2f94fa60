"""Transformed teacher matching (TTM) and its weighted form (WTTM): Zheng and Yang, ICLR 2024, arXiv:2402.11148.

Everything stays in the log domain. Raising probabilities to a power, as the published code does, loses in float32
every class that lies more than about 103 nats below the best one.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Positive, Signal, Term, logits_of


def ttm(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float) -> Tensor:
    """Match the student, which is not tempered, to the teacher with its probabilities raised to `gamma` = 1 / T.

        mean over the batch of  KL( softmax(gamma z_t) || softmax(z_s) )

    Section 3 of the paper. There is no T**2 factor: the student has no temperature, so its gradient does not shrink.

    Args:
        student_logits: `[B, C]`, float32 or float64.
        teacher_logits: `[B, C]`, constant.

    Returns:
        The loss in nats, a scalar; 0 where z_s equals gamma z_t up to a constant per row.
    """
    return _divergence(student_logits, teacher_logits, gamma).mean()


def wttm(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float) -> Tensor:
    """TTM with every sample weighted by its power sum, so that uncertain teachers count more.

        mean over the batch of  U(p_t) * KL( softmax(gamma z_t) || softmax(z_s) ),   U(p) = sum_i p_i ** gamma

    Section 4 of the paper. The weights, between 1 and C ** (1 - gamma), are not normalised over the batch.
    Arguments and result as for `ttm`.
    """
    return (power_sum(teacher_logits, gamma) * _divergence(student_logits, teacher_logits, gamma)).mean()


def power_sum(logits: Tensor, gamma: float) -> Tensor:
    """`[B]`: sum_i softmax(logits)_i ** gamma."""
    return torch.exp(torch.logsumexp(gamma * logits, dim=1) - gamma * torch.logsumexp(logits, dim=1))


def _divergence(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> Tensor:
    """`[B]`: KL( softmax(gamma z_t) || softmax(z_s) )."""
    log_p_s = F.log_softmax(student_logits, dim=1)
    log_p_t = F.log_softmax(gamma * teacher_logits, dim=1)
    return F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(dim=1)


POWER = "power that the teacher's probabilities are raised to, 1 / temperature"


class TTM(Term):
    """Match the student, untempered, to the teacher's probabilities raised to the power gamma = 1 / T."""

    paper: ClassVar[str] = "Zheng and Yang, ICLR 2024, arXiv:2402.11148"
    example: ClassVar = {"gamma": 0.5}

    term: Literal["ttm"]
    gamma: Positive = Field(description=POWER)

    @property
    def needs(self) -> Needs:
        return Needs(tail_temperature=1 / self.gamma)

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        return ttm(student_logits, logits_of(signal), gamma=self.gamma)


class WTTM(Term):
    """TTM with every sample weighted by its power sum, so that uncertain teachers count more."""

    paper: ClassVar[str] = TTM.paper
    example: ClassVar = {"gamma": 0.5}

    term: Literal["wttm"]
    gamma: Positive = Field(description=POWER)

    @property
    def needs(self) -> Needs:
        return Needs(measured=("wttm_weight_error", "whose weight is wrong by {:.1%} here"))

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        return wttm(student_logits, logits_of(signal), gamma=self.gamma)

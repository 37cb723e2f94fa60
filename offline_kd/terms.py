"""The terms of a recipe's objective, as numbers: what each is worth for a batch, and how much it counts in an epoch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives import dist, dkd, dtkd, kd, nkd, ttm, wttm
from offline_kd.recipe import CE, DIST, DKD, DTKD, KD, NKD, TTM, WTTM, AnyTerm


def term_value(
    term: AnyTerm, student: Tensor, teacher: Tensor | None, labels: Tensor, label_smoothing: float
) -> Tensor:
    """The bare value of one term.

    `ce` is the mean over the samples whose label is known (-1: hidden), 0 if there is none. The terms that use a label
    beside the teacher, `dkd` and `nkd`, take the teacher's first choice where the label is hidden.
    """
    if isinstance(term, CE):
        total = F.cross_entropy(student, labels, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
        return total / (labels >= 0).sum().clamp(min=1)
    assert teacher is not None, "distill() refuses terms without a teacher"
    match term:
        case KD():
            return kd(student, teacher, temperature=term.temperature)
        case TTM():
            return ttm(student, teacher, gamma=term.gamma)
        case WTTM():
            return wttm(student, teacher, gamma=term.gamma)
        case DTKD():
            return dtkd(
                student,
                teacher,
                temperature=term.temperature,
                sharpness=term.sharpness,
                detach_temperatures=term.detach_temperatures,
            )
        case DIST():
            return dist(student, teacher, beta=term.beta, gamma=term.gamma, temperature=term.temperature)
        case DKD():
            chosen = torch.where(labels >= 0, labels, teacher.argmax(dim=1))
            return dkd(student, teacher, chosen, alpha=term.alpha, beta=term.beta, temperature=term.temperature)
        case NKD():
            chosen = torch.where(labels >= 0, labels, teacher.argmax(dim=1))
            return nkd(student, teacher, chosen, gamma=term.gamma, temperature=term.temperature)


def term_weight(term: AnyTerm, epoch: int) -> float:
    """The weight of a term in an epoch counted from 0; warm-up counts from 1, as the published code does."""
    return term.weight * (min((epoch + 1) / term.warmup_epochs, 1.0) if term.warmup_epochs else 1.0)

"""The terms of a recipe's objective, as numbers: what each is worth for a batch, and how much it counts in an epoch."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives import decisions, dist, dkd, dtkd, kd, nkd, subclass_decisions, ttm, wttm
from offline_kd.recipe import CE, DIST, DKD, DTKD, KD, NKD, TTM, WTTM, AnyTerm, Decisions, KDLayerTerm, LogitTerm
from offline_kd.store.decisions import unpack_probs


def term_value(
    term: LogitTerm,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    mixed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The bare value of one term.

    `ce` is the mean over the samples whose label is known (-1: hidden), 0 if there is none. The terms that use a label
    beside the teacher, `dkd` and `nkd`, take the teacher's first choice where the label is hidden.

    Args:
        mixed: labels `[B]` of the images that are mixed in, and the share `[B]` of each image itself. Of a mixture,
            `ce` weighs both labels by their shares; `dkd` and `nkd`, which know one label, take the larger share's.
    """
    if isinstance(term, CE):
        if mixed:
            other, share = mixed
            values = [
                F.cross_entropy(student, one, ignore_index=-1, reduction="none", label_smoothing=label_smoothing)
                for one in (labels, other)
            ]
            return (share * values[0] + (1 - share) * values[1]).sum() / (labels >= 0).sum().clamp(min=1)
        total = F.cross_entropy(student, labels, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
        return total / (labels >= 0).sum().clamp(min=1)
    assert teacher is not None, "distill() refuses terms without a teacher"
    if mixed:
        labels = torch.where(mixed[1] >= 0.5, labels, mixed[0])
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


def kd_layer_value(
    term: KDLayerTerm, scores: Tensor, decided: Mapping[str, Tensor], labels: Tensor, num_classes: int
) -> Tensor:
    """The bare value of a term on the scores `[B, K, H, W]` of its KD layer.

    Args:
        decided: what the store keeps, by the last part of the array's name; for sub-classes with their `table`.
        labels: `[B]`; the sub-classes of samples whose label is hidden (-1) would give it away and are left out.
    """
    if isinstance(term, Decisions):
        ids = decided["id"]
        probs = unpack_probs(decided["prob"]) if "prob" in decided else torch.ones_like(ids, dtype=scores.dtype)
        if term.assignment == "hard":
            ids, probs = ids[..., :1], torch.ones_like(probs[..., :1])
        return decisions(scores, ids, probs)
    known = labels >= 0
    if not known.any():
        return 0 * scores.sum()
    per_class = len(decided["table"]) // num_classes
    ids = labels[known][:, None, None] * per_class + decided["subclass"][known].long()
    return subclass_decisions(scores[known], ids, decided["table"])


def term_weight(term: AnyTerm, epoch: int) -> float:
    """The weight of a term in an epoch counted from 0; warm-up counts from 1, as the published code does."""
    return term.weight * (min((epoch + 1) / term.warmup_epochs, 1.0) if term.warmup_epochs else 1.0)

"""The loss of a recipe's objective: the bare value of each term for a batch, and how much it counts in an epoch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offline_kd.objectives.term import LossBatch, Signal, Term


def bare_values(terms: Sequence[Term], student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
    """`[terms]`: the bare value of every term for a batch.

    Args:
        student_logits: `[B, C]` float32, with gradient.
    """
    return torch.stack([term(student_logits, signal, batch) for term in terms])


def term_weight(term: Term, epoch: int) -> float:
    """The weight of a term in an epoch counted from 0; warm-up counts from 1, as the published code does."""
    return term.weight * (min((epoch + 1) / term.warmup_epochs, 1.0) if term.warmup_epochs else 1.0)

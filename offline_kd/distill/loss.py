"""The loss of a recipe's objective: the bare value of each term for a batch, and how much it counts in an epoch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offline_kd.objectives.term import LossBatch, Signal, Term
from offline_kd.support.ranks import total, world


def bare_values(terms: Sequence[Term], student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
    """`[terms]`: the bare value of every term for a batch.

    Args:
        student_logits: `[B, C]` float32, with gradient.
    """
    return torch.stack([term(student_logits, signal, batch) for term in terms])


def own_parts(terms: Sequence[Term], student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
    """`[terms]`: what this rank's rows contribute to the bare values for the batch of all ranks.

    The parts of all ranks add up to what one process would compute of the whole batch, whatever the ranks' shares of
    it: a mean is weighted by the number of items it was taken of here, and divided by their number on all ranks.
    """
    values = bare_values(terms, student_logits, signal, batch)
    if world() == 1:
        return values
    counts = torch.stack([torch.as_tensor(term.count(batch), device=values.device) for term in terms]).float()
    parts = values * counts / total(counts).clamp(min=1)
    return torch.where(counts > 0, parts, 0)  # a mean over nothing is no number


def term_weight(term: Term, epoch: int) -> float:
    """The weight of a term in an epoch counted from 0; warm-up counts from 1, as the published code does."""
    return term.weight * (min((epoch + 1) / term.warmup_epochs, 1.0) if term.warmup_epochs else 1.0)

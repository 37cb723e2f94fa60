"""The loss of a recipe's objective: the bare value of each term for a batch, and how much it counts in an epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from offline_kd.data.label_sets import are_known, unpack_sets
from offline_kd.objectives.term import Head, LossBatch, Signal, Term
from offline_kd.store.rows import Rows
from offline_kd.support.ranks import total, world


def bare_values(
    terms: Sequence[Term], student_logits: Tensor, signal: Signal, batch: LossBatch, heads: Mapping[int, Head]
) -> Tensor:
    """`[terms]`: the bare value of every term for a batch.

    Args:
        student_logits: `[B, C]` float32, with gradient.
        heads: of the terms that have one, by number of the term.
    """
    known = [replace(batch, head=heads[number]) if number in heads else batch for number in range(len(terms))]
    return torch.stack([term(student_logits, signal, one) for term, one in zip(terms, known, strict=True)])


def loss_batch(batch: Rows, num_classes: int, mixes: bool) -> LossBatch:
    """What terms may know of the labels of a batch; sets are unpacked, and mixed where images are.

    Args:
        mixes: whether views mix images.
    """
    if batch.labels.dim() == 1:
        return LossBatch(batch.labels, (batch.other_labels, batch.share) if mixes else None)
    labels = unpack_sets(batch.labels, num_classes)
    if mixes:
        share = batch.share[:, None]
        labels = share * labels + (1 - share) * unpack_sets(batch.other_labels, num_classes)
    return LossBatch(torch.where(are_known(batch.labels)[:, None], labels, -1.0))


def own_parts(
    terms: Sequence[Term],
    student_logits: Tensor,
    signal: Signal,
    batch: LossBatch,
    items: Tensor | None = None,
    heads: Mapping[int, Head] | None = None,
) -> Tensor:
    """`[terms]`: what these rows contribute to the bare values for the whole batch.

    The parts of all ranks, and of all parts of a batch that pass one after the other, add up to what one process would
    compute of the whole batch, whatever their shares of it: a mean is weighted by the number of items it was taken of
    here, and divided by their number in all.

    Args:
        items: `[terms]`, their numbers in all; None: the rows of all ranks are the whole batch.
        heads: of the terms that have one, by number of the term.
    """
    values = bare_values(terms, student_logits, signal, batch, heads or {})
    if items is None and world() == 1:
        return values
    counts = counts_of(terms, batch)
    parts = values * counts / (total(counts) if items is None else items).clamp(min=1)
    return torch.where(counts > 0, parts, 0)  # a mean over nothing is no number


def counts_of(terms: Sequence[Term], batch: LossBatch) -> Tensor:
    """`[terms]` float32: of how many items of a batch the value of every term is the mean."""
    return torch.stack([_on_device(term.count(batch), batch.labels) for term in terms])


def _on_device(count: Tensor | int, labels: Tensor) -> Tensor:
    """A count beside labels; filled in there, for a number that is copied would be waited for."""
    return count.float() if isinstance(count, Tensor) else labels.new_full((), count).float()


def term_weights(terms: Sequence[Term], epoch: int, epochs: int, device: torch.device) -> Tensor:
    """`[terms]` float32: the weights of all terms in an epoch, counted from 0, of so many: made once for its steps."""
    return torch.tensor([term.weight_in(epoch, epochs) for term in terms], device=device)

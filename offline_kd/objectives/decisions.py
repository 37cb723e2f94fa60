"""Losses of a KD layer's scores against the teacher's decisions (letKD, arXiv:2309.02843 and its supplement)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Signal, Term
from offline_kd.support.errors import StoreMismatch


def decisions(scores: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """Match the template distribution at every location (letKD-1, penultimate map).

        mean over B, H, W of  KL( p || softmax(scores) ),   p the stored probabilities, renormalised

    Args:
        scores: `[B, K, H, W]`, of the KD layer.
        ids: `[B, H, W, m]` integer, the m likeliest templates.
        probs: `[B, H, W, m]`, their probabilities; what is missing to 1 was dropped by the store.

    Returns:
        The loss in nats, a scalar.
    """
    probs = probs.to(scores.dtype)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    # Over the last axis log-softmax is one fused pass; KD layers give channels-last maps, so this copies nothing.
    log_q = F.log_softmax(scores.permute(0, 2, 3, 1), dim=-1).gather(-1, ids.long())
    return (torch.special.xlogy(probs, probs) - probs * log_q).sum(dim=-1).mean()


def subclass_decisions(scores: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Match the confusion profile of the sub-class at every location (letKD-2, intermediate map).

        mean over B, H, W of  KL( table[id] || softmax(scores) )

    Args:
        scores: `[B, S, H, W]`, of the KD layer.
        ids: `[B, H, W]` integer, sub-class of the location, below S.
        table: `[S, S]`; row i says as which sub-classes locations of sub-class i are seen. Rows sum to 1.

    Returns:
        The loss in nats, a scalar.
    """
    return _subclass_divergence(scores, ids, table).mean()


def _subclass_divergence(scores: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """`[B, H, W]`: KL( table[id] || softmax(scores) )."""
    log_q = F.log_softmax(scores, dim=1).permute(0, 2, 3, 1)
    target = table.to(scores.dtype)[ids.long()]  # [B, H, W, S]
    return (torch.special.xlogy(target, target) - target * log_q).sum(dim=-1)


class KDLayerTerm(Term):
    """A term on the scores of a KD layer, which it puts into the student."""

    paper: ClassVar[str] = "Adagorgun et al. 2023, arXiv:2309.02843"
    kind: ClassVar[str]  # of the decisions in capture.decisions that it is about

    term: str
    decisions: str = Field(description="name in capture.decisions")
    after: str = Field(description="module of the student behind which the KD layer stands")
    value_ratio: float = Field(1.0, description="weight of what the KD layer adds to the map; 0 leaves it as it is")

    @property
    def needs(self) -> Needs:
        return Needs(logits=False, decisions=True, label="one" if self.kind == "subclasses" else "either")

    def scores(self, batch: LossBatch, places: Sequence[int]) -> Tensor:
        """`[B, K, H, W]` of the KD layer; raises StoreMismatch when the decisions were made on another grid."""
        scores = batch.scores[self.after]
        if list(scores.shape[2:]) != list(places):
            raise StoreMismatch(
                f"decisions '{self.decisions}' were made on a grid of {list(places)}, the student's map behind "
                f"'{self.after}' is {list(scores.shape[2:])}. Capture them with `grid: {list(scores.shape[2:])}`."
            )
        return scores


class Decisions(KDLayerTerm):
    """letKD-1: a KD layer in the student, supervised by the teacher's template decisions."""

    kind: ClassVar[str] = "templates"
    example: ClassVar = {"decisions": "last"}

    term: Literal["decisions"]
    after: str = Field("penultimate", description="module of the student behind which the KD layer stands")
    assignment: Literal["soft", "hard"] = Field("soft", description="hard: the likeliest template only")

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """As `decisions` says. Teacher's arrays: `id` `[B, H, W, m]`, and `prob` of the same shape unless m is 1."""
        decided = signal.decisions[self.decisions]
        ids = decided["id"]
        scores = self.scores(batch, ids.shape[1:3])
        probs = decided["prob"] if "prob" in decided else torch.ones_like(ids, dtype=scores.dtype)
        if self.assignment == "hard":
            ids, probs = ids[..., :1], torch.ones_like(probs[..., :1])
        return decisions(scores, ids, probs)


class SubclassTerm(KDLayerTerm):
    """letKD-2: a KD layer in the student, supervised by the teacher's sub-class decisions."""

    kind: ClassVar[str] = "subclasses"
    example: ClassVar = {"decisions": "first", "after": "layer3"}

    term: Literal["subclass_decisions"]

    def count(self, batch: LossBatch) -> Tensor | int:
        return (batch.labels >= 0).sum()

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """As `subclass_decisions` says. Teacher's arrays: `subclass` `[B, H, W]` below s, and `table` `[C s, C s]`.

        The sub-classes of samples whose label is hidden (-1) would give it away and are left out.
        """
        decided = signal.decisions[self.decisions]
        scores = self.scores(batch, decided["subclass"].shape[1:3])
        known = (batch.labels >= 0)[:, None, None]
        per_class = len(decided["table"]) // student_logits.shape[1]
        # Left out by what they count, not by choosing rows: how many there are would have to be waited for.
        ids = torch.where(known, batch.labels[:, None, None] * per_class + decided["subclass"].long(), 0)
        divergence = torch.where(known, _subclass_divergence(scores, ids, decided["table"]), 0)
        places = scores.shape[2] * scores.shape[3]
        return divergence.sum() / (known.sum() * places).clamp(min=1)

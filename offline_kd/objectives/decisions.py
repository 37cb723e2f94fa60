"""Losses of a KD layer's scores against the teacher's decisions (letKD, arXiv:2309.02843 and its supplement)."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    log_q = F.log_softmax(scores, dim=1).permute(0, 2, 3, 1)
    target = table.to(scores.dtype)[ids.long()]  # [B, H, W, S]
    return (torch.special.xlogy(target, target) - target * log_q).sum(dim=-1).mean()

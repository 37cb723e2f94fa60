"""Which classes whole logits make the likeliest, and in which steps these are made finer.

A class of probability 1 has the first of the steps, and every `width` of logarithm below that has the next one.
Logarithms are taken in eighths and by tables of whole numbers, which depend on no machine: encoder and decoder must
agree. On a CPU compiled loops do this, several times as fast as torch, which does it elsewhere; the result is the same.
"""

import numpy as np
import torch
from torch import Tensor

from offline_kd.support.constants import constant

E_EIGHTH = 1.1331484530668263  # e**(1/8)
# 2**16 e**-(i / 8), and the sums of these from which on a logarithm is nearer to (j + 1) / 8 than to j / 8.
EXP = tuple(round(2**16 * E_EIGHTH**-i) for i in range(100))
LOG = tuple(round(2**16 * E_EIGHTH ** (j + 0.5)) for j in range(45))
MOST_WHOLE = 2**24  # sums of undamaged numbers are smaller; others need not fit into 32 bits


def likeliest(
    whole: Tensor, count: int, eighth: int, width: int, steps: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the `count` largest of whole numbers `[n, C]`: which classes, their steps, and whether these are fine.

    Of equal ones the first comes first. A class that is too far below for any step is not fine, and has the last one.

    Args:
        eighth: an eighth of a logit, in the unit of `whole`.
        width: what lies between two steps, in the same unit.

    Returns:
        `[n, count]` each: int64, float32 and bool.
    """
    if whole.device.type != "cpu":
        return likeliest_by_torch(whole, count, eighth, width, steps)
    from offline_kd.store.codecs.logit_loops import likeliest_rows  # the compiler takes a second to import

    rows = whole.contiguous().numpy()
    sizes = np.array(steps, dtype=np.float32)
    found = likeliest_rows(rows, MOST_WHOLE, count, (eighth, width), np.array(EXP), np.array(LOG), sizes)
    classes, step, is_fine = (torch.from_numpy(one) for one in found)
    return classes, step, is_fine


def likeliest_by_torch(
    whole: Tensor, count: int, eighth: int, width: int, steps: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """`likeliest`, on any device and without waiting for it."""
    num_classes = whole.shape[1]
    whole = whole.clamp(-MOST_WHOLE, MOST_WHOLE)
    unique = whole.long() * num_classes + torch.arange(num_classes - 1, -1, -1, device=whole.device)
    found = unique.topk(count, dim=1)
    largest = torch.div(found.values, num_classes, rounding_mode="floor")
    below = (largest[:, :1] - largest).int()
    shares = torch.div(below, eighth, rounding_mode="floor").clamp_(max=len(EXP) - 1)
    total = constant(EXP, below)[shares].sum(dim=1)
    below += eighth * torch.bucketize(total, constant(LOG, below), out_int32=True)[:, None]
    step = torch.div(below, width, rounding_mode="floor")
    return found.indices, constant(steps, whole)[step.clamp(max=len(steps) - 1)], step < len(steps)

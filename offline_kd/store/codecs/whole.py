"""Logits as whole numbers, and logits of these: on a CPU by compiled loops, elsewhere by torch; the same result."""

import numpy as np
from torch import Tensor

from offline_kd.store.codecs.klt import whole_logits

FEW = 0.15  # of the numbers of a row: of more, a product of matrices is the faster way
LOOKED_AT = 8  # images


def whole_of_views(numbers: Tensor, axes: Tensor, mean: Tensor) -> Tensor:
    """`whole_logits`, `[..., C]`, of numbers `[n, v, k]` of v views of every image, or of `[n, k]`.

    Args:
        axes, mean: `[k, C]` and `[C]` float32.
    """
    if numbers.device.type != "cpu" or not _differ_in_few(numbers):
        return whole_by_torch(numbers, axes, mean)
    from offline_kd.store.codecs.logit_loops import add_differences  # the compiler takes a second to import

    whole = axes.new_empty(*numbers.shape[:2], axes.shape[1])
    whole[:, 0] = whole_logits(numbers[:, 0], axes, mean)
    add_differences(numbers.contiguous().numpy(), axes.contiguous().numpy(), whole.numpy())
    return whole


def whole_by_torch(numbers: Tensor, axes: Tensor, mean: Tensor) -> Tensor:
    """`whole_of_views`, on any device and without waiting for it."""
    return whole_logits(numbers.flatten(0, -2), axes, mean).view(*numbers.shape[:-1], axes.shape[1])


def _differ_in_few(numbers: Tensor) -> bool:
    """Whether views of an image, by the first images, differ in few numbers."""
    if numbers.ndim < 3 or numbers.shape[1] < 2 or not len(numbers):
        return False
    some = numbers[:LOOKED_AT]
    return (some[:, 1:] != some[:, :1]).float().mean().item() < FEW


def refined(whole: Tensor, unit: float, classes: Tensor, differences: Tensor, steps: Tensor) -> Tensor:
    """Logits `[n, C]`, in place of `whole`, which are in `unit`: `classes` `[n, m]` have `differences` `steps` more."""
    if whole.device.type != "cpu":
        return refined_by_torch(whole, unit, classes, differences, steps)
    from offline_kd.store.codecs.logit_loops import add_refinement

    add_refinement(whole.numpy(), np.float32(unit), classes.numpy(), differences.contiguous().numpy(), steps.numpy())
    return whole


def refined_by_torch(whole: Tensor, unit: float, classes: Tensor, differences: Tensor, steps: Tensor) -> Tensor:
    """`refined`, on any device and without waiting for it."""
    return whole.mul_(unit).scatter_add_(1, classes, differences.float() * steps)

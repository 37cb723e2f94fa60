"""What becomes of an objective's gradient when the teacher's logits are not quite right, as after a codec."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offline_kd.objectives.term import LossBatch, Term


@dataclass(frozen=True)
class _Logits:
    """A teacher that says nothing but these."""

    logits: Tensor
    decisions: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)


def example_student(teacher: Tensor) -> Tensor:
    """`[B, C]` of a student that has learned something: the teacher's answers `[B, C]`, half of them for the row
    before, and noise.
    """
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0))
    return 0.5 * teacher.roll(1, dims=0) + 0.5 * teacher + noise


def gradient(term: Term, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """`[B, C]`: of a term that looks at the teacher's logits `[B, C]`, on the student's `[B, C]`; labels `[B]`."""
    with torch.enable_grad():
        leaf = student.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(term(leaf, _Logits(teacher), LossBatch(labels)), leaf)
    return found


def relative_change(found: Tensor, true: Tensor) -> float:
    """Length of the difference over the length of the true gradient, over all rows together."""
    return ((found - true).norm() / true.norm()).item()

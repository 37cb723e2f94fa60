"""Information-theoretic representation distillation (ITRD): Miles et al., BMVC 2022, arXiv:2112.00459."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from offline_kd.objectives.features import FeatureTerm, Projection, unit
from offline_kd.objectives.term import DatasetRows, Head, LossBatch, Signal


def itrd(
    student: Tensor,
    teacher: Tensor,
    embedded: Tensor,
    *,
    alpha: float,
    correlation_weight: float,
    information_weight: float,
) -> Tensor:
    """Correlate every channel with the teacher's, and order the images of a batch as the teacher does.

        correlation_weight itrd_correlation(embedded, teacher)  +  information_weight itrd_information(x, teacher)

    x is `student` itself where it is as wide as the teacher, and `embedded` where it is not, as in the published code.

    Args:
        student: `[B, D_s]`, float32 or float64.
        teacher: `[B, D_t]`, constant.
        embedded: `[B, D_t]`, a trained linear map of `student`.

    Returns:
        The loss, a scalar without unit; negative values are normal.
    """
    x = student if student.shape[1] == teacher.shape[1] else embedded
    correlation = itrd_correlation(embedded, teacher, alpha=alpha)
    return correlation_weight * correlation + information_weight * itrd_information(x, teacher)


def itrd_correlation(embedded: Tensor, teacher: Tensor, *, alpha: float) -> Tensor:
    """Correlation of each channel over the batch, against the same channel of the teacher.

        log2 sum over channels of |r - 1| ** (2 alpha),   r = sum over the batch of e t / B

    e and t are standardised with the deviation over B - 1, and r is divided by B, as in the published code: so r is
    (B - 1) / B at most, and the value log2(D) - 2 alpha log2(B) at least. Channels that are constant over the batch, in
    either, have no correlation and are left out (`itrd_dropped` counts them); the value is 0 where none is left, as for
    a single row.

    Args:
        embedded: `[B, D]`, float32 or float64.
        teacher: `[B, D]`, constant.
        alpha: at least 1/2, for a finite gradient where a channel agrees.

    Returns:
        A scalar, in bits.
    """
    if len(embedded) < 2:
        return embedded.sum() * 0
    counted = _varies(embedded) & _varies(teacher)
    e, t = _standardised(embedded, counted), _standardised(teacher, counted)
    distance = ((e * t).sum(dim=0) / len(e) - 1).abs() ** (2 * alpha)
    total = torch.where(counted, distance, 0).sum()
    return torch.where(counted.any(), total, 1).log2()


def itrd_dropped(embedded: Tensor, teacher: Tensor) -> Tensor:
    """`[]` int64: how many channels `itrd_correlation` leaves out, since they are constant. Arguments as there."""
    return (~(_varies(embedded) & _varies(teacher))).sum()


def itrd_information(student: Tensor, teacher: Tensor) -> Tensor:
    """How much of the student's similarities between images the teacher's do not explain (Renyi's entropy of order 2).

        sum (S / tr S)**2 - sum (H / tr H)**2,   S = x x^T,  H = S * t t^T elementwise,  x and t of length 1

    Between 0 and 1; 0 for a single row, and where the teacher finds all images of a batch alike.

    Args:
        student: `[B, D_s]`, float32 or float64.
        teacher: `[B, D_t]`, constant; of another width, if wanted.

    Returns:
        A scalar.
    """
    x, t = unit(student), unit(teacher)
    similar = x @ x.T
    joint = similar * (t @ t.T)
    return _concentration(similar) - _concentration(joint)


def _varies(x: Tensor) -> Tensor:
    """`[D]` bool: which channels of `[B, D]` are not constant."""
    # The deviation of a constant channel may be some rounding, which would be divided by; and that of one that varies
    # little may vanish when it is squared.
    return (x.amax(dim=0) > x.amin(dim=0)) & (x.detach().var(dim=0) > 0)


def _standardised(x: Tensor, counted: Tensor) -> Tensor:
    """`[B, D]`: less its mean, over its deviation; 0 in channels that are not `counted` `[D]`."""
    variance = torch.where(counted, x.var(dim=0), 1)  # before the root, whose gradient at 0 is infinite
    return torch.where(counted, x - x.mean(dim=0), 0) / variance.sqrt()


def _concentration(matrix: Tensor) -> Tensor:
    trace = matrix.diagonal().sum()
    return (matrix / torch.where(trace > 0, trace, 1)).square().sum()


class CountingProjection(Projection):
    """A projection that counts the channels that are left out of the correlation, over the steps of a pass."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__(student_width, teacher_width)
        self.dropped: Tensor
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64))

    def counts(self) -> dict[str, int]:
        found = {"itrd_dropped": int(self.dropped)}
        self.dropped.zero_()
        return found


class ITRD(FeatureTerm):
    """Correlate features with the teacher's, and find the same images similar."""

    paper: ClassVar[str] = "Miles et al., BMVC 2022, arXiv:2112.00459"
    example: ClassVar = {"features": "penultimate"}

    term: Literal["itrd"]
    alpha: float = Field(1.5, ge=0.5, description="half of the exponent of what a channel's correlation lacks to 1")
    correlation_weight: float = Field(2.0, ge=0, description="how much the correlation of channels counts")
    information_weight: float = Field(1.0, ge=0, description="how much the similarities between images count")

    def head(self, student_width: int, teacher_width: int, rows: Callable[[], DatasetRows]) -> Head | None:
        return CountingProjection(student_width, teacher_width)

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        """As `itrd` says, over the batch of all ranks."""
        student, teacher = self.vectors(signal, batch)
        assert isinstance(batch.head, CountingProjection), "the term was given no head of its own"
        embedded: Tensor = batch.head(student)
        batch.head.dropped += itrd_dropped(embedded.detach(), teacher)
        return itrd(
            student,
            teacher,
            embedded,
            alpha=self.alpha,
            correlation_weight=self.correlation_weight,
            information_weight=self.information_weight,
        )

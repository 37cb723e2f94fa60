"""Distillation from a stronger teacher (DIST): Huang et al., NeurIPS 2022, arXiv:2205.10536."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Positive, Signal, Term, logits_of
from offline_kd.support.ranks import whole_batch

EPS = 1e-8  # added to the product of norms, as in the published code


def dist(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, gamma: float, temperature: float) -> Tensor:
    """Match correlations instead of values: over the classes of each sample, and over the batch for each class.

        T**2 [ beta (1 - mean_b corr(q_b, p_b)) + gamma (1 - mean_c corr(q_:c, p_:c)) ],   p, q = softmax(z / T)

    Equations 8 to 10 of the paper. The second part mixes samples, so the value depends on the batch's composition;
    with a batch of one it is the constant gamma T**2. At equal logits the value is about 1e-4, not 0, because of the
    published epsilon.

    Args:
        student_logits: `[B, C]`, float32 or float64.
        teacher_logits: `[B, C]`, constant.

    Returns:
        The loss, a scalar without unit.
    """
    q, p = (student_logits / temperature).softmax(dim=1), (teacher_logits / temperature).softmax(dim=1)
    between_classes = 1 - _correlation(q, p).mean()
    between_samples = 1 - _correlation(q.T, p.T).mean()
    return temperature**2 * (beta * between_classes + gamma * between_samples)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each row of `a` with that row of `b`."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + EPS)


class DIST(Term):
    """Match correlations instead of values, over the classes of a sample and over the batch for a class."""

    paper: ClassVar[str] = "Huang et al., NeurIPS 2022, arXiv:2205.10536"
    example: ClassVar = {"beta": 1.0, "gamma": 1.0, "temperature": 4.0}

    term: Literal["dist"]
    beta: float = Field(ge=0, description="how much correlation over the classes of a sample counts")
    gamma: float = Field(ge=0, description="how much correlation over the samples of a class counts")
    temperature: Positive = Field(description="of both softmaxes; the value is times its square")

    @property
    def needs(self) -> Needs:
        return Needs()

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        student, teacher = whole_batch(student_logits), whole_batch(logits_of(signal))
        return dist(student, teacher, beta=self.beta, gamma=self.gamma, temperature=self.temperature)

    def count(self, batch: LossBatch) -> Tensor | int:
        return 1

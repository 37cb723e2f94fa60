"""Dynamic temperature knowledge distillation (DTKD): Wei and Bai 2024, arXiv:2404.12711."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from offline_kd.objectives.needs import Needs
from offline_kd.objectives.term import LossBatch, Positive, Signal, Term, logits_of

Sharpness = Literal["max", "logsumexp"]


def dtkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    sharpness: Sharpness = "max",
    detach_temperatures: bool = False,
) -> Tensor:
    """KD in which each sample shares out 2 * `temperature` so that teacher and student become equally sharp.

        mean over the batch of  T_t T_s KL( softmax(z_t / T_t) || softmax(z_s / T_s) )
        T_t = 2 x / (x + v) * temperature,  T_s = 2 v / (x + v) * temperature,  x = max z_t,  v = max z_s

    This is the authors' code. Their paper derives it from equal log-sum-exp sharpness, and their own erratum
    withdraws that derivation; `sharpness="logsumexp"` solves the stated condition instead.

    The temperatures carry gradient into the student's maximum; detaching them is a different method. Raw logits are
    needed: adding a constant to a row changes the result. Where the two maxima differ in sign, or one is 0, the
    authors' loss is negative or undefined; those samples fall back to plain KD (`dtkd_fallbacks` counts them).

    Args:
        student_logits: `[B, C]`, float32 or float64.
        teacher_logits: `[B, C]`, raw, constant.
        temperature: the reference temperature, 4 in the paper.

    Returns:
        The loss in nats, a scalar.
    """
    t_teacher, t_student = dtkd_temperatures(
        student_logits.detach() if detach_temperatures else student_logits,
        teacher_logits,
        temperature=temperature,
        sharpness=sharpness,
    )
    log_p_s = F.log_softmax(student_logits / t_student, dim=1)
    log_p_t = F.log_softmax(teacher_logits / t_teacher, dim=1)
    divergence = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(dim=1, keepdim=True)
    return (t_teacher * t_student * divergence).mean()


def dtkd_temperatures(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, sharpness: Sharpness = "max"
) -> tuple[Tensor, Tensor]:
    """`[B, 1]` teacher and student temperatures, which add up to 2 * `temperature`."""
    if sharpness == "logsumexp":
        return _equal_logsumexp(student_logits, teacher_logits, temperature)
    x = teacher_logits.amax(dim=1, keepdim=True)
    # max, not amax: where several entries tie, the authors' gradient goes to one of them.
    v = student_logits.max(dim=1, keepdim=True).values
    usable = _same_sign(x, v)
    # Replace the inputs of the division, not its result, or NaN leaks through the gradient of `where`.
    x, v = torch.where(usable, x, 1.0), torch.where(usable, v, 1.0)
    return 2 * x / (x + v) * temperature, 2 * v / (x + v) * temperature


def dtkd_fallbacks(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How many rows fall back to plain KD, a scalar integer tensor on the logits' device."""
    return (~_same_sign(teacher_logits.amax(dim=1), student_logits.amax(dim=1))).sum()


def _same_sign(x: Tensor, v: Tensor) -> Tensor:
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    return (x * v > 0) & (x.abs() > tiny) & (v.abs() > tiny)


def _equal_logsumexp(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Temperatures T_t = temperature + d, T_s = temperature - d at which log-sum-exp of both tempered rows agree.

    Rows are centred on their mean first, which makes log-sum-exp fall monotonically with the temperature; 60
    bisections of d in (-temperature, temperature) then find it to rounding. The result carries no gradient.
    """
    with torch.no_grad():
        z_s = student_logits - student_logits.mean(dim=1, keepdim=True)
        z_t = teacher_logits - teacher_logits.mean(dim=1, keepdim=True)
        low = torch.full_like(z_t[:, :1], -0.999 * temperature)
        high = -low
        for _ in range(60):
            middle = (low + high) / 2
            teacher_sharper = torch.logsumexp(z_t / (temperature + middle), 1, keepdim=True) > torch.logsumexp(
                z_s / (temperature - middle), 1, keepdim=True
            )
            low, high = torch.where(teacher_sharper, middle, low), torch.where(teacher_sharper, high, middle)
        shift = (low + high) / 2
        return temperature + shift, temperature - shift


class DTKD(Term):
    """KD in which each sample shares out the temperature so that teacher and student are equally sharp."""

    paper: ClassVar[str] = "Wei and Bai 2024, arXiv:2404.12711"
    example: ClassVar = {"temperature": 4.0}

    term: Literal["dtkd"]
    temperature: Positive = Field(description="the middle of the teacher's and the student's")
    sharpness: Sharpness = Field("max", description="what is made equal: max as the authors' code, or logsumexp")
    detach_temperatures: bool = Field(False, description="no gradient through the temperatures: another method")

    @property
    def needs(self) -> Needs:
        return Needs(offset=True, measured=("dtkd_temperature_error", "whose temperature is wrong by {:.1%} here"))

    def __call__(self, student_logits: Tensor, signal: Signal, batch: LossBatch) -> Tensor:
        return dtkd(
            student_logits,
            logits_of(signal),
            temperature=self.temperature,
            sharpness=self.sharpness,
            detach_temperatures=self.detach_temperatures,
        )

    def fallbacks(self, student_logits: Tensor, signal: Signal) -> Tensor | int:
        # A temperature that solves for equal log-sum-exp exists for every pair of rows.
        return dtkd_fallbacks(student_logits, logits_of(signal)) if self.sharpness == "max" else 0

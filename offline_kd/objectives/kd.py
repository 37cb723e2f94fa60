"""Hinton's knowledge distillation."""

from torch import Tensor
from torch.nn import functional as F


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Match the tempered student to the tempered teacher.

        T**2 * mean over the batch of  KL( softmax(z_t / T) || softmax(z_s / T) )

    Hinton et al. 2015, arXiv:1503.02531, section 2. Unchanged when a constant is added to a row of logits.

    Args:
        student_logits: `[B, C]`, float32 or float64.
        teacher_logits: `[B, C]`, constant.

    Returns:
        The loss in nats, a scalar; 0 at equal logits.
    """
    log_p_s = F.log_softmax(student_logits / temperature, dim=1)
    log_p_t = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)

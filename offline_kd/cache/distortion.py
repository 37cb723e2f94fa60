"""How far decoded logits are from the teacher's, as objectives would notice: through a softmax, or through sigmoids."""

from typing import TypedDict

import torch
from torch import Tensor

from offline_kd.objectives import kd, power_sum

TEMPERATURES = (1, 2, 4)
GAMMAS = (0.25, 0.5, 0.8)

Means = dict[tuple[str, str], float]  # by field of `Fidelity`, and the key in it where it has several


def sigmoid_errors(z_t: Tensor, z: Tensor) -> dict[int, Tensor]:
    """`[n, C]` by temperature: how far the probability of every class is from a multi-label teacher's."""
    return {t: ((z / t).sigmoid() - (z_t / t).sigmoid()).abs() for t in TEMPERATURES}


class Distortion(TypedDict):
    """Fields of `Fidelity`: how far decoded logits are from the teacher's, as the objectives would notice."""

    top1_agreement: float
    kl: dict[str, float]
    total_variation: dict[str, float]
    wttm_weight_error: float
    dtkd_temperature_error: float


def distortion(z_t: Tensor, z: Tensor) -> Distortion:
    """How far decoded logits `[n, C]` are from the teacher's."""
    return distortion_of(means_of(z_t, z))


def means_of(z_t: Tensor, z: Tensor) -> Means:
    """Over rows."""

    def dtkd_temperature(x: Tensor) -> Tensor:
        """Of the teacher, beside a student that is as sharp as the teacher really is."""
        v = z_t.amax(1)
        return torch.where((x * v) > 0, 2 * x / (x + v), 2.0)

    return {
        ("top1_agreement", ""): (z.argmax(1) == z_t.argmax(1)).float().mean().item(),
        **{("kl", f"{t}"): kd(z, z_t, temperature=t).clamp(min=0).item() / t**2 for t in TEMPERATURES},
        **{
            ("total_variation", f"{t}"): ((z / t).softmax(1) - (z_t / t).softmax(1)).abs().sum(1).mean().item() / 2
            for t in TEMPERATURES
        },
        **{
            ("wttm_weight_error", f"{gamma}"): (power_sum(z, gamma) / power_sum(z_t, gamma) - 1).abs().mean().item()
            for gamma in GAMMAS
        },
        ("dtkd_temperature_error", ""): (dtkd_temperature(z.amax(1)) - 1).abs().mean().item(),
    }


def distortion_of(means: Means) -> Distortion:
    """The figures, of means over all rows as `means_of` gives them."""

    def of(field_name: str) -> dict[str, float]:
        return {key: mean for (name, key), mean in means.items() if name == field_name}

    return {
        "top1_agreement": means["top1_agreement", ""],
        "kl": of("kl"),
        "total_variation": of("total_variation"),
        "wttm_weight_error": max(of("wttm_weight_error").values()),
        "dtkd_temperature_error": means["dtkd_temperature_error", ""],
    }

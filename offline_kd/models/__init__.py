"""Networks: by name, with weights, with feature maps read (taps) or scored (KD layers); the teacher; accuracy.

In: a network's name or an `nn.Module`, uint8 images `[B, 3, H, W]`. Out: logits `[B, C]` and feature maps
`[B, D, H, W]`, float32. Begin with `networks.py`.
"""

from typing import TYPE_CHECKING

from offline_kd.support.lazy import lazy

if TYPE_CHECKING:
    from offline_kd.models.evaluation import Evaluation, evaluate
    from offline_kd.models.networks import build, normalise, parameter_count
    from offline_kd.models.taps import TapPoint, tapped
    from offline_kd.models.teacher import Teacher
    from offline_kd.models.weights import find_weights, load_weights
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Evaluation": "offline_kd.models.evaluation",
            "TapPoint": "offline_kd.models.taps",
            "Teacher": "offline_kd.models.teacher",
            "build": "offline_kd.models.networks",
            "evaluate": "offline_kd.models.evaluation",
            "find_weights": "offline_kd.models.weights",
            "load_weights": "offline_kd.models.weights",
            "normalise": "offline_kd.models.networks",
            "parameter_count": "offline_kd.models.networks",
            "tapped": "offline_kd.models.taps",
        },
    )

__all__ = [
    "Evaluation",
    "TapPoint",
    "Teacher",
    "build",
    "evaluate",
    "find_weights",
    "load_weights",
    "normalise",
    "parameter_count",
    "tapped",
]

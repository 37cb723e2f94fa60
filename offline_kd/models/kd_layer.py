"""The KD layer of letKD (Adagorgun et al., arXiv:2309.02843), put into any student by name.

The layer compares each location of a feature map with K learned templates, which are what the teacher's decisions
supervise, and adds a value made from these scores to the map. It stays in the student at inference.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offline_kd.models.taps import feature_maps
from offline_kd.support.errors import ModelError, did_you_mean

PENULTIMATE = "penultimate"


class CosineConv2d(nn.Module):
    """1x1 convolution of unit vectors: `scale * cos(angle between input and weight row)` at every location.

    `weight` is `[out, in]`; no bias. `[B, in, H, W]` -> `[B, out, H, W]`, within [-|scale|, |scale|].
    """

    def __init__(self, in_channels: int, out_channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels) * math.sqrt(2 / in_channels))
        self.scale = nn.Parameter(torch.tensor([scale]))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=1, eps=1e-12)
        return self.scale * F.conv2d(F.normalize(x, dim=1, eps=1e-12), weight[:, :, None, None])


class KDLayer(nn.Module):
    """Scores against templates, and the map with the value of these scores added.

        scores = s1 cos(f, templates)    value = s2 cos(ReLU(BN(scores)), values)    features = f + value_ratio value

    Args:
        in_channels: D, channels of the student's map.
        num_templates: K.
        value_ratio: weight of the value; 0 leaves the map as it is.
    """

    def __init__(self, in_channels: int, num_templates: int, *, value_ratio: float = 1.0) -> None:
        super().__init__()
        self.value_ratio = value_ratio
        self.templates = CosineConv2d(in_channels, num_templates, scale=3.0)
        self.norm = nn.BatchNorm2d(num_templates)
        self.values = CosineConv2d(num_templates, in_channels, scale=1.0)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, D, H, W]` -> the map that goes on `[B, D, H, W]`, and scores `[B, K, H, W]` for the decisions' loss."""
        scores: Tensor = self.templates(features)
        value = self.values(F.relu(self.norm(scores)))
        return features + self.value_ratio * value, scores


class WithKDLayer(nn.Module):
    """A module of a student followed by a KD layer; stands in its place. `scores`: of the last training pass."""

    def __init__(self, module: nn.Module, kd_layer: KDLayer) -> None:
        super().__init__()
        self.module, self.kd_layer = module, kd_layer
        self.scores: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        features, scores = self.kd_layer(self.module(x))
        if self.training:  # at inference the student is a plain function, which can be exported
            self.scores = scores
        return features


def insert_kd_layer(
    student: nn.Module, after: str, num_templates: int, *, value_ratio: float, example: Tensor
) -> tuple[WithKDLayer, tuple[int, int]]:
    """Put a KD layer behind the module `after` of `student`, whose own code and other weights stay as they are.

    Args:
        after: a module's name, or `penultimate`: the last module that gives a map, before pooling.
        example: one input `[1, 3, H, W]`, to find out the map's channels and size.

    Returns:
        What now stands in the module's place, and the map's height and width.

    Raises:
        ModelError: no such module, or one whose output is not a map.
    """
    name = find_map(student, after, example)
    _, channels, height, width = feature_maps(student, example)[name]
    layer = WithKDLayer(student.get_submodule(name), KDLayer(channels, num_templates, value_ratio=value_ratio))
    layer.to(example.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    student.set_submodule(name, layer.train(student.training))
    return layer, (height, width)


def find_map(student: nn.Module, after: str, example: Tensor) -> str:
    """Name of the module that `after` means; raises ModelError when there is none, or its output is not a map."""
    if after == PENULTIMATE:
        return penultimate(student, example)
    maps = feature_maps(student, example)
    if after not in maps:
        raise ModelError(f"no module '{after}' of the student gives a feature map.{did_you_mean(after, maps)}")
    return after


def penultimate(model: nn.Module, example: Tensor) -> str:
    """Name of the last module to give a `[B, D, H, W]` map: the one before global pooling.

    Of a module and the container that ends with it, the container. Maps of one location count only if all are.
    """
    maps = feature_maps(model, example)
    several = {name: shape for name, shape in maps.items() if shape[2] * shape[3] > 1} or maps
    if not several:
        raise ModelError("the student has no feature map: no module gives a [B, D, H, W] output.")
    return list(several)[-1]

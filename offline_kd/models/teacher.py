"""The frozen network that stage 1 asks: found, checked, gated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offline_kd.data.manifest import EvaluationCrop, ExpectedAccuracy, Normalisation
from offline_kd.models.networks import normalise
from offline_kd.models.taps import TapPoint, tapped
from offline_kd.support.errors import ModelError


@dataclass(frozen=True)
class Teacher:
    name: str
    model: str
    model_args: dict[str, int | float | str | bool]
    weights_sha256: str
    normalisation: Normalisation
    crop: EvaluationCrop | None  # where images have different sizes: its `size` is that of views, too
    dtype: str
    expected: ExpectedAccuracy | None
    licence: str
    network: nn.Module
    batch_size: int

    @torch.no_grad()  # not inference_mode: DTKD keeps what it needs of these logits for its backward pass
    def logits(self, images: Tensor) -> Tensor:
        """`[B, C]` float32 raw logits of `[B, 3, H, W]` uint8 images."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = self.network(normalise(images, self.normalisation))
        return logits.float()

    def logits_and_maps(self, images: Tensor, points: Sequence[TapPoint]) -> tuple[Tensor, list[Tensor]]:
        """The same, and the maps `[B, D, H, W]` float32 of the taps. Raises ModelError for a tap that never ran."""
        with tapped(self.network, points) as maps:
            logits = self.logits(images)
        for point, features in zip(points, maps, strict=True):
            if features is None:
                raise ModelError(f"tap '{point.module}': the network never runs this module.")
        return logits, [features for features in maps if features is not None]

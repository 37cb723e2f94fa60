"""VGG with batch normalisation for 32x32 images, with the widths of the distillation benchmarks."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _block(in_channels: int, widths: list[int]) -> nn.Sequential:
    """Convolutions with BN and ReLU; the last ReLU is left to the network."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        in_channels = width
    return nn.Sequential(*layers[:-1])


class CifarVGG(nn.Module):
    """Five blocks, max-pooling after the first three: maps of 32, 16, 8, 4 and 4 pixels."""

    def __init__(self, widths: list[list[int]], num_classes: int) -> None:
        super().__init__()
        in_channels = 3
        for index, block in enumerate(widths):
            self.add_module(f"block{index}", _block(in_channels, block))
            self.add_module(f"relu{index}", nn.ReLU())
            in_channels = block[-1]
        self.classifier = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(5):
            x = self.get_submodule(f"relu{index}")(self.get_submodule(f"block{index}")(x))
            if index < 3:
                x = F.max_pool2d(x, 2)
        logits: Tensor = self.classifier(torch.mean(x, dim=(2, 3)))
        return logits

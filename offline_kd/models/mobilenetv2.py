"""MobileNetV2 for 32x32 images (Sandler et al. 2018, arXiv:1801.04381), as the distillation benchmarks use it.

Departures from the paper that published checkpoints share: stride 1 where ImageNet's second stage has 2, plain ReLU,
and an expansion layer in every block.
"""

import math

from torch import Tensor, nn

# expansion (None: the network's), channels at width 1, blocks, stride of the first
STAGES = [
    (1, 16, 1, 1),
    (None, 24, 2, 1),
    (None, 32, 3, 2),
    (None, 64, 4, 2),
    (None, 96, 3, 1),
    (None, 160, 3, 2),
]
STAGES += [(None, 320, 1, 1)]


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """`[B, 3, 32, 32]` -> `[B, num_classes]`; the last map is `[B, 1280, 2, 2]`."""

    def __init__(self, num_classes: int, width: float = 0.5, expansion: int = 6) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = _conv(3, channels, 3, stride=2)
        stages = []
        for stage_expansion, full_width, num_blocks, stride in STAGES:
            blocks = []
            for index in range(num_blocks):
                out_channels = int(full_width * width)
                blocks.append(
                    InvertedResidual(channels, out_channels, stride if index == 0 else 1, stage_expansion or expansion)
                )
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.ModuleList(stages)
        last = int(1280 * max(width, 1.0))
        self.conv2 = _conv(channels, last, 1)
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        x = self.conv2(x)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits

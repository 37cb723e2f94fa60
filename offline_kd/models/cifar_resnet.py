"""ResNets for 32x32 images, in the three forms that published checkpoints come in.

Attribute names are those of the published checkpoints, so a state dict loads without renaming.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PadShortcut(nn.Module):
    """He et al.'s option A: every second pixel, new channels filled with zeros equally on both sides; no weights."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        half = self.new_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.new_channels - half))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut
        self.relu = nn.ReLU()  # the last activation, a module so that a tap can read the map before it

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        activated: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return activated


class CifarResNet(nn.Module):
    """`depth` = 6n + 2 layers in three stages of n basic blocks; `[B, 3, 32, 32]` -> `[B, num_classes]`.

    With `shortcut="projection"` it is the network of RepDistiller and mdistiller (resnet8 to resnet110, and with
    widths 64/128/256 resnet8x4 and resnet32x4), with `"pad"` the original CIFAR-10 network of He et al. 2016.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int],
        num_classes: int,
        shortcut: Literal["projection", "pad"] = "projection",
    ) -> None:
        super().__init__()
        num_blocks, rest = divmod(depth - 2, 6)
        assert rest == 0, "depth must be 6n + 2"
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        in_channels = widths[0]
        for stage, channels in enumerate(widths[1:], start=1):
            blocks = []
            for index in range(num_blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                skip: nn.Module | None = None
                if stride != 1 or in_channels != channels:
                    grows = channels - in_channels
                    skip = PadShortcut(grows) if shortcut == "pad" else _projection(in_channels, channels, stride)
                blocks.append(BasicBlock(in_channels, channels, stride, skip))
                in_channels = channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.head = "linear" if shortcut == "pad" else "fc"
        self.add_module(self.head, nn.Linear(in_channels, num_classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        logits: Tensor = self.get_submodule(self.head)(x.mean(dim=(2, 3)))
        return logits


class Bottleneck(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            _projection(in_channels, out_channels, stride)
            if stride != 1 or in_channels != out_channels
            else nn.Sequential()
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        activated: Tensor = self.relu(self.bn3(self.conv3(out)) + self.shortcut(x))
        return activated


class CifarResNet50(nn.Module):
    """ResNet-50 with a 3x3 stem and no max-pooling; stages at 32, 16, 8 and 4 pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        for stage, (channels, num_blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
            blocks = []
            for index in range(num_blocks):
                blocks.append(Bottleneck(in_channels, channels, 2 if stage > 1 and index == 0 else 1))
                in_channels = 4 * channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)

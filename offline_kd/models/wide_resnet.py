"""Wide ResNets for 32x32 images (Zagoruyko and Komodakis 2016, arXiv:1605.07146), pre-activation blocks."""

import math

from torch import Tensor, nn
from torch.nn import functional as F


class WideBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        # A block that changes the width takes its shortcut after the activation, the others before it.
        skip: Tensor = x if self.convShortcut is None else self.convShortcut(activated)
        return skip + out


class WideStage(nn.Module):
    def __init__(self, num_blocks: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                WideBlock(in_channels if index == 0 else channels, channels, stride if index == 0 else 1)
                for index in range(num_blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layer(x)
        return features


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`, depth = 6n + 4; `[B, 3, 32, 32]` -> `[B, num_classes]`."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        num_blocks, rest = divmod(depth - 4, 6)
        assert rest == 0, "depth must be 6n + 4"
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = WideStage(num_blocks, 16, 16 * widen, 1)
        self.block2 = WideStage(num_blocks, 16 * widen, 32 * widen, 2)
        self.block3 = WideStage(num_blocks, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU(inplace=True)  # a module, so that the last feature map can be tapped by name
        self.fc = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits

"""ShuffleNet V1 (Zhang et al. 2018, arXiv:1707.01083) and V2 (Ma et al. 2018, arXiv:1807.11164) for 32x32 images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal groups."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class ShuffleBlockV1(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.shuffle_groups = 1 if in_channels == 24 else groups  # the stem is too narrow for grouped convolution
        hidden = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=self.shuffle_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle_channels(F.relu(self.bn1(self.conv1(x))), self.shuffle_groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return F.relu(out + x)


class ShuffleNetV1(nn.Module):
    """Three groups; `[B, 3, 32, 32]` -> `[B, num_classes]`; the last map is `[B, 960, 4, 4]`."""

    def __init__(self, num_classes: int, groups: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        in_channels = 24
        for stage, (channels, num_blocks) in enumerate([(240, 4), (480, 8), (960, 4)], start=1):
            blocks = [ShuffleBlockV1(in_channels, channels - in_channels, 2, groups)]
            blocks += [ShuffleBlockV1(channels, channels, 1, groups) for _ in range(num_blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            in_channels = channels
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class ShuffleBlockV2(nn.Module):
    """Half of the channels pass untouched."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        changed = F.relu(self.bn1(self.conv1(changed)))
        changed = self.bn2(self.conv2(changed))
        changed = F.relu(self.bn3(self.conv3(changed)))
        return shuffle_channels(torch.cat([kept, changed], dim=1), 2)


class ShuffleDownV2(nn.Module):
    """Both branches halve the resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffle_channels(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(nn.Module):
    """Width 1; `[B, 3, 32, 32]` -> `[B, num_classes]`; the last map is `[B, 1024, 4, 4]`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        in_channels = 24
        for stage, (channels, num_blocks) in enumerate([(116, 3), (232, 7), (464, 3)], start=1):
            blocks: list[nn.Module] = [ShuffleDownV2(in_channels, channels)]
            blocks += [ShuffleBlockV2(channels) for _ in range(num_blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            in_channels = channels
        self.conv2 = nn.Conv2d(in_channels, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu = nn.ReLU()  # a module, so that the last feature map can be tapped by name
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        x = self.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits

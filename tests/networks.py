"""Small networks that test recipes name as `networks:NAME`."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Two convolutions, enough for digits."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def small(num_classes: int, width: int = 8) -> nn.Module:
    return Small(num_classes, width)


class Slow(Small):
    """Gives tests time to kill who asks it."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.03)
        return super().forward(x)


def slow(num_classes: int) -> nn.Module:
    return Slow(num_classes)


class NaNOnSomeViews(Small):
    """Says NaN where the left column is bright, which only shifted digits are."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, 0, :, 0].amax(dim=1) > 0.5
        return torch.where(bright[:, None], torch.nan, super().forward(x))


def nan_on_some_views(num_classes: int) -> nn.Module:
    return NaNOnSomeViews(num_classes)


class ChangingMap(Small):
    """Its maps are smaller for single images than for batches."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.body):
            x = layer(x if index != 3 or len(x) > 1 else x[:, :, ::2, ::2])
        return torch.zeros(len(x), self.head.out_features) + x.mean()


def changing_map(num_classes: int) -> nn.Module:
    return ChangingMap(num_classes)


class InfiniteMap(Small):
    """Says something finite, but its maps overflow on some views."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, 0, :, 1].amax(dim=1) > 0.5
        logits = super().forward(x)
        self.body[5](torch.where(bright[:, None, None, None], torch.inf, torch.zeros(len(x), 16, 4, 4)))
        return logits


def infinite_map(num_classes: int) -> nn.Module:
    return InfiniteMap(num_classes)


class Probabilities(Small):
    """A softmax follows its last layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=1)


def probabilities(num_classes: int) -> nn.Module:
    return Probabilities(num_classes)


def no_module(num_classes: int) -> int:
    return num_classes


class Watched(Small):
    """In a worker of Ray: slow, notes what it is asked, and ends so many processes, each after so many batches."""

    def __init__(self, num_classes: int, log: str, dies_at: int, deaths: int) -> None:
        super().__init__(num_classes)
        self.log, self.dies_at, self.deaths, self.calls = Path(log), dies_at, deaths, 0

    def forward(self, x: Tensor) -> Tensor:
        if Path(sys.argv[0]).name == "default_worker.py":
            time.sleep(0.02)
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {len(x)}\n")
            self.calls += 1
            died = self.log.with_suffix(".died")
            if self.calls == self.dies_at and (not died.exists() or died.stat().st_size < self.deaths):
                with died.open("a") as file:
                    file.write("x")
                os._exit(1)
        return super().forward(x)


def watched(num_classes: int, log: str, dies_at: int, deaths: int = 1) -> nn.Module:
    return Watched(num_classes, log, dies_at, deaths)


def group_norm(num_classes: int) -> nn.Module:
    """For images of any size, and without BatchNorm: nothing in it depends on how a batch is shared out."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def no_classes(num_classes: int) -> nn.Module:
    """For ten classes, whatever is asked for."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

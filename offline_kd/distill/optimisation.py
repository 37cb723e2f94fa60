"""Optimizer and learning rate, as a recipe describes them."""

import math

import torch
from torch import nn

from offline_kd.recipe import SGD, Step, Training


def learning_rate(training: Training, epochs_done: float) -> float:
    """The rate of a step, `epochs_done` (with the fraction of the current one) into the training."""
    schedule, full = training.schedule, training.optimizer.lr
    if epochs_done < schedule.warmup_epochs:
        return full * (epochs_done + 1e-3) / schedule.warmup_epochs
    if isinstance(schedule, Step):
        return full * schedule.gamma ** sum(milestone <= int(epochs_done) for milestone in schedule.milestones)
    span = max(training.epochs - schedule.warmup_epochs, 1e-9)
    cosine = (1 + math.cos(math.pi * min((epochs_done - schedule.warmup_epochs) / span, 1.0))) / 2
    return full * (schedule.final_fraction + (1 - schedule.final_fraction) * cosine)


def make_optimizer(training: Training, network: nn.Module) -> torch.optim.Optimizer:
    wanted = training.optimizer
    if isinstance(wanted, SGD):
        return torch.optim.SGD(
            network.parameters(),
            lr=wanted.lr,
            momentum=wanted.momentum,
            nesterov=wanted.nesterov,
            weight_decay=wanted.weight_decay,
        )
    return torch.optim.AdamW(network.parameters(), lr=wanted.lr, betas=wanted.betas, weight_decay=wanted.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

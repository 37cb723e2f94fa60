"""Optimizer, parameter groups and learning rate, as a recipe describes them."""

import fnmatch
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from offline_kd.models.kd_layer import WithKDLayer
from offline_kd.objectives.term import Head
from offline_kd.support.errors import RecipeError, did_you_mean
from offline_kd.training_recipe import SGD, ParameterGroups, Step, Training


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


def make_optimizer(training: Training, network: nn.Module, heads: Sequence[Head] = ()) -> torch.optim.Optimizer:
    """Of a student, and of the heads of its terms, which are told of every step that is applied.

    Raises RecipeError for a pattern that matches nothing, or layers of a network that does not tell its depth.
    """
    wanted, groups = training.optimizer, parameter_groups(training.optimizer, network, heads)
    optimizer: torch.optim.Optimizer
    if isinstance(wanted, SGD):
        optimizer = torch.optim.SGD(
            groups,
            lr=wanted.lr,
            momentum=wanted.momentum,
            nesterov=wanted.nesterov,
            weight_decay=wanted.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=wanted.lr, betas=wanted.betas, eps=wanted.eps, weight_decay=wanted.weight_decay
        )
    for head in heads:
        optimizer.register_step_post_hook(_telling(head))
    return optimizer


def _telling(head: Head) -> Callable[..., None]:
    def stepped(*_: object) -> None:
        head.end_step()

    return stepped


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """`rate`, in every group times the `lr_scale` that it has."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


# ---- groups --------------------------------------------------------------------------------------------------------


def parameter_groups(
    wanted: ParameterGroups, network: nn.Module, heads: Sequence[Head] = ()
) -> list[dict[str, object]]:
    """What optimizers take: all parameters, or groups with a `weight_decay` or `lr_scale` of their own.

    The groups with the whole rate come first. Heads have it, and their parameters are called `heads.NUMBER.NAME`.
    """
    parameters = dict(network.named_parameters())
    for number, head in enumerate(heads):
        parameters |= {f"heads.{number}.{name}": one for name, one in head.named_parameters()}
    if not wanted.no_decay and wanted.layer_decay is None:
        return [{"params": list(parameters.values())}]
    spared = _without_decay(network, list(parameters), wanted.no_decay)
    scales = {} if wanted.layer_decay is None else _rate_scales(network, wanted.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((scales.get(name, 1.0), name in spared), []).append(parameter)
    return [
        {"params": members, "lr_scale": scale} | ({"weight_decay": 0.0} if is_spared else {})
        for (scale, is_spared), members in sorted(groups.items(), key=lambda item: -item[0][0])
    ]


def _without_decay(network: nn.Module, names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Which of the parameters `names` are not decayed; a normalisation layer is a module whose class says `norm`."""
    spared: set[str] = set()
    for pattern in patterns:
        if pattern == "bias":
            spared |= {name for name in names if name.rpartition(".")[2] == "bias"}
        elif pattern == "norm":
            norms = {path for path, module in network.named_modules() if "norm" in type(module).__name__.lower()}
            spared |= {name for name in names if name.rpartition(".")[0] in norms}
        elif matched := fnmatch.filter(names, pattern):
            spared.update(matched)
        else:
            raise RecipeError(
                f"optimizer.no_decay: '{pattern}' is neither `bias` nor `norm`, and no parameter of the student has "
                f"such a name.{did_you_mean(pattern, ['bias', 'norm', *names])}"
            )
    return spared


def _rate_scales(network: nn.Module, layer_decay: float) -> dict[str, float]:
    """By name of a parameter: `layer_decay` to the number of layers between its own and the last (BEiT, timm).

    Layers are those of timm's `group_matcher`. Parameters of KD layers, which nobody trained before, keep the rate.
    """
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise RecipeError(
            f"optimizer.layer_decay: a {type(network).__name__} does not tell which layers are how deep. Name one of "
            "timm's networks (timm:NAME), or leave it out."
        )
    from timm.models._manipulate import group_with_matcher

    plain = _names_without_kd_layers(network)
    own = [(name, None) for name in plain.values() if name is not None]
    layers: dict[str, int] = group_with_matcher(own, matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: 1.0 if was is None else layer_decay ** (last - layers[was]) for name, was in plain.items()}


def _names_without_kd_layers(network: nn.Module) -> dict[str, str | None]:
    """Name of every parameter -> what it was before KD layers were put in; None: it is one of theirs."""
    places = [path for path, module in network.named_modules() if isinstance(module, WithKDLayer)]
    names: dict[str, str | None] = {}
    for name, _ in network.named_parameters():
        was: str | None = name
        for place in sorted(places, key=len, reverse=True):  # the innermost first
            if was is not None and was.startswith(f"{place}.kd_layer."):
                was = None
            elif was is not None and was.startswith(f"{place}.module."):
                was = place + was.removeprefix(f"{place}.module")
        names[name] = was
    return names

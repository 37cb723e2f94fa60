"""Networks by name, and weights for them.

cifar:NAME              the benchmark networks for 32x32 images, written here (`CIFAR` lists them)
torchvision:NAME        torchvision.models
timm:NAME               timm (install `offline-kd[timm]`)
package.module:NAME     your own, installed or in the current folder: a callable that is called as
                        NAME(num_classes=10, **model_args) and returns a torch.nn.Module, whose
                        forward takes [B, 3, H, W] float32 and returns logits [B, num_classes]; or, of a
                        teacher of kind embedding, vectors of any width
"""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from offline_kd.data.manifest import EvaluationCrop, Normalisation
from offline_kd.models.cifar_resnet import CifarResNet, CifarResNet50
from offline_kd.models.cifar_vgg import CifarVGG
from offline_kd.models.mobilenetv2 import MobileNetV2
from offline_kd.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from offline_kd.models.weights import import_timm, torchvision_entry, weights_name
from offline_kd.models.wide_resnet import WideResNet
from offline_kd.support.constants import constant
from offline_kd.support.errors import ModelError, did_you_mean, shorten

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
VGG8 = [[64], [128], [256], [512], [512]]
VGG13 = [[64, 64], [128, 128], [256, 256], [512, 512], [512, 512]]

CIFAR: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, WIDE) for depth in (8, 32)},
    **{f"resnet{depth}_a": partial(CifarResNet, depth, NARROW, shortcut="pad") for depth in (20, 32, 44, 56, 110)},
    **{f"wrn_{depth}_{widen}": partial(WideResNet, depth, widen) for depth in (16, 40) for widen in (1, 2)},
    "vgg8": partial(CifarVGG, VGG8),
    "vgg13": partial(CifarVGG, VGG13),
    "resnet50": CifarResNet50,
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
}


def build(name: str, num_classes: int, args: Mapping[str, int | float | str | bool] | None = None) -> nn.Module:
    """A freshly initialised network with `num_classes` outputs; raises ModelError for a name nobody knows.

    Weights are laid out channels-last, as `normalise` lays out images: twice as fast for ResNets on a CPU.
    """
    make = _constructor(name)
    _refuse_other_signature(name, make, args or {})
    try:
        model = make(num_classes=num_classes, **(args or {}))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"'{name}' cannot be built with {dict(args or {})}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"'{name}' returned a {type(model).__name__}, not a torch.nn.Module.")
    return model.to(memory_format=torch.channels_last)


def head_of(name: str, num_classes: int, args: Mapping[str, int | float | str | bool] | None = None) -> dict[str, int]:
    """The head of a network: the tensors whose shape depends on the number of classes, and in which dimension.

    Whatever they are called, and however many: what two networks for another number of classes differ in. Nothing is
    drawn from the generator that decides how students begin.
    """
    with torch.random.fork_rng(devices=[]):
        one, other = (build(name, count, args).state_dict() for count in (num_classes, num_classes + 1))
    shapes = {key: (one[key].shape, other[key].shape) for key in one if key in other}
    head = {
        key: next(dim for dim, sizes in enumerate(zip(*pair, strict=True)) if sizes[0] != sizes[1])
        for key, pair in shapes.items()
        if pair[0] != pair[1]
    }
    return head


def classifier_of(name: str, num_classes: int, args: Mapping[str, int | float | str | bool] | None = None) -> str:
    """Name of the module whose weights depend on the number of classes: what comes into it are the last features.

    Raises ModelError where that is not one module inside the network.
    """
    modules = {key.rpartition(".")[0] for key in head_of(name, num_classes, args)}
    if len(modules) != 1 or modules == {""}:
        found = ", ".join(sorted(modules)) if modules - {""} else "none"
        raise ModelError(
            f"'{name}': its features are what comes into its classifier, the one module that depends on num_classes, "
            f"and found is {found}. Name a module: `student_module` of the term."
        )
    return modules.pop()


def build_without_head(
    name: str, args: Mapping[str, int | float | str | bool] | None = None
) -> tuple[nn.Module, dict[str, int]]:
    """A freshly initialised network without its classifier, and the head that it lacks, as `head_of` says it.

    What came into the classifier comes out: vectors `[B, D]`. Of timm's networks it is what they give for
    `num_classes=0`; one whose `args` say `num_classes` has a projection under that name (CLIP), which stays. A network
    in which nothing depends on the number of classes stays as it is.

    Raises ModelError where the classifier is not one module inside the network.
    """
    args = dict(args or {})
    if "num_classes" in args and (width := int(args.pop("num_classes"))):
        return build(name, width, args), {}
    head = head_of(name, 2, args)
    if name.startswith("timm:"):
        return build(name, 0, args), head
    network = build(name, 2, args)
    if head:
        network.set_submodule(classifier_of(name, 2, args), nn.Identity())
    return network, head


def refuse_no_logits(output: object, name: str, rows: int | None = None, num_classes: int | None = None) -> None:
    """Raise ModelError for what a network gives instead of logits `[rows, num_classes]`, as far as these are known."""
    shape = list(output.shape) if isinstance(output, Tensor) else []
    expected = ("B" if rows is None else rows, "num_classes" if num_classes is None else num_classes)
    if len(shape) == 2 and all(isinstance(one, str) or one == size for one, size in zip(expected, shape, strict=True)):
        return
    raise ModelError(
        f"'{name}': its forward gives {_what(output)}, must give one tensor of logits [{expected[0]}, {expected[1]}]."
    )


def refuse_no_vectors(output: object, name: str, rows: int) -> None:
    """Raise ModelError for what a network without classes gives instead of vectors `[rows, D]`."""
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != rows or not output.shape[1]:
        raise ModelError(f"'{name}': its forward gives {_what(output)}, must give one tensor of vectors [{rows}, D].")


def _what(output: object) -> str:
    return f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _constructor(name: str) -> Callable[..., object]:
    source, _, model = name.partition(":")
    if source == "cifar":
        if model not in CIFAR:
            raise ModelError(f"no network 'cifar:{model}'.{did_you_mean(model, CIFAR)}")
        return CIFAR[model]
    if source == "torchvision":
        from torchvision import models

        if model not in models.list_models():
            raise ModelError(f"torchvision has no '{model}'.{did_you_mean(model, models.list_models())}")
        return partial(models.get_model, model, weights=None)
    if source == "timm":
        timm = import_timm()
        if not timm.is_model(model):
            raise ModelError(f"timm has no '{model}'.{did_you_mean(model, timm.list_models())}")
        return partial(timm.create_model, model)
    if model:
        return _import(source, model)
    raise ModelError(
        f"'{name}' is no network name. Write cifar:NAME, torchvision:NAME, timm:NAME or package.module:function."
    )


def _import(module: str, function: str) -> Callable[..., object]:
    """A callable of an installed package, or of a module in the current folder."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # at the end: nothing that is installed may be replaced; for good: it may import others
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"'{module}:{function}' cannot be imported: {error}. Modules are looked for among installed packages, in "
            f"PYTHONPATH and in {here}."
        ) from error
    except AttributeError as error:
        raise ModelError(f"'{module}:{function}' cannot be imported: {error}.") from error
    except Exception as error:  # of somebody's code
        reason = f"{type(error).__name__}: {shorten(' '.join(str(error).split()))}"
        raise ModelError(f"'{module}:{function}' cannot be imported: {reason}") from error
    if not callable(found):
        raise ModelError(f"'{module}:{function}' is not callable.")
    return found


def _refuse_other_signature(name: str, make: Callable[..., object], args: Mapping[str, object]) -> None:
    """Raise ModelError for a callable that cannot be given `num_classes` and these arguments."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    given = {"num_classes": 10, **args}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ModelError(
            f"'{name}' cannot be built with {dict(args)}: it is called with "
            f"{', '.join(f'{one}=...' for one in given)}, and takes {shorten(str(signature), 200)}: {error}."
        ) from error


@dataclass(frozen=True)
class Input:
    """What a network was trained to see."""

    normalisation: Normalisation
    crop: EvaluationCrop


def input_of(name: str, weights: str | None) -> Input | None:
    """What timm knows of a model, or torchvision of its weights (`ResNet50_Weights.IMAGENET1K_V2`); None: nothing."""
    source, _, model = name.partition(":")
    if source == "timm":
        config = import_timm().get_pretrained_cfg(model)
        if config is None:
            return None
        size = config.input_size[-1]
        return Input(
            Normalisation(mean=config.mean, std=config.std),
            EvaluationCrop(
                size=size,
                resize=math.floor(size / config.crop_pct),
                interpolation="bicubic" if config.interpolation == "bicubic" else "bilinear",
            ),
        )
    known = weights_name(weights, name) if weights else ""
    if source == "torchvision" and "_Weights." in known:
        preset = torchvision_entry(known).transforms()
        return Input(
            Normalisation(mean=tuple(preset.mean), std=tuple(preset.std)),
            EvaluationCrop(
                size=preset.crop_size[0], resize=preset.resize_size[0], interpolation=preset.interpolation.value
            ),
        )
    return None


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def normalise(images: Tensor, normalisation: Normalisation) -> Tensor:
    """`[B, 3, H, W]` uint8 pixels to the float32 input of a network: `(pixels / 255 - mean) / std`."""
    pixels = images / 255
    mean, std = (constant(tuple(one), pixels).view(1, 3, 1, 1) for one in (normalisation.mean, normalisation.std))
    # In place: on a CPU, new memory for each of these costs as much as the arithmetic.
    return pixels.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)

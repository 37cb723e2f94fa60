"""Networks by name, and weights for them.

cifar:NAME              the benchmark networks for 32x32 images, written here (`CIFAR` lists them)
torchvision:NAME        torchvision.models
timm:NAME               timm (install `offline-kd[timm]`)
package.module:NAME     your own: a callable that takes num_classes and returns a torch.nn.Module
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from offline_kd.errors import ModelError, did_you_mean
from offline_kd.manifest import EvaluationCrop, Manifest, Normalisation, file_sha256, locate_weights
from offline_kd.models.cifar_resnet import CifarResNet, CifarResNet50
from offline_kd.models.cifar_vgg import CifarVGG
from offline_kd.models.mobilenetv2 import MobileNetV2
from offline_kd.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from offline_kd.models.wide_resnet import WideResNet

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


def build(name: str, num_classes: int, args: Mapping[str, Any] | None = None) -> nn.Module:
    """A freshly initialised network with `num_classes` outputs; raises ModelError for a name nobody knows.

    Weights are laid out channels-last, as `normalise` lays out images: twice as fast for ResNets on a CPU.
    """
    try:
        model = _constructor(name)(num_classes=num_classes, **(args or {}))
    except TypeError as error:
        raise ModelError(f"'{name}' cannot be built with {dict(args or {})}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"'{name}' returned a {type(model).__name__}, not a torch.nn.Module.")
    return model.to(memory_format=torch.channels_last)


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
        timm = _timm()
        if not timm.is_model(model):
            raise ModelError(f"timm has no '{model}'.{did_you_mean(model, timm.list_models())}")
        return partial(timm.create_model, model)
    if model:
        return _import(source, model)
    raise ModelError(
        f"'{name}' is no network name. Write cifar:NAME, torchvision:NAME, timm:NAME or package.module:function."
    )


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ModelError("timm is not installed: pip install 'offline-kd[timm]'") from error


def _import(module: str, function: str) -> Callable[..., object]:
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"'{module}:{function}' cannot be imported: {error}") from error
    if not callable(found):
        raise ModelError(f"'{module}:{function}' is not callable.")
    return found


@dataclass(frozen=True)
class Input:
    """What a network was trained to see."""

    normalisation: Normalisation
    crop: EvaluationCrop


def input_of(name: str, weights: str | None) -> Input | None:
    """What timm knows of a model, or torchvision of its weights (`ResNet50_Weights.IMAGENET1K_V2`); None: nothing."""
    source, _, model = name.partition(":")
    if source == "timm":
        config = _timm().get_pretrained_cfg(model)
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
    if source == "torchvision" and weights and "_Weights." in weights:
        preset = _torchvision_entry(weights).transforms()
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
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (normalisation.mean, normalisation.std)
    )
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


# ---- weights -------------------------------------------------------------------------------------------------------


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a PyTorch checkpoint, which is read with `weights_only=True`.

    Of a checkpoint that holds more than the network (RepDistiller's and mdistiller's `.pth`), the entry `model` or
    `state_dict` is taken, and the `module.` that DataParallel puts before names is dropped.
    """
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not readable as safetensors: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}: not readable as a checkpoint of plain tensors ({reason}). "
            "Convert it to safetensors where it was made; pickled code is never run."
        ) from error
    for entry in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path}: holds no state dict (a mapping of names to tensors).")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights into `model`; raises ModelError naming the first tensor that does not fit.

    Tensors stored in half precision are widened. Missing `num_batches_tracked` counters, which inference does not
    use, are let pass; anything else missing, surplus or of another shape is refused.
    """
    state, own = read_state_dict(path), model.state_dict()
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked") and name not in state:
            continue
        if name not in state:
            raise ModelError(f"{path}: lacks '{name}' {list(tensor.shape)}.{did_you_mean(name, state)}")
        if state[name].shape != tensor.shape:
            raise ModelError(
                f"{path}: '{name}' is {list(state[name].shape)}, the network's is {list(tensor.shape)}. "
                "Weights of another architecture or another number of classes."
            )
    surplus = [name for name in state if name not in own]
    if surplus:
        raise ModelError(f"{path}: '{surplus[0]}' (and {len(surplus) - 1} more) has no place in the network.")
    model.load_state_dict({name: state[name].to(own[name].dtype) for name in state}, strict=False)


def find_weights(weights: str, manifest: Manifest, roots: Sequence[Path]) -> tuple[Path, str]:
    """Path and sha256 of weights named by a recipe: a manifest name, a path, or a torchvision weights name."""
    if entry := manifest.weights(weights):
        return locate_weights(entry, roots), entry.sha256
    if Path(weights).is_file():
        return Path(weights), file_sha256(Path(weights))
    if "_Weights." in weights:
        path = _torchvision_weights(weights)
        return path, file_sha256(path)
    raise ModelError(
        f"weights '{weights}': no teacher of the manifest, no file, no torchvision weights name such as "
        f"ResNet50_Weights.IMAGENET1K_V2.{did_you_mean(weights, [*manifest.teachers, *manifest.files])}"
    )


def _torchvision_entry(name: str) -> Any:
    from torchvision import models

    try:
        return models.get_weight(name)
    except ValueError as error:
        raise ModelError(f"torchvision has no weights '{name}'.") from error


def _torchvision_weights(name: str) -> Path:
    url = _torchvision_entry(name).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        except OSError as error:
            raise ModelError(f"'{name}' could not be downloaded ({error}). Fetch {url} to {path}.") from error
    return path

"""Weights for networks: found, read without executing anything, loaded whole."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from offline_kd.data.fetching import Fetched, Root
from offline_kd.data.manifest import Manifest, locate_weights
from offline_kd.support.downloads import DEFAULT_BYTES, shared_downloads
from offline_kd.support.errors import ModelError, did_you_mean
from offline_kd.support.files import cache_folder, file_sha256

# ---- weights -------------------------------------------------------------------------------------------------------


def read_state_dict(path: Path | Fetched) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a PyTorch checkpoint, which is read with `weights_only=True`.

    What was fetched from afar is not read again: the bytes that were proven are the bytes that are loaded.

    Of a checkpoint that holds more than the network (RepDistiller's and mdistiller's `.pth`), the entry `model` or
    `state_dict` is taken, and the `module.` that DataParallel puts before names is dropped.
    """
    if str(path).endswith(".safetensors"):
        try:
            if isinstance(path, Fetched):
                return safetensors.torch.load(path.content)
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not readable as safetensors: {error}") from error
    try:
        source = io.BytesIO(path.content) if isinstance(path, Fetched) else path
        content = torch.load(source, map_location="cpu", weights_only=True)
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


def load_weights(model: nn.Module, path: Path | Fetched) -> None:
    """Load weights into `model`; raises ModelError naming the first tensor that does not fit.

    Tensors stored in half precision are widened. Missing `num_batches_tracked` counters, which inference does not
    use, are let pass; anything else missing, surplus or of another shape is refused.
    """
    _load(model, read_state_dict(path), path)


def load_pretrained(model: nn.Module, path: Path | Fetched, num_classes: int) -> list[str]:
    """Load weights to begin from: as `load_weights`, but a head for another number of classes is left as it is.

    Of the head are the tensors whose first dimension is `num_classes` in `model`, one other number in the file, the
    same of all of them, and nothing else differs.

    Returns the names of the tensors of the head that were left.
    """
    state, own = read_state_dict(path), model.state_dict()
    other = {name: tensor for name, tensor in own.items() if name in state and state[name].shape != tensor.shape}
    classes = {state[name].shape[0] for name in other if state[name].dim()}
    is_head = len(classes) == 1 and all(
        tensor.shape == (num_classes, *state[name].shape[1:]) for name, tensor in other.items()
    )
    left = list(other) if is_head else []
    _load(model, state | {name: own[name] for name in left}, path)
    return left


def _load(model: nn.Module, state: dict[str, Tensor], path: Path | Fetched) -> None:
    own = model.state_dict()
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


def find_weights(weights: str, manifest: Manifest, roots: Sequence[Root]) -> tuple[Path | Fetched, str]:
    """Path, or content from afar, and sha256 of weights of a recipe: a manifest name, a path, or torchvision's name."""
    if entry := manifest.weights(weights):
        return locate_weights(entry, roots, shared_downloads(cache_folder(), DEFAULT_BYTES)), entry.sha256
    if Path(weights).is_file():
        return Path(weights), file_sha256(Path(weights))
    if "_Weights." in weights:
        path = _torchvision_weights(weights)
        return path, file_sha256(path)
    raise ModelError(
        f"weights '{weights}': no teacher of the manifest, no file, no torchvision weights name such as "
        f"ResNet50_Weights.IMAGENET1K_V2.{did_you_mean(weights, [*manifest.teachers, *manifest.files])}"
    )


def known_sha256(weights: str, manifest: Manifest) -> str:
    """The sha256 of weights as far as it can be known here, without fetching them: "" for not at all.

    Of torchvision's weights that are not on this machine, their address tells the first digits.
    """
    if entry := manifest.weights(weights):
        return entry.sha256
    if Path(weights).is_file():
        return file_sha256(Path(weights))
    if "_Weights." not in weights:
        return ""
    stem = Path(_torchvision_entry(weights).url).stem
    first_digits = re.search("-([0-9a-f]{8,64})$", stem)
    return first_digits[1] if first_digits else ""


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

"""Weights for networks: found, and loaded whole, or as far as a network begins from them."""

import hashlib
import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import safetensors.torch
import torch
from torch import nn

from offline_kd.data.fetching import Fetched, Root
from offline_kd.data.manifest import Manifest, locate_weights
from offline_kd.models.checkpoints import (
    StateDict,
    WeightsFile,
    as_file,
    best_beginning,
    read_state_dict,
    weights_of_network,
)
from offline_kd.support.downloads import DEFAULT_BYTES, shared_downloads
from offline_kd.support.errors import ModelError, did_you_mean, shorten
from offline_kd.support.files import cache_folder, file_sha256

PRETRAINED = "pretrained"  # of timm's and torchvision's networks: what these libraries fetch for them

# ---- loading -------------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: Path | Fetched) -> None:
    """Load weights into `model`; raises ModelError naming the first tensor that does not fit.

    Tensors stored in half precision are widened. Missing `num_batches_tracked` counters, which inference does not
    use, are let pass; anything else missing, surplus or of another shape is refused.
    """
    load_state(model, read_state_dict(path))


def load_state(model: nn.Module, state: StateDict, left: Collection[str] = ()) -> None:
    """The same of tensors that were read; those that are `left` stay as they are, whatever the file has of them."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in left}
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    tensors = {name: one for name, one in weights_of_network(state, needed).items() if name not in left}
    missing, surplus = [name for name in needed if name not in tensors], [name for name in tensors if name not in own]
    problems = []
    if missing:
        problems.append(
            f"lacks '{missing[0]}' {list(own[missing[0]].shape)} ({len(missing)} of the network's {len(needed)} "
            "tensors are missing)"
        )
    if surplus:
        problems.append(f"'{surplus[0]}' ({len(surplus)} of the file's {len(tensors)}) has no place in the network")
    if problems:
        near = did_you_mean(missing[0], surplus) if missing else ""
        hint = best_beginning(tensors, needed) or (near if near.startswith(" Did") else "")
        raise ModelError(f"{state.where}: {'; '.join(problems)}.{hint}")
    for name in tensors:
        if tensors[name].shape != own[name].shape:
            raise ModelError(
                f"{state.where}: '{name}' is {list(tensors[name].shape)}, the network's is {list(own[name].shape)}. "
                "Weights of another architecture or another number of classes."
            )
    model.load_state_dict({name: tensors[name].to(own[name].dtype) for name in tensors}, strict=False)


def begin_from(
    model: nn.Module, state: StateDict, head: Mapping[str, int], wanted: Literal["keep", "new"] | None, field: str
) -> list[str]:
    """Load weights to begin a training from.

    Args:
        head: the tensors of the head, and the dimension of each that is as long as there are classes.
        wanted: whether the head begins anew; None: where the file has one for another number of classes.
        field: of the recipe, where `wanted` stands.

    Returns:
        The names of the tensors that begin anew.

    Raises ModelError for weights that do not fit, and for a head of other classes that is to be kept.
    """
    if wanted == "new":
        return _with_new_head(model, state, head)
    here, there = classes_of(model.state_dict(), head), known_classes(model, state, head)
    if there in (None, here):
        load_state(model, state)
        return []
    if wanted == "keep":
        raise ModelError(
            f"{state.where}: is for {there:,} classes, the dataset has {here:,}. To begin with a new head: "
            f"{field}: new; a teacher that stays as it is can be asked about some of its classes: teacher.classes."
        )
    return _with_new_head(model, state, head)


def _with_new_head(model: nn.Module, state: StateDict, head: Mapping[str, int]) -> list[str]:
    """Load all but the head, which begins with 0 where it is a linear map.

    What it would begin with by chance stays in all directions that the images at hand do not show: with few of them,
    and libraries that begin with large numbers, that decides what is said of others.
    """
    load_state(model, state, left=head)
    for name in head:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | nn.Conv2d):
            nn.init.zeros_(model.get_parameter(name))
    return list(head)


def known_classes(model: nn.Module, state: StateDict, head: Mapping[str, int]) -> int | None:
    """For how many classes weights of such a network are; None where its head does not tell."""
    needed = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    return classes_of(weights_of_network(state, needed), head)


def classes_of(tensors: Mapping[str, torch.Tensor], head: Mapping[str, int]) -> int | None:
    """As many as all tensors of the head are long; None where they are not, or are not all there."""
    lengths = {
        tensors[name].shape[dim] if name in tensors and dim < tensors[name].dim() else None
        for name, dim in head.items()
    }
    return lengths.pop() if len(lengths) == 1 else None


# ---- finding -------------------------------------------------------------------------------------------------------


def find_weights(
    weights: str | WeightsFile,
    manifest: Manifest,
    roots: Sequence[Root],
    model: str | None = None,
    args: Mapping[str, int | float | str | bool] | None = None,
) -> tuple[Path | Fetched, str]:
    """Path, or content from afar, and sha256 of weights of a recipe.

    They are a manifest name, a path, torchvision's name, or `pretrained`: what timm or torchvision fetch for `model`.
    """
    name = weights_name(weights, model)
    if entry := manifest.weights(name):
        return locate_weights(entry, roots, shared_downloads(cache_folder(), DEFAULT_BYTES)), entry.sha256
    if Path(name).is_file():
        return Path(name), file_sha256(Path(name))
    if "_Weights." in name:
        path = _torchvision_weights(name)
        return path, file_sha256(path)
    if name == PRETRAINED:
        fetched = _timm_weights(model, args or {})
        return fetched, fetched.sha256
    raise ModelError(
        f"weights '{name}': no teacher of the manifest, no file, no torchvision weights name such as "
        f"ResNet50_Weights.IMAGENET1K_V2.{did_you_mean(name, [*manifest.teachers, *manifest.files, PRETRAINED])}"
    )


def known_sha256(weights: str | WeightsFile, manifest: Manifest, model: str | None = None) -> str:
    """The sha256 of weights as far as it can be known here, without fetching them: "" for not at all.

    Of torchvision's weights that are not on this machine, their address tells the first digits.
    """
    name = weights_name(weights, model)
    if entry := manifest.weights(name):
        return entry.sha256
    if Path(name).is_file():
        return file_sha256(Path(name))
    if "_Weights." not in name:
        return ""
    stem = Path(torchvision_entry(name).url).stem
    first_digits = re.search("-([0-9a-f]{8,64})$", stem)
    return first_digits[1] if first_digits else ""


def weights_name(weights: str | WeightsFile, model: str | None) -> str:
    """What weights are called: `pretrained` of a network of torchvision has a name there, that of the best it has."""
    name = as_file(weights).file
    source, _, network = (model or "").partition(":")
    if name != PRETRAINED or source != "torchvision":
        return name
    from torchvision import models

    try:
        return str(models.get_model_weights(network).DEFAULT)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"torchvision has no pretrained weights of '{network}'.") from error


def import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ModelError("timm is not installed: pip install 'offline-kd[timm]'") from error


def _timm_weights(model: str | None, args: Mapping[str, int | float | str | bool]) -> Fetched:
    """What timm fetches for a network, as timm itself fits it to these arguments; with the head that it came with."""
    source, _, name = (model or "").partition(":")
    if source != "timm":
        raise ModelError(
            f"weights '{PRETRAINED}' are of timm:NAME and torchvision:NAME, the network is '{model}'. Name a file."
        )
    try:
        state = import_timm().create_model(name, pretrained=True, **args).state_dict()
    except ModelError:
        raise
    except Exception as error:  # of the network, of servers, of caches: whatever its downloads lead to
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
        raise ModelError(
            f"'{model}': timm could not fetch its pretrained weights ({reason}). Fetch them where there is a network "
            "and name the file: teacher.weights: FILE.safetensors."
        ) from error
    content = safetensors.torch.save({key: state[key].contiguous().clone() for key in sorted(state)})
    return Fetched(f"{model}, pretrained.safetensors", content, hashlib.sha256(content).hexdigest())


def torchvision_entry(name: str) -> Any:
    from torchvision import models

    try:
        return models.get_weight(name)
    except ValueError as error:
        raise ModelError(f"torchvision has no weights '{name}'.") from error


def _torchvision_weights(name: str) -> Path:
    url = torchvision_entry(name).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        except OSError as error:
            raise ModelError(f"'{name}' could not be downloaded ({error}). Fetch {url} to {path}.") from error
    return path

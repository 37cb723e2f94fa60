"""What a file of weights holds: read without running anything of it, one of its state dicts, under a network's names.

weights: file.pth                                              whichever state dict is in it
weights: {file: file.pth, key: model_ema, prefix: encoder.}    that one, and of it what begins so
"""

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from offline_kd.data.fetching import Fetched
from offline_kd.support.console import say
from offline_kd.support.errors import ModelError, did_you_mean, shorten
from offline_kd.support.strict import Strict

# Entries of checkpoints that hold a state dict, the first that is there being taken: averages of the weights before
# the weights themselves, for they are what is evaluated where somebody trains with an average.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PLAIN = ("model", "state_dict", "model_state_dict", "net", "network")
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")  # of DataParallel and torch.compile, wherever they are

COUNTER = "n_averaged"  # how often torch's AveragedModel was updated, beside the `module.` of its names


class WeightsFile(Strict):
    """Weights, and what of their file is meant."""

    file: str = Field(min_length=1, description="what `weights` may be alone: manifest name, path, pretrained, ...")
    key: str | None = Field(
        None, min_length=1, description="entry of a checkpoint, such as model_ema; dots lead deeper"
    )
    prefix: str | None = Field(None, min_length=1, description="what the network's names have before them, `encoder.`")


def as_file(weights: str | WeightsFile) -> WeightsFile:
    return WeightsFile(file=weights) if isinstance(weights, str) else weights


@dataclass(frozen=True)
class StateDict:
    """Tensors of a file by the names they have there."""

    where: Path | Fetched
    tensors: dict[str, Tensor]
    prefix: str | None = None  # that was asked for
    part: str = ""  # of the file, where it is another one than the weights themselves: stores tell it


def read_state_dict(where: Path | Fetched, key: str | None = None, prefix: str | None = None) -> StateDict:
    """Tensors of a `.safetensors` file or of a PyTorch checkpoint, which is read with `weights_only=True`.

    What was fetched from afar is not read again: the bytes that were proven are the bytes that are loaded.

    Of a checkpoint that holds more than one network's weights, the first entry of AVERAGES and PLAIN is taken, and so
    on inside it; where several would do, it says which.

    Args:
        key: of the entry to take instead.
        prefix: what is before the network's names, as `weights_of_network` takes it.

    Raises ModelError for a file that cannot be read as plain tensors, and for one that lacks such an entry.
    """
    if str(where).endswith(".safetensors"):
        if key is not None:
            raise ModelError(f"{where}: a safetensors file has no entries: leave key out (it is '{key}').")
        return StateDict(where, _read_safetensors(where), prefix, prefix or "")
    whole = _read_checkpoint(where)
    path = _path_to(whole, (*AVERAGES, *PLAIN)) if key is None else _path_of(whole, key)
    content = _at(whole, path)
    if not _is_state_dict(content):
        raise ModelError(f"{where}: {_what_it_holds(whole, key)}")
    taken, several = ".".join(path), [name for name, one in _entries(whole).items() if _is_state_dict(one)]
    if key is None and len(several) > 1:
        say(
            f"{where}: holds {' and '.join(several)}: {taken} is taken. To choose, write weights: {{file: {where}, "
            f"key: {next(name for name in several if name != path[0])}}}"
        )
    part = "" if path == _path_to(whole, PLAIN) else taken
    tensors = {str(name): tensor for name, tensor in content.items()}
    return StateDict(where, tensors, prefix, ":".join(filter(None, (part, prefix))))


def _read_safetensors(where: Path | Fetched) -> dict[str, Tensor]:
    try:
        if isinstance(where, Fetched):
            return safetensors.torch.load(where.content)
        return safetensors.torch.load_file(where)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{where}: not readable as safetensors: {error}") from error


def _read_checkpoint(where: Path | Fetched) -> object:
    """Whatever plain values and tensors `torch.save` wrote; raises ModelError where it is more than that."""
    try:
        return torch.load(_opened(where), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        reason = _reason(where, error)
        raise ModelError(
            f"{where}: not readable as a checkpoint of plain tensors: {reason} Pickled code is never run. Where the "
            "file was made, or where you trust it, write the network's tensors alone: "
            "`torch.save(network.state_dict(), FILE)`, or safetensors."
        ) from error


def _opened(where: Path | Fetched) -> io.BytesIO | Path:
    return io.BytesIO(where.content) if isinstance(where, Fetched) else where


def _reason(where: Path | Fetched, error: Exception) -> str:
    """Why a file is no checkpoint of tensors, in a sentence of our own: PyTorch's are long, and advise to run it."""
    try:
        # Looked up in the text of the pickle: nothing of it is run.
        found = torch.serialization.get_unsafe_globals_in_checkpoint(_opened(where))
    except Exception:  # of files by PyTorch before 1.6, which are no archives, and of damaged ones
        found = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return f"it also holds {', '.join(found[:3])}{more}, which would have to be unpickled."
    if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError):
        return f"{error.strerror}."
    return "it is damaged, or was not written by torch.save."


# ---- entries -------------------------------------------------------------------------------------------------------


def _is_state_dict(content: object) -> TypeGuard[dict[object, Tensor]]:
    return isinstance(content, dict) and bool(content) and all(isinstance(one, Tensor) for one in content.values())


def _entries(content: object) -> dict[str, object]:
    """What holds several values itself, by name."""
    known = content if isinstance(content, dict) else {}
    return {name: value for name, value in known.items() if isinstance(name, str) and isinstance(value, dict)}


def _path_to(content: object, names: Sequence[str]) -> list[str]:
    """The first of these entries that holds a state dict, itself or in such an entry of its own; [] for none."""
    for name in names:
        if name in _entries(content):
            path = [name, *_path_to(_at(content, [name]), names)]
            if _is_state_dict(_at(content, path)):
                return path
    return []


def _path_of(content: object, key: str) -> list[str]:
    return [key] if isinstance(content, dict) and key in content else key.split(".")


def _at(content: object, path: Sequence[str]) -> object:
    for step in path:
        content = content.get(step) if isinstance(content, dict) else None
    return content


def _what_it_holds(whole: object, key: str | None) -> str:
    if not isinstance(whole, dict):
        return f"holds no state dict (a mapping of names to tensors), but a {type(whole).__name__}."
    known = shorten(", ".join(map(str, whole)), 200)
    if key is not None:
        return f"holds no state dict (a mapping of names to tensors) at '{key}'. Its entries: {known}."
    possible = next((name for name, one in _entries(whole).items() if _is_state_dict(one)), None)
    hint = f" To take one, write weights: {{file: ..., key: {possible}}}." if possible else ""
    return f"holds no state dict (a mapping of names to tensors) under a name that is known. Entries: {known}.{hint}"


# ---- names ---------------------------------------------------------------------------------------------------------


def weights_of_network(state: StateDict, needed: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a file by the network's own names, of which it must have those that are `needed`.

    As they are, if that fits; else without the `module.` of DataParallel and the `_orig_mod.` of torch.compile; else
    without the one beginning, such as Lightning's `model.`, with which all are there. Nothing is renamed where no
    beginning fits: what is missing is for the caller to say.

    Raises ModelError for a wanted beginning that no name has, and where the network is there more than once.
    """
    tensors = _unwrapped(state.tensors, needed)
    if state.prefix is not None:
        inside = _inside(state.tensors, state.prefix) or _inside(tensors, state.prefix)
        if not inside:
            starts = {name.split(".", 1)[0] + "." for name in tensors}
            raise ModelError(
                f"{state.where}: no tensor's name begins with '{state.prefix}'.{did_you_mean(state.prefix, starts)}"
            )
        return _unwrapped(inside, needed)
    if _has(tensors, "", needed):
        return tensors
    whole = [prefix for prefix in _beginnings(tensors) if _has(tensors, prefix, needed)]
    if len(whole) > 1:
        raise ModelError(
            f"{state.where}: the network is in it as '{whole[0]}' and as '{whole[1]}'. Say which: weights: {{file: "
            f"{state.where}, prefix: {whole[0]}}}."
        )
    if not whole:
        return tensors
    inside = _inside(tensors, whole[0])
    if others := [name for name in tensors if not name.startswith(whole[0])]:
        say(f"{state.where}: what begins with {whole[0]} is taken, {len(others)} others are not, such as {others[0]}")
    return inside


def best_beginning(tensors: Mapping[str, Tensor], needed: Collection[str]) -> str:
    """What to try where names do not fit: the beginning with which most are there, as the end of a message."""
    found = {prefix: sum(prefix + name in tensors for name in needed) for prefix in _beginnings(tensors)}
    best = max(found, key=lambda prefix: found[prefix], default="")
    if found.get(best, 0) <= sum(name in tensors for name in needed):
        return ""
    return f" With prefix: {best} {found[best]} of {len(needed)} would be there."


def _has(tensors: Mapping[str, Tensor], prefix: str, needed: Collection[str]) -> bool:
    return all(prefix + name in tensors for name in needed)


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _unwrapped(tensors: dict[str, Tensor], needed: Collection[str]) -> dict[str, Tensor]:
    if _has(tensors, "", needed):
        return tensors
    bare = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        return tensors
    return {name: tensor for name, tensor in bare.items() if name != COUNTER}


def _beginnings(tensors: Mapping[str, Tensor]) -> list[str]:
    """Every `a.`, `a.b.`, ... that names begin with, in the order of the file."""
    return list(dict.fromkeys(name[: dot.end()] for name in tensors for dot in re.finditer(r"\.", name)))

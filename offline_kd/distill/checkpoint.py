"""How far a training run is, on disk: `last.ckpt`, and `previous.ckpt` in case that one is damaged.

A checkpoint is what `torch.save` writes, and a last line with the sha256 of that: one flipped bit would otherwise be
another student. It is read without running anything of it.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offline_kd.support.console import say
from offline_kd.support.errors import TrainingError
from offline_kd.support.places import WritablePlace
from offline_kd.support.ranks import from_first

MAX_BYTES = 2**40  # of a checkpoint
LAST_LINE = b"\noffline-kd checkpoint, sha256 "  # 64 digits and a line feed follow


@dataclass(frozen=True)
class Progress:
    """How far a run is, and what it has measured. Order and views need nothing: they are functions of the epoch."""

    epochs_done: int = 0
    steps_done: int = 0  # of the pass that is not over
    sums: list[float] = field(default_factory=list)  # of every term over these steps
    fallbacks: int = 0
    images: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    teacher: list[float] = field(default_factory=lambda: [0.0] * 4)  # what it said of these rows: `said_of`


class Stateful(Protocol):
    """What goes on from a state of plain values and tensors."""

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state_dict: dict[str, object]) -> object: ...


@dataclass(frozen=True)
class _Saved:
    identity: str  # of the run
    progress: Progress
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: Tensor  # of the CPU: for networks with dropout
    device_rng: Tensor | None  # of the GPU that the run is on
    beside: dict[str, dict[str, object]] = field(default_factory=dict)  # by name: what a student has beside its weights


def save_progress(
    out: WritablePlace,
    identity: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    progressed: Progress,
    beside: Mapping[str, Stateful] | None = None,
) -> None:
    """Everything that the rest of the run depends on; what was saved before becomes `previous.ckpt`."""
    device = next(network.parameters()).device
    content: dict[str, object] = {
        "identity": identity,
        "progress": json.dumps(asdict(progressed)),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "device_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    if beside:
        content["beside"] = {name: one.state_dict() for name, one in beside.items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    saved = buffer.getvalue()
    # The newest keeps its name until it is replaced whole: a full disk, or a kill at any point, leaves it good.
    if out.size("last.ckpt") is not None:
        out.copy("last.ckpt", "previous.ckpt")
    out.put("last.ckpt", saved + LAST_LINE + hashlib.sha256(saved).hexdigest().encode() + b"\n")


def load_progress(
    out: WritablePlace,
    identity: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    beside: Mapping[str, Stateful] | None = None,
) -> Progress | None:
    """Bring network, optimizer, generators and what is beside to where the run was; None where nothing was saved yet.

    Of several ranks the first one reads, and tells the others.

    Raises TrainingError when no checkpoint can be used, or when it is another run's.
    """
    saved = from_first(lambda: _newest_good(out))
    if saved is None:
        return None
    if saved.identity != identity:
        raise TrainingError(
            f"{out}: holds a run of another recipe, objective, seed or store (see its recipe.yaml), or one "
            "that earlier code began in another order. Give another --out folder, or delete this one."
        )
    try:
        network.load_state_dict(saved.network)
        optimizer.load_state_dict(saved.optimizer)
        for name, one in (beside or {}).items():
            one.load_state_dict(saved.beside[name])
        torch.set_rng_state(saved.rng.cpu())
        if device.type == "cuda" and saved.device_rng is not None:
            torch.cuda.set_rng_state(saved.device_rng.cpu(), device)
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{out}/last.ckpt: does not fit the network that the recipe builds ({_first_line(error)}). Its code has "
            "changed: give another --out folder, or delete this one."
        ) from error
    after = f"after epoch {saved.progress.epochs_done}"
    steps = f" and {saved.progress.steps_done} steps" if saved.progress.steps_done else ""
    say(f"{out}: resuming {after}{steps}")
    return saved.progress


def _newest_good(out: WritablePlace) -> _Saved | None:
    if all(out.size(name) is None for name in ("last.ckpt", "previous.ckpt")):
        return None
    try:
        return _read(out, "last.ckpt")
    except TrainingError as error:
        problem = str(error)
    try:
        saved = _read(out, "previous.ckpt")
    except TrainingError as error:
        raise TrainingError(
            f"{problem}, and {error}: this run cannot go on. Delete {out} to begin again, or give another --out folder."
        ) from error
    say(f"{problem}: going on from previous.ckpt")
    out.copy("previous.ckpt", "last.ckpt")  # or the next save would put the damaged one in place of the good one
    return saved


def _read(out: WritablePlace, name: str) -> _Saved:
    file = f"{out}/{name}"
    try:
        content = out.read(name, MAX_BYTES)
    except FileNotFoundError:
        raise TrainingError(f"{file} is missing") from None
    whole, last_line, promised = content.rpartition(LAST_LINE)
    if not last_line:
        raise TrainingError(f"{file} is torn, or no checkpoint of this version: it does not end with its sha256")
    if promised != f"{hashlib.sha256(whole).hexdigest()}\n".encode():
        raise TrainingError(f"{file} was changed after it was written: its sha256 is not the one that it ends with")
    try:
        saved = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
        return _Saved(**{**saved, "progress": Progress(**json.loads(saved["progress"]))})
    except Exception as error:  # whatever a file leads to that was made by somebody else
        raise TrainingError(f"{file} is no checkpoint of this version ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[:2])[:200] if lines else type(error).__name__

"""How far a training run is, on disk: `last.ckpt`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offline_kd.support.console import say
from offline_kd.support.errors import TrainingError
from offline_kd.support.files import flush_to_disk


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


def save_progress(
    out: Path, identity: str, network: nn.Module, optimizer: torch.optim.Optimizer, progressed: Progress
) -> None:
    """Everything that the rest of the run depends on."""
    partial = out / "last.ckpt.partial"
    torch.save(
        {
            "identity": identity,
            "progress": json.dumps(asdict(progressed)),
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),  # for networks with dropout
        },
        partial,
    )
    flush_to_disk(partial)
    partial.replace(out / "last.ckpt")


def load_progress(
    out: Path, identity: str, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Progress | None:
    file = out / "last.ckpt"
    if not file.is_file():
        return None
    saved = torch.load(file, map_location=device, weights_only=True)
    if saved["identity"] != identity:
        raise TrainingError(
            f"{out}: holds a run of another recipe, objective, seed or store (see its recipe.yaml). "
            "Give another --out folder, or delete this one."
        )
    network.load_state_dict(saved["network"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"].cpu())
    progressed = Progress(**json.loads(saved["progress"]))
    after = f"after epoch {progressed.epochs_done}"
    say(f"{out}: resuming {after}" + (f" and {progressed.steps_done} steps" if progressed.steps_done else ""))
    return progressed

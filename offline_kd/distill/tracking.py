"""What a run tells while it trains: a line an epoch for people, and the same figures for trackers of experiments.

A tracker is handed the history of the run when it is opened, and every epoch after that when it is over. It shows no
epoch twice: a run that goes on goes on in the same curves, and what a kill kept from them is made up for.
"""

import contextlib
import importlib.util
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from offline_kd.distill.results import Run
from offline_kd.recipe import dump_recipe
from offline_kd.support.console import duration_text, rate_text
from offline_kd.support.errors import RecipeError, TrainingError, did_you_mean
from offline_kd.support.places import Folder
from offline_kd.support.ranks import rank

Line = Mapping[str, Any]  # of `metrics.jsonl`
Write = Callable[[Line], None]

OF_STUDENTS = {"top1": "top-1", "map": "mAP", "knn_top1": "k-NN top-1", "probe_top1": "linear probe top-1"}  # percent
MEASURED = [f"{name}{end}" for name in (*OF_STUDENTS, "nll", "ece", "bce") for end in ("", "_ema")]
WHERE = {"epoch": "epoch", "lr": "lr"} | {
    f"{begin}{name}": f"val/{name}" for name in MEASURED for begin in ("", "val_")
}
FAMILIES = {"loss_": "train/loss/", "weight_": "train/weight/", "teacher_": "teacher/"}
ID_FILE = "tracking.id"  # what the run is called by trackers, however often it goes on


# ---- for people ----------------------------------------------------------------------------------------------------


def epoch_line(run: Run, line: Line, seconds_left: float) -> str:
    """What the epoch has measured, as one readable line; losses are means of every term, without its weight."""
    losses = [f"{name.removeprefix('loss_')} {value:.4g}" for name, value in line.items() if name.startswith("loss_")]
    left = f", {duration_text(seconds_left)} left" if seconds_left else ""
    accuracies = []
    for begin, split in (("val_", "validation "), ("", "")):
        for figure, called in OF_STUDENTS.items():
            name = f"{begin}{figure}"
            if name in line:
                average = f" (average of weights {line[f'{name}_ema']:.2f} %)" if f"{name}_ema" in line else ""
                accuracies.append(f"{split}{called} {line[name]:.2f} %{average}")
    return (
        f"{run.objective}, seed {run.seed}: epoch {line['epoch']} of {run.recipe.training.epochs}, "
        f"loss {', '.join([*losses, *accuracies])}, lr {line['lr']:.3g}, "
        f"{rate_text(line['images_per_second'], 'images')}{left}"
    )


# ---- for trackers --------------------------------------------------------------------------------------------------


def check_tracker(log: str | None) -> None:
    """Raise RecipeError for a tracker that is not known or not installed, before anything is trained."""
    if log is None:
        return
    if log not in TRACKERS:
        raise RecipeError(f"--log {log}: no such tracker.{did_you_mean(log, TRACKERS)}")
    found = importlib.util.find_spec(log)
    if found is None or found.origin is None:  # the latter: a folder of that name, such as wandb makes
        raise RecipeError(f"--log {log}: {log} is not installed. Install it: pip install 'offline-kd[{log}]'")


@contextmanager
def tracking(run: Run, history: Sequence[Line]) -> Iterator[Write]:
    """What takes every epoch that is over, after those of `history`. Of several ranks the first one alone is heard.

    Raises TrainingError where the tracker cannot begin.
    """
    if run.log is None or rank() > 0:
        yield lambda line: None
        return
    with TRACKERS[run.log](run) as write:
        for line in history:
            write(line)
        yield write


def figures(line: Line) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl`, by the names that every tracker shows, such as `train/loss/kd`.

    What one chooses by is `val/top1`: of the validation rows, where there are any, so that the evaluation split is
    `test/top1` then.
    """
    shown = {name: _shown(name) for name, value in line.items() if isinstance(value, int | float)}
    if any(f"val_{name}" in line for name in OF_STUDENTS):
        shown |= {name: f"test/{name}" for name in MEASURED if name in line}
    return {name: line[own] for own, name in shown.items()}


def _shown(name: str) -> str:
    if name in WHERE:
        return WHERE[name]
    family = next((family for family in FAMILIES if name.startswith(family)), None)
    return f"train/{name}" if family is None else FAMILIES[family] + name.removeprefix(family)


@contextmanager
def _tensorboard(run: Run) -> Iterator[Write]:
    """Event files in OUT/tensorboard. Every start writes the whole history, and voids what was written before it."""
    from torch.utils.tensorboard import SummaryWriter

    if not isinstance(run.out, Folder):
        raise TrainingError(f"--log tensorboard: writes a folder, and {run.out} is a bucket. Give a folder as --out.")
    with SummaryWriter(run.out.path / "tensorboard", purge_step=0) as writer:
        writer.add_text("recipe", f"```yaml\n{dump_recipe(run.recipe)}```")

        def write(line: Line) -> None:
            for name, value in figures(line).items():
                writer.add_scalar(name, value, line["epoch"])
            writer.flush()  # a kill takes nothing that was told

        yield write


@contextmanager
def _wandb(run: Run) -> Iterator[Write]:
    """A run of Weights & Biases, which goes on under its id. Offline every start writes a folder with all of it."""
    import wandb

    name, identity = _called(run)
    where = run.out.path if isinstance(run.out, Folder) else None
    settings = wandb.Settings(console="off")  # the bar stays with us
    about = run.recipe.model_dump(mode="json") | {"objective": run.objective, "seed": run.seed}
    try:
        opened = wandb.init(
            project=run.recipe.name, name=name, id=identity, resume="allow", dir=where, config=about, settings=settings
        )
    except wandb.errors.Error as error:
        raise TrainingError(
            f"--log wandb: cannot begin ({' '.join(str(error).split()):.300}). Log in with `wandb login`, or set "
            "WANDB_MODE=offline."
        ) from error
    first = opened.step

    def write(line: Line) -> None:
        if line["epoch"] >= first:
            opened.log(figures(line), step=line["epoch"])

    with opened:
        yield write


@contextmanager
def _trackio(run: Run) -> Iterator[Write]:
    """A run of Trackio, which goes on under its name."""
    import trackio

    name, identity = _called(run)
    about = run.recipe.model_dump(mode="json") | {"objective": run.objective, "seed": run.seed}
    with contextlib.redirect_stdout(sys.stderr):
        opened = trackio.init(project=run.recipe.name, name=f"{name}-{identity}", resume="allow", config=about)
    first = opened._next_step  # after what it has; told nowhere else

    def write(line: Line) -> None:
        if line["epoch"] >= first:
            opened.log(figures(line), step=line["epoch"])

    try:
        yield write
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()


TRACKERS: dict[str, Callable[[Run], contextlib.AbstractContextManager[Write]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _called(run: Run) -> tuple[str, str]:
    """Name and id of a run: of its directory, and one that is drawn once and kept there."""
    if run.out.size(ID_FILE) is None:
        run.out.put(ID_FILE, secrets.token_hex(8).encode())
    return str(run.out).rstrip("/").rpartition("/")[2] or run.objective, run.out.read(ID_FILE).decode()

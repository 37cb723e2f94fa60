"""Ends a process at a durable call of an operation on a store, runs the same command again, and looks at what is there.

    python crash_points.py FOLDER PER_OPERATION [OPERATION ...]

PER_OPERATION: how many points of every operation are tried, spread over its kinds of calls; 0 for every point. Prints a
JSON object per operation: how many durable calls it makes, which were tried, and what went wrong. A process is forked
for every attempt, before torch or zarr have begun any thread.
"""

import importlib
import io
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from offline_kd.cli import main as cli
from offline_kd.data.packing import digits_samples, pack
from offline_kd.models.networks import build

ENDED = 77
IMPORTED_ONCE = [
    f"offline_kd.{name}"
    for name in ("cache.pipeline", "cli.cache", "cli.store", "store.sync", "store.card", "views.operations.geometry")
]
CALLS = {"link": os, "replace": os, "rename": os, "unlink": os, "rmdir": os, "mkdir": os, "fsync": os, "write": os}
RECIPE = {
    "name": "tiny",
    "data": {"dataset": "tiny", "normalisation": {"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]}},
    "teacher": {"model": "networks:small", "model_args": {"width": 2}},
    "views": {"kind": "pad_crop_flip", "padding": 1, "flip": False, "count": 2},
    "capture": {"codec": {"name": "f16"}, "views_per_group": 2, "fidelity_rows": 4},
    "student": {"model": "networks:small"},
    "training": {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "cosine"}},
    "objectives": {"kd": [{"term": "kd", "temperature": 4}]},
}
CODED = {"module": "body.5", "code": {"name": "pq", "subspaces": 2, "centroids": 2}}
TAP = {"kind": "templates", "module": "body.5", "templates": 2, "top": 1}


def damage(folder: Path) -> None:
    """Flip a bit of an object, lose a ledger entry and the card."""
    (file,) = (folder / "store/targets.zarr/logits/values/c/0/0").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    (folder / "store/ledger/000001-00000-00002.json").unlink()
    (folder / "store/index.html").unlink()


def begin_copy(folder: Path) -> None:
    """A copy that is damaged, and does not open."""
    shutil.copytree(folder / "store", folder / "copy")
    (folder / "copy/manifest.json").unlink()
    (folder / "copy/ledger/000001-00000-00002.json").write_bytes(b"{}")


def unfinish(folder: Path) -> None:
    for name in ("manifest.json", "README.md", "index.html"):
        (folder / "store" / name).unlink()


# What makes the state that each operation begins with: a store, or nothing; then the command; then what it makes.
Operation = tuple[bool, Callable[[Path], None] | None, list[str], str]
CAPTURE = ["cache-teacher", "{inputs}/recipe.yaml", "--store", "{folder}/store"]
OPERATIONS: dict[str, Operation] = {
    "capture": (False, None, CAPTURE, "store"),
    "growth": (True, None, ["cache-teacher", "{inputs}/more.yaml", "--store", "{folder}/store"], "store"),
    "add": (True, None, ["cache-teacher", "{inputs}/other.yaml", "--store", "{folder}/store", "--add"], "store"),
    "finish": (True, unfinish, CAPTURE, "store"),
    "push": (True, None, ["store", "push", "{folder}/store", "{folder}/copy"], "copy"),
    "pull": (True, begin_copy, ["store", "pull", "{folder}/store", "{folder}/copy"], "copy"),
    "repair": (True, damage, ["store", "repair", "{folder}/store", "{inputs}/recipe.yaml"], "store"),
}


def make_inputs(folder: Path) -> None:
    """Twelve images in two tars, three recipes, two teachers."""
    samples = digits_samples()
    splits = {"train": pack(samples["train"][:12], folder / "data/tiny", "train", 6)}
    splits["test"] = pack(samples["test"][:6], folder / "data/tiny", "test", 6)
    described = {
        "folder": "tiny",
        "source": "some of scikit-learn's digits",
        "classes": [str(digit) for digit in range(10)],
        "splits": {name: {"tars": [tar.model_dump(mode="json") for tar in tars]} for name, tars in splits.items()},
    }
    (folder / "data_manifest.yaml").write_text(yaml.safe_dump({"manifest_version": 1, "datasets": {"tiny": described}}))
    for seed, name in enumerate(("tiny", "other")):
        torch.manual_seed(seed)
        torch.save(build("networks:small", 10, {"width": 2}).state_dict(), folder / f"{name}.pt")
    more = {"views": {"count": 4}, "capture": {"decisions": {"late": TAP}, "features": {"kept": CODED}}}
    for file, name, changes in (("recipe", "tiny", {}), ("more", "tiny", more), ("other", "other", {})):
        recipe: dict[str, Any] = {**RECIPE, "name": name}
        for field, values in {**changes, "teacher": {"weights": str(folder / f"{name}.pt")}}.items():
            recipe[field] = {**recipe[field], **values}
        (folder / f"{file}.yaml").write_text(yaml.safe_dump(recipe))


class Attempts:
    """Runs commands in forked processes, of which one may end at its n-th durable call."""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs

    def command(self, template: list[str], folder: Path) -> list[str]:
        where = ["--manifest", str(self.inputs / "data_manifest.yaml"), "--data-root", str(self.inputs / "data")]
        return [*(part.format(inputs=self.inputs, folder=folder) for part in template), *where]

    def run(self, commands: list[list[str]], end_at: int = 0, calls: Path | None = None) -> tuple[int, str]:
        """The exit status of the first command that fails, 0 if none, ENDED if the process was ended; what was said.

        Args:
            end_at: the durable call before which the process ends, from 1 on; of one that writes, in the middle of it.
            calls: where to write the kinds of all durable calls.
        """
        said = self.inputs / "said.txt"
        child = os.fork()
        if child == 0:
            try:
                os._exit(in_child(commands, said, end_at, calls))
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()


def in_child(commands: list[list[str]], said: Path, end_at: int, calls: Path | None) -> int:
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    kinds: list[str] = []
    os.fsync = lambda descriptor: None  # processes end here, not machines
    count_durable_calls(kinds, end_at)
    status = 0
    for command in commands:
        try:
            cli.main(command, standalone_mode=True)
        except SystemExit as done:
            status = int(done.code or 0)
        if status:
            return status
    if calls:
        calls.write_text(json.dumps([*kinds]))
    return status


class Counted(io.BufferedWriter):
    """A file that is written before it gets its name."""


def count_durable_calls(kinds: list[str], end_at: int) -> None:
    lock = threading.Lock()

    def counted(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            with lock:
                kinds.append(kind)
                if len(kinds) == end_at:
                    if kind == "write_file":
                        file, content = arguments
                        call(file, content[: len(content) // 2])
                        file.flush()
                    os._exit(ENDED)
            return call(*arguments, **options)

        return instead

    for name, module in CALLS.items():
        setattr(module, name, counted(name, getattr(module, name)))
    os.remove = os.unlink
    Counted.write = counted("write_file", io.BufferedWriter.write)
    open_file = Path.open

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return Counted(io.FileIO(path, mode)) if mode == "xb" else open_file(path, mode, *arguments, **options)

    Path.open = opened


def files_in(folder: Path) -> set[str]:
    """Every file and folder, but for the empty folder of leases."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*")} - {"leases"}


def chosen_points(kinds: list[str], count: int, first: int) -> list[int]:
    """Which durable calls to end at: all, or so many, at random, of one kind after the other from the `first` on."""
    if not count:
        return list(range(1, len(kinds) + 1))
    moment, names = random.Random(first), sorted(set(kinds))
    chosen: set[int] = set()
    for turn in range(count):
        kind = names[(first + turn) % len(names)]
        chosen.add(moment.choice([n for n, one in enumerate(kinds, 1) if one == kind]))
    return sorted(chosen)


def try_operation(attempts: Attempts, name: str, base: Path, folder: Path, count: int) -> dict[str, object]:
    has_store, prepare, template, made = OPERATIONS[name]
    start = folder / f"{name}-start"
    start.mkdir()
    if has_store:
        shutil.copytree(base / "store", start / "store")
    if prepare:
        prepare(start)
    work = folder / f"{name}-work"
    command, calls = attempts.command(template, work), folder / "calls.json"
    verify = ["store", "verify", str(work / made)]
    shutil.copytree(start, work)
    status, said = attempts.run([command, verify], calls=calls)
    assert status == 0, f"{name}, undisturbed: {said}"
    kinds = json.loads(calls.read_text())
    whole = files_in(work / made)
    digest = json.loads((work / made / "manifest.json").read_text())["digest"]
    failures = []
    points = chosen_points(kinds, count, count * list(OPERATIONS).index(name))
    for point in points:
        shutil.rmtree(work)
        shutil.copytree(start, work)
        status, said = attempts.run([command], end_at=point)
        # Threads and waiting make the number of calls differ by a few.
        if status != ENDED and point < len(kinds) - 8:
            failures.append(f"{point} ({kinds[point - 1]}): was not ended: {status} {said}")
            continue
        status, said = attempts.run([command, verify])
        if status:
            failures.append(f"{point} ({kinds[point - 1]}): afterwards: {status} {said}")
        else:
            if left := sorted(files_in(work / made) ^ whole):
                failures.append(f"{point} ({kinds[point - 1]}): left lying, or missing: {left}")
            if json.loads((work / made / "manifest.json").read_text())["digest"] != digest:
                failures.append(f"{point} ({kinds[point - 1]}): another digest")
    return {
        "operation": name,
        "calls": len(kinds),
        "kinds": sorted(set(kinds)),
        "tried": len(points),
        "failures": failures,
    }


def main(folder: Path, count: int, names: list[str]) -> None:
    inputs = folder / "inputs"
    make_inputs(inputs)
    attempts = Attempts(inputs)
    base = folder / "base"
    status, said = attempts.run([attempts.command(CAPTURE, base)])
    assert status == 0, said
    for name in names or list(OPERATIONS):
        print(json.dumps(try_operation(attempts, name, base, folder, count)), flush=True)


if __name__ == "__main__":
    for module in IMPORTED_ONCE:
        importlib.import_module(module)
    Image.init()
    # Drawing takes most of the time of these small captures, and makes no file.
    Figure.savefig = lambda figure, file, **options: file.write(b"<svg/>")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

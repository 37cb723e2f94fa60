"""A training step from what is kept on the device, beside the same step from a stream, with and without a teacher.

    offline-kd run pipelines/digits.yaml --out runs/digits
    python tests/bench_resident.py runs/digits/recipe.yaml kd --store runs/digits/store

Whole epochs in turn, round after round, with decoded images in memory; ratios are taken within a round. The first epoch
of every part, which reads, is not counted, but printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.loader import Loader
from offline_kd.distill.loop import Run, train_step
from offline_kd.distill.loss import term_weights
from offline_kd.distill.optimisation import make_optimizer, set_learning_rate
from offline_kd.distill.student import new_student
from offline_kd.distill.teacher_signal import no_signal, stored_signal
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.objectives.ce import CE
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.store.opening import open_store
from offline_kd.support.places import Folder

ROOT = Path(__file__).parent.parent


def parts_of(recipe: Recipe, objective: str, store_path: Path, device: torch.device) -> dict[str, Callable[[int], int]]:
    """What to time, by name: each goes through one epoch and says how many steps that were."""
    manifest = load_manifest(ROOT / "data_manifest.yaml")
    images = training_images(recipe, manifest, data_roots([recipe.data.root] if recipe.data.root else []))
    store = open_store(store_path)
    found: dict[str, Callable[[int], int]] = {}
    for what, stores, terms in (("plain", [], [CE(term="ce")]), ("store", [store], recipe.objectives[objective])):
        source = source_of(recipe, images, stores, terms, store.identity.groups)
        ask = stored_signal(stores, terms, device) if stores else no_signal
        for choice in ("never", "always"):
            training = recipe.training.model_copy(update={"resident": choice})
            loader = make_loader(recipe.model_copy(update={"training": training}), source, 0, device)
            student = new_student(recipe, images, 0, device, terms)
            student.network.train()
            optimizer = make_optimizer(recipe.training, student.network)
            set_learning_rate(optimizer, 1e-4)  # the speed is measured, not the student
            run = Run(recipe, "bench", terms, 0, Folder(Path()), device)
            weights = term_weights(terms, 100, 200, device)

            def train(
                epoch: int, loader=loader, student=student, optimizer=optimizer, run=run, weights=weights, ask=ask
            ) -> int:
                for batch in loader.epoch(epoch):
                    train_step(run, student, optimizer, batch, ask(batch), weights)
                return len(loader)

            def load(epoch: int, loader: Loader = loader) -> int:
                for _ in loader.epoch(epoch):
                    pass
                return len(loader)

            how = "streamed" if choice == "never" else "resident"
            found[f"{what} loader, {how}"], found[f"{what} step, {how}"] = load, train
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("objective")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    recipe, device = load_recipe(arguments.recipe, arguments.changes), torch.device(arguments.device)
    parts = parts_of(recipe, arguments.objective, arguments.store, device)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for epoch in range(arguments.rounds + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            steps = part(epoch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - started) / steps)
    for name, (first, *others) in seconds.items():
        low, middle, high = statistics.quantiles(others, n=4)
        print(f"{name:26} {1e3 * middle:8.3f} ms ({low * 1e3:.3f} to {high * 1e3:.3f}), first epoch {1e3 * first:.3f}")
    for above, below in (
        ("store step, resident", "store step, streamed"),
        ("store step, resident", "plain step, resident"),
        ("store step, streamed", "plain step, streamed"),
        ("store step, resident", "plain step, streamed"),
        ("store loader, resident", "store loader, streamed"),
        ("plain loader, resident", "plain loader, streamed"),
    ):
        ratios = [a / b for a, b in zip(seconds[above][1:], seconds[below][1:], strict=True)]
        print(f"{above} / {below}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()

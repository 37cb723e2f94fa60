"""What a shared store saves: core-seconds of the first students from a store and with the live teacher; ten, derived.

    OFFLINE_KD_DATA=FOLDER python tests/bench_sharing.py pipelines/cifar100_filtered/lite0_resnet8_codecs.yaml kd \
        --set views.count=8 --set capture.views_per_group=4 --set training.epochs=8 --out runs/sharing

CPU time of this process with all its threads, so that other work on the machine hardly counts; wall-clock is shown
beside. Every student is trained from nothing, with a seed of its own. What is finished is not done again: its figures
are kept in OUT/seconds.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.training import distill
from offline_kd.recipe import load_recipe

ROOT = Path(__file__).parent.parent
STUDENTS, DERIVED = 3, 10
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("objective")
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe, out = load_recipe(arguments.recipe, arguments.sets), arguments.out
    manifest, roots, file = load_manifest(ROOT / "data_manifest.yaml"), data_roots(), out / "seconds.json"
    out.mkdir(parents=True, exist_ok=True)
    taken: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}

    def timed(name: str, work: Callable[[], object]) -> list[float]:
        """Core-seconds and seconds."""
        if name not in taken:
            cores, wall = time.process_time(), time.perf_counter()
            work()
            taken[name] = [time.process_time() - cores, time.perf_counter() - wall]
            file.write_text(json.dumps(taken))
        print(f"{name}: {taken[name][0]:.0f} core-seconds, {taken[name][1]:.0f} s", flush=True)
        return taken[name]

    def student(name: str, seed: int, **options: object) -> None:
        distill(
            recipe, manifest, roots, out / f"{name}-{seed}", CPU, objective=arguments.objective, seed=seed, **options
        )

    def online(seed: int) -> None:
        student("online", seed, online=True)

    def stored(seed: int) -> None:
        student("store", seed, stores=[str(out / "teacher")])

    once = timed("store", lambda: cache_teacher(recipe, manifest, roots, out / "teacher", CPU))[0]
    from_store = [
        timed(f"student {seed} from the store", lambda seed=seed: stored(seed))[0] for seed in range(STUDENTS)
    ]
    live = [
        timed(f"student {seed} with the live teacher", lambda seed=seed: online(seed))[0] for seed in range(STUDENTS)
    ]
    print("students   from the store   with the live teacher   ratio")
    for count in (*range(1, STUDENTS + 1), DERIVED):
        rest = count - STUDENTS
        ours, theirs = (
            sum(part[:count]) + max(0, rest) * sum(part) / STUDENTS + before
            for part, before in ((from_store, once), (live, 0.0))
        )
        print(f"{count:8}   {ours:14.0f}   {theirs:21.0f}   {theirs / ours:5.2f}" + " (derived)" * (rest > 0))


if __name__ == "__main__":
    main()

"""Is training from a store training with the live teacher? Students in pairs by seed, on crops, RandAugment and cutmix.

    python tests/bench_offline.py --out runs/offline --seeds 24

Everything of pipelines/offline_online.yaml: the teacher is trained, a store is captured in every codec, and for
every seed a student learns from each store and one from the live teacher. What is finished is not done again, so the
program may be ended and started with more seeds.
"""

import argparse
from pathlib import Path

import torch

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.differences import difference
from offline_kd.distill.run import pack_digits
from offline_kd.distill.teacher_training import TEACHER_FILE, train_teacher
from offline_kd.distill.training import distill
from offline_kd.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "pipelines/offline_online.yaml"
CODECS = {"f32": "{name: f32}", "f16": "{name: f16}", "int 8": "{name: int, bits: 8}", "klt": "{name: klt, step: 1}"}
CPU = torch.device("cpu")


def recipe_with(weights: Path, codec: str) -> Recipe:
    return load_recipe(RECIPE, [f"teacher.weights={weights}", f"capture.codec={codec}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=24)
    arguments = parser.parse_args()
    out, manifest = arguments.out.absolute(), load_manifest(ROOT / "data_manifest.yaml")
    if not (out / "data").exists():
        pack_digits(out / "data" / "digits")
    roots = data_roots([out / "data"])
    train_teacher(load_recipe(RECIPE), manifest, roots, out / "teacher", CPU)
    weights = out / "teacher" / TEACHER_FILE
    for name, codec in CODECS.items():
        cache_teacher(recipe_with(weights, codec), manifest, roots, out / name / "store", CPU)
    top1: dict[str, dict[int, float]] = {name: {} for name in ("live", *CODECS)}
    for seed in range(arguments.seeds):
        for name in top1:
            options = {"online": True} if name == "live" else {"stores": [str(out / name / "store")]}
            found = distill(
                recipe_with(weights, CODECS.get(name, CODECS["f32"])), manifest, roots, out / name / f"seed{seed}", CPU,
                seed=seed, **options,
            )  # fmt: skip
            top1[name][seed] = found.top1
        print(f"after {seed + 1} seeds: live {sum(top1['live'].values()) / (seed + 1):.2f} %", flush=True)
        for name in CODECS:
            apart = difference(top1[name], top1["live"])
            half = "" if apart.half_width is None else f" +- {apart.half_width:.2f}"
            equal = sum(top1[name][one] == top1["live"][one] for one in top1["live"])
            print(
                f"  {name:6} less live: {apart.mean:+.2f}{half} points, the same in {equal} of {seed + 1}", flush=True
            )


if __name__ == "__main__":
    main()

"""Training with images and store in a bucket against training from local folders: images per second, in one run.

    OFFLINE_KD_DATA=FOLDER .venv/bin/python tests/bench_remote.py

Small parts of CIFAR-10 (exact views) and of the ImageNet sample (JPEGs, resampled views of 64 pixels) in tars of their
own, which a real S3 server on loopback (moto, on the same cores) hands out 5 ms after it was asked; the student is a
ResNet-8, so that reading shows, and the teacher another that knows nothing. Local and remote runs alternate. A run
begins with an empty local cache and keeps no image in memory: each epoch reads every tar and another view group.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from test_remote import run_server

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cli.main import keep_freed_memory
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Dataset, Manifest, Split, data_roots, folders_of, load_manifest, locate
from offline_kd.data.packing import pack
from offline_kd.data.tars import read_tar
from offline_kd.distill.training import distill
from offline_kd.models.networks import build
from offline_kd.recipe import Recipe
from offline_kd.store.sync import copy_store
from offline_kd.support.console import say, show_table

ROOT, ROUNDS, LATENCY, EPOCHS = Path(__file__).parent.parent, 3, 0.005, 3
CPU = torch.device("cpu")
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
# Per dataset: split, images, images a tar, and the recipe's own part.
PARTS = {
    "cifar10": ("train", 1000, 250, {
        "views": {"kind": "pad_crop_flip", "padding": 4, "count": EPOCHS},
        "student": {"model": "cifar:resnet8"},
    }),
    "imagenet_sample": ("val", 120, 30, {
        "views": {"kind": "random_resized_crop", "size": 64, "count": EPOCHS},
        "student": {"model": "cifar:resnet8"},
    }),
}  # fmt: skip


def main() -> None:
    keep_freed_memory()  # as the command line does
    known = load_manifest(ROOT / "data_manifest.yaml")
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name, run_server(Path(name)) as server:
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": server.endpoint,
        }
        for dataset in PARTS:
            server.control(latency=0)
            folder = Path(name) / dataset
            small = _packed(known, dataset, [folder, *data_roots(["s3://team"])[:1]])
            manifest, weights = Manifest(datasets={dataset: small}), folder / "teacher.safetensors"
            state = build("cifar:resnet8", len(small.classes), {}).state_dict()
            safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, weights)
            recipe = _recipe(dataset, weights)
            cache_teacher(recipe, manifest, [folder], folder / "store", CPU)
            copy_store(folder / "store", f"s3://team/{dataset}/store")
            server.control(latency=LATENCY)
            rows += _compared(recipe, manifest, folder)
    title = f"images per second, latency {1000 * LATENCY:.0f} ms, medians of {ROUNDS} rounds"
    show_table(title, ["dataset", "epochs", "local", "bucket", "ratio", "least", "most"], rows)


def _packed(known: Manifest, name: str, roots: Sequence[Root]) -> Dataset:
    """The first images of a dataset in tars of their own, below every root, and the first of them for evaluation."""
    split, count, per_tar, _ = PARTS[name]
    whole, samples = known.dataset(name), []
    for tar in whole.splits[split].tars:
        samples += read_tar(locate(tar.file, folders_of(whole, data_roots())))[0][: count - len(samples)]
        if len(samples) == count:
            break
    for root in roots:
        below = folders_of(Dataset(folder=name, classes=whole.classes, splits=whole.splits), [root])[0]
        splits = {
            "train": Split(tars=pack(samples, below, "train", per_tar)),
            "test": Split(tars=pack(samples[:per_tar], below, "test", per_tar)),
        }
    return Dataset(folder=name, classes=whole.classes, splits=splits)


def _recipe(dataset: str, weights: Path) -> Recipe:
    _, _, per_tar, own = PARTS[dataset]
    return Recipe.model_validate({
        "name": f"bench-{dataset}",
        "data": {"dataset": dataset, "evaluation": "test", "normalisation": HALF, "keep_bytes": 0},
        "teacher": {"model": "cifar:resnet8", "weights": str(weights), "crop": {"size": 64, "resize": 72}},
        "capture": {"codec": {"name": "f16"}, "views_per_group": 1, "fidelity_rows": 100},
        "training": {
            "epochs": EPOCHS, "batch_size": per_tar // 2, "pool_blocks": 2,
            "optimizer": {"name": "sgd", "lr": 0.01}, "schedule": {"name": "cosine"},
        },
        "objectives": {"kd": [{"term": "kd", "temperature": 4}]},
        **own,
    })  # fmt: skip


def _compared(recipe: Recipe, manifest: Manifest, folder: Path) -> list[list[str]]:
    """Rows of the table: the first epoch, and those after it."""
    speeds: dict[str, list[tuple[float, float]]] = {"local": [], "bucket": []}
    places = {
        "local": ([folder], str(folder / "store")),
        "bucket": (data_roots(["s3://team"])[:1], f"s3://team/{folder.name}/store"),
    }
    for turn in range(ROUNDS):
        os.environ["OFFLINE_KD_CACHE"] = str(folder / f"downloads-{turn}")
        for where, (roots, store) in places.items():
            out = folder / f"{where}-{turn}"
            distill(recipe, manifest, roots, out, CPU, objective="kd", stores=[store])
            epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            images, seconds = ([epoch[name] for epoch in epochs] for name in ("images", "seconds"))
            speeds[where].append((images[0] / seconds[0], sum(images[1:]) / sum(seconds[1:])))
            say(f"{folder.name}, {where}: {speeds[where][-1][0]:.0f}, then {speeds[where][-1][1]:.0f} images/s")
    rows = []
    for index, epochs in enumerate(("first", "after")):
        here, there = ([speed[index] for speed in speeds[where]] for where in ("local", "bucket"))
        ratios = sorted(b / a for a, b in zip(here, there, strict=True))
        values = [f"{statistics.median(one):.0f}" for one in (here, there)]
        shown = [f"{one:.3f}" for one in (statistics.median(ratios), ratios[0], ratios[-1])]
        rows.append([folder.name, epochs, *values, *shown])
    return rows


if __name__ == "__main__":
    main()

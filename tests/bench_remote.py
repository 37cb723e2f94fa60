"""Training from a bucket against training from the local folder: images per second, in one run.

    OFFLINE_KD_DATA=FOLDER .venv/bin/python tests/bench_remote.py

CIFAR-10, two tars, 8 views in groups of 2, ResNet-56 -> ResNet-20; a real S3 server on loopback (moto) that waits 5
ms before every answer. Runs alternate; nothing is kept between them, and every run's epochs read all view groups once.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from test_remote import run_server

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cli.main import keep_freed_memory
from offline_kd.data.manifest import data_roots, load_manifest
from offline_kd.distill.training import distill
from offline_kd.recipe import load_recipe
from offline_kd.store.sync import copy_store
from offline_kd.support.console import say, show_table

ROOT, ROUNDS, LATENCY = Path(__file__).parent.parent, 3, 0.005
OVERRIDES = ["data.tars=[0,1]", "views.count=8", "capture.views_per_group=2", "training.epochs=4"]


def main() -> None:
    keep_freed_memory()  # as the command line does
    device = torch.device("cpu")
    recipe = load_recipe(ROOT / "pipelines/cifar10/resnet56_resnet20_cpu.yaml", OVERRIDES)
    manifest, roots = load_manifest(ROOT / "data_manifest.yaml"), data_roots()
    speeds: dict[str, list[float]] = {"local": [], "bucket": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with run_server(folder) as server:
            os.environ |= {
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": server.endpoint,
            }
            cache_teacher(recipe, manifest, roots, folder / "store", device)
            copy_store(folder / "store", "s3://team/store")
            server.control(latency=LATENCY)
            for turn in range(ROUNDS):
                for where, store in (("local", str(folder / "store")), ("bucket", "s3://team/store")):
                    os.environ["OFFLINE_KD_CACHE"] = str(folder / f"downloads-{turn}")
                    out = folder / f"{where}-{turn}"
                    distill(recipe, manifest, roots, out, device, objective="kd", stores=[store])
                    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                    # The first epoch decodes the images, for both alike.
                    speeds[where].append(
                        sum(epoch["images"] for epoch in epochs) / sum(epoch["seconds"] for epoch in epochs)
                    )
                    say(f"{where}: {speeds[where][-1]:.0f} images/s")
    ratio = statistics.median(there / here for there, here in zip(speeds["bucket"], speeds["local"], strict=True))
    rows = [[where, f"{statistics.median(values):.0f}"] for where, values in speeds.items()]
    show_table(
        f"images per second, latency {1000 * LATENCY:.0f} ms", ["store", "value"], [*rows, ["ratio", f"{ratio:.3f}"]]
    )


if __name__ == "__main__":
    main()

"""`offline-kd cache-teacher`: stage 1."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from offline_kd.cli.options import EngineChoice, Inputs, engine_options, read_inputs, recipe_options
from offline_kd.support.errors import RecipeError
from offline_kd.support.job_array import told_by

if TYPE_CHECKING:
    from offline_kd.cache.pipeline import Worker
    from offline_kd.store.schema import Fidelity


@click.command("cache-teacher")
@recipe_options
@click.option("--store", "store", required=True, help="Folder or URL (s3://, gs://, az://) of the store.")
@click.option(
    "--worker", metavar="I/N", help="Do the blocks of worker I (from 0) of N only.  [default: as a job array says]"
)
@engine_options
@click.option("--add", is_flag=True, help="Add this teacher to a store of another one, over the same views.")
def command(
    recipe_path: Path, store: str, worker: str | None, add: bool, engine: EngineChoice, **inputs: Unpack[Inputs]
) -> None:
    """Stage 1: ask the teacher about every view of every image, once. The same command again resumes.

    Several processes may run it on one store, on any machines: blocks that one works on are left alone by the others,
    and taken over when it dies. A recipe with more views, or more decisions or features, adds them to the store.

    \b
    offline-kd cache-teacher cifar10/resnet56_resnet20_cpu --store stores/cifar10-resnet56
    offline-kd cache-teacher recipe.yaml --store s3://team/stores/cifar10 --worker 3/16
    torchrun --nproc-per-node 8 -m offline_kd cache-teacher recipe.yaml --store stores/cifar10
    offline-kd cache-teacher recipe.yaml --store s3://team/stores/cifar10 --engine ray --ray-address auto
    """
    from offline_kd.cache.pipeline import cache_teacher
    from offline_kd.support.console import show_table

    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    finished = cache_teacher(recipe, manifest, roots, store, device, worker=which_worker(worker), add=add, **engine)
    if finished is None:
        return
    fidelity = finished.fidelity.get(recipe.name) or next(iter(finished.fidelity.values()))
    show_table(
        f"store {store}",
        ["", "value"],
        [
            ["views of every image", f"{max(finished.views.values()):,}"],
            ["bytes", f"{finished.total_bytes:,}"],
            ["rows asked again", fidelity.looked_at],
            *_lost(fidelity),
            ["digest", f"sha256:{finished.digest}"],
        ],
    )


def _lost(fidelity: Fidelity) -> list[list[str]]:
    """What the codec has changed: as a softmax sees it, or sigmoids; of a teacher without logits, of features."""
    if fidelity.mean_error is None or fidelity.max_error is None:
        return [
            [f"features '{name}', relative error / cosine", f"{one['relative_l2']:.2g} / {one['cosine']:.4f}"]
            for name, one in fidelity.features.items()
        ]
    logits = ["logit error, mean / largest", f"{fidelity.mean_error:.2g} / {fidelity.max_error:.2g}"]
    if fidelity.top1_agreement is None:
        errors = " / ".join(f"{value:.2g}" for value in fidelity.sigmoid_error.values())
        return [logits, ["mean error of a probability at T = 1, 2, 4", errors]]
    return [
        ["same top-1 as the teacher", f"{100 * fidelity.top1_agreement:.2f} %"],
        logits,
        ["KL in nats at T = 1, 2, 4", " / ".join(f"{value:.2g}" for value in fidelity.kl.values())],
    ]


def which_worker(text: str | None) -> Worker:
    """From --worker, or from what torchrun, SLURM or Kubernetes tell their processes, which is said."""
    from offline_kd.cache.pipeline import Worker
    from offline_kd.support.console import say

    if text is None:
        told = told_by(os.environ)
        if told is None:
            return Worker()
        share = "does its own share of the blocks" if told.own_share else "shares the blocks with the others"
        say(f"worker {told.index} of {told.count}, from {told.source}: {share}")
        return Worker(told.index, told.count, told.own_share)
    parts = re.fullmatch(r"(\d+)/(\d+)", text)
    if parts is None or not int(parts[1]) < int(parts[2]):
        raise RecipeError(f"--worker {text}: write I/N with I from 0 to N - 1, such as 0/4.")
    return Worker(int(parts[1]), int(parts[2]), own_blocks_only=True)

"""Students of one recipe, trained at once: each is a task of a Ray cluster that writes its own run directory.

A task whose node was lost is started again by Ray and goes on from its last checkpoint.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest
from offline_kd.distill.results import Result
from offline_kd.distill.training import DistillOptions, distill
from offline_kd.recipe import Recipe
from offline_kd.support.errors import TrainingError
from offline_kd.support.ray_cluster import as_expected, in_folder, ray

RETRIES = 3  # of a task whose process or node was lost


def distill_on_ray(
    manifest: Manifest,
    roots: Sequence[Root],
    students: Mapping[Path, tuple[Recipe, DistillOptions]],
    gpus_per_run: float,
) -> Iterator[tuple[Path, Result]]:
    """Train all students, by their run directories; yields each when it is finished.

    Args:
        gpus_per_run: with a fraction students share a GPU; with 0 they train on a CPU.

    Raises what the first student to fail raised; the others are ended, and go on when the same command is run again.
    """
    task = ray.remote(num_cpus=1, num_gpus=gpus_per_run, max_retries=RETRIES)(_train)
    inputs, device = ray.put((manifest, list(roots))), "cuda" if gpus_per_run else "cpu"
    waiting: dict[Any, Path] = {
        task.remote(inputs, folder, what, os.getcwd(), device): folder for folder, what in students.items()
    }
    try:
        while waiting:
            (ref, *_), _ = ray.wait(list(waiting))
            folder = waiting.pop(ref)
            try:
                yield folder, ray.get(ref)
            except ray.exceptions.RayTaskError as failed:
                raise as_expected(failed) from None
            except ray.exceptions.RayError as lost:
                raise TrainingError(
                    f"{folder}: its process was lost {RETRIES + 1} times, the last one with: "
                    f"{' '.join(str(lost).split()):.400} Train it alone to see why: offline-kd distill."
                ) from lost
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)


def _train(
    inputs: tuple[Manifest, list[Root]],
    folder: Path,
    what: tuple[Recipe, DistillOptions],
    driver_folder: str,
    device: str,
) -> Result:
    """In a process of the cluster."""
    in_folder(driver_folder)
    manifest, roots = inputs
    recipe, about = what
    with contextlib.redirect_stderr(io.StringIO()):  # metrics.jsonl has it; of many students at once nobody reads it
        return distill(recipe, manifest, roots, folder, torch.device(device), **about)

"""`offline-kd train`: teachers and baselines, from labels only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from offline_kd.cli.distill import show_result
from offline_kd.cli.options import MANIFEST_NAME, SEED, Inputs, log_option, read_inputs, recipe_options

if TYPE_CHECKING:
    from offline_kd.network_recipe import TeacherNetwork
    from offline_kd.recipe import Recipe


@click.command("train")
@recipe_options
@click.option("--out", required=True, help="Run directory: a folder or a URL.")
@click.option("--teacher", is_flag=True, help="Train the recipe's teacher instead of its student.")
@click.option("--seed", type=SEED, help="Seed of the student's weights and order.  [default: the recipe's first]")
@log_option
def command(
    recipe_path: Path, out: str, teacher: bool, seed: int | None, log: str | None, **inputs: Unpack[Inputs]
) -> None:
    """Plain supervised training: cross-entropy on labels only, for teachers and baselines.

    With --teacher the recipe's `teacher.training` makes OUT/teacher.safetensors, beginning from `teacher.weights` where
    there are any.

    \b
    offline-kd train cifar10/resnet56_resnet20_cpu --out runs/ce
    torchrun --nproc-per-node 8 -m offline_kd train recipe.yaml --teacher --out runs/teacher
    """
    from offline_kd.data.fetching import is_url
    from offline_kd.distill.teacher_training import TEACHER_FILE, train_teacher, trained_teacher
    from offline_kd.distill.training import distill
    from offline_kd.recipe import Recipe

    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    if teacher:
        result = train_teacher(recipe, manifest, roots, out, device, log)
        show_result(result, out)
        if os.environ.get("RANK", "0") == "0":
            weights = f"{out.rstrip('/')}/{TEACHER_FILE}"
            if is_url(out):
                weights = say_where_it_lies(recipe, out, TEACHER_FILE, result.student_sha256)
            say_what_to_set(recipe, trained_teacher(recipe, manifest, weights))
        return
    plain = Recipe.model_validate({**recipe.model_dump(), "objectives": {"ce": [{"term": "ce"}]}})
    show_result(distill(plain, manifest, roots, out, device, seed=seed, log=log), out)


def say_where_it_lies(recipe: Recipe, url: str, file: str, sha256: str) -> str:
    """The entry of a manifest that proves weights from afar, and how they are found; returns the entry's name."""
    from offline_kd.support.console import say

    name = f"{recipe.name}_teacher"
    entry = json.dumps({name: {"file": file, "sha256": sha256}})
    say(f"to find this teacher, put into {MANIFEST_NAME}: files: {entry}, and give --data-root {url.rstrip('/')}")
    return name


def say_what_to_set(recipe: Recipe, trained: TeacherNetwork) -> None:
    """The lines of a recipe that name the teacher that was just trained."""
    from offline_kd.support.console import say

    before, after = (one.model_dump(mode="json", exclude_none=True) for one in (recipe.teacher, trained))
    for name in before | after:
        value = after.get(name)
        if value != before.get(name):
            shown = value if isinstance(value, str) else json.dumps(value)
            say(f"to ask this teacher, set in the recipe: teacher.{name}: {shown}")

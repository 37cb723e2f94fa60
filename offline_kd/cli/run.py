"""`offline-kd run`: every stage of a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Unpack

import click

from offline_kd.cli.options import EngineChoice, Inputs, engine_options, gpu_option, read_inputs, recipe_options
from offline_kd.support.errors import RecipeError


@click.command("run")
@recipe_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.  [default: runs/NAME]")
@engine_options
@gpu_option("--gpus-per-run", "a student")
def command(
    recipe_path: Path, out: Path | None, engine: EngineChoice, gpus_per_run: float | None, **inputs: Unpack[Inputs]
) -> None:
    """Every stage of RECIPE: teacher, store, students, report. The same command again goes on where it stopped.

    With `--engine ray` stage 1 is done by actors of a Ray cluster, and all students are trained at once, as its tasks.

    \b
    offline-kd run digits --out runs/digits
    offline-kd run recipe.yaml --out /shared/runs/cifar10 --engine ray --gpus-per-run 0.25
    """
    from offline_kd.distill.run import run

    if out is not None and re.match("[a-z0-9]+:/", str(out)):
        raise RecipeError(f"--out {out}: `run` writes a folder. `distill --out` and `train --out` take URLs.")
    recipe, manifest, _, device = read_inputs(recipe_path, **inputs)
    out = out or Path("runs") / recipe.name
    run(recipe, manifest, list(inputs["data_root"]), out, device, gpus_per_run=gpus_per_run, **engine)

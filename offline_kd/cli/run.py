"""`offline-kd run`: every stage of a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Unpack

import click

from offline_kd.cli.options import Inputs, read_inputs, recipe_options
from offline_kd.support.errors import RecipeError


@click.command("run")
@recipe_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.  [default: runs/NAME]")
def command(recipe_path: Path, out: Path | None, **inputs: Unpack[Inputs]) -> None:
    """Every stage of RECIPE: teacher, store, students, report. The same command again goes on where it stopped.

    \b
    offline-kd run pipelines/digits.yaml --out runs/digits
    """
    from offline_kd.distill.run import run

    if out is not None and re.match("[a-z0-9]+:/", str(out)):
        raise RecipeError(f"--out {out}: `run` writes a folder. `distill --out` and `train --out` take URLs.")
    recipe, manifest, _, device = read_inputs(recipe_path, **inputs)
    run(recipe, manifest, list(inputs["data_root"]), out or Path("runs") / recipe.name, device)

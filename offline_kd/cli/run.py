"""`offline-kd run`: every stage of a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Unpack

import click

from offline_kd.cli.options import (
    SEED,
    EngineChoice,
    Inputs,
    engine_options,
    gpu_option,
    log_option,
    read_inputs,
    recipe_options,
)
from offline_kd.support.errors import RecipeError


class Given(Inputs):
    """What the options say, besides which file is the recipe, and where and by whom things are done."""

    objectives: tuple[str, ...]
    seeds: list[int] | None
    jobs: int
    log: str | None
    gpus_per_run: float | None


def _seeds(context: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    return None if text is None else [SEED(seed.strip(), option, context) for seed in text.split(",")]


@click.command("run")
@recipe_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.  [default: runs/NAME]")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="FIELD=VALUE,...",
    help="Train students with each of these values; several: with every combination.",
)
@click.option("--seeds", metavar="N,...", callback=_seeds, help="Seeds of the students, instead of the recipe's.")
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    metavar="NAME",
    help="Only these of the recipe.  [default: those that --sweep is about, or all]",
)
@click.option(
    "--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Students trained at once, in processes."
)
@log_option
@engine_options
@gpu_option("--gpus-per-run", "a student")
def command(
    recipe_path: Path, out: Path | None, sweeps: tuple[str, ...], engine: EngineChoice, **given: Unpack[Given]
) -> None:
    """Every stage of RECIPE: teacher, store, students, report. The same command again goes on where it stopped.

    A position in a list is a number from 0: 1 is the second term of an objective. What a sweep has trained already it
    does not train again, when seeds or values are added to it.

    With `--engine ray` stage 1 is done by actors of a Ray cluster, and all students are trained at once, as its tasks.

    \b
    offline-kd run digits --out runs/digits
    offline-kd run digits --out runs/gammas --sweep objectives.wttm.1.gamma=.1,.2,.4 \\
        --seeds 0,1,2 --objective wttm --objective ce --jobs 2
    offline-kd run recipe.yaml --out /shared/runs/cifar10 --engine ray --gpus-per-run 0.25
    """
    from offline_kd.distill.run import run
    from offline_kd.distill.sweep import with_sweeps

    if out is not None and re.match("[a-z0-9]+:/", str(out)):
        raise RecipeError(f"--out {out}: `run` writes a folder. `distill --out` and `train --out` take URLs.")
    roots = given["data_root"]
    recipe, manifest, _, device = read_inputs(
        recipe_path, given["overrides"], given["manifest_path"], roots, given["device"]
    )
    run(
        with_sweeps(recipe, sweeps),
        manifest,
        list(roots),
        out or Path("runs") / recipe.name,
        device,
        objectives=given["objectives"],
        seeds=given["seeds"],
        jobs=given["jobs"],
        log=given["log"],
        gpus_per_run=given["gpus_per_run"],
        **engine,
    )

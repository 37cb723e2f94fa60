"""`offline-kd distill`: stage 2."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from offline_kd.cli.options import DOWNLOAD_BYTES, SEED, log_option, read_inputs, recipe_options

if TYPE_CHECKING:
    from offline_kd.distill.results import Result
    from offline_kd.distill.training import DistillOptions


class DistillCommand(click.Command):
    """Its help ends with the objectives."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Terms of an objective"):
            formatter.write_dl(describe_objectives())


def describe_objectives() -> list[tuple[str, str]]:
    """Name and one line of every objective. Read from the source text, so that help does not wait for PyTorch."""
    folder = Path(__file__).parent.parent / "objectives"
    classes = next(
        ast.literal_eval(node.value)
        for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CLASSES"
    )
    described = []
    for name, where in classes.items():
        file, class_name = where.split(".")
        for node in ast.parse((folder / f"{file}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                described.append((name, (ast.get_docstring(node) or "").partition("\n")[0]))
    return described


@click.command("distill", cls=DistillCommand)
@recipe_options
@click.option(
    "--store",
    "stores",
    multiple=True,
    metavar="STORE",
    help="Folder, URL or manifest name; #TARGETS and @sha256:DIGEST may follow. Several are mixed.",
)
@click.option(
    "--download-bytes",
    default=DOWNLOAD_BYTES,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
    help="How much of a remote store to keep.",
)
@click.option("--out", required=True, help="Run directory: a folder or a URL.")
@click.option("--objective", help="Which objective of the recipe, if it has several.")
@click.option("--seed", type=SEED, help="Seed of weights, order and views.  [default: the recipe's first]")
@click.option("--allow-biased", is_flag=True, help="Train though the store's codec does not serve the objective.")
@log_option
@click.option("--online", is_flag=True, help="Ask the live teacher instead of the store: same views, same order.")
def command(
    recipe_path: Path,
    overrides: tuple[str, ...],
    manifest_path: Path,
    data_root: tuple[str, ...],
    device: str,
    out: str,
    **options: Unpack[DistillOptions],
) -> None:
    """Stage 2: train the student of RECIPE from a store, without its teacher. The same command again resumes.

    A store may be a URL: what is read of it is kept in OFFLINE_KD_CACHE (~/.cache/offline-kd).

    \b
    offline-kd distill recipe.yaml --store s3://team/stores/cifar10 --out runs/kd --objective kd
    offline-kd distill cifar10/resnet56_resnet20_cpu --objective wttm \\
        --store stores/cifar10-resnet56 --out runs/wttm
    torchrun --nproc-per-node 8 -m offline_kd distill recipe.yaml --store stores/imagenet --out s3://team/runs/kd
    """
    from offline_kd.distill.training import distill

    recipe, manifest, roots, on = read_inputs(recipe_path, overrides, manifest_path, data_root, device)
    result = distill(recipe, manifest, roots, out, on, **options)
    show_result(result, out)


def show_result(result: Result, out: str) -> None:
    """The table of one run, on standard output; of several ranks the first one prints it."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1") and os.environ.get("RANK", "0") != "0":
        return
    from offline_kd.distill.report import summarise, table
    from offline_kd.distill.run_records import group_runs, read_runs
    from offline_kd.support.console import say, show_table

    summaries = summarise(group_runs(read_runs([out])))
    show_table(f"{out}: {result.recipe}, seed {result.seed}", *table(summaries))
    if result.dtkd_fallbacks:
        say(f"DTKD fell back to KD for {result.dtkd_fallbacks:,} samples whose maxima differ in sign or are 0")

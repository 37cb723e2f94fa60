"""`offline-kd bench ...`: measure the parts of a recipe, or codecs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from offline_kd.cli.options import Inputs, common_options, open_named, read_inputs, recipe_options
from offline_kd.support.errors import RecipeError

if TYPE_CHECKING:
    from offline_kd.cli.bench_codecs import CodecResult
    from offline_kd.cli.bench_steps import Extent, StepTimes


class BenchGroup(click.Group):
    """`bench RECIPE` is `bench steps RECIPE`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["steps", *args])


@click.group("bench", cls=BenchGroup)
def command() -> None:
    """Measure: the parts of a recipe against each other, or codecs on a store's logits. The first needs no name.

    \b
    offline-kd bench cifar10/resnet56_resnet20_cpu
    offline-kd bench codecs runs/digits/store
    """


class CodecExtent(TypedDict):
    """On what codecs are measured; data_root is not used."""

    rows: int
    views: int | None
    data_root: tuple[str, ...]


@command.command("codecs")
@click.argument("reference", metavar="STORE")
@click.option("--rows", default=20_000, show_default=True, type=click.IntRange(min=1), help="At least so many rows.")
@click.option("--views", type=click.IntRange(min=1), help="The first so many views of an image, as one view group.")
@click.option("--codec", "codecs", multiple=True, metavar="YAML", help="Measure this one, as in a recipe; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="A plot (.svg or .png) of rate against distortion.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@common_options
def bench_codecs_command(
    reference: str,
    codecs: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    manifest_path: Path,
    **extent: Unpack[CodecExtent],
) -> None:
    """What every codec makes of the logits of STORE (f32 or f16): bytes, speed, and how much is lost for whom.

    Codecs learn from four of every five images; all are measured on every fifth, on one core. Bytes are those that a
    store has for a row, image means included, tables beside them; `ideal` is what an ideal entropy coder would take.
    Of a store with codec last_layer, codes of its features are measured as well.

    \b
    offline-kd bench codecs runs/digits/store --out codecs.svg
    offline-kd bench codecs stores/imagenet --codec '{name: klt_means, step: 2.4}' --codec '{name: topk, k: 100}'
    """
    from offline_kd.cli.bench_codecs import bench_codecs, write_plot
    from offline_kd.cli.bench_material import parse_codec
    from offline_kd.support.console import say

    if out is not None and out.suffix not in (".svg", ".png"):
        raise RecipeError(f"--out {out}: a plot is an .svg or a .png file.")
    store = open_named(reference, manifest_path)
    results = bench_codecs(store, extent["rows"], [parse_codec(codec) for codec in codecs], extent["views"])
    if out is not None:
        write_plot(results, out, f"{store.identity.teacher.name}, {store.identity.num_classes} classes")
        say(f"{out} written")
    if as_json:
        click.echo(json.dumps([asdict(one) for one in results], indent=2))
    else:
        show_codecs(reference, results)


def show_codecs(reference: str, results: Sequence[CodecResult]) -> None:
    """As three tables: what is lost at how many bytes, bytes and speeds, what it does to gradients."""
    from offline_kd.support.console import show_table

    lost = [
        [
            one.codec,
            f"{one.bytes_per_row:.1f}",
            *(f"{value:.4f}" for value in one.distortion["total_variation"].values()),
            f"{one.distortion['kl']['1']:.1e}",
            f"{100 * one.distortion['top1_agreement']:.2f}",
            f"{100 * one.distortion['wttm_weight_error']:.2f}",
            f"{100 * one.distortion['dtkd_temperature_error']:.3f}",
        ]
        for one in results
    ]
    columns = ["codec", "B/row", "TV1", "TV2", "TV4", "KL1", "top-1 %", "WTTM %", "DTKD %"]
    show_table(reference, columns, lost)
    parts = [
        [
            one.codec,
            " + ".join(f"{size:.1f}" for size in one.stored.values()),
            f"{sum(one.ideal.values()):.1f}" if one.ideal else "",
            *(f"{one.ideal[part]:.1f}" if part in one.ideal else "" for part in ("means", "views", "refinement")),
            f"{one.table_bytes / 1e3:,.0f}",
            f"{one.table_bytes_per_row:.1f}",
            *(f"{rate / 1e3:,.0f}" for rate in _speeds(one)),
        ]
        for one in results
    ]
    columns = ["codec", "arrays", "ideal", "means", "views", "finer", "tables kB", "B/row", "enc k/s", "unpack", "dec"]
    show_table("bytes per row as stored, of an ideal entropy coder, by part; tables; thousand rows/s", columns, parts)
    names = list(results[0].change)
    changes = [[one.codec, *(f"{100 * one.change[name]:.2f}" for name in names)] for one in results]
    show_table("change of the gradient on a student's logits, %", ["codec", *names], changes)


def _speeds(one: CodecResult) -> tuple[float, float, float]:
    return one.encode_rows_per_second, one.unpack_rows_per_second, one.decode_rows_per_second


def extent_options(command: Callable[..., None]) -> Callable[..., None]:
    """--rounds, --steps, --views and --codec, handed to the command as one `extent`."""

    @functools.wraps(command)
    def with_extent(rounds: int, steps: int, views: int, codecs: tuple[str, ...], **values: object) -> None:
        command(extent={"rounds": rounds, "steps": steps, "views": views, "codecs": codecs}, **values)

    measured: Callable[..., None] = with_extent
    for option in reversed(
        [
            click.option(
                "--rounds", default=7, show_default=True, type=click.IntRange(3, 1000), help="Interleaved repetitions."
            ),
            click.option(
                "--steps", default=10, show_default=True, type=click.IntRange(1, 10_000), help="Steps per repetition."
            ),
            click.option(
                "--views", default=4, show_default=True, type=click.IntRange(1, 4096), help="Of an image, at most."
            ),
            click.option(
                "--codec", "codecs", multiple=True, metavar="YAML", help="Steps from a store of this too; repeatable."
            ),
        ]
    ):
        measured = option(measured)
    return measured


@command.command("steps")
@recipe_options
@click.option("--objective", help="Which objective of the recipe the student steps use.")
@extent_options
@click.option(
    "--drift", type=click.IntRange(1, 10**6), help="Instead: train that many steps online and from each codec."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def bench_steps_command(
    recipe_path: Path,
    objective: str | None,
    extent: Extent,
    drift: int | None,
    as_json: bool,
    **inputs: Unpack[Inputs],
) -> None:
    """Time plain, offline and online steps, teacher, stage 1 and loaders against each other, interleaved in one run.

    With --drift: how far students trained from each codec end from the one trained with the live teacher.

    \b
    offline-kd bench steps cifar10/resnet56_resnet20_cpu --objective kd --codec '{name: int}'
    offline-kd bench runs/digits/recipe.yaml --drift 200
    """
    from offline_kd.cli.bench_drift import measure_drift
    from offline_kd.cli.bench_steps import bench
    from offline_kd.support.console import show_table

    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    if drift:
        drifts = measure_drift(recipe, manifest, roots, drift, device)
        if as_json:
            click.echo(json.dumps(drifts, indent=2))
            return
        columns = list(next(iter(drifts.values())))
        rows = [
            [name, *(f"{part['distance']:.2g} ({part['top1']:.1f} %)" for part in by_codec.values())]
            for name, by_codec in drifts.items()
        ]
        title = f"after {drift} steps: distance of the student's parameters from the online run, and top-1"
        show_table(title, ["objective", *columns], rows)
        return
    timings = bench(recipe, manifest, roots, device, objective=objective, extent=extent)
    if as_json:
        click.echo(json.dumps(timings, indent=2))
        return
    show_steps(timings)


def show_steps(timings: StepTimes) -> None:
    """As two tables."""
    from offline_kd.support.console import show_table

    rows = [
        [name, f"{1e3 * part['median']:.2f}", f"{1e3 * part['low']:.2f} .. {1e3 * part['high']:.2f}"]
        for name, part in timings["seconds"].items()
    ]
    about = f"{timings['workers']} workers, {timings['threads']} threads, {timings['device']}"
    title = (
        f"{timings['recipe']}: milliseconds per batch of {timings['batch_size']} ({about}); the first batch: of a run"
    )
    show_table(title, ["part", "median", "quartiles"], rows)
    ratios = [
        [name, f"{value:.3f}", timings["aims"].get(name, ""), "missed" if name in timings["missed"] else ""]
        for name, value in timings["ratios"].items()
    ]
    show_table("ratios, median over rounds", ["ratio", "value", "aim", ""], ratios)

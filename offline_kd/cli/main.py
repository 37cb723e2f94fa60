"""The command line: parse, call one function, print. The only place that turns expected failures into messages."""

import ctypes
import errno
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from offline_kd.cache.pipeline import Worker, cache_teacher
from offline_kd.cli.bench_codecs import bench_codecs, write_plot
from offline_kd.cli.bench_steps import bench, measure_drift
from offline_kd.cli.options import common_options, read_inputs, recipe_options
from offline_kd.cli.store import open_named, store_group
from offline_kd.data import packing
from offline_kd.data.checking import check_dataset
from offline_kd.data.manifest import MANIFEST_NAME, Tar, data_roots, load_manifest, locate_weights
from offline_kd.data.tars import Sample
from offline_kd.distill.loop import Result
from offline_kd.distill.report import COLUMNS, read_runs, summarise, table_rows, write_report
from offline_kd.distill.run import run
from offline_kd.distill.training import distill, train_teacher
from offline_kd.models.networks import build
from offline_kd.models.taps import feature_maps
from offline_kd.recipe import Recipe, parse_codec
from offline_kd.store.downloads import DEFAULT_BYTES
from offline_kd.support.console import printable, progress, say, show_table
from offline_kd.support.errors import OfflineKDError, RecipeError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}


class Group(click.Group):
    """Turns expected failures into one line and exit status 1; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OfflineKDError as error:
            click.echo(printable(f"Error: {error}"), err=True)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            click.echo(
                f"Error: {error.filename or 'disk'}: {error.strerror}. What was committed is safe: "
                "make room or correct the permissions, and run the same command again.",
                err=True,
            )
        except KeyboardInterrupt:
            click.echo("Interrupted. What was committed is safe: run the same command again to go on.", err=True)
            ctx.exit(130)
        ctx.exit(1)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next step instead of giving them back to the system.

    Otherwise every large activation is mapped, and its pages are zeroed, anew in every step: a student with 4,096
    templates trains 3.4 times slower on a CPU. Other C libraries have no such setting.
    """
    mmap_threshold, trim_threshold = -3, -1  # names of glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="offline-kd")
def main() -> None:
    """Run a teacher over an image dataset once, store what it says, train any number of students from the store.

    \b
    offline-kd run pipelines/digits.yaml --out runs/digits
    """
    keep_freed_memory()


@main.command("run")
@recipe_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.  [default: runs/NAME]")
def run_command(recipe_path: Path, out: Path | None, **inputs: Any) -> None:
    """Every stage of RECIPE: teacher, store, students, report. The same command again goes on where it stopped.

    \b
    offline-kd run pipelines/digits.yaml --out runs/digits
    """
    recipe, manifest, _, device = read_inputs(recipe_path, **inputs)
    run(recipe, manifest, list(inputs["data_root"]), out or Path("runs") / recipe.name, device)


@main.command("cache-teacher")
@recipe_options
@click.option("--store", "store", required=True, help="Folder or URL (s3://, gs://, az://) of the store.")
@click.option("--worker", metavar="I/N", help="In a job array: do the blocks of worker I (from 0) of N only.")
@click.option("--add", is_flag=True, help="Add this teacher to a store of another one, over the same views.")
def cache_command(recipe_path: Path, store: str, worker: str | None, add: bool, **inputs: Any) -> None:
    """Stage 1: ask the teacher about every view of every image, once. The same command again resumes.

    Several processes may run it on one store, on any machines: blocks that one works on are left alone by the others,
    and taken over when it dies. A recipe with more views, or more decisions, adds them to the store.

    \b
    offline-kd cache-teacher pipelines/cifar10/resnet56_resnet20_cpu.yaml --store stores/cifar10-resnet56
    offline-kd cache-teacher recipe.yaml --store s3://team/stores/cifar10 --worker 3/16
    torchrun --nproc-per-node 8 -m offline_kd.cli cache-teacher recipe.yaml --store stores/cifar10
    """
    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    finished = cache_teacher(recipe, manifest, roots, store, device, worker=which_worker(worker), add=add)
    if finished is None:
        return
    fidelity = finished.fidelity.get(recipe.name) or next(iter(finished.fidelity.values()))
    show_table(
        f"store {store}",
        ["", "value"],
        [
            ["blocks", f"{len(finished.entries):,}"],
            ["bytes", f"{finished.total_bytes:,}"],
            ["rows asked again", f"{fidelity.rows:,}"],
            ["same top-1 as the teacher", f"{100 * fidelity.top1_agreement:.2f} %"],
            ["logit error, mean / largest", f"{fidelity.mean_error:.2g} / {fidelity.max_error:.2g}"],
            ["KL in nats at T = 1, 2, 4", " / ".join(f"{value:.2g}" for value in fidelity.kl.values())],
            ["digest", f"sha256:{finished.digest}"],
        ],
    )


def which_worker(text: str | None) -> Worker:
    """From --worker, or from what torchrun tells its processes."""
    if text is None:
        return Worker(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    parts = re.fullmatch(r"(\d+)/(\d+)", text)
    if parts is None or not int(parts[1]) < int(parts[2]):
        raise RecipeError(f"--worker {text}: write I/N with I from 0 to N - 1, such as 0/4.")
    return Worker(int(parts[1]), int(parts[2]), own_blocks_only=True)


@main.command("distill")
@recipe_options
@click.option(
    "--store",
    "stores",
    multiple=True,
    metavar="STORE",
    help="Folder, URL or manifest name; #TARGETS and @sha256:DIGEST may follow. Several are mixed.",
)
@click.option("--download-bytes", default=DEFAULT_BYTES, show_default=True, help="How much of a remote store to keep.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory.")
@click.option("--objective", help="Which objective of the recipe, if it has several.")
@click.option("--seed", type=int, help="Seed of weights, order and views.  [default: the recipe's first]")
@click.option("--allow-biased", is_flag=True, help="Train though the store's codec does not serve the objective.")
@click.option("--online", is_flag=True, help="Ask the live teacher instead of the store: same views, same order.")
def distill_command(
    recipe_path: Path,
    stores: tuple[str, ...],
    download_bytes: int,
    out: Path,
    objective: str | None,
    seed: int | None,
    allow_biased: bool,
    online: bool,
    **inputs: Any,
) -> None:
    """Stage 2: train the student of RECIPE from a store, without its teacher. The same command again resumes.

    A store may be a URL: what is read of it is kept in OFFLINE_KD_CACHE (~/.cache/offline-kd).

    \b
    offline-kd distill recipe.yaml --store s3://team/stores/cifar10 --out runs/kd --objective kd
    offline-kd distill pipelines/cifar10/resnet56_resnet20_cpu.yaml --objective wttm \\
        --store stores/cifar10-resnet56 --out runs/wttm
    """
    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    result = distill(
        recipe,
        manifest,
        roots,
        out,
        device,
        objective=objective,
        seed=seed,
        stores=stores,
        online=online,
        download_bytes=download_bytes,
        allow_biased=allow_biased,
    )
    show_result(result, out)


@main.command("train")
@recipe_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory.")
@click.option("--teacher", is_flag=True, help="Train the recipe's teacher instead of its student.")
@click.option("--seed", type=int, help="Seed of the student's weights and order.  [default: the recipe's first]")
def train_command(recipe_path: Path, out: Path, teacher: bool, seed: int | None, **inputs: Any) -> None:
    """Plain supervised training: cross-entropy on labels only, for teachers and baselines.

    \b
    offline-kd train pipelines/cifar10/resnet56_resnet20_cpu.yaml --out runs/ce
    """
    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    if teacher:
        show_result(train_teacher(recipe, manifest, roots, out, device), out)
        return
    plain = Recipe.model_validate({**recipe.model_dump(), "objectives": {"ce": [{"term": "ce"}]}})
    show_result(distill(plain, manifest, roots, out, device, seed=seed), out)


def show_result(result: Result, out: Path) -> None:
    runs = read_runs([out])
    show_table(f"{out}: {result.recipe}, seed {result.seed}", COLUMNS, table_rows(summarise(runs)))
    if result.dtkd_fallbacks:
        say(f"DTKD fell back to KD for {result.dtkd_fallbacks:,} samples whose maxima differ in sign or are 0")


@main.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page to write.")
def report_command(runs: tuple[Path, ...], out: Path) -> None:
    """Compare finished run directories: a table, and a self-contained page with the curves.

    \b
    offline-kd report runs/digits/students/* --out comparison.html
    """
    records = read_runs(runs)
    write_report(out, out.stem, records)
    show_table(str(out), COLUMNS, table_rows(summarise(records)))


# ---- data ----------------------------------------------------------------------------------------------------------


@main.group("data")
def data_group() -> None:
    """Make, list and prove datasets.

    \b
    offline-kd data check cifar10
    """


@data_group.command("pack")
@click.argument("kind", type=click.Choice(["digits", "cifar10", "cifar100", "imagefolder"]))
@click.option("--source", type=click.Path(path_type=Path), help="Your copy of the data (not for digits).")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the tars.  [default: data/KIND]")
@click.option("--samples-per-tar", type=click.IntRange(min=1), help="[default: 5000; digits 512, imagefolder 1000]")
@click.option("--split", default="train", show_default=True, help="Name of the split (imagefolder).")
def pack_command(kind: str, source: Path | None, out: Path | None, samples_per_tar: int | None, split: str) -> None:
    """Write WebDataset tars and print their manifest entry. Packing twice gives the same bytes.

    \b
    offline-kd data pack digits
    offline-kd data pack cifar100 --source DIR      (DIR holds cifar-100-python)
    offline-kd data pack imagefolder --source photos/train --split train --out data/photos
    """
    out = out or Path("data") / kind
    if kind != "digits" and source is None:
        raise RecipeError(f"data pack {kind}: give --source, the folder of your own copy.")
    splits: dict[str, Iterable[Sample]]
    if kind == "digits":
        splits, classes = {**packing.digits_samples()}, [str(digit) for digit in range(10)]
    elif kind == "imagefolder":
        assert source is not None
        samples, classes = packing.imagefolder_samples(source)
        splits = {split: samples}
    else:
        assert source is not None
        cifar, classes = packing.cifar_samples(kind, source)
        splits = {**cifar}
    size = samples_per_tar or {"digits": 512, "imagefolder": 1000}.get(kind, 5000)
    packed = {name: packing.pack(samples, out, name, size) for name, samples in splits.items()}
    entry = {
        kind if kind != "imagefolder" else out.name: {
            "folder": out.name,
            "classes": classes,
            "splits": {name: {"tars": [tar.model_dump() for tar in tars]} for name, tars in packed.items()},
        }
    }
    say(f"{out}: {sum(tar.count for tars in packed.values() for tar in tars):,} samples. For {MANIFEST_NAME}:")
    click.echo(yaml.safe_dump({"datasets": entry}, sort_keys=False, width=120))


@data_group.command("list")
@common_options
def list_command(manifest_path: Path, data_root: tuple[Path, ...]) -> None:
    """The datasets and teachers of the manifest, and whether they are here.

    \b
    offline-kd data list
    """
    manifest, roots = load_manifest(manifest_path), data_roots(data_root)

    def is_here(files: list[str]) -> str:
        return "yes" if all(any((root / file).is_file() for root in roots) for file in files) else "no"

    rows = []
    for name, dataset in manifest.datasets.items():
        files = [f"{dataset.folder}/{tar.file}" for split in dataset.splits.values() for tar in split.tars]
        counts = ", ".join(f"{split} {part.count:,}" for split, part in dataset.splits.items())
        rows.append([name, "dataset", f"{len(dataset.classes)} classes; {counts}", is_here(files)])
    for name, teacher in manifest.teachers.items():
        expected = f"; top-1 {teacher.expected.top1:.2f} on {teacher.expected.dataset}" if teacher.expected else ""
        rows.append([name, "teacher", f"{teacher.model}{expected}", is_here([teacher.weights.file])])
    rows += [[name, "file", weights.file, is_here([weights.file])] for name, weights in manifest.files.items()]
    show_table(str(manifest_path), ["name", "kind", "what", "here"], rows)


@data_group.command("check")
@click.argument("name")
@common_options
def check_command(name: str, manifest_path: Path, data_root: tuple[Path, ...]) -> None:
    """Prove a local copy of NAME. A dataset: sha256, count, keys, labels, every image decodable. Weights: sha256.

    \b
    offline-kd data check digits
    """
    manifest, roots = load_manifest(manifest_path), data_roots(data_root)
    if weights := manifest.weights(name):
        click.echo(f"{name}: {locate_weights(weights, roots)} has the sha256 of the manifest")
        return
    dataset = manifest.dataset(name)
    total = sum(len(split.tars) for split in dataset.splits.values())
    with progress(f"checking {name}", total, "tars") as meter:

        def watched(tars: Iterable[Tar]) -> Iterable[Tar]:
            for tar in tars:
                yield tar
                meter.advance()

        counts = check_dataset(dataset, roots, watched)
    unproven = [tar.file for split in dataset.splits.values() for tar in split.tars if tar.sha256 is None]
    click.echo(f"{name}: " + ", ".join(f"{split} {count:,} samples" for split, count in counts.items()) + ", all good")
    if unproven:
        say(f"the manifest has no sha256 for {len(unproven)} tars, such as {unproven[0]}: these bytes were not proven")


@main.command("taps")
@click.argument("model")
@click.option("--size", default=32, show_default=True, type=click.IntRange(min=1), help="Height and width of images.")
def taps_command(model: str, size: int) -> None:
    """The modules of MODEL whose feature maps can be tapped, in the order in which they finish.

    \b
    offline-kd taps cifar:resnet56_a
    """
    network = build(model, 10)
    maps = feature_maps(network, torch.zeros(1, 3, size, size))
    rows = [[name, f"{channels} x {height} x {width}"] for name, (_, channels, height, width) in maps.items()]
    show_table(f"{model}, images of {size}x{size}", ["module", "channels x height x width"], rows)


main.add_command(store_group)


# ---- bench ---------------------------------------------------------------------------------------------------------


class BenchGroup(click.Group):
    """`bench RECIPE` is `bench steps RECIPE`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["steps", *args])


@main.group("bench", cls=BenchGroup)
def bench_group() -> None:
    """Measure: the parts of a recipe against each other, or codecs on a store's logits. The first needs no name.

    \b
    offline-kd bench pipelines/cifar10/resnet56_resnet20_cpu.yaml
    offline-kd bench codecs runs/digits/store
    """


@bench_group.command("codecs")
@click.argument("reference", metavar="STORE")
@click.option("--rows", default=20_000, show_default=True, type=click.IntRange(min=1), help="At least so many rows.")
@click.option("--codec", "codecs", multiple=True, metavar="YAML", help="Measure this one, as in a recipe; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="A plot (.svg or .png) of rate against distortion.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@common_options
def bench_codecs_command(
    reference: str,
    rows: int,
    codecs: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    manifest_path: Path,
    data_root: tuple[Path, ...],
) -> None:
    """What every codec makes of the logits of STORE (f32 or f16): bytes, speed, and how much is lost for whom.

    \b
    offline-kd bench codecs runs/digits/store --out codecs.svg
    offline-kd bench codecs stores/imagenet --codec '{name: klt, step: 1.2, refine: 96}' --codec '{name: topk, k: 100}'
    """
    store = open_named(reference, manifest_path)
    results = bench_codecs(store, rows, [parse_codec(codec) for codec in codecs])
    if out is not None:
        write_plot(results, out, f"{store.identity.teacher.name}, {store.identity.num_classes} classes")
        say(f"{out} written")
    if as_json:
        click.echo(json.dumps([asdict(one) for one in results], indent=2))
        return
    table = [
        [
            one.codec,
            f"{one.bytes_per_row:.1f}",
            *(f"{value:.4f}" for value in one.distortion["total_variation"].values()),
            f"{one.distortion['kl']['1']:.1e}",
            f"{100 * one.distortion['top1_agreement']:.2f}",
            f"{100 * one.distortion['wttm_weight_error']:.2f}",
            f"{100 * one.distortion['dtkd_temperature_error']:.3f}",
            f"{one.encode_rows_per_second / 1e3:,.0f}",
            f"{one.decode_rows_per_second / 1e3:,.0f}",
        ]
        for one in results
    ]
    columns = ["codec", "B/row", "TV1", "TV2", "TV4", "KL1", "top-1 %", "WTTM %", "DTKD %", "enc k/s", "dec k/s"]
    show_table(reference, columns, table)
    names = list(results[0].change)
    changes = [[one.codec, *(f"{100 * one.change[name]:.2f}" for name in names)] for one in results]
    show_table("change of the gradient on a student's logits, %", ["codec", *names], changes)


@bench_group.command("steps")
@recipe_options
@click.option("--objective", help="Which objective of the recipe the student steps use.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=3), help="Interleaved repetitions.")
@click.option("--steps", default=10, show_default=True, type=click.IntRange(min=1), help="Steps per repetition.")
@click.option("--drift", type=click.IntRange(min=1), help="Instead: train that many steps online and from each codec.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def bench_command(
    recipe_path: Path,
    objective: str | None,
    rounds: int,
    steps: int,
    drift: int | None,
    as_json: bool,
    **inputs: Any,
) -> None:
    """Time plain, offline and online steps, teacher and stage 1 against each other, interleaved in one run.

    With --drift: how far students trained from each codec end from the one trained with the live teacher.

    \b
    offline-kd bench steps pipelines/cifar10/resnet56_resnet20_cpu.yaml --objective kd
    offline-kd bench runs/digits/recipe.yaml --drift 200
    """
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
    timings = bench(recipe, manifest, roots, device, objective=objective, rounds=rounds, steps=steps)
    if as_json:
        click.echo(json.dumps(timings, indent=2))
        return
    rows = [
        [name, f"{1e3 * part['median']:.2f}", f"{1e3 * part['low']:.2f} .. {1e3 * part['high']:.2f}"]
        for name, part in timings["seconds"].items()
    ]
    show_table(
        f"{recipe.name}: milliseconds per batch of {timings['batch_size']}", ["part", "median", "quartiles"], rows
    )
    show_table(
        "ratios, median over rounds", ["ratio", "value"], [[k, f"{v:.3f}"] for k, v in timings["ratios"].items()]
    )

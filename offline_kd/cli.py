"""The command line: parse, call one function, print. The only place that turns expected failures into messages."""

import ctypes
import errno
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from offline_kd import data as data_module
from offline_kd.bench import bench, measure_drift
from offline_kd.cache import cache_teacher
from offline_kd.distill import Result, distill, train_teacher
from offline_kd.errors import OfflineKDError, RecipeError
from offline_kd.inspect_page import write_inspect_page
from offline_kd.manifest import MANIFEST_NAME, Manifest, Tar, data_roots, load_manifest, locate_weights
from offline_kd.models import build
from offline_kd.progress import progress, say, show_table
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.report import COLUMNS, read_runs, summarise, table_rows, write_report
from offline_kd.run import run
from offline_kd.store.reader import open_store
from offline_kd.taps import feature_maps

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}


class Group(click.Group):
    """Turns expected failures into one line and exit status 1; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OfflineKDError as error:
            click.echo(f"Error: {error}", err=True)
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


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option(
                "--manifest",
                "manifest_path",
                type=click.Path(path_type=Path),
                default=MANIFEST_NAME,
                show_default=True,
                help="Datasets and teachers that names refer to.",
            ),
            click.option(
                "--data-root",
                "data_root",
                type=click.Path(path_type=Path),
                multiple=True,
                help="Folder of the data, before those of OFFLINE_KD_DATA and ./data.",
            ),
        ]
    ):
        command = option(command)
    return command


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path)),
            click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a recipe field."),
            click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or auto."),
        ]
    ):
        command = option(command)
    return common_options(command)


def read_inputs(
    recipe_path: Path, overrides: tuple[str, ...], manifest_path: Path, data_root: tuple[Path, ...], device: str
) -> tuple[Recipe, Manifest, list[Path], torch.device]:
    recipe = load_recipe(recipe_path, overrides)
    own_root = [Path(recipe.data.root)] if recipe.data.root else []
    return recipe, load_manifest(manifest_path), data_roots([*data_root, *own_root]), choose_device(device)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: no such device. Use cpu, cuda, cuda:N or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"--device {name}: no CUDA device is available here. Use --device cpu.")
    return device


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
@click.option("--store", "store", required=True, type=click.Path(path_type=Path), help="Folder of the store.")
def cache_command(recipe_path: Path, store: Path, **inputs: Any) -> None:
    """Stage 1: ask the teacher about every view of every image, once. The same command again resumes.

    \b
    offline-kd cache-teacher pipelines/cifar10/resnet56_resnet20_cpu.yaml --store stores/cifar10-resnet56
    """
    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    finished = cache_teacher(recipe, manifest, roots, store, device)
    fidelity = finished.fidelity
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


@main.command("distill")
@recipe_options
@click.option("--store", "store_path", type=click.Path(path_type=Path), help="Folder of the store.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory.")
@click.option("--objective", help="Which objective of the recipe, if it has several.")
@click.option("--seed", type=int, help="Seed of weights, order and views.  [default: the recipe's first]")
@click.option("--online", is_flag=True, help="Ask the live teacher instead of the store: same views, same order.")
def distill_command(
    recipe_path: Path,
    store_path: Path | None,
    out: Path,
    objective: str | None,
    seed: int | None,
    online: bool,
    **inputs: Any,
) -> None:
    """Stage 2: train the student of RECIPE from a store, without its teacher. The same command again resumes.

    \b
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
        store_path=store_path,
        online=online,
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
@click.option("--samples-per-tar", type=click.IntRange(min=1), help="[default: 512 for digits, else 5000]")
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
    splits: dict[str, Iterable[data_module.Sample]]
    if kind == "digits":
        splits, classes = {**data_module.digits_samples()}, [str(digit) for digit in range(10)]
    elif kind == "imagefolder":
        assert source is not None
        samples, classes = data_module.imagefolder_samples(source)
        splits = {split: samples}
    else:
        assert source is not None
        cifar, classes = data_module.cifar_samples(kind, source)
        splits = {**cifar}
    size = samples_per_tar or (512 if kind == "digits" else 5000)
    packed = {name: data_module.pack(samples, out, name, size) for name, samples in splits.items()}
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

        counts = data_module.check_dataset(dataset, roots, watched)
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


# ---- store ---------------------------------------------------------------------------------------------------------


@main.group("store")
def store_group() -> None:
    """Look at teacher stores.

    \b
    offline-kd store info runs/digits/store
    """


@store_group.command("info")
@click.argument("path", metavar="STORE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info_command(path: Path, as_json: bool) -> None:
    """What a store holds, from whom, and how faithfully.

    \b
    offline-kd store info runs/digits/store --json
    """
    store = open_store(path)
    identity, manifest = store.identity, store.manifest
    assert manifest is not None
    facts = {
        "digest": f"sha256:{manifest.digest}",
        "blocks": identity.num_blocks,
        "rows": sum(tar.count for tar in identity.dataset.tars) * identity.views.num_views,
        "views": identity.views.model_dump(mode="json") | {"stored": identity.views.num_views},
        "bytes": manifest.total_bytes,
        "codecs": {"logits": identity.codec.model_dump(mode="json")},
        "teacher": identity.teacher.model_dump(mode="json"),
        "dataset": identity.dataset.model_dump(mode="json", exclude={"tars", "classes"})
        | {"samples": sum(tar.count for tar in identity.dataset.tars), "classes": len(identity.dataset.classes)},
        "fidelity": manifest.fidelity.model_dump(mode="json"),
        "versions": identity.versions,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = []
    for name, value in facts.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [[f"{name} {part}".strip(), f"{text}"] for part, text in parts]
    show_table(str(path), ["", "value"], rows)


@store_group.command("inspect")
@click.argument("path", metavar="STORE", type=click.Path(path_type=Path))
@click.option("--key", required=True, help="Key of the sample.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page to write.")
@common_options
def inspect_command(path: Path, key: str, out: Path, manifest_path: Path, data_root: tuple[Path, ...]) -> None:
    """A page about one sample: its views, the teacher's five likeliest classes, the template map over the image.

    \b
    offline-kd store inspect runs/digits/store --key 0042 --data-root runs/digits/data --out 0042.html
    """
    store = open_store(path)
    folder = load_manifest(manifest_path).dataset(store.identity.dataset.name).folder
    write_inspect_page(store, key, folder, data_roots(data_root), out)
    say(f"{out} written")


# ---- bench ---------------------------------------------------------------------------------------------------------


@main.command("bench")
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
    offline-kd bench pipelines/cifar10/resnet56_resnet20_cpu.yaml --objective kd
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


if __name__ == "__main__":
    sys.exit(main())

"""The command line: parse, call one function, print. The only place that turns expected failures into messages."""

import ctypes
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from offline_kd import data as data_module
from offline_kd.bench import bench, measure_drift
from offline_kd.cache import Worker, cache_teacher
from offline_kd.codec_bench import bench_codecs, write_plot
from offline_kd.distill import Result, distill, train_teacher, training_images
from offline_kd.errors import OfflineKDError, RecipeError, StoreMismatch
from offline_kd.fidelity import measure_fidelity
from offline_kd.inspect_page import write_inspect_page
from offline_kd.manifest import MANIFEST_NAME, Manifest, Split, Tar, data_roots, load_manifest, locate_weights
from offline_kd.models import build
from offline_kd.plan import plan
from offline_kd.progress import printable, progress, say, show_table
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.report import COLUMNS, read_runs, summarise, table_rows, write_report
from offline_kd.run import run
from offline_kd.store.card import served_terms
from offline_kd.store.downloads import DEFAULT_BYTES
from offline_kd.store.opening import group_digests, open_store
from offline_kd.store.place import Place, place_at
from offline_kd.store.reader import Store
from offline_kd.store.transfer import KINDS, copy_store, describe
from offline_kd.taps import feature_maps
from offline_kd.teacher import load_teacher
from offline_kd.verify import Verification, faults_as_json, take_back, verify

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
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # as torchrun counts
    if name == "auto":
        return torch.device("cpu")
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
    """Look at teacher stores, prove them, share them. STORE is a folder, a URL or a name in the manifest.

    \b
    offline-kd store info runs/digits/store
    """


def open_named(reference: str, manifest_path: Path) -> Store:
    """A store by folder, URL or manifest name, with `#TARGETS` and `@sha256:DIGEST` or not."""
    known = load_manifest(manifest_path) if manifest_path.is_file() else Manifest(manifest_version=1)
    where = known.store(reference)
    return open_store(where.location, targets=where.targets, digest=where.digest)


def place_named(reference: str, manifest_path: Path) -> Place:
    known = load_manifest(manifest_path) if manifest_path.is_file() else Manifest(manifest_version=1)
    return place_at(known.store(reference).location)


@store_group.command("info")
@click.argument("reference", metavar="STORE")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@common_options
def info_command(reference: str, as_json: bool, manifest_path: Path, data_root: tuple[Path, ...]) -> None:
    """What a store holds, from whom, how faithfully, and which objectives it serves.

    \b
    offline-kd store info runs/digits/store
    offline-kd store info s3://team/stores/cifar10 --json
    """
    store = open_named(reference, manifest_path)
    identity, manifest = store.identity, store.manifest
    assert manifest is not None
    fidelity = manifest.fidelity.get(store.targets)
    facts = {
        "digest": f"sha256:{store.digest}",
        "holds": describe(manifest.held),
        "blocks": len(store.blocks),
        "rows": sum(identity.dataset.tars[block].count for block in store.blocks) * identity.views.num_views,
        "views": identity.views.model_dump(mode="json") | {"stored": identity.views.num_views},
        "group digests": group_digests(store),
        "bytes": manifest.total_bytes,
        "bytes by array": manifest.bytes_by_array,
        "codecs": {"logits": identity.codec.model_dump(mode="json")},
        "teacher": identity.teacher.model_dump(mode="json"),
        "other teachers": [one.name for one in store.additions if one.extends is None],
        "dataset": identity.dataset.model_dump(mode="json", exclude={"tars", "classes"})
        | {"samples": sum(tar.count for tar in identity.dataset.tars), "classes": len(identity.dataset.classes)},
        "licences": {"dataset": identity.dataset.licence, "teacher": identity.teacher.licence},
        "serves": served_terms(store),
        "fidelity": fidelity.model_dump(mode="json") if fidelity else None,
        "schema version": manifest.schema_version,
        "versions": identity.versions,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = []
    for name, value in facts.items():
        if name == "group digests":
            continue  # as many as there are groups: for programs
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [
            [f"{name} {part}".strip(), ", ".join(text) if isinstance(text, list) else f"{text}"] for part, text in parts
        ]
    show_table(reference, ["", "value"], rows)


@store_group.command("verify")
@click.argument("reference", metavar="STORE")
@click.option("--quick", is_flag=True, help="Ledger, presence and sizes only; nothing large is read.")
@click.option("--dataset", "with_dataset", is_flag=True, help="Compare keys, images and labels with the dataset too.")
@click.option("--teacher", "rows", type=click.IntRange(min=1), help="Ask the teacher of --recipe again about N rows.")
@click.option("--recipe", "recipe_path", type=click.Path(path_type=Path), help="Names the teacher for --teacher.")
@click.option("--device", default="auto", show_default=True, help="For --teacher.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@common_options
def verify_command(
    reference: str,
    quick: bool,
    with_dataset: bool,
    rows: int | None,
    recipe_path: Path | None,
    device: str,
    as_json: bool,
    manifest_path: Path,
    data_root: tuple[Path, ...],
) -> None:
    """Prove a store: every file is read, hashed, unpacked and looked at. Exit 1 and a list of places on any fault.

    \b
    offline-kd store verify runs/digits/store
    offline-kd store verify s3://team/stores/cifar10 --quick
    offline-kd store verify stores/cifar10 --teacher 1000 --recipe pipelines/cifar10/resnet56_resnet20_cpu.yaml
    """
    place = place_named(reference, manifest_path)
    images = None
    if with_dataset:
        store = open_named(reference, manifest_path)
        about, roots = store.identity.dataset, data_roots(data_root)
        dataset = load_manifest(manifest_path).dataset(about.name)
        images = data_module.BlockLoader(dataset, Split(tars=about.tars), roots, keep_bytes=0).__getitem__
    result = verify(place, quick=quick, images=images)
    show_faults(result, reference, as_json)
    if result.faults:
        sys.exit(1)
    open_named(reference, manifest_path)  # with the digest that was asked for
    if rows is None:
        return
    if recipe_path is None:
        raise RecipeError("--teacher needs --recipe, which names the teacher.")
    recipe, manifest, roots, on = read_inputs(recipe_path, (), manifest_path, data_root, device)
    store = open_named(reference, manifest_path)
    loader = training_images(recipe, manifest, roots)
    teacher = load_teacher(recipe, manifest, roots, len(loader.dataset.classes), on)
    if teacher.weights_sha256 != store.identity.teacher.weights_sha256:
        raise StoreMismatch(
            f"{reference}: was made by weights {store.identity.teacher.weights_sha256}, the recipe's teacher has "
            f"{teacher.weights_sha256}. Name the right recipe, or other targets of the store: STORE#TARGETS."
        )
    found = measure_fidelity(store, loader, teacher, rows, on).model_dump(mode="json")
    assert store.manifest is not None
    before = store.manifest.fidelity.get(store.targets)
    known = before.model_dump(mode="json") if before else {}
    table = [[name, f"{value}", f"{known.get(name, '')}"] for name, value in found.items()]
    show_table(f"{reference}: the teacher, asked again", ["field", "now", "when finished"], table)


def show_faults(result: Verification, reference: str, as_json: bool) -> None:
    if as_json:
        click.echo(faults_as_json(result))
        return
    for fault in result.faults:
        click.echo(printable(f"{fault.file}: {fault.problem}"))
    found = f"{len(result.faults)} FAULTS" if result.faults else "no fault"
    say(f"{reference}: {result.mode} verification of {result.objects:,} objects, {result.bytes:,} bytes: {found}")


@store_group.command("repair")
@click.argument("reference", metavar="STORE")
@recipe_options
@click.option("--remove-extra", is_flag=True, help="Delete files that do not belong to the store, too.")
def repair_command(reference: str, recipe_path: Path, remove_extra: bool, **inputs: Any) -> None:
    """Find what is wrong with STORE and do exactly those blocks again, with the teacher of RECIPE.

    Without the teacher, `store pull` over a damaged copy fetches what is wrong from another one.

    \b
    offline-kd store repair runs/digits/store runs/digits/recipe.yaml
    """
    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    place = place_at(manifest.store(reference).location)
    for _ in range(3):  # a damaged manifest hides what else is damaged
        result = verify(place)
        faults = [fault for fault in result.faults if remove_extra or not fault.is_extra]
        if not faults:
            break
        show_faults(result, reference, as_json=False)
        redone = take_back(place, faults, remove_extra)
        say(f"{reference}: doing {len(redone)} blocks again")
        is_addition = place.size(f"additions/{recipe.name}.json") is not None
        cache_teacher(recipe, manifest, roots, place, device, add=is_addition)
    result = verify(place)
    show_faults(result, reference, as_json=False)
    if any(not fault.is_extra for fault in result.faults):
        sys.exit(1)
    say(f"{reference}: sha256:{open_store(place).digest}")


@store_group.command("plan")
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plan_command(recipe_path: Path, as_json: bool, **inputs: Any) -> None:
    """What capturing RECIPE would cost, from a warm-up of some seconds, and from how many students on it pays.

    \b
    offline-kd store plan pipelines/cifar10/resnet56_resnet20_cpu.yaml
    """
    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    found = plan(recipe, manifest, roots, device)
    if as_json:
        click.echo(json.dumps(asdict(found) | {"total_bytes": sum(found.bytes.values())}, indent=2))
        return
    total = sum(found.bytes.values())
    table = [
        ["rows", f"{found.rows:,}"],
        ["bytes", f"{total:,} ({total / found.rows:.1f} per row)"],
        *[[f"  {kind}", f"{size:,}"] for kind, size in found.bytes.items()],
        ["objects", f"{found.objects:,}"],
        ["images through the teacher", f"{found.teacher_passes:,}"],
        [
            "time of a view, teacher alone / whole stage 1",
            f"{1e3 * found.teacher_seconds_per_view:.3f} / {1e3 * found.seconds_per_view:.3f} ms",
        ],
        ["time of the capture", duration(found.capture_seconds)],
        ["what a live teacher would add to one student", duration(found.student_teacher_seconds)],
        ["students from which on the store pays", f"{found.break_even_students:,}"],
    ]
    show_table(f"{recipe.name} on {device}", ["", "estimate"], table)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def copy_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.argument("source", metavar="FROM"),
            click.argument("target", metavar="TO"),
            click.option("--blocks", metavar="A:B", help="Take blocks A to B - 1 only."),
            click.option("--views", metavar="0:N", help="Take the first N views only."),
            click.option("--only", type=click.Choice(KINDS), multiple=True, help="Take these kinds of targets only."),
        ]
    ):
        command = option(command)
    return common_options(command)


@store_group.command("push")
@copy_options
def push_command(**options: Any) -> None:
    """Copy a store to where the team can reach it. Interrupted, the same command goes on.

    \b
    offline-kd store push runs/digits/store s3://team/stores/digits
    """
    copy_command(**options)


@store_group.command("pull")
@copy_options
def pull_command(**options: Any) -> None:
    """Copy a store, or a part of it, from where the team keeps it. Over a damaged copy, it repairs that.

    \b
    offline-kd store pull s3://team/stores/digits stores/digits
    offline-kd store pull https://example.org/stores/digits stores/digits --views 0:5 --only logits
    """
    copy_command(**options)


def copy_command(
    source: str,
    target: str,
    blocks: str | None,
    views: str | None,
    only: tuple[str, ...],
    manifest_path: Path,
    data_root: tuple[Path, ...],
) -> None:
    known = load_manifest(manifest_path) if manifest_path.is_file() else Manifest(manifest_version=1)
    where = known.store(source)
    some_views = from_to("--views", views)
    if some_views is not None and some_views.start:
        raise RecipeError(f"--views {views}: a copy has the first views, write 0:N.")
    copied = copy_store(
        where.location,
        target,
        blocks=from_to("--blocks", blocks),
        views=some_views.stop if some_views else None,
        only=only or None,
        digest=where.digest,
    )
    say(
        f"{target}: {describe(copied.held)}, sha256:{copied.digest}; {copied.files:,} files, {copied.bytes:,} bytes, "
        f"{copied.already_there:,} of them were there already"
    )


def from_to(option: str, text: str | None) -> range | None:
    if text is None:
        return None
    parts = re.fullmatch(r"(\d+):(\d+)", text)
    if parts is None or not int(parts[1]) < int(parts[2]):
        raise RecipeError(f"{option} {text}: write A:B with A < B, such as 0:10.")
    return range(int(parts[1]), int(parts[2]))


@store_group.command("inspect")
@click.argument("reference", metavar="STORE")
@click.option("--key", required=True, help="Key of the sample.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page to write.")
@common_options
def inspect_command(reference: str, key: str, out: Path, manifest_path: Path, data_root: tuple[Path, ...]) -> None:
    """A page about one sample: its views, the teacher's five likeliest classes, the template map over the image.

    \b
    offline-kd store inspect runs/digits/store --key 0042 --data-root runs/digits/data --out 0042.html
    """
    store = open_named(reference, manifest_path)
    folder = load_manifest(manifest_path).dataset(store.identity.dataset.name).folder
    write_inspect_page(store, key, folder, data_roots(data_root), out)
    say(f"{out} written")


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
@click.option("--out", type=click.Path(path_type=Path), help="A plot (.svg or .png) of rate against distortion.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@common_options
def bench_codecs_command(
    reference: str, rows: int, out: Path | None, as_json: bool, manifest_path: Path, data_root: tuple[Path, ...]
) -> None:
    """What every codec makes of the logits of STORE (f32 or f16): bytes, speed, and how much is lost for whom.

    \b
    offline-kd bench codecs runs/digits/store --out codecs.svg
    """
    store = open_named(reference, manifest_path)
    results = bench_codecs(store, rows)
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


if __name__ == "__main__":
    sys.exit(main())

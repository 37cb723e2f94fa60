"""`offline-kd data ...`: make, list and prove datasets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offline_kd.cli.options import MANIFEST_NAME, common_options
from offline_kd.support.errors import RecipeError

if TYPE_CHECKING:
    from offline_kd.data.manifest import Tar
    from offline_kd.data.tars import Sample


@click.group("data")
def command() -> None:
    """Make, list and prove datasets.

    \b
    offline-kd data check cifar10
    """


@command.command("pack")
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
    import yaml

    from offline_kd.data import packing
    from offline_kd.support.console import say

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


@command.command("list")
@common_options
def list_command(manifest_path: Path, data_root: tuple[Path, ...]) -> None:
    """The datasets and teachers of the manifest, and whether they are here.

    \b
    offline-kd data list
    """
    from offline_kd.data.manifest import data_roots, load_manifest
    from offline_kd.support.console import show_table

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


@command.command("check")
@click.argument("name")
@common_options
def check_command(name: str, manifest_path: Path, data_root: tuple[Path, ...]) -> None:
    """Prove a local copy of NAME. A dataset: sha256, count, keys, labels, every image decodable. Weights: sha256.

    \b
    offline-kd data check digits
    """
    from offline_kd.data.checking import check_dataset
    from offline_kd.data.manifest import data_roots, load_manifest, locate_weights
    from offline_kd.support.console import progress, say

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

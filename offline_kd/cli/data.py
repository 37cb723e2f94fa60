"""`offline-kd data ...`: make, list and prove datasets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import click

from offline_kd.cli.options import MANIFEST_NAME, common_options
from offline_kd.support.errors import RecipeError, shorten

if TYPE_CHECKING:
    from offline_kd.data.fetching import Root
    from offline_kd.data.folders import Photos
    from offline_kd.data.manifest import Tar
    from offline_kd.data.tars import Sample


def _part_of_a_name(context: click.Context, option: click.Parameter, value: str) -> str:
    if re.fullmatch(r"[0-9A-Za-z_][0-9A-Za-z_.\-]{0,99}", value) is None:
        raise RecipeError(f"--{option.name} {shorten(value)}: letters, digits, '_', '-' and '.' only, at most 100.")
    return value


@click.group("data")
def command() -> None:
    """Make, list and prove datasets.

    \b
    offline-kd data check digits
    """


class OfFolder(TypedDict):
    """What `data pack` is told of a folder of pictures."""

    split: str | None
    bad_images: Literal["fail", "skip"] | None
    side: int | None
    labels: Path | None


@command.command("pack")
@click.argument("kind", type=click.Choice(["digits", "cifar10", "cifar100", "imagefolder"]))
@click.option("--source", type=click.Path(path_type=Path), help="Your copy of the data (not for digits).")
@click.option("--out", type=click.Path(), help="Folder or bucket of the tars.  [default: data/KIND]")
@click.option("--samples-per-tar", type=click.IntRange(min=1), help="[default: 5000; digits 512, imagefolder 1000]")
@click.option("--split", help="Name of the only split (imagefolder).  [default: folders in --source, or train]")
@click.option(
    "--bad-images",
    type=click.Choice(["fail", "skip"]),
    help="Of an imagefolder: what happens with pictures that cannot be decoded, when all are listed.  [default: fail]",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="Of an imagefolder without folders of classes: a CSV of `file,class`.",
)
@click.option(
    "--side",
    type=click.IntRange(min=0),
    help="Of an imagefolder: larger pictures get so many pixels on the shorter side.  [default: as they are]",
)
@click.option("--write", "manifest_file", type=click.Path(path_type=Path), help="Merge the entry into this manifest.")
def pack_command(
    kind: str,
    source: Path | None,
    out: str | None,
    samples_per_tar: int | None,
    manifest_file: Path | None,
    **of_folder: Unpack[OfFolder],
) -> None:
    """Write WebDataset tars and print their manifest entry. Packing twice gives the same bytes.

    --source of an imagefolder holds SPLIT/CLASS/IMAGE for several splits, or CLASS/IMAGE for one. Files that are no
    pictures are left out and counted; bad pictures are listed, all of them, before anything is written. Every epoch
    decodes what is packed: photographs of a camera are best packed smaller, with --side 512.

    \b
    offline-kd data pack digits
    offline-kd data pack cifar100 --source DIR      (DIR holds cifar-100-python)
    offline-kd data pack imagefolder --source photos --out data/photos --write data_manifest.yaml
    offline-kd data pack imagefolder --source photos/train --split train --out data/photos --bad-images skip
    offline-kd data pack imagefolder --source photos --out s3://team/pictures --write data_manifest.yaml
    """
    from offline_kd.data import packing
    from offline_kd.data.fetching import root_at
    from offline_kd.data.manifest_merging import (
        check_same_dataset,
        check_same_place,
        entry_yaml,
        manifest_entry,
        merge_dataset,
    )
    from offline_kd.support.console import say
    from offline_kd.support.web import Web

    to = root_at(out or f"data/{kind}")
    folder = to.resolve().name if isinstance(to, Path) else str(to).rsplit("/", 1)[-1]
    location = None if isinstance(to, Path) else str(to)
    if isinstance(to, Web):
        raise RecipeError(f"data pack --out {to}: web addresses can be read only. Write to a folder or a bucket.")
    name = folder if kind == "imagefolder" else kind
    photos = _photos(kind, source, to, of_folder)
    splits, classes = _samples(kind, source) if photos is None else ({}, photos.classes)
    if manifest_file is not None:
        check_same_dataset(manifest_file, name, folder, classes)  # before hours of packing
        if location is not None:
            check_same_place(manifest_file, name, location)
    size = samples_per_tar or {"digits": 512, "imagefolder": 1000}.get(kind, 5000)
    packed = {part: packing.pack(samples, to, part, size) for part, samples in splits.items()}
    if photos is not None:
        packed = packing.pack_photos(photos, to, size)
    entry = manifest_entry(folder, classes, packed, location)
    say(f"{to}: {sum(tar.count for tars in packed.values() for tar in tars):,} samples. For {MANIFEST_NAME}:")
    click.echo(entry_yaml({"datasets": {name: entry}}))
    if manifest_file is not None:
        merge_dataset(manifest_file, name, entry)
        say(f"{manifest_file}: dataset '{name}' has {', '.join(packed)} now")


def _photos(kind: str, source: Path | None, to: Root, options: OfFolder) -> Photos | None:
    """What a folder of pictures holds, when that is what is packed."""
    from offline_kd.data.folders import look_through
    from offline_kd.data.packing import refuse_inside, shrunk

    if kind != "imagefolder":
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if given:
            raise RecipeError(f"data pack {kind}: {', '.join(given)}: for imagefolder only. Leave it out.")
        return None
    folder = _own_copy(kind, source)
    refuse_inside(folder, to)
    photos = look_through(folder, options["split"], options["bad_images"] or "fail", options["labels"])
    return shrunk(photos, options["side"]) if options["side"] else photos


def _samples(kind: str, source: Path | None) -> tuple[Mapping[str, Iterable[Sample]], list[str]]:
    """The splits to pack, and their classes."""
    from offline_kd.data import packing

    if kind == "digits":
        return packing.digits_samples(), [str(digit) for digit in range(10)]
    return packing.cifar_samples(kind, _own_copy(kind, source))


def _own_copy(kind: str, source: Path | None) -> Path:
    if source is None:
        raise RecipeError(f"data pack {kind}: give --source, the folder of your own copy.")
    return source


class IndexOptions(TypedDict):
    """What `data index` is told besides the tars."""

    name: str
    split: str
    rule: str
    classes_file: Path | None
    num_classes: int | None
    workers: int
    engine: str
    manifest_path: Path


@command.command("index")
@click.argument("tars", nargs=-1, required=True)
@click.option("--name", required=True, callback=_part_of_a_name, help="Of the dataset, in the manifest.")
@click.option(
    "--split", default="train", show_default=True, callback=_part_of_a_name, help="Which split these tars are."
)
@click.option(
    "--label",
    "rule",
    default="cls",
    show_default=True,
    help="What says a label: cls, json:FIELD, json-set:FIELD (a list of classes) or none.",
)
@click.option("--classes", "classes_file", type=click.Path(path_type=Path), help="Class names in order, one a line.")
@click.option("--num-classes", type=click.IntRange(2, 2**20), help="Classes without names, where nothing says them.")
@click.option(
    "--workers", type=click.IntRange(1, 1024), default=os.cpu_count(), help="Tars read at once.  [default: cores]"
)
@click.option("--engine", type=click.Choice(["processes", "ray"]), default="processes", show_default=True)
@click.option("--manifest", "manifest_path", type=click.Path(path_type=Path), default=MANIFEST_NAME, show_default=True)
def index_command(tars: tuple[str, ...], **options: Unpack[IndexOptions]) -> None:
    """Put webdatasets that exist into the manifest, as they are: every tar is read once, where it lies.

    TARS are files or URLs, with {000..123}, {a,b}, * and ?. Count and sha256 of each go into an index beside the
    manifest. Interrupted, the same command goes on; with another --split it adds one.

    \b
    offline-kd data index 's3://bucket/imagenet-train-{000000..001281}.tar' --name imagenet --split train
    offline-kd data index 'laion/*.tar' --name laion --label none --classes imagenet_classes.txt
    """
    from offline_kd.data.index_entry import index_split

    index_split(tars, **options)


@command.command("list")
@common_options
def list_command(manifest_path: Path, data_root: tuple[str, ...]) -> None:
    """The datasets and teachers of the manifest and of the package, and whether they are here.

    \b
    offline-kd data list
    """
    from offline_kd.data.manifest import data_roots, is_complete, is_there, load_manifest
    from offline_kd.support.console import show_table

    manifest, roots = load_manifest(manifest_path), data_roots(data_root)

    def here(file: str) -> str:
        return "yes" if is_there(file, roots) else "no"

    rows = []
    for name in manifest.datasets:
        dataset = manifest.dataset(name)
        counts = ", ".join(f"{split} {part.count:,}" for split, part in dataset.splits.items())
        complete = "yes" if is_complete(dataset, roots) else "no"
        rows.append([name, "dataset", f"{len(dataset.classes)} classes; {counts}", complete])
    for name, teacher in manifest.teachers.items():
        expected = f"; {teacher.expected.in_words} on {teacher.expected.dataset}" if teacher.expected else ""
        rows.append([name, "teacher", f"{teacher.model}{expected}", here(teacher.weights.file)])
    rows += [[name, "file", weights.file, here(weights.file)] for name, weights in manifest.files.items()]
    where = f"{manifest_path} and the package" if os.path.isfile(manifest_path) else "the package"
    show_table(f"in {where}", ["name", "kind", "what", "here"], rows)


@command.command("check")
@click.argument("name")
@common_options
def check_command(name: str, manifest_path: Path, data_root: tuple[str, ...]) -> None:
    """Prove what lies below the data roots as NAME.

    Of a dataset: sha256, count, keys, labels, every image decodable. Of weights: sha256.

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

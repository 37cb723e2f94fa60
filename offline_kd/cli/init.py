"""`offline-kd init`: a folder of pictures becomes a dataset, and a recipe that `run` takes as it is."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from offline_kd.cli.options import MANIFEST_NAME, choose_device
from offline_kd.support.errors import DataError, RecipeError, shorten

if TYPE_CHECKING:
    from offline_kd.data.folders import Photos

RECIPE_NAME = "recipe.yaml"
MOST_ROWS = 50  # classes that are listed one by one
BEGIN = "offline-kd init --images FOLDER --teacher timm:resnet50"


class InitOptions(TypedDict):
    """What `init` is told besides images and teacher."""

    student: str | None
    labels: Path | None
    weights: str
    name: str | None
    out: Path
    minutes: int
    side: int | None
    force: bool
    device: str


@click.command("init")
@click.option(
    "--images", type=click.Path(path_type=Path), help="Folder of SPLIT/CLASS/IMAGE or CLASS/IMAGE.  [required]"
)
@click.option("--teacher", help="Its network: timm:NAME, torchvision:NAME, cifar:NAME or module:function.  [required]")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="CSV of `file,class`, for a folder without folders of classes."
)
@click.option("--student", help="Its network.  [default: a small one]")
@click.option(
    "--weights",
    default="auto",
    help="Of the teacher: a file, `pretrained` or `none`.  [default: pretrained, where they can be had]",
)
@click.option("--name", help="Of the dataset and the recipe.  [default: that of the folder]")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("."), help="Folder to write into.  [default: this one]"
)
@click.option("--minutes", type=click.IntRange(1, 10_000), default=8, show_default=True, help="Time for `run` here.")
@click.option(
    "--side",
    type=click.IntRange(min=0),
    help="Larger pictures are packed with so many pixels on the shorter side; 0: as they are.  [default: 512, or twice "
    "what the teacher sees]",
)
@click.option("--force", is_flag=True, help="Write the recipe and the dataset anew where they exist.")
@click.option("--device", default="auto", show_default=True, help="That `run` will use: cpu, cuda, cuda:N or auto.")
def command(images: Path | None, teacher: str | None, **options: Unpack[InitOptions]) -> None:
    """Begin here: a folder of pictures becomes a dataset and a recipe that `run` takes.

    What every setting follows from stands beside it. Networks are timed, so that a run takes about --minutes here.

    Splits are called train and val, valid, validation or test; a folder of classes alone is split by key. Files that
    are no pictures, and bad pictures, are listed and left out. Weights with as many outputs as there are classes are
    used as they are; otherwise the recipe trains the teacher on the pictures first. Pictures much larger than networks
    see are packed smaller, because every epoch decodes them: see --side.

    \b
    offline-kd init --images photos --teacher timm:resnet50
    offline-kd init --images photos --labels labels.csv --teacher timm:resnet50
    offline-kd init --images photos --teacher timm:resnet50 --weights mine.pth --student timm:mobilenetv3_small_100
    offline-kd run recipe.yaml
    """
    from offline_kd.data.folders import look_through
    from offline_kd.data.manifest_merging import check_same_dataset, manifest_entry, merge_dataset
    from offline_kd.data.packing import pack_photos, refuse_inside, shrunk
    from offline_kd.first_plan import side_for, teacher_start
    from offline_kd.first_recipe import first_recipe
    from offline_kd.models.networks import build
    from offline_kd.support.console import say
    from offline_kd.support.files import write_atomically

    if images is None or teacher is None:
        missing = " and ".join([*["--images"] * (images is None), *["--teacher"] * (teacher is None)])
        raise RecipeError(f"init: {missing} missing. Two lines are enough: `{BEGIN}`, `offline-kd run {RECIPE_NAME}`.")
    out, name = options["out"], options["name"] or _name_of(images)
    tars = out / "data" / name
    _refuse_what_exists(out, name, options["force"])
    refuse_inside(images, tars)
    device, weights = choose_device(options["device"]), _weights(options["weights"], out)
    for network in filter(None, (teacher, options["student"])):
        build(network, 2)  # a wrong name should not wait for pictures to be looked at
    photos = _with_splits(look_through(images, on_bad="skip", table=options["labels"]))
    _show(photos)
    check_same_dataset(out / MANIFEST_NAME, name, name, photos.classes)
    start = teacher_start(teacher, weights, photos)
    say(f"{teacher}: {start.why}")
    if start.warning:
        say(f"warning: {start.warning}")
    side = side_for(start) if options["side"] is None else options["side"]
    photos = shrunk(photos, side) if side else photos
    recipe = first_recipe(name, photos, start, options["student"], options["minutes"], device)
    count = sum(map(len, photos.splits.values()))
    packed = pack_photos(photos, tars, min(max(count // 16, 64), 1000))
    merge_dataset(out / MANIFEST_NAME, name, manifest_entry(name, photos.classes, packed))
    write_atomically(out / RECIPE_NAME, recipe.text)
    say(f"{out / RECIPE_NAME} and {out / MANIFEST_NAME} are written, the pictures packed in {tars}.")
    minutes = max(round(recipe.minutes), 1)
    if minutes > options["minutes"]:
        say(f"--minutes {options['minutes']} is too little: a smaller --teacher or --student, or a GPU, takes less.")
    say(f"Next, about {minutes} min where nothing else is going on (see the recipe):")
    go = "" if out.resolve() == Path.cwd() else f"cd {shlex.quote(str(out))} && "
    click.echo(f"{go}offline-kd run {RECIPE_NAME}")


def _name_of(images: Path) -> str:
    """A name for datasets, recipes and folders, after that of the pictures' folder."""
    return re.sub(r"[^0-9A-Za-z_\-]+", "_", images.resolve().name)[:100].strip("_") or "photos"


def _refuse_what_exists(out: Path, name: str, force: bool) -> None:
    if re.fullmatch(r"[0-9A-Za-z_\-]{1,100}", name) is None:
        raise RecipeError(f"--name {shorten(name)}: letters, digits, '_' and '-' only, at most 100.")
    there = [path for path in (out / RECIPE_NAME, out / "data" / name) if os.path.lexists(path)]
    if there and not force:
        raise RecipeError(
            f"{there[0]} exists. Give another --out"
            + (" or --name" if len(there) == 1 and there[0].is_dir() else "")
            + ", or --force to write it anew."
        )


def _weights(weights: str, out: Path) -> str:
    """As the recipe in `out` names them."""
    if weights in ("auto", "none", "pretrained"):
        return weights
    if not os.path.isfile(weights):
        raise RecipeError(f"--weights {shorten(weights)}: no such file. Give one, `pretrained` or `none`.")
    return weights if out.resolve() == Path.cwd() else os.path.abspath(weights)


def _with_splits(photos: Photos) -> Photos:
    """With a split to learn from and one to measure on, and without classes that have no picture."""
    from offline_kd.data.folders import evaluation_split, training_split
    from offline_kd.data.splitting import HELD_OUT, split_by_key, without_empty_classes
    from offline_kd.support.console import counted, say

    photos = without_empty_classes(photos)
    if len(photos.splits) == 1:
        photos = split_by_key(photos)
        say(f"{photos.folder}: has no splits: one of {HELD_OUT} pictures, by its key, is held out in 'val'")
    if training_split(photos.splits) is None or evaluation_split(photos.splits) is None:
        raise DataError(
            f"{photos.folder}: its splits are called {', '.join(photos.splits)}. Call one train, and one val or test."
        )
    for part, pictures in photos.splits.items():
        if not pictures or len(photos.classes) < 2:
            raise DataError(
                f"{photos.folder}: {part} has {counted(len(pictures), 'pictures')} of "
                f"{counted(len(photos.classes), 'classes')} that can be read. At least 2 classes and a picture to "
                "measure on are needed."
            )
    return photos


def _show(photos: Photos) -> None:
    """How many pictures there are, of which class and size."""
    from offline_kd.support.console import counted, show_table

    counts = {part: photos.counts(part) for part in photos.splits}
    shorter, longer = ({side(one.size) for those in photos.splits.values() for one in those} for side in (min, max))
    pictures = counted(sum(one.total() for one in counts.values()), "pictures")
    title = (
        f"{photos.folder}: {pictures} of {counted(len(photos.classes), 'classes')}; short sides of {min(shorter):,} to "
        f"{max(shorter):,} pixels, long sides up to {max(longer):,}"
    )
    rows = [[name, *(f"{one[name]:,}" for one in counts.values())] for name in photos.classes[:MOST_ROWS]]
    if len(photos.classes) > MOST_ROWS:
        rows.append(["...", *("" for _ in counts)])
    rows.append(["together", *(f"{one.total():,}" for one in counts.values())])
    show_table(title, ["class", *counts], rows)

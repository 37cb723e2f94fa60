"""`offline-kd predict`: what a trained student says of image files."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from offline_kd.cli.options import student_options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offline_kd.models.prediction import Prediction


@click.command("predict")
@student_options
@click.argument("images", metavar="IMAGES...", nargs=-1, required=True)
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 1000), help="So many classes of an image.")
@click.option("--format", "output", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
def command(student: str, images: tuple[str, ...], network: str | None, device: str, top: int, output: str) -> None:
    """What a trained STUDENT says of IMAGES: classes and probabilities. STUDENT is a run directory or a weight file.

    Of a multi-label student, the classes with a probability above .5: maybe none.

    IMAGES are files, folders, and - for names on standard input, one a line. What cannot be read is listed, and the
    exit status is then 1.

    \b
    offline-kd predict runs/wttm photos/val --top 1
    find . -name '*.jpg' | offline-kd predict runs/wttm/best.safetensors - --format csv > predictions.csv
    """
    from offline_kd.cli.options import choose_device
    from offline_kd.models.prediction import image_files, predict_files
    from offline_kd.models.student_file import load_student
    from offline_kd.support.console import say
    from offline_kd.support.errors import DataError

    on = choose_device(device)
    loaded = load_student(student, network=network)
    loaded.network.to(on)
    named = [one for name in images for one in (_lines() if name == "-" else [name])]
    files = image_files(named)
    bad = []

    def readable() -> Iterable[Prediction]:
        for one in predict_files(loaded, files, top):
            if one.problem is not None:
                say(f"{one.image}: {one.problem}")
                bad.append(one)
            yield one

    if output == "json":
        print_json(readable())
    elif output == "csv":
        print_csv(readable())
    else:
        show(readable())
    if bad:
        raise DataError(f"{len(bad)} of {len(files)} images cannot be read: the lines above say why. Repair them.")


def _lines() -> list[str]:
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]  # names are bytes


def show(predictions: Iterable[Prediction]) -> None:
    """A line for every image."""
    from offline_kd.support.console import show_table

    rows = [
        [one.image, ", ".join(f"{name} {probability:.4f}" for name, probability in one.classes)]
        for one in predictions
        if one.problem is None
    ]
    show_table("classes and probabilities", ["image", "likeliest first"], rows)


def print_json(predictions: Iterable[Prediction]) -> None:
    """A list of images, each with its `classes` or its `problem`."""
    import json

    def content(one: Prediction) -> dict[str, object]:
        if one.problem is not None:
            return {"image": one.image, "problem": one.problem}
        classes = [{"class": name, "probability": probability} for name, probability in one.classes]
        return {"image": one.image, "classes": classes}

    click.echo(json.dumps([content(one) for one in predictions], indent=2))


def print_csv(predictions: Iterable[Prediction]) -> None:
    """A line for every class of every image, written as soon as it is known."""
    import csv

    from offline_kd.support.console import printable

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for one in predictions:
        for rank, (name, probability) in enumerate(one.classes, 1):
            writer.writerow([printable(one.image), rank, name, probability])

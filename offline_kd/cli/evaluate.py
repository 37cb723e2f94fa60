"""`offline-kd evaluate`: how good a trained student is on a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from offline_kd.cli.options import common_options, student_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from offline_kd.data.blocks import BlockLoader
    from offline_kd.data.fetching import Root
    from offline_kd.data.manifest import Manifest
    from offline_kd.models.evaluation import ClassAccuracy
    from offline_kd.models.student_file import StudentFile, TrainedStudent

SHOWN = 20  # classes of the table


@click.command("evaluate")
@student_options
@click.option("--data", metavar="DATASET[/SPLIT]", help="Of the manifest.  [default: what the run was evaluated on]")
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@common_options
def command(
    student: str,
    network: str | None,
    device: str,
    data: str | None,
    as_json: bool,
    manifest_path: Path,
    data_root: tuple[str, ...],
) -> None:
    """How good a trained STUDENT is on a split: top-1, top-5, calibration, classes. A run directory or a weight file.

    Of a multi-label student: mean average precision, and that of every class. Of a student without classes: k-NN
    top-1. On the split that the run was evaluated on, these are its own figures.

    \b
    offline-kd evaluate runs/wttm
    offline-kd evaluate runs/wttm/best.safetensors --data digits/test --json
    """
    import json
    from dataclasses import asdict

    from offline_kd.cli.options import choose_device
    from offline_kd.data.manifest import data_roots, load_manifest
    from offline_kd.models.evaluation import by_class, evaluate, top_k
    from offline_kd.models.student_file import load_student

    on = choose_device(device)
    loaded = load_student(student, network=network)
    data_name, split = evaluation_split(loaded.about, data, load_manifest(manifest_path), data_roots(data_root))
    loaded.network.to(on)
    if loaded.about.kind == "embedding":
        show_vectors(student, data_name, vectors_measured(loaded, split, on, f"{student} on {data_name}"), as_json)
        return
    found = evaluate(loaded.logits, split, 256, on, f"{student} on {data_name}", loaded.about.crop)
    z, y = found.answers.logits, found.answers.labels
    if loaded.about.kind == "multilabel":
        about = {"student": student, "data": data_name, "samples": found.samples, **found.figures}
        show_sets(about | {"left_out": split.split.count - found.samples}, z, y, loaded.about.classes, as_json)
        return
    classes = by_class(z, y, loaded.about.classes)
    left_out = split.split.count - found.samples
    top5 = 100 * top_k(z, y).double().mean().item()
    measured = {name: getattr(found, name) for name in ("samples", "top1", "nll", "ece")}
    figures = {"student": student, "data": data_name, **measured, "top5": top5, "left_out": left_out}
    if as_json:
        click.echo(json.dumps({**figures, "classes": [asdict(one) for one in classes]}, indent=2))
    else:
        show(figures, classes)


def evaluation_split(
    about: StudentFile, data: str | None, manifest: Manifest, roots: Sequence[Root]
) -> tuple[str, BlockLoader]:
    """The split that is meant, DATASET/SPLIT, and its images; raises DataError for other classes than the student's."""
    from offline_kd.data.blocks import BlockLoader
    from offline_kd.data.labels import need_labels, refuse_other_labels
    from offline_kd.support.errors import DataError

    if data is None:
        name, part = manifest.evaluation(about.dataset, about.evaluation)
    elif data in manifest.datasets or "/" not in data:
        name, part = manifest.evaluation(data, about.evaluation if data == about.dataset else "test")
    else:
        name, _, part = data.rpartition("/")
    dataset, split = manifest.dataset(name), manifest.split(name, part)
    need_labels(split.labels, f"{name}/{part}", "evaluation")
    refuse_other_labels(about.kind, split.labels, f"{name}/{part}")
    if about.kind != "embedding" and dataset.classes != about.classes:
        pairs = zip(dataset.classes, about.classes, strict=False)
        first = next((f"class {n} is '{a}', the student's '{b}'" for n, (a, b) in enumerate(pairs) if a != b), "")
        raise DataError(
            f"{name}: has {len(dataset.classes)} classes, the student {len(about.classes)}"
            f"{f': {first}' if first else ''}. Evaluate on images of the same classes, in the same order."
        )
    return f"{name}/{part}", BlockLoader(dataset, split, roots, decode=about.crop is None, on_bad="skip")


def vectors_measured(student: TrainedStudent, split: BlockLoader, device: torch.device, title: str) -> dict[str, float]:
    """k-NN top-1 in percent, of a student's own vectors (`knn_top1`) and of their projections, by name of the teacher's
    features."""
    from offline_kd.models.neighbours import embed, knn_top1

    found = embed(student.vectors, split, 256, device, title, student.about.crop)
    vectors, labels = found.vectors.to(device), found.labels.to(device)
    projected = {f"knn_top1_{name}": one.to(device)(vectors) for name, one in student.projections.items()}
    of_each = {"knn_top1": vectors} | projected
    return {"samples": len(labels), **{name: knn_top1(one, labels) for name, one in of_each.items()}}


def show_vectors(student: str, data: str, figures: dict[str, float], as_json: bool) -> None:
    """What was measured of a student without classes: a table, or JSON."""
    import json

    from offline_kd.support.console import show_table

    if as_json:
        click.echo(json.dumps({"student": student, "data": data, **figures}, indent=2))
        return
    spaces = [name.removeprefix("knn_top1_") for name in figures if name.startswith("knn_top1_")]
    columns = ["images", "k-NN top-1 %", *(f"k-NN top-1 % in '{name}'" for name in spaces)]
    percents = [f"{value:.2f}" for name, value in figures.items() if name != "samples"]
    show_table(f"{student} on {data}", columns, [[f"{figures['samples']:,}", *percents]])


def show(figures: dict[str, object], classes: Sequence[ClassAccuracy]) -> None:
    """Two tables: all images, and the classes that are worst."""
    from offline_kd.support.console import say, show_table

    def percent(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "-"

    row = [f"{figures['samples']:,}", percent(figures["top1"]), percent(figures["top5"])]
    row += [f"{figures['nll']:.4f}", f"{figures['ece']:.4f}"]
    title = f"{figures['student']} on {figures['data']}"
    show_table(title, ["images", "top-1 %", "top-5 %", "nats per image", "ECE"], [row])
    worst = sorted(classes, key=lambda one: 101.0 if one.top1 is None else one.top1)[:SHOWN]
    rows = [
        [one.name, f"{one.images:,}", percent(one.top1), percent(one.top5), one.mistaken_for or "-"] for one in worst
    ]
    about = f"the {len(worst)} worst of {len(classes)} classes" if len(worst) < len(classes) else "classes, worst first"
    show_table(about, ["class", "images", "top-1 %", "top-5 %", "mostly mistaken for"], rows)
    if figures["left_out"]:
        say(f"{figures['left_out']} images that cannot be decoded were left out")


def show_sets(figures: dict[str, object], z: Tensor, y: Tensor, classes: Sequence[str], as_json: bool) -> None:
    """Of a multi-label student: all images, and the classes that are ranked worst.

    Args:
        z: logits `[n, C]`.
        y: packed sets `[n, bytes]`.
        classes: their names.
    """
    import json

    from offline_kd.data.label_sets import unpack_sets
    from offline_kd.models.average_precision import average_precisions
    from offline_kd.support.console import say, show_table

    labels = unpack_sets(y, len(classes)).numpy() > 0
    found = zip(classes, labels.sum(axis=0).tolist(), average_precisions(z.numpy(), labels).tolist(), strict=True)
    by_class = [(name, images, 100 * average if images else None) for name, images, average in found]
    if as_json:
        lines = [{"name": name, "images": images, "ap": average} for name, images, average in by_class]
        click.echo(json.dumps({**figures, "classes": lines}, indent=2))
        return
    row = [f"{figures['samples']:,}", f"{figures['map']:.2f}", f"{figures['bce']:.4f}"]
    show_table(f"{figures['student']} on {figures['data']}", ["images", "mAP %", "nats per image and class"], [row])
    worst = sorted(by_class, key=lambda one: 101.0 if one[2] is None else one[2])[:SHOWN]
    rows = [[name, f"{images:,}", "-" if average is None else f"{average:.2f}"] for name, images, average in worst]
    about = (
        f"the {len(worst)} worst of {len(by_class)} classes" if len(worst) < len(by_class) else "classes, worst first"
    )
    show_table(about, ["class", "images", "average precision %"], rows)
    if figures["left_out"]:
        say(f"{figures['left_out']} images that cannot be decoded were left out")

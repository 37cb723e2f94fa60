"""`offline-kd export`: a trained student for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offline_kd.cli.evaluate import evaluation_split
from offline_kd.cli.options import common_options, network_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from offline_kd.models.export import Format, Input
    from offline_kd.models.student_file import TrainedStudent

COMPARED = 16  # images


@click.command("export")
@click.argument("student", metavar="STUDENT")
@network_option
@click.option("--format", "form", type=click.Choice(["onnx", "torch-export", "timm"]), required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write; for timm a folder.")
@click.option(
    "--input",
    "takes",
    type=click.Choice(["uint8", "float", "normalised"]),
    help="What it takes: pixels 0..255, float32 0..1, or what is normalised already.  [default: uint8]",
)
@click.option("--images", multiple=True, metavar="PATH", help="To compare on.  [default: of the evaluation split]")
@common_options
def command(
    student: str,
    network: str | None,
    form: Format,
    out: Path,
    takes: Input | None,
    images: tuple[str, ...],
    manifest_path: Path,
    data_root: tuple[str, ...],
) -> None:
    """Write a trained STUDENT for other programs, and compare both. STUDENT is a run directory or a weight file.

    ONNX needs `pip install 'offline-kd[onnx]'`. Batches may have any size. Where no images are here, both are compared
    on noise.

    \b
    offline-kd export runs/wttm --format onnx --out wttm.onnx
    offline-kd export runs/wttm/best.safetensors --format torch-export --out wttm.pt2 --input float --images photos/val
    """
    from offline_kd.models.export import export_student
    from offline_kd.models.student_file import load_student
    from offline_kd.support.console import say
    from offline_kd.support.errors import RecipeError

    if form == "timm" and takes is not None:
        raise RecipeError(f"--input {takes}: timm's models take normalised images, as config.json says. Leave it out.")
    loaded = load_student(student, network=network)
    compared, which = images_to_compare(loaded, images, manifest_path, data_root)
    found = export_student(loaded, form, out, compared, takes or "uint8")
    what = "vectors" if loaded.about.kind == "embedding" else "logits"
    say(
        f"{out}: {what} of {found.images} {which} differ by {found.difference:.2g} at most from the student's, whose "
        f"largest is {found.largest:.3g}"
    )


def images_to_compare(
    student: TrainedStudent, named: Sequence[str], manifest_path: Path, data_root: tuple[str, ...]
) -> tuple[Tensor, str]:
    """`[n, 3, H, W]` uint8 as the student takes them, and what they are."""
    import numpy as np
    import torch

    from offline_kd.data.manifest import data_roots, load_manifest
    from offline_kd.models.prediction import image_files, read_pixels
    from offline_kd.support.console import say
    from offline_kd.support.errors import DataError, RecipeError
    from offline_kd.views.render import plain_images

    if named:
        files = image_files(named)[:COMPARED]
        pixels = [read_pixels(student, file) for file in files]
        for file, one in zip(files, pixels, strict=True):
            if isinstance(one, str):
                raise DataError(f"{file}: {one}. Name other images.")
        return torch.from_numpy(np.stack([one for one in pixels if not isinstance(one, str)])), "images"
    if os.path.isfile(manifest_path):
        try:
            name, split = evaluation_split(student.about, None, load_manifest(manifest_path), data_roots(data_root))
            found, _ = plain_images(split[0], student.about.crop, 0, COMPARED)
            if len(found):
                return found, f"images of {name}"
        except (DataError, RecipeError) as error:
            say(f"{error}")
    say("no image of the student's dataset is here: compared on noise. Name some with --images.")
    noise = torch.randint(0, 256, (COMPARED, 3, *student.about.input_size), generator=torch.Generator().manual_seed(0))
    return noise.to(torch.uint8), "images of noise"

"""`offline-kd store import ...`: label stores of other programs made stores of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from offline_kd.cli.options import common_options

if TYPE_CHECKING:
    from offline_kd.cache.foreign.answers import Foreign


class Where(TypedDict):
    """What `import_options` hand to a command, besides the folder and the number of views."""

    data: str
    out: str
    split: str
    teacher: str
    least_top1: float
    manifest_path: Path
    data_root: tuple[str, ...]


def import_options(command: Callable[..., None]) -> Callable[..., None]:
    """SOURCE and what all formats need to know."""
    for option in reversed(
        [
            click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path)),
            click.option("--data", required=True, help="The images: name in the manifest, or folder or URL of tars."),
            click.option("--split", default="train", show_default=True, help="Of the images that the labels are of."),
            click.option("--out", required=True, metavar="STORE", help="Folder or URL of the store to make."),
            click.option("--views", "num_views", type=click.IntRange(1), help="Take the first N.  [default: all]"),
            click.option("--teacher", default="", metavar="NAME", help="What the teacher was, for the store's card."),
            click.option(
                "--least-top1",
                type=click.FloatRange(0, 100),
                default=50.0,
                show_default=True,
                help="Percent of views whose likeliest class must be the label.",
            ),
        ]
    ):
        command = option(command)
    return common_options(command)


@click.group("import")
def import_command() -> None:
    """Make a store of labels that another program stored, for its crops of the same images.

    \b
    offline-kd store import fkd FKD_soft_label/imagenet --data imagenet --out stores/fkd
    """


@import_command.command("fkd")
@import_options
@click.option("--size", type=click.IntRange(1, 4096), default=224, show_default=True, help="Of the student's images.")
@click.option(
    "--interpolation",
    type=click.Choice(["bilinear", "bicubic"]),
    default="bicubic",
    show_default=True,
    help="How the teacher's crops were resampled.",
)
@click.option("--temperature", type=click.Choice(["1", "2", "4"]), default="1", show_default=True, help="Their --temp.")
def fkd_command(
    source: Path, num_views: int | None, size: int, interpolation: str, temperature: str, **where: Unpack[Where]
) -> None:
    """Soft labels of FKD's generate_soft_label.py: crops, flips and the likeliest classes, a file for every image.

    \b
    offline-kd store import fkd FKD_soft_label/imagenet --data imagenet --out stores/fkd --views 50
    """
    from offline_kd.cache.foreign.fkd import open_fkd

    _import(open_fkd(source, size, interpolation, int(temperature), num_views), None, where)


@import_command.command("ml-dr")
@import_options
@click.option("--keys", type=click.Path(path_type=Path), help="Keys of the images in their order, one a line.")
def ml_dr_command(source: Path, num_views: int | None, keys: Path | None, **where: Unpack[Where]) -> None:
    """A reinforced dataset of ml-dr's reinforce.py: crops, flips, RandAugment, erased boxes and likeliest classes.

    Files have the number of their image: that of torchvision's ImageFolder, unless --keys says another order.

    \b
    offline-kd store import ml-dr reinforced_data --data imagenet --out stores/ml-dr
    """
    from offline_kd.cache.foreign.ml_dr import open_ml_dr

    _import(open_ml_dr(source, num_views, keys is not None), keys, where)


@import_command.command("tinyvit")
@import_options
@click.option(
    "--config", required=True, type=click.Path(path_type=Path), help="config.json that save_logits.py has written."
)
def tinyvit_command(source: Path, num_views: int | None, config: Path, **where: Unpack[Where]) -> None:
    """Sparse logits of TinyViT's save_logits.py: likeliest classes, and a seed from which crop and flip follow.

    Only where the teacher saw crops and flips and nothing else: from a seed, the rest can only be made by their code.

    \b
    offline-kd store import tinyvit teacher_logits --config output/config.json --data imagenet --out stores/tinyvit
    """
    from offline_kd.cache.foreign.tinyvit import open_tinyvit

    _import(open_tinyvit(source, config, num_views), None, where)


def _import(foreign: Foreign, keys: Path | None, where: Where) -> None:
    from offline_kd.cache.importing import Options, import_labels, read_keys
    from offline_kd.cli.options import known_stores
    from offline_kd.data.manifest import data_roots
    from offline_kd.support.console import show_table

    options = Options(where["split"], where["teacher"], read_keys(keys), where["least_top1"])
    found_in = known_stores(where["manifest_path"]), data_roots(where["data_root"])
    finished = import_labels(foreign, where["data"], found_in, where["out"], options)
    rows = [
        ["views of every image", f"{max(finished.views.values()):,}"],
        ["likeliest classes of each", f"{foreign.k}"],
        ["left out", f"{finished.left_out:,} images"],
        ["bytes", f"{finished.total_bytes:,}"],
        ["digest", f"sha256:{finished.digest}"],
    ]
    show_table(f"store {where['out']}, imported from {foreign.name}", ["", "value"], rows)

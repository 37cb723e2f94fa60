"""`offline-kd store explore`: a gallery of what a teacher knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offline_kd.cli.options import common_options, known_stores, open_named
from offline_kd.support.errors import RecipeError, shorten

if TYPE_CHECKING:
    from offline_kd.data.fetching import Root
    from offline_kd.store.reader import Store


@click.command("explore")
@click.argument("reference", metavar="STORE")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write: a new one.")
@click.option("--data", metavar="FOLDER", help="Folder or URL of the dataset's tars, where no manifest names them.")
@click.option(
    "--samples", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="Show so many at most."
)
@common_options
def explore_command(
    reference: str, out: Path, data: str | None, samples: int, manifest_path: Path, data_root: tuple[str, ...]
) -> None:
    """What the teacher knows, as a folder of pages and CSV: likely label errors, the least sure, confusions.

    \b
    offline-kd store explore runs/digits/store --data-root runs/digits/data --out gallery
    offline-kd store explore s3://team/stores/digits --data data/digits --samples 5000 --out pages
    """
    from offline_kd.store.gallery import write_gallery
    from offline_kd.support.console import say

    store = open_named(reference, manifest_path)
    found = write_gallery(store, _folders_of_images(store, data, manifest_path, data_root), out, samples)
    for problem in found.in_words:
        say(problem)
    say(
        f"{out / 'index.html'}: {found.shown:,} of {found.samples:,} samples, {found.pictured:,} with pictures; "
        f"{out / 'samples.csv'} has all of them"
    )


def _folders_of_images(store: Store, data: str | None, manifest_path: Path, data_root: tuple[str, ...]) -> list[Root]:
    """Where the tars of a store's dataset may lie; none where nothing says it, which is said."""
    from offline_kd.data.fetching import root_at
    from offline_kd.data.manifest import data_roots, folders_of
    from offline_kd.support.console import say

    if data is not None:
        root = root_at(data)
        if isinstance(root, Path) and not os.path.isdir(root):
            raise RecipeError(f"--data {shorten(data)}: no such folder. Correct it, or leave the option out.")
        return [root]
    name = store.identity.dataset.name
    datasets = known_stores(manifest_path).datasets
    if name not in datasets:
        say(f"{manifest_path} names no dataset '{name}', so there will be no pictures: give --data FOLDER")
        return []
    return folders_of(datasets[name], data_roots(data_root))

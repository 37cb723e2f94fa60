"""Options that several commands have, and what they are read into."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from offline_kd.cache.engines import DEFAULT_ENGINE, ENGINES, EngineOption
from offline_kd.support.errors import RecipeError, shorten

if TYPE_CHECKING:
    import torch

    from offline_kd.data.fetching import Root
    from offline_kd.data.manifest import Manifest
    from offline_kd.recipe import Recipe
    from offline_kd.store.reader import Store
    from offline_kd.support.places import Place

# What help shows, without importing the files that say it; a test compares them.
MANIFEST_NAME = "data_manifest.yaml"
SEED = click.IntRange(0, 2**64 - 1)
DOWNLOAD_BYTES = 10 * 2**30
TARGET_KINDS = ("logits", "decisions", "features")
TRACKERS = ("tensorboard", "wandb", "trackio")


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """--manifest and --data-root."""
    for option in reversed(
        [
            click.option(
                "--manifest",
                "manifest_path",
                type=click.Path(path_type=Path),
                default=MANIFEST_NAME,
                show_default=True,
                help="Datasets and teachers that names refer to, beside those of the package.",
            ),
            click.option(
                "--data-root",
                "data_root",
                type=click.Path(),
                multiple=True,
                callback=_roots,
                help="Folder or URL of the data, before those of OFFLINE_KD_DATA and ./data.",
            ),
        ]
    ):
        command = option(command)
    return command


def _roots(context: click.Context, option: click.Parameter, roots: tuple[str, ...]) -> tuple[str, ...]:
    """The data roots, none of which is left out without a word; raises RecipeError for no folder here and no URL."""
    if roots:
        from offline_kd.data.manifest import data_roots

        known = data_roots(roots)
    for number, root in enumerate(roots):
        if isinstance(known[number], Path) and not os.path.isdir(root):
            raise RecipeError(f"--data-root {shorten(str(root))}: no such folder. Correct it, or leave the option out.")
    return roots


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """RECIPE, --set and --device, besides the common options: what `read_inputs` takes."""
    for option in reversed(
        [
            click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path)),
            click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a recipe field."),
            click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or auto."),
        ]
    ):
        command = option(command)
    return common_options(command)


network_option = click.option(
    "--network",
    metavar="PACKAGE.MODULE:NAME",
    help="Code of your own that the network is, which may then be imported.",
)


def student_options(command: Callable[..., None]) -> Callable[..., None]:
    """STUDENT, --network and --device."""
    device = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or auto.")
    return click.argument("student", metavar="STUDENT")(network_option(device(command)))


def log_option(command: Callable[..., None]) -> Callable[..., None]:
    """--log: the tracker that is told every epoch."""
    return click.option(
        "--log",
        "--tracker",  # torchrun takes the other for an option of its own
        "log",
        type=click.Choice(TRACKERS),
        help="Tell a tracker of experiments every epoch, too (docs/training.md); under torchrun --tracker.",
    )(command)


class EngineChoice(TypedDict):
    """Who does the blocks of stage 1."""

    engine: str
    engine_options: dict[str, EngineOption]  # what was given of them


def gpu_option(flag: str, of_what: str) -> Callable[..., Callable[..., None]]:
    """How many GPUs a task of Ray takes: a share of one, or whole ones."""

    def whole_or_share(context: click.Context, option: click.Parameter, gpus: float | None) -> float | None:
        if gpus is not None and not gpus <= 1 and not gpus.is_integer():
            raise click.BadParameter(f"{gpus:g}: a share of one GPU, such as 0.5, or a whole number.")
        return gpus

    return click.option(
        flag, type=click.FloatRange(0, 1024), callback=whole_or_share, help=f"With Ray: of {of_what}; 0.5 is a share."
    )


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """--engine and the options that some engines have, handed to the command as one `engine`."""

    @functools.wraps(command)
    def with_choice(engine: str, **values: object) -> None:
        given = {name: value for name in names if (value := values.pop(name)) is not None}
        command(engine={"engine": engine, "engine_options": given}, **values)

    names = ("ray_address", "min_actors", "max_actors", "gpus_per_actor")
    positive = click.IntRange(1)
    chosen: Callable[..., None] = with_choice
    for option in reversed(
        [
            click.option(
                "--engine",
                default=DEFAULT_ENGINE,
                show_default=True,
                help=f"Who does the blocks of stage 1: {', '.join(ENGINES)}.",
            ),
            click.option("--ray-address", metavar="HOST:PORT", help="Of the Ray cluster; auto: that of this machine."),
            click.option("--min-actors", type=positive, help="With Ray: ask for so many at first.  [default: 1]"),
            click.option("--max-actors", type=positive, help="With Ray: never more.  [default: what is free]"),
            gpu_option("--gpus-per-actor", "an actor of stage 1"),
        ]
    ):
        chosen = option(chosen)
    return chosen


class Inputs(TypedDict):
    """What `recipe_options` hand to a command, besides `recipe_path`."""

    overrides: tuple[str, ...]
    manifest_path: Path
    data_root: tuple[str, ...]
    device: str


def read_inputs(
    recipe_path: Path, overrides: tuple[str, ...], manifest_path: Path, data_root: tuple[str, ...], device: str
) -> tuple[Recipe, Manifest, list[Root], torch.device]:
    """The recipe, the manifest, the roots of data and the device that `recipe_options` name."""
    from offline_kd.data.manifest import data_roots, load_manifest
    from offline_kd.recipe import load_recipe

    recipe = load_recipe(recipe_path, overrides)
    own_root = [recipe.data.root] if recipe.data.root else []
    return recipe, load_manifest(manifest_path), data_roots([*data_root, *own_root]), choose_device(device)


def choose_device(name: str) -> torch.device:
    """Of `--device`; auto is this process's GPU where there is one. Raises RecipeError for one that is not here."""
    parts = re.fullmatch(r"auto|cpu|cuda(?::([0-9]{1,3}))?", name)
    if parts is None:
        raise RecipeError(f"--device {name[:80]}: no such device. Use cpu, cuda, cuda:N or auto.")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise RecipeError(f"--device {name}: no CUDA device is available here. Use --device cpu.")
    rank = os.environ.get("LOCAL_RANK", "")  # as torchrun counts
    task = os.environ.get("SLURM_LOCALID", "")  # as srun counts, which may show a task its own GPUs only
    near = rank if rank.isdecimal() else int(task) % count if task.isdecimal() else 0
    index = int(parts[1] or (near if name == "auto" else 0))
    if index >= count:
        raise RecipeError(f"--device {name}: there are {count} CUDA devices here, none has number {index}.")
    return torch.device("cuda", index)


def known_stores(manifest_path: Path) -> Manifest:
    """The manifest that may name stores; the packaged one where there is none, whatever was said."""
    from offline_kd.data.manifest import load_manifest, packaged_manifest

    return load_manifest(manifest_path) if os.path.isfile(manifest_path) else packaged_manifest()


def open_named(reference: str, manifest_path: Path) -> Store:
    """A store by folder, URL or manifest name, with `#TARGETS` and `@sha256:DIGEST` or not."""
    from offline_kd.store.signing import open_as_demanded

    return open_as_demanded(known_stores(manifest_path).store(reference))


def place_named(reference: str, manifest_path: Path) -> Place:
    """Where a store is, by folder, URL or manifest name."""
    from offline_kd.support.places import place_at

    return place_at(known_stores(manifest_path).store(reference).location)

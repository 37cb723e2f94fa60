"""Options that several commands have, and what they are read into."""

import os
from collections.abc import Callable
from pathlib import Path

import click
import torch

from offline_kd.data.manifest import MANIFEST_NAME, Manifest, data_roots, load_manifest
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.support.errors import RecipeError


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

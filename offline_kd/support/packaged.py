"""What comes with the package beside its code: recipes, each with a name, and a manifest of datasets and teachers.

In a checkout they are `pipelines/` and `data_manifest.yaml` beside the package; an installed package holds both.
"""

import os
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from offline_kd.support.errors import RecipeError, shorten


def packaged(name: str) -> Path:
    """The file or folder of that name: `data_manifest.yaml` or `pipelines`."""
    package = Path(str(files("offline_kd")))
    installed = package / "packaged"
    return (installed if installed.is_dir() else package.parent) / name


def recipe_names() -> list[str]:
    """The packaged recipes, those that others extend too: `digits`, `cifar10/base`."""
    folder = packaged("pipelines")
    found = (file.relative_to(folder) for file in folder.rglob("*.yaml"))
    return sorted(file.with_suffix("").as_posix() for file in found if file.parts[0] != "cluster")  # jobs, no recipes


def recipe_file(path: Path, name: str = "", extended_by: Path | None = None) -> Path:
    """The file at `path`; where there is none, the packaged recipe of that name.

    Args:
        name: as the recipe `extended_by` writes it; `path` itself if empty.

    Raises RecipeError for neither, with near names.
    """
    if os.path.isfile(path):  # False where a name is too long for a file, too
        return path
    found = packaged_recipe(name or path.as_posix())
    if found is None:
        by = f" (extended by {extended_by})" if extended_by else ""
        raise RecipeError(f"{shorten(str(path))}: no such recipe{by}.{recipes_like(name or path.as_posix())}")
    return found


def packaged_recipe(name: str) -> Path | None:
    """The packaged recipe of that name; None where there is none."""
    return packaged("pipelines") / f"{name}.yaml" if name in recipe_names() else None


def recipes_like(name: str) -> str:
    """Which packaged recipes are near to a name, and where all are listed."""
    wanted, known = name.removeprefix("pipelines/").removesuffix(".yaml")[:100], recipe_names()
    near = [one for one in known if wanted in one] if len(wanted) > 2 else []
    near = (near or get_close_matches(wanted, known, cutoff=0.5))[:3]
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{meant} `offline-kd recipe list` shows the packaged ones."

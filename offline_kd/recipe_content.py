"""What was read of a recipe's file, before it is checked: files named beside it, fields that are replaced."""

import os
from pathlib import Path

from offline_kd.support.errors import RecipeError, shorten
from offline_kd.support.strict_yaml import MAX_DEPTH, read_yaml


def keys_beside(path: Path, content: dict[str, object]) -> None:
    """Keys that stores must be signed by are named relative to the recipe; a resolved recipe may lie elsewhere."""
    stores = content.get("store")
    for one in stores if isinstance(stores, list) else []:
        if isinstance(one, dict) and isinstance(one.get("signed_by"), str):
            one["signed_by"] = os.path.abspath(path.parent / one["signed_by"])


def with_classes(content: dict[str, object], folder: Path) -> dict[str, object]:
    """The map of classes in the place of the name of its file: a resolved recipe may lie elsewhere."""
    teacher = content.get("teacher")
    if not isinstance(teacher, dict) or not isinstance(teacher.get("classes"), str):
        return content
    file = folder / teacher["classes"]
    if not os.path.isfile(file):
        raise RecipeError(f"teacher.classes: {shorten(str(file))}: no such file. Name one, or write the map itself.")
    return {**content, "teacher": {**teacher, "classes": read_yaml(file)}}


def with_subset(content: dict[str, object], folder: Path) -> dict[str, object]:
    """The file of a subset's keys by its whole name: a resolved recipe may lie elsewhere."""
    data = content.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("subset"), str):
        return content
    return {**content, "data": {**data, "subset": os.path.abspath(folder / data["subset"])}}


def with_value(content: dict[str, object], path: str, value: object, about: str) -> dict[str, object]:
    """`content` with another value at `path.to.field`. Positions in lists are numbers from 0: `objectives.kd.1.gamma`.

    Nothing in `content` is changed, for YAML aliases may share parts of it. Raises RecipeError, beginning with `about`,
    where no such place can be.
    """
    steps = path.split(".")
    if "" in steps:
        raise RecipeError(f"{about}: write path.to.field=value")
    if len(steps) > MAX_DEPTH:
        raise RecipeError(f"{about}: the path has {len(steps):,} parts, no recipe is deeper than {MAX_DEPTH}")

    def replaced(node: object, at: int) -> object:
        if at == len(steps):
            return value
        if isinstance(node, dict):
            return {**node, steps[at]: replaced(node.get(steps[at], {}), at + 1)}
        if isinstance(node, list):
            positions = [str(position) for position in range(len(node))]
            if steps[at] not in positions:
                raise RecipeError(f"{about}: '{shorten(steps[at], 100)}' is no position in a list of {len(node)} (0..)")
            changed = positions.index(steps[at])
            return [*node[:changed], replaced(node[changed], at + 1), *node[changed + 1 :]]
        raise RecipeError(f"{about}: '{shorten(steps[at - 1], 100)}' has no fields, it is {shorten(repr(node), 100)}")

    changed = replaced(content, 0)
    assert isinstance(changed, dict)
    return changed

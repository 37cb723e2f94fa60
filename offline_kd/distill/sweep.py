"""The students of one `run`: every objective with every seed, and of a sweep every combination of values of fields.

A student of a sweep has a resolved recipe of its own, about nothing but itself: its objective, its seed, the values it
has. So it is the same run whatever else is swept, and values and seeds can be added to a sweep later.
"""

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from offline_kd.objectives.term import Term
from offline_kd.recipe import Recipe, recipe_of
from offline_kd.recipe_content import with_value
from offline_kd.support.errors import RecipeError, did_you_mean, shorten
from offline_kd.support.strict import fingerprint
from offline_kd.support.strict_yaml import parse_yaml

OF_STUDENTS = (
    "objectives",
    "student",
    "training",
    "data.labelled_fraction",
    "data.subset",
)  # which no store depends on
MAX_STUDENTS = 10_000
PLAIN = re.compile(r"[0-9A-Za-z_.+\-]{1,40}")  # of a value in the name of a folder


@dataclass(frozen=True)
class Planned:
    """A student that is to be trained."""

    recipe: Recipe
    objective: str
    seed: int
    label: str

    @property
    def terms(self) -> Sequence[Term]:
        return self.recipe.objectives[self.objective]


def with_sweeps(recipe: Recipe, texts: Sequence[str]) -> Recipe:
    """The recipe with sweeps as they are typed, `path.to.field=VALUE,VALUE`, in place of its own of these fields.

    Raises RecipeError for text that is not read as a list of values.
    """
    sweep = dict(recipe.sweep)
    for text in texts:
        about = f"--sweep {shorten(text, 100)}"
        path, equals, values = text.partition("=")
        parsed = parse_yaml(f"[{values}]", where=about)
        if not equals or not isinstance(parsed, list) or not parsed:
            raise RecipeError(f"{about}: write path.to.field=VALUE,VALUE,...")
        sweep[path] = parsed
    return recipe_of({**recipe.model_dump(mode="json"), "sweep": sweep}, "--sweep") if texts else recipe


def plan(recipe: Recipe, objectives: Sequence[str] = (), seeds: Sequence[int] | None = None) -> dict[str, Planned]:
    """The students of a recipe, by the names of their run directories.

    Args:
        objectives: which; by default those that a swept field belongs to, or all.
        seeds: instead of the recipe's. With them, and where anything is swept, each student has a recipe of its own.

    Raises RecipeError for a field that the store depends on, a value that a field cannot have, and too many students.
    """
    for name in objectives:
        recipe.objective(name)
    swept = [path.split(".")[1] for path in recipe.sweep if path.startswith("objectives.")]
    chosen = list(dict.fromkeys(objectives)) or [one for one in recipe.objectives if one in swept or not swept]
    if not recipe.sweep and seeds is None:
        return {
            f"{name}-{seed}": Planned(recipe, name, seed, f"{name}, seed {seed}")
            for name in chosen
            for seed in recipe.seeds
        }
    seeds = list(dict.fromkeys(recipe.seeds if seeds is None else seeds))
    _check(recipe, chosen, len(seeds))
    planned: dict[str, Planned] = {}
    for name in chosen:
        for point in _points(recipe, name):
            for seed in seeds:
                about = point.model_copy(update={"seeds": [seed]})
                label = _label(about, name, list(recipe.sweep))
                folder = f"{_folder(label)}_seed{seed}"
                if folder in planned and planned[folder].recipe != about:
                    raise RecipeError(f"recipe '{recipe.name}': two students of the sweep would be called {folder}.")
                planned[folder] = Planned(about, name, seed, f"{label}, seed {seed}")
    return planned


def _check(recipe: Recipe, objectives: Sequence[str], num_seeds: int) -> None:
    for path in recipe.sweep:
        where, steps = f"recipe '{recipe.name}': sweep of {shorten(path, 100)}", path.split(".")
        if path == "seeds":
            raise RecipeError(f"{where}: every student is trained with every seed already. Give --seeds 0,1,2.")
        if not any(path == known or path.startswith(f"{known}.") for known in OF_STUDENTS):
            raise RecipeError(
                f"{where}: all students of a sweep learn from one store, so a field that stage 1 may depend on cannot "
                f"be swept; those below {', '.join(OF_STUDENTS)} can. Give each value a run of its own: "
                f"--set {shorten(path, 100)}=VALUE --out FOLDER."
            )
        if steps[0] == "objectives" and (len(steps) == 1 or steps[1] not in recipe.objectives):
            near = did_you_mean(steps[1] if len(steps) > 1 else "", recipe.objectives)
            raise RecipeError(f"{where}: name one of the recipe's objectives, as in objectives.NAME.1.gamma.{near}")
    points = [math.prod(len(recipe.sweep[path]) for path in _paths_of(name, list(recipe.sweep))) for name in objectives]
    students = num_seeds * sum(points)
    if students > MAX_STUDENTS:
        raise RecipeError(f"recipe '{recipe.name}': a sweep of {students:,} students, at most {MAX_STUDENTS:,} are.")


def _points(recipe: Recipe, objective: str) -> list[Recipe]:
    """The recipe of that objective alone, with every combination of values of the fields that are about it."""
    content = recipe.model_dump(mode="json", exclude={"sweep"})
    content["objectives"] = {objective: content["objectives"][objective]}
    paths = _paths_of(objective, list(recipe.sweep))
    points = []
    for values in itertools.product(*(recipe.sweep[path] for path in paths)):
        where, point = f"recipe '{recipe.name}', sweep", content
        for path, value in zip(paths, values, strict=True):
            point = with_value(point, path, value, f"{where} of {shorten(path, 100)}")
        told = ", ".join(f"{path}={shorten(json.dumps(value), 100)}" for path, value in zip(paths, values, strict=True))
        points.append(recipe_of(point, f"{where} {told}" if told else where))
    return points


def _paths_of(objective: str, paths: Sequence[str]) -> list[str]:
    """Those that are not of another objective."""
    return [path for path in paths if path.partition(".")[0] != "objectives" or path.split(".")[1] == objective]


# ---- names ---------------------------------------------------------------------------------------------------------


def _label(recipe: Recipe, objective: str, paths: Sequence[str]) -> str:
    """`wttm gamma=0.1 lr=0.05`: the objective, and the values that the recipe has in the fields that are swept."""
    content = recipe.model_dump(mode="json")
    told = [f"{_short(path, paths)}={_text(_at(content, path))}" for path in _paths_of(objective, paths)]
    return " ".join([objective, *told])


def _folder(label: str) -> str:
    name = label.replace(" ", "_")
    return name if len(name) <= 150 else f"{name[:140]}-{fingerprint(name)[:8]}"


def _short(path: str, paths: Sequence[str]) -> str:
    """The end of a path by which it is told from the others."""
    steps = path.split(".")
    last = max(place for place, step in enumerate(steps) if not step.isdecimal())
    for start in range(last, 0, -1):
        end = ".".join(steps[start:])
        if not any(other != path and other.endswith(f".{end}") for other in paths):
            return end
    return path


def _at(content: object, path: str) -> object:
    """The value of a field; None where it is left out because it has its default."""
    for step in path.split("."):
        if isinstance(content, list):
            content = content[int(step)]
        elif isinstance(content, dict):
            content = content.get(step)
    return content


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if PLAIN.fullmatch(text):
        return text
    return f"{re.sub('[^0-9A-Za-z_.+]+', '-', text).strip('-')[:30]}-{fingerprint(value)[:6]}"

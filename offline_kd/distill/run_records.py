"""Run directories, read and grouped.

Runs are averaged where they differ in nothing but their seed: not in a field of the recipe that makes the student, not
in the store. What sets rows apart is shown in columns of its own.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from offline_kd.recipe import Recipe, read_recipe
from offline_kd.support.console import progress, say
from offline_kd.support.errors import TrainingError, shorten
from offline_kd.support.places import Folder, Place, place_at
from offline_kd.support.web import READ_BYTES

COMPARED = ("data", "views", "student", "training")  # of the recipes of all students, whatever the objective
NO_EFFECT = (  # on the student
    *("data.root", "data.workers", "data.keep_bytes"),
    *("training.checkpoint_steps", "training.evaluate_every", "training.keep", "training.resident"),
)
ABSENT = "-"
LARGEST = 1e300  # number that has a curve: neither infinite, nor an integer that no float can be
M = TypeVar("M", bound=BaseModel)
GroupKey = tuple[str, ...]
Measure = Literal["top1", "map", "knn_top1"]


def _is_none(value: object) -> bool:
    """Left out of a report's JSON: a student is measured by one of several."""
    return value is None


class Outcome(BaseModel):
    """What a report takes of `result.json`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    objective: str
    targets: Literal["store", "online", "none"]
    kind: Literal["embedding"] | None = Field(None, exclude_if=_is_none)  # of a student without classes
    seed: int
    # Of these three there is the one that the student is judged by; none of a student without classes, without labels.
    top1: float | None = Field(None, exclude_if=_is_none)  # percent
    map: float | None = Field(None, exclude_if=_is_none)  # percent, where labels are sets
    knn_top1: float | None = Field(None, exclude_if=_is_none)  # percent, of a student without classes
    best_top1: float | None = Field(None, exclude_if=_is_none)
    best_map: float | None = Field(None, exclude_if=_is_none)
    best_knn_top1: float | None = Field(None, exclude_if=_is_none)
    probe_top1: float | None = Field(None, exclude_if=_is_none)  # percent, of a linear classifier on its vectors
    probe_learned_from: str | None = Field(None, exclude_if=_is_none)
    nll: float | None = None
    ece: float | None = None
    seconds_per_epoch: float
    parameters: int
    dtkd_fallbacks: int
    store_digest: str
    student_sha256: str
    initial_sha256: str | None = None
    rows_sha256: str | None = None
    val_top1: float | None = None  # percent
    val_map: float | None = Field(None, exclude_if=_is_none)
    val_knn_top1: float | None = Field(None, exclude_if=_is_none)

    @model_validator(mode="after")
    def _says_how_good_it_is(self) -> Self:
        has_top1, has_map = None not in (self.top1, self.best_top1), None not in (self.map, self.best_map)
        if self.kind is None and has_top1 == has_map:
            raise ValueError("has neither `top1` and `best_top1`, nor `map` and `best_map`")
        return self

    @property
    def measure(self) -> Measure:
        """What the student is judged by."""
        if self.kind == "embedding":
            return "knn_top1"
        return "top1" if self.map is None else "map"

    @property
    def score(self) -> float | None:
        """Percent, after the last epoch; None: there were no labels."""
        return {"top1": self.top1, "map": self.map, "knn_top1": self.knn_top1}[self.measure]

    @property
    def best_score(self) -> float | None:
        """Percent, of the best epoch."""
        return {"top1": self.best_top1, "map": self.best_map, "knn_top1": self.best_knn_top1}[self.measure]

    @property
    def val_score(self) -> float | None:
        """Percent, of the validation rows."""
        return {"top1": self.val_top1, "map": self.val_map, "knn_top1": self.val_knn_top1}[self.measure]


class Epoch(BaseModel):
    """A line of `metrics.jsonl`: top-1 in percent, of validation rows or the evaluation split, where the pass was
    evaluated, and whatever else was measured of it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="allow")

    epoch: int
    top1: float | None = None  # with validation rows after the last pass alone
    val_top1: float | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """All that is a finite number, by name; in mappings by `mapping.name`."""
        return dict(_numbers(self.model_dump()))


def _numbers(content: dict[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{path}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
            yield path + name, float(value)


@dataclass(frozen=True)
class RunRecord:
    place: Place
    result: Outcome
    history: list[dict[str, float]]  # what was measured of every pass, by name; empty without `metrics.jsonl`
    fields: dict[str, str]  # path in the recipe -> value, of all that makes the student
    recipe: Recipe
    recipe_sha256: str

    @property
    def is_teacher(self) -> bool:
        return self.result.objective not in self.recipe.objectives

    @property
    def is_plain(self) -> bool:
        """Whether the student was trained on labels alone."""
        return not self.is_teacher and all(
            term.term in ("ce", "bce") for term in self.recipe.objectives[self.result.objective]
        )


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone."""

    objective: str
    targets: str
    fields: dict[str, str]  # those that set groups apart, the same ones in every group
    runs: list[RunRecord]

    @property
    def key(self) -> GroupKey:
        return self.objective, self.targets, *self.fields.values()

    @property
    def label(self) -> str:
        online = " (online)" if self.targets == "online" else ""
        told = [f", {name} {value}" for name, value in self.fields.items() if value != ABSENT]
        return self.objective + online + "".join(told)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_runs(places: Sequence[str | Path]) -> list[RunRecord]:
    """Finished run directories, folders and URLs, each once however often it is named.

    Raises TrainingError for one that holds no result, or files that no run wrote. One without `metrics.jsonl` is read,
    and said to have no curve.
    """
    named = list({_really(place): place for place in map(place_at, places)}.values())
    recipes: dict[bytes, Recipe] = {}  # seeds share theirs
    runs = []
    with progress("reading runs", len(named), "runs") as meter:
        for place in named:
            runs.append(_read_run(place, recipes))
            meter.advance()
    return runs


def _read_run(place: Place, recipes: dict[bytes, Recipe]) -> RunRecord:
    found = {name: read_if_there(place, name) for name in ("result.json", "recipe.yaml")}
    for name, content in found.items():
        if content is None:
            raise TrainingError(f"{shorten(str(place))}: no {name}: not a run directory, or the run is not finished.")
    result = _parse_json(Outcome, found["result.json"] or b"", f"{place}/result.json")
    text = found["recipe.yaml"] or b""
    recipe = recipes.get(text) or recipes.setdefault(text, read_recipe(text, f"{place}/recipe.yaml"))
    fields = _fields(recipe, result, is_teacher=result.objective not in recipe.objectives)
    return RunRecord(place, result, _history(place), fields, recipe, hashlib.sha256(text).hexdigest())


def _really(place: Place) -> str:
    return os.path.realpath(place.path) if isinstance(place, Folder) else str(place)


def read_if_there(place: Place, name: str, limit: int = READ_BYTES) -> bytes | None:
    """A file of a run; None where there is none, which is all that is known of a folder with an impossible name."""
    if isinstance(place, Folder) and not os.path.isfile(place.path / name):
        return None
    try:
        return place.read(name, limit)
    except FileNotFoundError:
        return None


def _history(place: Place) -> list[dict[str, float]]:
    content, file = read_if_there(place, "metrics.jsonl"), f"{place}/metrics.jsonl"
    if content is None:
        say(f"{file}: missing, so the curve of this run is left out")
        return []
    lines = enumerate(content.splitlines(), 1)
    return [_parse_json(Epoch, line, f"{file}, line {number}").numbers for number, line in lines]


def _parse_json(model: type[M], content: bytes, where: str) -> M:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "content"
        raise TrainingError(
            f"{where}: '{field}': {problem['msg']}. Damaged, or no run wrote it: run it again, or leave it out."
        ) from error


def _fields(recipe: Recipe, result: Outcome, is_teacher: bool) -> dict[str, str]:
    """What makes the student of a run. What was captured counts by the digest of the store, not by the recipe."""
    content = recipe.model_dump(mode="json")
    counting = {name: content[name] for name in COMPARED}
    if isinstance(recipe.data.subset, str):  # what it held, not where it lay
        counting["data"]["subset"] = f"{Path(recipe.data.subset).name} {(result.rows_sha256 or '')[:8]}"
    if is_teacher:
        del counting["student"]
        counting["teacher"] = {name: content["teacher"][name] for name in ("model", "model_args")}
    elif result.targets == "online":
        counting |= {"teacher": content["teacher"], "capture": content["capture"]}
    elif result.targets == "store":
        counting["store"] = "+".join(digest[:8] for digest in result.store_digest.split("+"))
        if isinstance(recipe.store, list):
            counting |= {"mix": recipe.mix, "store weights": [one.weight for one in recipe.store]}
    names: list[str] = []
    for term in content["objectives"].get(result.objective, []):
        names.append(term["term"])
        uses = names.count(term["term"])
        counting[term["term"] + (f"_{uses}" if uses > 1 else "")] = term
    return {name: value for name, value in _flat(counting) if name not in NO_EFFECT}


def _flat(content: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """`(path.to.field, value)` of nested mappings; a list is one value."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield path + name, value if isinstance(value, str) else json.dumps(value)


# ---- comparing -----------------------------------------------------------------------------------------------------


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Runs that differ by their seed alone, in the order in which they first come; the same student counts once."""
    columns = _columns(runs)
    groups: dict[GroupKey, Group] = {}
    for run in runs:
        fields = {name: run.fields.get(name, ABSENT) for name in columns}
        objective, targets = run.result.objective, run.result.targets
        group = groups.setdefault((objective, targets, *fields.values()), Group(objective, targets, fields, []))
        student = (run.result.seed, run.result.student_sha256)
        same = [one for one in group.runs if (one.result.seed, one.result.student_sha256) == student]
        if same:
            say(f"{run.place}: the student of {same[0].place} again, counted once")
        else:
            group.runs.append(run)
    return list(groups.values())


def _columns(runs: Sequence[RunRecord]) -> list[str]:
    """The fields by which runs of one objective differ, and those of COMPARED by which any two students do."""
    found: dict[str, dict[tuple[str, ...], set[str]]] = {name: {} for run in runs for name in run.fields}
    for run in runs:
        for name, values in found.items():
            peers: list[tuple[str, str]] = [(run.result.objective, run.result.targets)]
            if not run.is_teacher and name.partition(".")[0] in COMPARED:
                peers.append(("any", "student"))
            for one in peers:
                values.setdefault(one, set()).add(run.fields.get(name, ABSENT))
    return [name for name, values in found.items() if any(len(different) > 1 for different in values.values())]

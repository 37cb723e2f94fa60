"""Run directories -> one table and one self-contained page.

Runs are averaged where they differ in nothing but their seed: not in a field of the recipe that makes the student, not
in the store. What sets rows apart is shown in columns of its own.
"""

import io
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from offline_kd.recipe import Recipe, read_recipe
from offline_kd.support.console import say
from offline_kd.support.errors import TrainingError, shorten
from offline_kd.support.pages import data_url, render_page
from offline_kd.support.places import Folder, Place, place_at

COMPARED = ("data", "views", "student", "training")  # of the recipes of all students, whatever the objective
NO_EFFECT = ("data.root", "data.workers", "data.keep_bytes", "training.checkpoint_steps")
ABSENT = "-"
M = TypeVar("M", bound=BaseModel)


class Outcome(BaseModel):
    """What a report takes of `result.json`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    objective: str
    targets: Literal["store", "online", "none"]
    seed: int
    top1: float  # percent
    best_top1: float
    seconds_per_epoch: float
    parameters: int
    dtkd_fallbacks: int
    store_digest: str
    student_sha256: str


class Epoch(BaseModel):
    """What a report takes of a line of `metrics.jsonl`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    top1: float  # percent


@dataclass(frozen=True)
class RunRecord:
    place: Place
    result: Outcome
    history: list[Epoch]  # empty where `metrics.jsonl` is missing
    fields: dict[str, str]  # path in the recipe -> value, of all that makes the student
    is_teacher: bool


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone."""

    objective: str
    targets: str
    fields: dict[str, str]  # those that set groups apart, the same ones in every group
    runs: list[RunRecord]

    @property
    def label(self) -> str:
        online = " (online)" if self.targets == "online" else ""
        told = [f", {name} {value}" for name, value in self.fields.items() if value != ABSENT]
        return self.objective + online + "".join(told)


@dataclass(frozen=True)
class Summary:
    """All seeds of one group."""

    objective: str
    targets: str
    fields: dict[str, str]
    runs: int
    top1_mean: float
    top1_std: float  # sample standard deviation; 0 for a single run
    best_top1_mean: float
    seconds_per_epoch: float
    parameters: int
    dtkd_fallbacks: int


# ---- reading -------------------------------------------------------------------------------------------------------


def read_runs(places: Sequence[str | Path]) -> list[RunRecord]:
    """Finished run directories, folders and URLs, each once however often it is named.

    Raises TrainingError for one that holds no result, or files that no run wrote. One without `metrics.jsonl` is read,
    and said to have no curve.
    """
    runs = []
    for place in {_really(place): place for place in map(place_at, places)}.values():
        found = {name: _content(place, name) for name in ("result.json", "recipe.yaml")}
        for name, content in found.items():
            if content is None:
                raise TrainingError(
                    f"{shorten(str(place))}: no {name}: not a run directory, or the run is not finished."
                )
        result = _parse_json(Outcome, found["result.json"] or b"", f"{place}/result.json")
        recipe = read_recipe(found["recipe.yaml"] or b"", f"{place}/recipe.yaml")
        is_teacher = result.objective not in recipe.objectives
        runs.append(RunRecord(place, result, _history(place), _fields(recipe, result, is_teacher), is_teacher))
    return runs


def _really(place: Place) -> str:
    return os.path.realpath(place.path) if isinstance(place, Folder) else str(place)


def _content(place: Place, name: str) -> bytes | None:
    """A file of a run; None where there is none, which is all that is known of a folder with an impossible name."""
    if isinstance(place, Folder) and not os.path.isfile(place.path / name):
        return None
    try:
        return place.read(name)
    except FileNotFoundError:
        return None


def _history(place: Place) -> list[Epoch]:
    content, file = _content(place, "metrics.jsonl"), f"{place}/metrics.jsonl"
    if content is None:
        say(f"{file}: missing, so the curve of this run is left out")
        return []
    return [_parse_json(Epoch, line, f"{file}, line {number}") for number, line in enumerate(content.splitlines(), 1)]


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
    groups: dict[tuple[str, ...], Group] = {}
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


def summarise(groups: Sequence[Group]) -> list[Summary]:
    """One line per group."""
    summaries = []
    for group in groups:
        results = [run.result for run in group.runs]
        summary = Summary(
            objective=group.objective,
            targets=group.targets,
            fields=group.fields,
            runs=len(results),
            top1_mean=statistics.mean(result.top1 for result in results),
            top1_std=statistics.stdev([result.top1 for result in results]) if len(results) > 1 else 0.0,
            best_top1_mean=statistics.mean(result.best_top1 for result in results),
            seconds_per_epoch=statistics.median(result.seconds_per_epoch for result in results),
            parameters=results[0].parameters,
            dtkd_fallbacks=sum(result.dtkd_fallbacks for result in results),
        )
        summaries.append(summary)
    return summaries


# ---- showing -------------------------------------------------------------------------------------------------------


def table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of cells. `top-1` is after the last epoch, mean +- standard deviation over seeds."""
    apart = list(summaries[0].fields)
    columns = ["objective", *apart, "targets", "runs", "top-1 %", "best top-1 %", "s / epoch", "parameters"]
    rows = [
        [
            summary.objective,
            *summary.fields.values(),
            summary.targets,
            str(summary.runs),
            f"{summary.top1_mean:.2f} ± {summary.top1_std:.2f}" if summary.runs > 1 else f"{summary.top1_mean:.2f}",
            f"{summary.best_top1_mean:.2f}",
            f"{summary.seconds_per_epoch:.2f}",
            f"{summary.parameters:,}",
        ]
        for summary in summaries
    ]
    return columns, rows


def write_report(file: Path, title: str, groups: Sequence[Group], notes: Sequence[str] = ()) -> None:
    """A page with the table, the accuracy of every group as a picture, and the curves; nothing is loaded from
    elsewhere."""
    columns, rows = table(summarise(groups))
    pictures = [("Top-1 after the last epoch, one dot per seed", _dots(groups))]
    if any(run.history for group in groups for run in group.runs):
        pictures.append(("Top-1 on the evaluation split, mean over seeds", _curves(groups)))
    page = render_page("report", title=title, notes=notes, columns=columns, rows=rows, pictures=pictures)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def _dots(groups: Sequence[Group]) -> str:
    figure, axes = _figure(0.35 * len(groups) + 1.2)
    for row, group in enumerate(groups):
        top1 = [run.result.top1 for run in group.runs]
        axes.plot(top1, [row] * len(top1), "o", color=f"C{row % 10}", alpha=0.7)
        axes.plot([statistics.mean(top1)], [row], "|", color=f"C{row % 10}", markersize=18)
    axes.set_yticks(range(len(groups)), [group.label for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 %")
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def _curves(groups: Sequence[Group]) -> str:
    figure, axes = _figure(4.5)
    lowest = 100.0
    for row, group in enumerate(groups):
        histories = [[line.top1 for line in run.history] for run in group.runs if run.history]
        if not histories:
            continue
        means = [statistics.mean(column) for column in zip(*histories, strict=False)]
        lowest = min(lowest, *means[len(means) // 4 :])
        style = "-" if row < 10 else "--"
        # The x axis of a group is its own number of epochs: teachers are trained for another one.
        done = [(step + 1) / len(means) for step in range(len(means))]
        axes.plot(done, means, style, label=group.label, color=f"C{row % 10}")
    axes.set_ylim(bottom=lowest - 2)
    axes.set_xlabel("share of the training that is done")
    axes.set_ylabel("top-1 %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", ncols=2)
    return _svg(figure)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_url(buffer.getvalue(), "image/svg+xml")

"""A report as files: a page to read, CSV and JSON for other tools."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offline_kd.distill.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SQUARE,
    TOP,
    WIDTH,
    Chart,
    Series,
    chart,
    reliability_bars,
    series_of,
    share_of,
)
from offline_kd.distill.report import (
    MEASURES,
    Summary,
    Value,
    by_seed,
    measures_of,
    num_silent,
    record,
    shown_difference,
    shown_mean,
    shown_published,
)
from offline_kd.distill.run_records import GroupKey, Measure, RunRecord
from offline_kd.support.errors import TrainingError
from offline_kd.support.files import write_atomically
from offline_kd.support.pages import render_page

DRAWN = 10  # rows with curves and diagrams, besides plain training and the teacher
CLASSES_SHOWN = 4  # that a row helped or hurt most
METRICS = {"top1": "top-1 %", "nll": "NLL, nats", "ece": "ECE", "lr": "learning rate", "seconds": "seconds per pass"}
METRICS |= {"map": "mAP %", "bce": "binary cross-entropy, nats", "val_map": "validation mAP %"}
METRICS |= {"val_top1": "validation top-1 %", "val_nll": "validation NLL, nats", "val_ece": "validation ECE"}
METRICS |= {"val_knn_top1": "validation k-NN top-1 %", "knn_top1": "k-NN top-1 %", "probe_top1": "linear probe %"}
# Of these the curves come first.
MEASURED = [f"{part}{name}" for name in ("top1", "map", "knn_top1", "nll", "ece", "bce") for part in ("val_", "")]
TITLES = {
    "objective": "objective",
    "targets": "targets",
    "runs": "runs",
    "val_top1_mean": "validation %",
    "top1_mean": "top-1 %",
    "val_map_mean": "validation %",
    "map_mean": "mAP %",
    "val_knn_top1_mean": "validation k-NN top-1 %",
    "knn_top1_mean": "k-NN top-1 %",
    "probe_top1_mean": "linear probe %",
    "difference": "vs plain",
    "published_top1": "published",
    "best_top1_mean": "best %",
    "best_map_mean": "best %",
    "best_knn_top1_mean": "best k-NN top-1 %",
    "ece_mean": "ECE %",
    "teacher_agreement": "as teacher %",
    "seconds_per_epoch": "s / epoch",
    "parameters": "parameters",
}
SCORES = ("top1_mean", "map_mean", "knn_top1_mean")
ESSENTIAL = ("objective", *SCORES, "difference")  # columns on a narrow screen


@dataclass(frozen=True)
class Cell:
    column: str
    text: str
    value: Value  # as in CSV and JSON, and what rows are sorted by


@dataclass(frozen=True)
class Row:
    label: str
    style: str
    apart: str  # fields that set it apart, for a narrow screen
    cells: list[Cell]
    seeds: list[list[Cell]]
    score: str  # column of what the students are judged by
    dots: list[float]  # that of each run, in percent of the width
    plain: float | None


def write_report(file: Path, title: str, summaries: Sequence[Summary], notes: Sequence[str] = ()) -> None:
    """Write the page, which loads nothing from elsewhere, and the same as CSV and JSON beside it.

    Raises TrainingError where one of them would be written over another.
    """
    if file.suffix in (".csv", ".json"):
        raise TrainingError(f"{file}: is where the same lies as {file.suffix[1:].upper()}. Name the page .html.")
    lines = [record(summary) for summary in summaries]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, _page(title, summaries, lines, notes))
    write_atomically(file.with_suffix(".csv"), _csv(lines))
    content = {"title": title, "notes": list(notes), "rows": list(map(_json, summaries, lines))}
    write_atomically(file.with_suffix(".json"), json.dumps(content, indent=1) + "\n")


def _csv(lines: Sequence[Mapping[str, Value]]) -> str:
    text = io.StringIO()
    columns = dict.fromkeys(name for line in lines for name in line)  # students may be judged by other figures
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _json(summary: Summary, line: Mapping[str, Value]) -> dict[str, object]:
    answered = summary.answered
    about = {
        "classes": answered.classes,
        "images_by_class": answered.by_class[:, 0].tolist(),
        "right_by_class": answered.by_class[:, 1].tolist(),
        "reliability": answered.reliability.tolist(),
    } if answered else {}  # fmt: skip
    return {**line, **about, "seeds": [_run_json(run, summary) for run in summary.group.runs]}


def _run_json(run: RunRecord, summary: Summary) -> dict[str, Value]:
    place, answered = str(run.place), summary.answered
    return {
        "directory": place,
        **run.result.model_dump(exclude={"objective", "targets", "parameters", "dtkd_fallbacks"}),
        "teacher_agreement": answered.with_teacher.get(place) if answered else None,
        "teacher_kl": answered.divergence.get(place) if answered else None,
        "recipe_sha256": run.recipe_sha256,
    }


# ---- the page ------------------------------------------------------------------------------------------------------


def _page(title: str, summaries: Sequence[Summary], lines: Sequence[Mapping[str, Value]], notes: Sequence[str]) -> str:
    styles = _styles(summaries)
    columns = [*summaries[0].group.fields]
    at = list(TITLES).index("targets")
    columns = [*list(TITLES)[:at], *columns, *list(TITLES)[at:]]
    columns = [name for name in columns if any(line.get(name) is not None for line in lines)]
    runs = [run for summary in summaries for run in summary.group.runs]
    shared = {
        name: value for name, value in runs[0].fields.items() if all(one.fields.get(name) == value for one in runs)
    }
    drawn = [summary for summary in summaries if summary.group.key in styles]
    sources = {run.recipe.published.source for run in runs if run.recipe.published}
    return render_page(
        "report",
        title=title,
        notes=notes,
        columns=[(name, TITLES.get(name, name), name in ESSENTIAL) for name in columns],
        essential=ESSENTIAL,
        has_validation=any(summary.val_mean is not None for summary in summaries),
        scores=SCORES,
        measures={one: MEASURES[one] for one in measures_of(summaries) if f"{one}_mean" in columns},
        probed={run.result.probe_learned_from for run in runs} - {None},
        rows=_rows(summaries, lines, columns, styles),
        tests={summary.difference.test for summary in summaries if summary.difference},
        seeds=max((summary.difference.seeds for summary in summaries if summary.difference), default=0),
        sources=sorted(sources),
        legend=[(summary.group.label, styles[summary.group.key]) for summary in drawn],
        left_out=len(summaries) - len(drawn),
        axes=_axes(drawn, styles),
        constant=_constant(drawn),
        area={"width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "right": RIGHT, "bottom": BOTTOM},
        square=SQUARE,
        calibration=[
            (summary.group.label, record(summary)["ece_mean"], reliability_bars(summary.answered.reliability))
            for summary in drawn
            if summary.answered
        ],
        classes=_classes(summaries),
        agreements=[
            (summary.group.label, summary.with_teacher, summary.divergence, summary.answered.among_seeds)
            for summary in summaries
            if summary.answered and not summary.group.runs[0].is_teacher
        ],
        shared=shared,
        details=[(summary, _own(summary, shared)) for summary in summaries],
        silent=num_silent(summaries),
        all_runs=len(runs),
    )


def _own(summary: Summary, shared: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in summary.group.runs[0].fields.items() if name not in shared}


def _styles(summaries: Sequence[Summary]) -> dict[GroupKey, str]:
    """Classes of the style sheet of the rows that are drawn: teachers, plain training, and the best others."""
    styles = {}
    others = []
    for summary in summaries:
        first = summary.group.runs[0]
        if first.is_teacher or first.is_plain:
            styles[summary.group.key] = "teacher" if first.is_teacher else "plain"
        else:
            others.append(summary)
    best = {summary.group.key for summary in sorted(others, key=_worth, reverse=True)[:DRAWN]}
    for number, key in enumerate(summary.group.key for summary in others if summary.group.key in best):
        styles[key] = f"s{number}"
    return styles


def _worth(summary: Summary) -> float:
    """What rows are chosen by: validation rows, where there are any."""
    return next((one for one in (summary.val_mean, summary.mean) if one is not None), 0.0)


def _rows(
    summaries: Sequence[Summary],
    lines: Sequence[Mapping[str, Value]],
    columns: Sequence[str],
    styles: Mapping[GroupKey, str],
) -> list[Row]:
    scores = {measure: _scores_of(summaries, measure) or [0.0] for measure in measures_of(summaries)}
    rows = []
    for summary, line in zip(summaries, lines, strict=True):
        group, plain = summary.group, by_seed(summary.plain) if summary.plain else {}
        low, high = min(scores[summary.measure]), max(scores[summary.measure])
        seeds = [_of_one_run(run, summary, plain) for run in group.runs] if len(group.runs) > 1 else []
        row = Row(
            label=group.label,
            style=styles.get(summary.group.key, ""),
            apart=", ".join(f"{name} {value}" for name, value in group.fields.items()),
            cells=[Cell(name, _together(_shown(name, summary, line)), line.get(name)) for name in columns],
            seeds=[[Cell(name, _plain_text(one.get(name)), one.get(name)) for name in columns] for one in seeds],
            score=f"{summary.measure}_mean",
            dots=[share_of(one, low, high) for one in _scores_of([summary], summary.measure)],
            plain=share_of(sum(plain.values()) / len(plain), low, high) if plain else None,
        )
        rows.append(row)
    return rows


def _scores_of(summaries: Sequence[Summary], measure: Measure) -> list[float]:
    """Of all runs whose students are judged by it."""
    results = [run.result for summary in summaries for run in summary.group.runs if run.result.measure == measure]
    return [result.score for result in results if result.score is not None]


def _of_one_run(run: RunRecord, summary: Summary, plain: Mapping[int, float]) -> dict[str, Value]:
    """Under the columns of its row; the difference is to plain training with the same seed."""
    result, place = run.result, str(run.place)
    before = plain.get(result.seed)
    return {
        "objective": f"seed {result.seed}",
        f"val_{result.measure}_mean": result.val_score,
        f"{result.measure}_mean": result.score,
        "probe_top1_mean": result.probe_top1,
        "difference": None if before is None or result.score is None else result.score - before,
        f"best_{result.measure}_mean": result.best_score,
        "ece_mean": None if result.ece is None else 100 * result.ece,
        "teacher_agreement": summary.answered.with_teacher.get(place) if summary.answered else None,
        "seconds_per_epoch": result.seconds_per_epoch,
    }


def _shown(name: str, summary: Summary, line: Mapping[str, Value]) -> str:
    if name == f"{summary.measure}_mean":
        return shown_mean(summary)
    if name == "difference":
        return shown_difference(summary.difference)
    if name == "published_top1":
        return shown_published(summary)
    return _plain_text(line.get(name))


def _together(text: str) -> str:
    """On a narrow screen a line ends before a spread or an interval, not in it."""
    return (
        text.replace("± ", "±\N{NO-BREAK SPACE}").replace(", ", ",\N{NO-BREAK SPACE}")
        if text[:1] in "+-0123456789"
        else text
    )


def _plain_text(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


# ---- curves --------------------------------------------------------------------------------------------------------


def _epochs(run: RunRecord) -> list[float]:
    return [line.get("epoch", number) for number, line in enumerate(run.history, 1)]


def _seconds(run: RunRecord) -> list[float]:
    return list(itertools.accumulate(line.get("seconds", 0) for line in run.history))


def _metrics(drawn: Sequence[Summary]) -> dict[str, set[float]]:
    """What was measured of every pass, in the order in which it first comes, and its values."""
    found: dict[str, set[float]] = {}
    for line in (line for summary in drawn for run in summary.group.runs for line in run.history):
        for name, value in line.items():
            if name != "epoch":
                found.setdefault(name, set()).add(value)
    return found


def _constant(drawn: Sequence[Summary]) -> dict[str, float]:
    return {name: next(iter(values)) for name, values in _metrics(drawn).items() if len(values) == 1}


def _axes(drawn: Sequence[Summary], styles: Mapping[GroupKey, str]) -> list[tuple[str, str, list[Chart]]]:
    """`(name, title, charts)` over epochs and over time; nothing over what no run measured."""
    histories = [run for summary in drawn for run in summary.group.runs if run.history]
    if not histories:
        return []
    longest = max(_seconds(run)[-1] for run in histories)
    unit, size = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    axes: list[tuple[str, str, Callable[[RunRecord], list[float]]]] = [("epoch", "epochs", _epochs)]
    if longest:
        axes.append(("time", f"{unit} of training", lambda run: [second / size for second in _seconds(run)]))
    names = sorted(
        (name for name, values in _metrics(drawn).items() if len(values) > 1),
        key=lambda name: MEASURED.index(name) if name in MEASURED else len(MEASURED),
    )
    found = []
    for axis, title, places in axes:
        charts = [_chart(name, title, drawn, styles, places) for name in names]
        found.append((axis, title, [one for one in charts if one]))
    return found


def _chart(
    name: str,
    x_label: str,
    drawn: Sequence[Summary],
    styles: Mapping[GroupKey, str],
    places: Callable[[RunRecord], list[float]],
) -> Chart | None:
    """None where no run has a place on the axis."""
    series: list[Series] = []
    for summary in drawn:
        xs, ys = [], []
        for run in summary.group.runs:
            axis = places(run)
            points = [(x, line[name]) for x, line in zip(axis, run.history, strict=True) if name in line]
            if points and any(axis):  # a run that measured no time is not at time 0
                xs.append([x for x, _ in points])
                ys.append([y for _, y in points])
        if ys:
            series.append(series_of(summary.group.label, styles[summary.group.key], xs, ys))
    title = METRICS.get(name, name.replace("loss_", "loss: ").replace("_", " "))
    return chart(title, x_label, series) if series else None


# ---- classes -------------------------------------------------------------------------------------------------------


def _classes(summaries: Sequence[Summary]) -> list[tuple[str, list[tuple[str, float]], list[tuple[str, float]]]]:
    """Of every row the classes that gained and lost most against plain training, in percentage points."""
    by_group = {summary.group.key: summary for summary in summaries}
    rows = []
    for summary in summaries:
        plain = by_group[summary.plain.key].answered if summary.plain else None
        ours = summary.answered
        if plain is None or ours is None or plain.classes != ours.classes:
            continue
        changes = [
            (name, 100 * float(right / images - plain_right / plain_images))
            for name, (images, right), (plain_images, plain_right) in zip(
                ours.classes, ours.by_class, plain.by_class, strict=True
            )
            if images and plain_images
        ]
        changes.sort(key=lambda change: change[1])
        helped = [change for change in changes[::-1] if change[1] > 0][:CLASSES_SHOWN]
        hurt = [change for change in changes if change[1] < 0][:CLASSES_SHOWN]
        rows.append((summary.group.label, helped, hurt))
    return rows

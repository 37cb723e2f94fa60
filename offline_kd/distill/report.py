"""Run directories -> one table and one self-contained page."""

import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_kd.support.errors import TrainingError
from offline_kd.support.pages import data_url, render_page


@dataclass(frozen=True)
class RunRecord:
    name: str
    result: dict[str, Any]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Summary:
    """All seeds of one objective."""

    objective: str
    targets: str
    runs: int
    top1_mean: float
    top1_std: float  # sample standard deviation; 0 for a single run
    best_top1_mean: float
    seconds_per_epoch: float
    parameters: int
    dtkd_fallbacks: int


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Finished run directories; raises TrainingError for one that holds no result."""
    runs = []
    for folder in folders:
        file = folder / "result.json"
        if not file.is_file():
            raise TrainingError(f"{folder}: no result.json: not a run directory, or the run is not finished.")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        runs.append(RunRecord(folder.name, json.loads(file.read_text()), [json.loads(line) for line in lines]))
    return runs


def summarise(runs: Sequence[RunRecord]) -> list[Summary]:
    """One line per objective, in the order in which they first come."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run.result["objective"], run.result["targets"]), []).append(run.result)
    return [
        Summary(
            objective=objective,
            targets=targets,
            runs=len(results),
            top1_mean=statistics.mean(result["top1"] for result in results),
            top1_std=statistics.stdev([result["top1"] for result in results]) if len(results) > 1 else 0.0,
            best_top1_mean=statistics.mean(result["best_top1"] for result in results),
            seconds_per_epoch=statistics.median(result["seconds_per_epoch"] for result in results),
            parameters=results[0]["parameters"],
            dtkd_fallbacks=sum(result["dtkd_fallbacks"] for result in results),
        )
        for (objective, targets), results in groups.items()
    ]


COLUMNS = ["objective", "targets", "runs", "top-1 %", "best top-1 %", "s / epoch", "parameters"]


def table_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """Cells for COLUMNS. `top-1` is after the last epoch, mean +- standard deviation over seeds."""
    return [
        [
            summary.objective,
            summary.targets,
            str(summary.runs),
            f"{summary.top1_mean:.2f} ± {summary.top1_std:.2f}" if summary.runs > 1 else f"{summary.top1_mean:.2f}",
            f"{summary.best_top1_mean:.2f}",
            f"{summary.seconds_per_epoch:.2f}",
            f"{summary.parameters:,}",
        ]
        for summary in summaries
    ]


def write_report(file: Path, title: str, runs: Sequence[RunRecord], notes: Sequence[str] = ()) -> None:
    """A page with the table, the accuracy of every objective as a picture, and the curves; nothing is loaded from
    elsewhere."""
    page = render_page(
        "report",
        title=title,
        notes=notes,
        columns=COLUMNS,
        rows=table_rows(summarise(runs)),
        pictures=[
            ("Top-1 after the last epoch, one dot per seed", _dots(runs)),
            ("Top-1 on the evaluation split, mean over seeds", _curves(runs)),
        ],
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def _by_objective(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        online = " (online)" if run.result["targets"] == "online" else ""
        groups.setdefault(run.result["objective"] + online, []).append(run)
    return groups


def _dots(runs: Sequence[RunRecord]) -> str:
    groups = _by_objective(runs)
    figure, axes = _figure(0.35 * len(groups) + 1.2)
    for row, members in enumerate(groups.values()):
        top1 = [run.result["top1"] for run in members]
        axes.plot(top1, [row] * len(top1), "o", color=f"C{row % 10}", alpha=0.7)
        axes.plot([statistics.mean(top1)], [row], "|", color=f"C{row % 10}", markersize=18)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel("top-1 %")
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def _curves(runs: Sequence[RunRecord]) -> str:
    figure, axes = _figure(4.5)
    lowest = 100.0
    for row, (name, members) in enumerate(_by_objective(runs).items()):
        columns = zip(*([line["top1"] for line in run.history] for run in members), strict=False)
        means = [statistics.mean(column) for column in columns]
        lowest = min(lowest, *means[len(means) // 4 :])
        style = "-" if row < 10 else "--"
        # An objective's x axis is its own number of epochs: teachers are trained for another one.
        axes.plot(
            [(step + 1) / len(means) for step in range(len(means))], means, style, label=name, color=f"C{row % 10}"
        )
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

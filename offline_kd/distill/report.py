"""Groups of runs -> one line each: accuracy, beside plain training, the teacher and what was published."""

import hashlib
import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offline_kd.distill.differences import Difference, difference
from offline_kd.distill.run_records import COMPARED, Group, Measure, RunRecord, read_if_there
from offline_kd.models.checkpoints import as_file
from offline_kd.models.evaluation_file import (
    FILE,
    FILE_OF_TEACHER,
    MOST_FILE_BYTES,
    Predictions,
    agreement,
    divergence,
    read_predictions,
    reliability,
    right_by_class,
)
from offline_kd.support.console import progress, say
from offline_kd.support.errors import TrainingError

Value = str | float | int | None
MEASURES: dict[Measure, str] = {"top1": "top-1", "map": "mAP", "knn_top1": "k-NN top-1"}  # for people
TOLERANCE = 1e-6  # percentage points, between the top-1 of a result and that of the predictions beside it


@dataclass(frozen=True)
class Answered:
    """What the runs of a group said on the evaluation split, of those that wrote it down."""

    classes: list[str]
    reliability: NDArray[np.float64]  # [15, 3] of all runs together: images, confidence, right answers
    by_class: NDArray[np.int64]  # [C, 2] of all runs together: images, right answers
    with_teacher: dict[
        str, float | None
    ]  # by run directory: percent of the images on which a run and its teacher agree
    divergence: dict[str, float | None]  # KL(teacher || student) in nats
    among_seeds: float | None  # percent of the images on which two runs agree, mean over pairs
    teacher_top1: float | None  # percent, of the teacher on the same images


@dataclass(frozen=True)
class Summary:
    """All seeds of one group."""

    group: Group
    mean: float | None  # of what the students are judged by, in percent; None: there were no labels
    std: float  # sample standard deviation; 0 for a single run
    val_mean: float | None  # of the validation rows; None where a run has none
    probe_mean: float | None  # of a linear probe, in percent, of students without classes
    plain: Group | None  # plain training that this is compared with
    difference: Difference | None
    published: tuple[float, float | None] | None  # top-1, standard deviation
    answered: Answered | None

    @property
    def measure(self) -> Measure:
        """What the students are judged by."""
        return self.group.runs[0].result.measure

    @property
    def with_teacher(self) -> float | None:
        return _mean(self.answered.with_teacher.values()) if self.answered else None

    @property
    def divergence(self) -> float | None:
        return _mean(self.answered.divergence.values()) if self.answered else None


def summarise(groups: Sequence[Group]) -> list[Summary]:
    """One line per group.

    Raises TrainingError for predictions that are damaged, or of another run than the result beside them, and for runs
    that were not measured alike.
    """
    summaries = []
    runs = [run for group in groups for run in group.runs]
    # Top-1 and k-NN top-1 have columns of their own: they are of images of one label.
    other = next((run for run in runs if (run.result.measure == "map") != (runs[0].result.measure == "map")), None)
    if other:
        raise TrainingError(
            f"{runs[0].place} is measured by {MEASURES[runs[0].result.measure]}, {other.place} by "
            f"{MEASURES[other.result.measure]}: they cannot stand in one table. Make a report of each."
        )
    teachers: dict[str, Predictions | None] = {}
    with progress("reading what students answered", len(runs), "runs") as meter:
        for group in groups:
            scores = [run.result.score for run in group.runs if run.result.score is not None]
            plain = _plain_of(group, groups)
            published = group.runs[0].recipe.published
            summary = Summary(
                group=group,
                mean=_mean(scores),
                std=statistics.stdev(scores) if len(scores) > 1 else 0.0,
                val_mean=_mean_of_all([run.result.val_score for run in group.runs]),
                probe_mean=_mean(run.result.probe_top1 for run in group.runs),
                plain=plain,
                difference=difference(by_seed(group), by_seed(plain)) if plain else None,
                published=published.of(group.objective)
                if published and group.runs[0].result.measure == "top1"
                else None,
                answered=_answered(group, runs, teachers),
            )
            summaries.append(summary)
            meter.advance(len(group.runs))
    if missing := num_silent(summaries):
        say(f"{missing} of {len(runs)} runs have no {FILE}: what follows from it is left out for them")
    return summaries


def num_silent(summaries: Sequence[Summary]) -> int:
    """How many runs of classifiers lack what these answered; of others, answers are not compared."""
    classifiers = sum(run.result.measure == "top1" for summary in summaries for run in summary.group.runs)
    return classifiers - sum(len(summary.answered.with_teacher) for summary in summaries if summary.answered)


def measures_of(summaries: Sequence[Summary]) -> list[Measure]:
    """All that students are judged by."""
    there = {summary.measure for summary in summaries}
    return [measure for measure in MEASURES if measure in there]


def by_seed(group: Group) -> dict[int, float]:
    """What students are judged by, in percent; the mean of those of one seed."""
    found: dict[int, list[float]] = {}
    for run in group.runs:
        if run.result.score is not None:
            found.setdefault(run.result.seed, []).append(run.result.score)
    return {seed: statistics.mean(values) for seed, values in found.items()}


def _plain_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """Plain training of the same student on the same data and views in the same way.

    Where there is none, the only one of the same student and data with as many epochs.
    """
    first = group.runs[0]
    if first.is_teacher or first.is_plain or first.result.kind is not None:
        return None
    plain = [one for one in groups if one.runs[0].is_plain]
    for same in (COMPARED, ("data", "student", "training.epochs")):
        wanted = _fields_of(first, same)
        found = [one for one in plain if _fields_of(one.runs[0], same) == wanted]
        if found and (same is COMPARED or len(found) == 1):
            return found[0]
    return None


def _fields_of(run: RunRecord, rooms: Sequence[str]) -> dict[str, str]:
    return {name: value for name, value in run.fields.items() if name in rooms or name.partition(".")[0] in rooms}


# ---- what students answered ----------------------------------------------------------------------------------------


def _answered(group: Group, runs: Sequence[RunRecord], teachers: dict[str, Predictions | None]) -> Answered | None:
    """Of large splits one run at a time has its log-probabilities in memory, beside its teacher."""
    with_teacher: dict[str, float | None] = {}
    apart: dict[str, float | None] = {}
    of_teachers: list[float] = []
    found: list[Predictions] = []
    for run in group.runs:
        said = predictions_of(run)
        if said is None:
            continue
        teacher = _told_by_store(run, teachers)
        if teacher is None or agreement(teacher, said) is None:  # it may have been measured on another split
            teacher = None if run.is_teacher else _teacher_of(run, runs, teachers)
        with_teacher[str(run.place)] = agreement(teacher, said) if teacher else None
        apart[str(run.place)] = divergence(teacher, said) if teacher else None
        of_teachers += [teacher.top1] if teacher and with_teacher[str(run.place)] is not None else []
        found.append(replace(said, log_probs=None))
    found = [one for one in found if one.classes == found[0].classes]
    if not found:
        return None
    return Answered(
        classes=found[0].classes,
        reliability=np.sum([reliability(one) for one in found], axis=0),
        by_class=np.sum([right_by_class(one) for one in found], axis=0),
        with_teacher=with_teacher,
        divergence=apart,
        among_seeds=_mean(agreement(one, other) for one, other in itertools.combinations(found, 2)),
        teacher_top1=_mean(of_teachers),
    )


def predictions_of(run: RunRecord) -> Predictions | None:
    """None for a run of a version that did not write them."""
    content = read_if_there(run.place, FILE, MOST_FILE_BYTES)
    if content is None:
        return None
    found = read_predictions(content, f"{run.place}/{FILE}")
    if run.result.top1 is not None and abs(found.top1 - run.result.top1) > TOLERANCE:
        raise TrainingError(
            f"{run.place}/{FILE}: top-1 is {found.top1:.2f} %, result.json says {run.result.top1:.2f} %: one of "
            "them is of another run. Run it again, or leave the file out."
        )
    return found


def _told_by_store(run: RunRecord, known: dict[str, Predictions | None]) -> Predictions | None:
    """What the teacher of a run answered when it was measured; None where that was not kept."""
    content = read_if_there(run.place, FILE_OF_TEACHER, MOST_FILE_BYTES) if run.result.targets == "store" else None
    if content is None:
        return None
    digest = hashlib.sha256(content).hexdigest()  # students of one store share it
    if digest not in known:
        known[digest] = read_predictions(content, f"{run.place}/{FILE_OF_TEACHER}")
    return known[digest]


def _teacher_of(run: RunRecord, runs: Sequence[RunRecord], known: dict[str, Predictions | None]) -> Predictions | None:
    """What the teacher of a run answered: of the run directory that its recipe names, or of the only teacher among
    `runs` that is the same network; None where several teachers were mixed, or none can be had."""
    wanted = run.recipe.teacher
    if isinstance(run.recipe.store, list):
        return None
    weights = Path(as_file(wanted.weights or "-").file)
    if weights.name in ("teacher.safetensors", "student.safetensors") and (weights.parent / FILE).is_file():
        key = str(weights.parent)
        if key not in known:
            known[key] = read_predictions((weights.parent / FILE).read_bytes(), str(weights.parent / FILE))
        return known[key]
    network = (wanted.model, wanted.model_args)
    same = [
        one for one in runs if one.is_teacher and (one.recipe.teacher.model, one.recipe.teacher.model_args) == network
    ]
    if wanted.expected is not None and (near := wanted.expected.top1) is not None:
        tolerance = wanted.expected.tolerance
        same = [one for one in same if one.result.top1 is not None and abs(one.result.top1 - near) <= tolerance]
    if len(same) != 1:
        return None
    key = str(same[0].place)
    if key not in known:
        known[key] = predictions_of(same[0])
    return known[key]


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """None where one is missing: groups are chosen by it."""
    return None if None in values else _mean(values)


# ---- lines ---------------------------------------------------------------------------------------------------------


def record(summary: Summary) -> dict[str, Value]:
    """A line as plain values; accuracies and agreements in percent, differences in percentage points."""
    group, apart, published = summary.group, summary.difference, summary.published or (None, None)
    results = [run.result for run in group.runs]
    half, measure = apart.half_width if apart else None, summary.measure
    return {
        "objective": group.objective,
        **group.fields,
        "targets": group.targets,
        "runs": len(results),
        f"val_{measure}_mean": summary.val_mean,
        f"{measure}_mean": summary.mean,
        f"{measure}_std": None if summary.mean is None else summary.std,
        **({"probe_top1_mean": summary.probe_mean} if measure == "knn_top1" else {}),
        "difference": apart.mean if apart else None,
        "difference_low": apart.mean - half if apart and half is not None else None,
        "difference_high": apart.mean + half if apart and half is not None else None,
        "difference_test": apart.test if apart else None,
        "difference_seeds": apart.seeds if apart else None,
        "difference_to": summary.plain.label if summary.plain else None,
        "published_top1": published[0],
        "published_std": published[1],
        f"best_{measure}_mean": _mean(result.best_score for result in results),
        "nll_mean": _mean(result.nll for result in results),
        "ece_mean": _percent(_mean(result.ece for result in results)),
        "teacher_agreement": summary.with_teacher,
        "teacher_kl": summary.divergence,
        "seeds_agreement": summary.answered.among_seeds if summary.answered else None,
        "seconds_per_epoch": statistics.median(result.seconds_per_epoch for result in results),
        "parameters": results[0].parameters,
        "dtkd_fallbacks": sum(result.dtkd_fallbacks for result in results),
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of cells. `top-1` is after the last epoch, mean +- standard deviation over seeds; `vs plain`
    is the difference to plain training with its interval of 95 %; `val top-1` is of validation rows, where any run has
    them: settings go by it, and `top-1` is what they are worth; `published` is what a recipe says of others. Where
    labels are sets it is `mAP`; of students without classes `k-NN top-1`, and that of a `linear probe` beside it."""
    apart = list(summaries[0].group.fields)
    has_plain = any(summary.difference for summary in summaries)
    is_published = any(summary.published for summary in summaries)
    validated = {summary.measure for summary in summaries if summary.val_mean is not None}
    measures = measures_of(summaries)
    columns = ["objective", *apart, "targets", "runs"]
    for measure in measures:
        columns += [f"val {MEASURES[measure]} %"] * (measure in validated) + [f"{MEASURES[measure]} %"]
        columns += ["linear probe %"] * (measure == "knn_top1")
    columns += ["published"] * is_published + ["vs plain"] * has_plain
    columns += [*(f"best {MEASURES[measure]} %" for measure in measures), "s / epoch", "parameters"]
    rows = []
    for summary in summaries:
        group, line = summary.group, record(summary)
        row = [group.objective, *group.fields.values(), group.targets, str(len(group.runs))]
        for measure in measures:
            row += [_shown(line.get(f"val_{measure}_mean"))] * (measure in validated)
            row += [shown_mean(summary) if summary.measure == measure else ""]
            row += [_shown(line.get("probe_top1_mean"))] * (measure == "knn_top1")
        row += [shown_published(summary)] * is_published + [shown_difference(summary.difference)] * has_plain
        row += [_shown(line.get(f"best_{measure}_mean")) for measure in measures]
        row += [f"{line['seconds_per_epoch']:.2f}", f"{line['parameters']:,}"]
        rows.append(row)
    return columns, rows


def _shown(percent: Value) -> str:
    return f"{percent:.2f}" if isinstance(percent, float) else ""


def shown_mean(summary: Summary) -> str:
    if summary.mean is None:
        return ""
    spread = f" ± {summary.std:.2f}" if len(summary.group.runs) > 1 else ""
    return f"{summary.mean:.2f}{spread}"


def shown_published(summary: Summary) -> str:
    """`71.92 ± 0.40`; nothing where nobody is known to have reported it."""
    mean, std = summary.published or (None, None)
    return "" if mean is None else f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def shown_difference(found: Difference | None) -> str:
    """`+1.20 [0.40, 2.00]`."""
    if found is None:
        return ""
    if found.half_width is None:
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.mean - found.half_width:.2f}, {found.mean + found.half_width:.2f}]"

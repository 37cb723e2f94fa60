"""`offline-kd run`: every stage of a recipe, one after the other, then the report. On Ray, all students at once.

OUT/recipe.yaml     resolved; `offline-kd cache-teacher OUT/recipe.yaml --store ...` repeats the capture
OUT/data/           the dataset, where it is one that `data pack` can make by itself (digits)
OUT/teacher/        run directory of the teacher, where the recipe trains one
OUT/store/          the teacher store
OUT/students/NAME/  run directories, one per objective and seed, and of a sweep one per combination of values
OUT/summary.json, OUT/report.html, .csv, .json
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from offline_kd.cache.engines import DEFAULT_ENGINE, EngineOption, find_engine
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data.expected import ExpectedAccuracy
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest, data_roots, is_complete
from offline_kd.data.packing import digits_samples, pack
from offline_kd.data_recipe import ScoredRows
from offline_kd.distill.conclusion import conclusion
from offline_kd.distill.report import record, summarise, table
from offline_kd.distill.report_page import write_report
from offline_kd.distill.results import Result
from offline_kd.distill.run_directory import refuse_ranks, run_directory
from offline_kd.distill.run_records import group_runs, read_runs
from offline_kd.distill.student_processes import distill_in_processes
from offline_kd.distill.sweep import Planned, plan
from offline_kd.distill.teacher_training import train_teacher, trained_teacher
from offline_kd.distill.tracking import check_tracker
from offline_kd.distill.training import DistillOptions, Shared, distill
from offline_kd.recipe import Recipe, dump_recipe, needs_teacher
from offline_kd.support.console import counted, say, show_table
from offline_kd.support.errors import RecipeError
from offline_kd.support.files import write_atomically
from offline_kd.support.places import Folder

TEACHER_TOLERANCE = 0.5  # percentage points, between the evaluation after training and the gate


class RunOptions(TypedDict, total=False):
    """Which students a run trains, and where its stages take place."""

    objectives: Sequence[str]  # of the recipe; none: those that a swept field belongs to, or all
    seeds: Sequence[int] | None  # of students; None: the recipe's
    log: str | None  # a tracker that is told every epoch, as of `distill`
    jobs: int  # students trained at once, in processes of this machine

    engine: str  # of stage 1; with "ray", students are trained on that cluster too
    engine_options: Mapping[str, EngineOption]
    gpus_per_run: float | None  # of a student, on Ray; None: 1 if this process uses a GPU


def run(
    recipe: Recipe,
    manifest: Manifest,
    extra_roots: Sequence[str | Path],
    out: Path,
    device: torch.device,
    **options: Unpack[RunOptions],
) -> None:
    """Pack, train the teacher, cache it, distil every objective with every seed, report. Resumes by itself.

    Raises TrainingError when another process writes `out`.
    """
    refuse_ranks()
    if options.get("gpus_per_run") is not None and options.get("engine") != "ray":
        raise RecipeError(
            "--gpus-per-run: students are tasks with GPUs on Ray only. Leave it out, or add --engine ray."
        )
    if options.get("jobs", 1) > 1 and options.get("engine") == "ray":
        raise RecipeError("--jobs: on Ray as many students are trained at once as there is room for. Leave it out.")
    check_tracker(options.get("log"))
    plan(recipe, options.get("objectives", ()), options.get("seeds"))  # what cannot be is refused before anything
    with _cluster(options), run_directory(Folder(out)):
        _run(recipe, manifest, extra_roots, out, device, options)


@contextlib.contextmanager
def _cluster(options: RunOptions) -> Iterator[None]:
    """One connection for all stages, where they take place on Ray."""
    find_engine(options.get("engine", DEFAULT_ENGINE), options.get("engine_options"))  # refuses what is wrong
    if options.get("engine") != "ray":
        yield
        return
    from offline_kd.support.ray_cluster import joined

    address = options.get("engine_options", {}).get("ray_address")
    with joined(None if address is None else str(address)):
        yield


def _run(
    recipe: Recipe,
    manifest: Manifest,
    extra_roots: Sequence[str | Path],
    out: Path,
    device: torch.device,
    options: RunOptions,
) -> None:
    started = time.monotonic()
    sweep, recipe = recipe.sweep, recipe.without_sweep()
    recipe = _with_digits(recipe, manifest, extra_roots, out)
    roots = data_roots([*extra_roots, *([recipe.data.root] if recipe.data.root else [])])
    folders: list[str | Path] = []

    if recipe.teacher.is_to_be_trained:
        say(f"training the teacher, {recipe.teacher.model or 'of the manifest'}")
        trained = train_teacher(recipe, manifest, roots, out / "teacher", device, options.get("log"))
        recipe = _with_teacher(recipe, manifest, trained, out)
        folders.append(out / "teacher")
    elif recipe.teacher.training is not None:
        say("teacher.weights are the teacher's, it is not trained. To train it from them: teacher.head: keep, or new")
    swept = recipe.model_copy(update={"sweep": sweep})
    write_atomically(out / "recipe.yaml", dump_recipe(swept))

    planned = plan(swept, options.get("objectives", ()), options.get("seeds"))
    if any(_needs_store(one) for one in planned.values()):
        say("asking the teacher about every view")
        engine, its_options = options.get("engine", DEFAULT_ENGINE), options.get("engine_options", {})
        store = cache_teacher(recipe, manifest, roots, out / "store", device, engine=engine, engine_options=its_options)
        assert store is not None
        say(f"store: {store.total_bytes:,} bytes, digest sha256:{store.digest}")
    students = {out / "students" / name: one for name, one in planned.items()}
    for number, (folder, result) in enumerate(_distill_all(manifest, roots, students, out, device, options), 1):
        say(
            f"{students[folder].label}: {result.accuracy}, {result.seconds_per_epoch:.2f} s per epoch "
            f"({number} of {len(students)} students)"
        )
    folders += students

    summaries = summarise(group_runs(read_runs(folders)))
    seconds = time.monotonic() - started
    content = {"recipe": recipe.name, "seconds": seconds, "objectives": [record(summary) for summary in summaries]}
    write_atomically(out / "summary.json", json.dumps(content, indent=2) + "\n")
    share = f" with {recipe.data.labelled_fraction:.0%} of the labels" if recipe.data.labelled_fraction < 1 else ""
    notes = [
        f"{recipe.data.dataset}: student {recipe.student.model}{share}, {counted(recipe.views.num_views, 'views')} per "
        f"image, {counted(recipe.training.epochs, 'epochs')}, "
        f"{counted(len({one.seed for one in planned.values()}), 'seeds')}."
    ]
    found = conclusion(summaries)
    write_report(out / "report.html", recipe.name, summaries, [*notes, *found])
    show_table(notes[0], *table(summaries))
    for sentence in found:
        say(sentence)
    say(f"{out / 'report.html'} shows the curves; {seconds:.0f} s in all")


def _needs_store(one: Planned) -> bool:
    """For its terms, or because what its teacher said chooses the rows."""
    return needs_teacher(one.terms) or isinstance(one.recipe.data.subset, ScoredRows)


def _distill_all(
    manifest: Manifest,
    roots: Sequence[Root],
    students: Mapping[Path, Planned],
    out: Path,
    device: torch.device,
    options: RunOptions,
) -> Iterator[tuple[Path, Result]]:
    """Every student with its run directory, when it is finished: one after the other, or several at once."""
    asked: dict[Path, tuple[Recipe, DistillOptions]] = {}
    for folder, one in students.items():
        stores = [str(out / "store")] if _needs_store(one) else []
        log = options.get("log")
        asked[folder] = one.recipe, {"objective": one.objective, "seed": one.seed, "stores": stores, "log": log}
    jobs = options.get("jobs", 1)
    if options.get("engine") == "ray":
        from offline_kd.distill.ray_students import distill_on_ray

        gpus = options.get("gpus_per_run")
        gpus = float(device.type == "cuda") if gpus is None else gpus
        yield from distill_on_ray(manifest, roots, asked, gpus)
    elif jobs > 1:
        yield from distill_in_processes(manifest, roots, asked, device, jobs)
    else:
        shared = Shared()
        for folder, (recipe, about) in asked.items():
            what: DistillOptions = {**about, "shared": shared}
            yield folder, distill(recipe, manifest, roots, folder, device, **what)


def _with_digits(recipe: Recipe, manifest: Manifest, extra_roots: Sequence[str | Path], out: Path) -> Recipe:
    """Pack the bundled digits into OUT/data, unless they are somewhere already."""
    if recipe.data.dataset != "digits":
        return recipe
    dataset = manifest.dataset("digits")
    own_root = [recipe.data.root] if recipe.data.root else []
    if is_complete(dataset, data_roots([*extra_roots, *own_root])):
        return recipe
    say("packing the digits")
    pack_digits(out / "data" / dataset.folder)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(out / "data")})})


def pack_digits(folder: Path) -> None:
    for split, samples in digits_samples().items():
        pack(samples, folder, split, 512)


def _with_teacher(recipe: Recipe, manifest: Manifest, result: Result, out: Path) -> Recipe:
    """The recipe with the teacher that was just trained, and the accuracy that its gate expects."""
    expected = ExpectedAccuracy(
        dataset=recipe.data.dataset,
        split=recipe.data.evaluation,
        top1=result.top1,
        map=result.map,
        tolerance=TEACHER_TOLERANCE,
    )
    teacher = trained_teacher(recipe, manifest, str(out / "teacher" / "student.safetensors"))
    return recipe.model_copy(update={"teacher": teacher.model_copy(update={"expected": expected})})

"""`offline-kd run`: every stage of a recipe, one after the other, then the report. On Ray, all students at once.

OUT/recipe.yaml     resolved; `offline-kd cache-teacher OUT/recipe.yaml --store ...` repeats the capture
OUT/data/           the dataset, where it is one that `data pack` can make by itself (digits)
OUT/teacher/        run directory of the teacher, where the recipe trains one
OUT/store/          the teacher store
OUT/students/NAME/  run directories, one per objective and seed
OUT/summary.json, OUT/report.html
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from offline_kd.cache.engines import DEFAULT_ENGINE, EngineOption, find_engine
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import ExpectedAccuracy, Manifest, data_roots, is_complete
from offline_kd.data.packing import digits_samples, pack
from offline_kd.distill.report import group_runs, read_runs, summarise, table, write_report
from offline_kd.distill.results import Result
from offline_kd.distill.run_directory import refuse_ranks, run_directory
from offline_kd.distill.training import DistillOptions, Shared, distill, train_teacher, trained_teacher
from offline_kd.recipe import Recipe, dump_recipe, needs_teacher
from offline_kd.support.console import say, show_table
from offline_kd.support.errors import RecipeError
from offline_kd.support.files import write_atomically
from offline_kd.support.places import Folder

TEACHER_TOLERANCE = 0.5  # percentage points, between the evaluation after training and the gate


class RunOptions(TypedDict, total=False):
    """Where the stages of a run take place."""

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
    recipe = _with_digits(recipe, manifest, extra_roots, out)
    roots = data_roots([*extra_roots, *([recipe.data.root] if recipe.data.root else [])])
    folders: list[str | Path] = []

    if recipe.teacher.is_to_be_trained:
        say(f"training the teacher, {recipe.teacher.model or 'of the manifest'}")
        recipe = _with_teacher(recipe, manifest, train_teacher(recipe, manifest, roots, out / "teacher", device), out)
        folders.append(out / "teacher")
    elif recipe.teacher.training is not None:
        say("teacher.weights are the teacher's, it is not trained. To train it from them: teacher.head: keep, or new")
    write_atomically(out / "recipe.yaml", dump_recipe(recipe))

    if any(needs_teacher(terms) for terms in recipe.objectives.values()):
        say("asking the teacher about every view")
        engine, its_options = options.get("engine", DEFAULT_ENGINE), options.get("engine_options", {})
        store = cache_teacher(recipe, manifest, roots, out / "store", device, engine=engine, engine_options=its_options)
        assert store is not None
        say(f"store: {store.total_bytes:,} bytes, digest sha256:{store.digest}")
    students: dict[Path, DistillOptions] = {
        out / "students" / f"{objective}-{seed}": {
            "objective": objective,
            "seed": seed,
            "stores": [str(out / "store")] if needs_teacher(terms) else [],
        }
        for objective, terms in recipe.objectives.items()
        for seed in recipe.seeds
    }
    for folder, result in _distill_all(recipe, manifest, roots, students, device, options):
        about = students[folder]
        say(
            f"{about['objective']}, seed {about['seed']}: top-1 {result.top1:.2f} %, "
            f"{result.seconds_per_epoch:.2f} s per epoch"
        )
    folders += students

    groups = group_runs(read_runs(folders))
    summaries = summarise(groups)
    seconds = time.monotonic() - started
    content = {"recipe": recipe.name, "seconds": seconds, "objectives": [asdict(summary) for summary in summaries]}
    write_atomically(out / "summary.json", json.dumps(content, indent=2) + "\n")
    share = f" with {recipe.data.labelled_fraction:.0%} of the labels" if recipe.data.labelled_fraction < 1 else ""
    notes = [
        f"{recipe.data.dataset}: student {recipe.student.model}{share}, {recipe.views.num_views} views per image, "
        f"{recipe.training.epochs} epochs, {len(recipe.seeds)} seed(s)."
    ]
    write_report(out / "report.html", recipe.name, groups, notes)
    show_table(notes[0], *table(summaries))
    say(f"{out / 'report.html'} shows the curves; {seconds:.0f} s in all")


def _distill_all(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Root],
    students: Mapping[Path, DistillOptions],
    device: torch.device,
    options: RunOptions,
) -> Iterator[tuple[Path, Result]]:
    """Every student with its run directory, when it is finished: one after the other, or all at once on Ray."""
    if options.get("engine") != "ray":
        shared = Shared()
        for folder, about in students.items():
            what: DistillOptions = {**about, "shared": shared}
            yield folder, distill(recipe, manifest, roots, folder, device, **what)
        return
    from offline_kd.distill.ray_students import distill_on_ray

    gpus = options.get("gpus_per_run")
    gpus = float(device.type == "cuda") if gpus is None else gpus
    yield from distill_on_ray(recipe, manifest, roots, students, gpus)


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
        dataset=recipe.data.dataset, split=recipe.data.evaluation, top1=result.top1, tolerance=TEACHER_TOLERANCE
    )
    teacher = trained_teacher(recipe, manifest, str(out / "teacher" / "student.safetensors"))
    return recipe.model_copy(update={"teacher": teacher.model_copy(update={"expected": expected})})

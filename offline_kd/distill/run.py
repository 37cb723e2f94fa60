"""`offline-kd run`: every stage of a recipe, one after the other, then the report.

OUT/recipe.yaml     resolved; `offline-kd cache-teacher OUT/recipe.yaml --store ...` repeats the capture
OUT/data/           the dataset, where it is one that `data pack` can make by itself (digits)
OUT/teacher/        run directory of the teacher, where the recipe trains one
OUT/store/          the teacher store
OUT/students/NAME/  run directories, one per objective and seed
OUT/summary.json, OUT/report.html
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.data.manifest import ExpectedAccuracy, Manifest, data_roots, is_complete
from offline_kd.data.packing import digits_samples, pack
from offline_kd.distill.loop import Result
from offline_kd.distill.report import group_runs, read_runs, summarise, table, write_report
from offline_kd.distill.run_directory import refuse_ranks, run_directory
from offline_kd.distill.training import distill, train_teacher
from offline_kd.recipe import Recipe, dump_recipe, needs_teacher
from offline_kd.support.console import say, show_table
from offline_kd.support.files import write_atomically

TEACHER_TOLERANCE = 0.5  # percentage points, between the evaluation after training and the gate


def run(recipe: Recipe, manifest: Manifest, extra_roots: Sequence[str | Path], out: Path, device: torch.device) -> None:
    """Pack, train the teacher, cache it, distil every objective with every seed, report. Resumes by itself.

    Raises TrainingError when another process writes `out`.
    """
    refuse_ranks()
    with run_directory(out):
        _run(recipe, manifest, extra_roots, out, device)


def _run(
    recipe: Recipe, manifest: Manifest, extra_roots: Sequence[str | Path], out: Path, device: torch.device
) -> None:
    started = time.monotonic()
    recipe = _with_digits(recipe, manifest, extra_roots, out)
    roots = data_roots([*extra_roots, *([recipe.data.root] if recipe.data.root else [])])
    folders: list[Path] = []

    if recipe.teacher.training is not None and recipe.teacher.weights is None:
        say(f"training the teacher, {recipe.teacher.model}")
        recipe = _with_teacher(recipe, train_teacher(recipe, manifest, roots, out / "teacher", device), out)
        folders.append(out / "teacher")
    write_atomically(out / "recipe.yaml", dump_recipe(recipe))

    if any(needs_teacher(terms) for terms in recipe.objectives.values()):
        say("asking the teacher about every view")
        store = cache_teacher(recipe, manifest, roots, out / "store", device)
        assert store is not None
        say(f"store: {store.total_bytes:,} bytes, digest sha256:{store.digest}")
    for objective, terms in recipe.objectives.items():
        for seed in recipe.seeds:
            folder = out / "students" / f"{objective}-{seed}"
            result = distill(
                recipe,
                manifest,
                roots,
                folder,
                device,
                objective=objective,
                seed=seed,
                stores=[str(out / "store")] if needs_teacher(terms) else [],
            )
            say(f"{objective}, seed {seed}: top-1 {result.top1:.2f} %, {result.seconds_per_epoch:.2f} s per epoch")
            folders.append(folder)

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


def _with_teacher(recipe: Recipe, result: Result, out: Path) -> Recipe:
    """The recipe with the teacher that was just trained, and the accuracy that its gate expects."""
    expected = ExpectedAccuracy(
        dataset=recipe.data.dataset, split=recipe.data.evaluation, top1=result.top1, tolerance=TEACHER_TOLERANCE
    )
    teacher = recipe.teacher.model_copy(
        update={"weights": str(out / "teacher" / "student.safetensors"), "expected": expected}
    )
    return recipe.model_copy(update={"teacher": teacher})

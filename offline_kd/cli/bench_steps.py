"""`offline-kd bench`: what a step costs with and without a teacher, and what training from a store changes.

What is measured beside it is in `bench_stage_1.py` and `bench_loaders.py`; how, in `bench_timing.py`.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.cli.bench_loaders import loader_parts
from offline_kd.cli.bench_material import Bench, parse_codec, small_recipe
from offline_kd.cli.bench_stage_1 import stage_1_parts
from offline_kd.cli.bench_timing import STAGE_1, STAGE_1_TINY, Quartiles, Timed, quartiles, ratios_of, time_in_turn
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest
from offline_kd.distill.heads import with_heads
from offline_kd.distill.loader import Loader
from offline_kd.distill.loop import train_step
from offline_kd.distill.optimisation import make_optimizer, set_learning_rate
from offline_kd.distill.results import Run
from offline_kd.distill.student import kd_layer_scores, new_student
from offline_kd.distill.teacher_signal import AskTeacher, live_signal, no_signal, stored_signal
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.models.networks import normalise
from offline_kd.objectives.ce import CE
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import AnyTerm, Recipe, kd_layer_terms, needs_teacher
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.opening import open_store
from offline_kd.support.errors import RecipeError
from offline_kd.support.places import Folder

TINY = 8  # pixels a side: those of the digits


class Extent(TypedDict, total=False):
    """How much is measured; everything may be left out."""

    rounds: int  # interleaved repetitions; 7 if absent
    steps: int  # batches of images; 10 if absent
    views: int  # of every image, at most; 4 if absent
    codecs: Sequence[str]  # beside that of the recipe, and written as there


class StepTimes(TypedDict):
    """What `bench steps --json` prints."""

    recipe: str
    objective: str | None
    device: str
    threads: int
    workers: int
    batch_size: int
    rounds: int
    seconds: dict[str, Quartiles]  # per batch; of the first batch, until it is there
    ratios: dict[str, float]
    aims: dict[str, str]  # of some ratios: `<= 1.02`
    missed: list[str]  # the ratios that are not what they should be


def bench(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Root],
    device: torch.device,
    *,
    objective: str | None,
    extent: Extent,
) -> StepTimes:
    """Seconds per batch of every part, with quartiles over rounds, and the ratios that matter.

    Works on the first `steps` batches of the dataset with up to `views` views, in a temporary folder. Images are kept
    in memory, as in training after the first epoch; stage 1 and the first batch include reading and decoding.

    Raises RecipeError for an objective without a teacher, and for a codec that is none.
    """
    if objective is None:
        objective = next((name for name, terms in recipe.objectives.items() if needs_teacher(terms)), None)
    _, terms = recipe.objective(objective)
    if not needs_teacher(terms):
        raise RecipeError(f"objective '{objective}' has no teacher to compare with: pick another with --objective.")
    rounds, codecs = extent.get("rounds", 7), [parse_codec(one) for one in extent.get("codecs", ())]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, manifest = small_recipe(
            recipe, manifest, roots, folder, (extent.get("steps", 10), extent.get("views", 4))
        )
        recipe = _streamed_or_resident(recipe, "never")
        roots = [folder, *roots]
        images = training_images(recipe, manifest, roots)
        teacher = load_teacher(recipe, manifest, roots, len(images.dataset.classes), device)
        cache_teacher(recipe, manifest, roots, folder / "store", device)
        this = Bench(recipe, terms, manifest, roots, images, teacher, open_store(folder / "store"), folder, device)
        from_store = make_loader(recipe, source_of(recipe, images, [this.store], terms), 0, device)
        parts = _steps(this, from_store)
        parts |= {f"store step, {codec.label()}": _step_from(this, codec) for codec in codecs}
        parts |= stage_1_parts(this) | loader_parts(this, from_store)
        seconds = time_in_turn(parts, rounds, device)
        is_tiny = recipe.views.is_exact and max(images[0].images.shape[2:]) <= TINY
    ratios = ratios_of(seconds, STAGE_1_TINY if is_tiny else STAGE_1)
    values = {ratio.name: ratio.median(seconds) for ratio in ratios}
    return {
        "recipe": recipe.name,
        "objective": objective,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "workers": recipe.data.workers,
        "batch_size": recipe.training.batch_size,
        "rounds": rounds,
        "seconds": {part: quartiles(times) for part, times in seconds.items()},
        "ratios": values,
        "aims": {ratio.name: ratio.aim_text for ratio in ratios if ratio.aim is not None},
        "missed": [ratio.name for ratio in ratios if ratio.misses(values[ratio.name])],
    }


def _steps(this: Bench, from_store: Loader) -> dict[str, Timed]:
    """Seconds per batch of training steps, reading included."""
    recipe, store, device = this.recipe, this.store, this.device
    plain = source_of(recipe, this.images, [], [])
    live_size = this.teacher.crop.size if this.teacher.crop else None
    stored = stored_signal([store], this.terms, device)
    live = live_signal(this.teacher, recipe, this.terms, store, device)
    works = {
        "ce step": _training(this, make_loader(recipe, plain, 0, device), [CE(term="ce")], no_signal),
        "store step": _training(this, from_store, this.terms, stored),
        "online step": _training(this, make_loader(recipe, plain, 0, device, live_size), this.terms, live),
    }
    if "resident" in type(recipe.training).model_fields:
        resident = _streamed_or_resident(recipe, "always")
        loader = make_loader(resident, source_of(resident, this.images, [store], this.terms), 0, device)
        works["store step, resident"] = _training(this, loader, this.terms, stored)
    if kd_layer_terms(this.terms):
        works["decision losses alone"] = _losses_alone(this, from_store, stored)
    return {name: Timed(work, this.batches_of_pass) for name, work in works.items()}


def _streamed_or_resident(recipe: Recipe, resident: str) -> Recipe:
    """The recipe with its images and targets `always` or `never` on the device, where that can be said."""
    if "resident" not in type(recipe.training).model_fields:
        return recipe
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"resident": resident})})


def _step_from(this: Bench, codec: AnyCodec) -> Timed:
    """A step from a store of another codec."""
    recipe = this.recipe.model_copy(update={"capture": this.recipe.capture.model_copy(update={"codec": codec})})
    folder = this.folder / f"store of {codec.label()}"
    cache_teacher(recipe, this.manifest, this.roots, folder, this.device)
    store = open_store(folder)
    loader = make_loader(recipe, source_of(recipe, this.images, [store], this.terms), 0, this.device)
    work = _training(this, loader, this.terms, stored_signal([store], this.terms, this.device))
    return Timed(work, this.batches_of_pass)


def _training(this: Bench, stream: Loader, terms: Sequence[AnyTerm], ask: AskTeacher) -> Callable[[], None]:
    """One epoch of the training loop's own steps, reading included."""
    student = with_heads(new_student(this.recipe, this.images, 0, this.device, terms), terms, stream, ask)
    student.network.train()
    optimizer = make_optimizer(this.recipe.training, student.network, list(student.heads.values()))
    set_learning_rate(optimizer, 1e-4)  # the speed is measured, not the student
    weights = torch.tensor([term.weight for term in terms], device=this.device)
    run = Run(this.recipe, "bench", terms, 0, Folder(Path()), this.device)

    def work() -> None:
        for batch in stream.epoch(0):
            train_step(run, student, optimizer, batch, ask(batch), weights)

    return work


def _losses_alone(this: Bench, stream: Loader, ask: AskTeacher) -> Callable[[], None]:
    """Forward and backward of the losses on KD-layer scores, without the student and its KD layers."""
    student = new_student(this.recipe, this.images, 0, this.device, this.terms)
    student.network.train()
    batches = [(batch, ask(batch)) for batch in stream.epoch(0)]
    inputs = []
    for batch, _ in batches:
        logits = student.network(normalise(batch.images, this.recipe.data.normalisation)).detach()
        inputs.append((logits, {after: one.detach() for after, one in kd_layer_scores(student).items()}))

    def work() -> None:
        for (batch, signal), (logits, scores) in zip(batches, inputs, strict=True):
            for term in kd_layer_terms(this.terms):
                leaf = scores[term.after].requires_grad_()
                torch.autograd.grad(term(logits, signal, LossBatch(batch.labels, scores={term.after: leaf})), leaf)

    return work

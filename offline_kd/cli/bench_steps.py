"""`offline-kd bench`: what a step costs with and without a teacher, and what training from a store changes.

Parts are timed in turn, round after round, so that a slow moment of the machine hits all of them; ratios are taken
within a round and their median is reported.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from zarr.storage import LocalStore

from offline_kd.cache.asking import Inquiry, ask_teacher
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.fetching import Root
from offline_kd.data.labels import labels_of, need_labels
from offline_kd.data.manifest import Dataset, Manifest, Split, folders_of, locate
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample, read_tar
from offline_kd.distill.loader import Loader
from offline_kd.distill.loop import train_step
from offline_kd.distill.optimisation import make_optimizer, set_learning_rate
from offline_kd.distill.results import Run
from offline_kd.distill.student import kd_layer_scores, new_student
from offline_kd.distill.teacher_signal import AskTeacher, live_signal, no_signal, stored_signal
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.models.networks import normalise
from offline_kd.models.teacher import Teacher
from offline_kd.objectives.ce import CE
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import AnyTerm, Recipe, kd_layer_terms, needs_teacher
from offline_kd.store.join import tables_on
from offline_kd.store.layout import create_array, parts_of
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.store.schema import LedgerEntry, StoreIdentity
from offline_kd.store.writer import commit, create_or_resume
from offline_kd.support.console import progress
from offline_kd.support.errors import RecipeError
from offline_kd.support.places import Folder
from offline_kd.views.kind import draw
from offline_kd.views.render import plain_images

BENCH_VIEWS = 4
COMPARED = (
    ("store step", "ce step"),
    ("online step", "store step"),
    ("stage 1", "bare teacher"),
    ("loader alone", "ce step"),
    ("stage 1", "stage 1, logits only"),
    ("decision losses alone", "store step"),
)


class Quartiles(TypedDict):
    """Seconds per batch, over rounds."""

    median: float
    low: float
    high: float


class StepTimes(TypedDict):
    """What `bench steps --json` prints."""

    recipe: str
    objective: str | None
    device: str
    threads: int
    batch_size: int
    rounds: int
    seconds: dict[str, Quartiles]
    ratios: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """What the parts work on: a small capture of the recipe in a temporary folder."""

    recipe: Recipe
    terms: Sequence[AnyTerm]
    images: BlockLoader
    teacher: Teacher
    store: Store
    folder: Path
    device: torch.device


@dataclass(frozen=True)
class Timed:
    """A part: what to do, and how many views it shows of every image."""

    work: Callable[[], None]
    views: int = 1


def bench(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Root],
    device: torch.device,
    *,
    objective: str | None,
    rounds: int,
    steps: int,
) -> StepTimes:
    """Seconds per batch of every part, with quartiles over rounds, and the ratios that matter.

    Works on the first `steps` batches of the dataset with up to BENCH_VIEWS views, in a temporary folder. Decoded
    images are kept in memory, as in training after the first epoch; stage 1 includes decoding.
    """
    if objective is None:
        objective = next((name for name, terms in recipe.objectives.items() if needs_teacher(terms)), None)
    _, terms = recipe.objective(objective)
    if not needs_teacher(terms):
        raise RecipeError(f"objective '{objective}' has no teacher to compare with: pick another with --objective.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, manifest = _small(recipe, manifest, roots, folder, steps)
        roots = [folder, *roots]
        images = training_images(recipe, manifest, roots)
        teacher = load_teacher(recipe, manifest, roots, len(images.dataset.classes), device)
        cache_teacher(recipe, manifest, roots, folder / "store", device)
        this = Bench(recipe, terms, images, teacher, open_store(folder / "store"), folder, device)
        num_batches = -(-len(images[0]) // recipe.training.batch_size)
        seconds = _time_in_turn(_parts(this), num_batches, rounds, device)
    return {
        "recipe": recipe.name,
        "objective": objective,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "batch_size": recipe.training.batch_size,
        "rounds": rounds,
        "seconds": {part: _quartiles(times) for part, times in seconds.items()},
        "ratios": _ratios(seconds),
    }


def _parts(this: Bench) -> dict[str, Timed]:
    recipe, store, device = this.recipe, this.store, this.device
    views = store.identity.groups[0].stop
    from_store = make_loader(recipe, source_of(recipe, this.images, [store], this.terms), 0, device)
    plain = make_loader(recipe, source_of(recipe, this.images, [], []), 0, device)
    block = this.images[0]
    pixels, _ = plain_images(block, this.teacher.crop, 0, len(block))

    def ask_bare() -> None:
        for start in range(0, len(pixels), this.teacher.batch_size):
            this.teacher.logits(pixels[start : start + this.teacher.batch_size])

    def load_only() -> None:
        for _ in from_store.epoch(0):
            pass

    stored = stored_signal([store], this.terms, device)
    live = live_signal(this.teacher, recipe, this.terms, store, device)
    commit_block, write_bare = _writing(this)
    parts = {
        "ce step": Timed(_training(this, plain, [CE(term="ce")], no_signal)),
        "store step": Timed(_training(this, from_store, this.terms, stored)),
        "online step": Timed(_training(this, plain, this.terms, live)),
        "loader alone": Timed(load_only),
        "bare teacher": Timed(ask_bare),
        "stage 1": Timed(_stage_1(this, store.identity), views),
        "commit": Timed(commit_block, views),
        "bare zarr writes": Timed(write_bare, views),
    }
    if store.identity.decisions:
        logits_only = store.identity.model_copy(update={"decisions": {}})
        parts["stage 1, logits only"] = Timed(_stage_1(this, logits_only), views)
    if kd_layer_terms(this.terms):
        parts["decision losses alone"] = Timed(_losses_alone(this, from_store, stored))
    return parts


def _time_in_turn(
    parts: dict[str, Timed], num_batches: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per batch of every part in every round but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with progress("bench", rounds + 1, "rounds") as meter:
        for round_number in range(rounds + 1):
            for name, part in parts.items():
                started = time.perf_counter()
                part.work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if round_number:
                    seconds[name].append((time.perf_counter() - started) / (num_batches * part.views))
            meter.advance()
    return seconds


def _quartiles(times: list[float]) -> Quartiles:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle, "low": low, "high": high}


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of the ratios within each."""
    ratios = {
        f"{above} / {below}": statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
        for above, below in COMPARED
        if above in seconds and below in seconds
    }
    parts = (seconds[part] for part in ("commit", "bare zarr writes", "stage 1", "bare teacher"))
    protocol = [(durable - bare) / (whole - teacher) for durable, bare, whole, teacher in zip(*parts, strict=True)]
    return ratios | {"(commit - bare zarr writes) / (stage 1 - bare teacher)": statistics.median(protocol)}


def _small(
    recipe: Recipe, manifest: Manifest, roots: Sequence[Root], folder: Path, steps: int
) -> tuple[Recipe, Manifest]:
    """The recipe on its first `steps` batches and at most BENCH_VIEWS views; the teacher's gate is left out."""
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    wanted = steps * recipe.training.batch_size
    samples: list[Sample] = []
    folders, labels = folders_of(dataset, roots), labels_of(split.labels, dataset.classes)
    need_labels(split.labels, f"{recipe.data.dataset}/{recipe.data.train}", "this benchmark")
    for tar in split.tars:
        some, _ = read_tar(locate(tar.file, folders), labels=labels)
        samples += some[: wanted - len(samples)]
    small = Dataset(
        folder="bench",
        classes=dataset.classes,
        splits={"all": Split(tars=pack(samples, folder / "bench", "all", wanted))},
    )
    views = recipe.views.with_count(min(BENCH_VIEWS, recipe.views.num_views))
    ungated = {name: teacher.model_copy(update={"expected": None}) for name, teacher in manifest.teachers.items()}
    changes = {"dataset": "bench", "train": "all", "evaluation": "all", "tars": None, "workers": 0, "keep_bytes": 2**30}
    return (
        recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update=changes),
                "views": views,
                "capture": recipe.capture.model_copy(update={"views_per_group": None}),
                "teacher": recipe.teacher.model_copy(update={"expected": None}),
            }
        ),
        manifest.model_copy(update={"datasets": {"bench": small}, "teachers": ungated}),
    )


def _training(this: Bench, stream: Loader, terms: Sequence[AnyTerm], ask: AskTeacher) -> Callable[[], None]:
    """One epoch of the training loop's own steps, reading included."""
    student = new_student(this.recipe, this.images, 0, this.device, terms)
    student.network.train()
    optimizer = make_optimizer(this.recipe.training, student.network)
    set_learning_rate(optimizer, 1e-4)  # the speed is measured, not the student
    weights = torch.tensor([term.weight for term in terms], device=this.device)
    run = Run(this.recipe, "bench", terms, 0, Folder(Path()), this.device)

    def work() -> None:
        for batch in stream.epoch(0):
            train_step(run, student, optimizer, batch, ask(batch), weights)

    return work


def _stage_1(this: Bench, identity: StoreIdentity) -> Callable[[], None]:
    """Read, decode, ask and commit one block and view group, as `cache_teacher` does for this identity."""
    tables = {name: tables_on(this.store, name, this.device) for name in identity.decisions}
    inquiry = Inquiry(this.teacher, identity, tables, this.device)
    dataset, split = this.images.dataset, this.images.split
    undecoded = BlockLoader(dataset, split, [this.folder], keep_bytes=0, decode=this.recipe.views.is_exact)

    def work() -> None:
        place = Folder(this.folder / "stage-1")
        create_or_resume(place, identity)
        block = undecoded[0]
        parameters = draw(this.recipe.views, block.key_hash, block.sizes())
        end = identity.groups[0].stop
        chosen = {name: array[:, :end] for name, array in parameters.items()}
        arrays, _ = ask_teacher(inquiry, block, chosen, 0, 0)
        part, views = parts_of(identity)[""], identity.groups[0]
        entry = LedgerEntry(
            block=0, first_view=views.start, end_view=views.stop, rows=len(block), tar=block.name,
            tar_sha256=block.sha256, objects={},
        )  # fmt: skip
        commit(place, part, 0, entry, arrays)
        shutil.rmtree(place.path)

    return work


def _writing(this: Bench) -> tuple[Callable[[], None], Callable[[], None]]:
    """Committing one block and view group, and writing the same arrays with zarr alone."""
    store, folder = this.store, this.folder
    part, entry = store.parts[""], store.entry("", 0, 0)
    arrays = store.read(0, 0, [spec.name for spec in part.specs])

    def commit_block() -> None:
        place = Folder(folder / "committed")
        commit(place, part, 0, entry, arrays)
        shutil.rmtree(place.path)

    created = LocalStore(folder / "bare.zarr")
    bare = {spec.name: create_array(created, spec) for spec in part.specs}

    def write_bare() -> None:
        for spec in part.specs:
            values = arrays[spec.name]
            values = values[None, None] if spec.name.startswith("probe/") else values
            bare[spec.name][tuple(slice(size) for size in values.shape)] = values

    return commit_block, write_bare


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

"""`offline-kd bench`: what a step costs with and without a teacher, and what training from a store changes.

Parts are timed in turn, round after round, so that a slow moment of the machine hits all of them; ratios are taken
within a round and their median is reported.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zarr.storage import LocalStore

from offline_kd.cache.asking import Inquiry, ask_teacher
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import Dataset, Manifest, Split, locate
from offline_kd.data.packing import pack
from offline_kd.data.tars import Sample, read_tar
from offline_kd.distill.loader import Loader
from offline_kd.distill.loop import Run, train_step
from offline_kd.distill.loss import term_weight
from offline_kd.distill.optimisation import learning_rate, make_optimizer, set_learning_rate
from offline_kd.distill.student import Student, kd_layer_scores, new_student
from offline_kd.distill.teacher_signal import AskTeacher, TeacherSignal, live_signal, no_signal, stored_signal
from offline_kd.distill.training import evaluation_images, make_loader, source_of, training_images
from offline_kd.models.evaluation import evaluate
from offline_kd.models.networks import normalise
from offline_kd.models.teacher import Teacher
from offline_kd.objectives.ce import CE
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import AnyTerm, Recipe, kd_layer_terms, needs_teacher
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.join import tables_on
from offline_kd.store.layout import create_array, parts_of
from offline_kd.store.opening import open_store
from offline_kd.store.places import Folder
from offline_kd.store.reader import Store
from offline_kd.store.rows import Rows
from offline_kd.store.schema import StoreIdentity
from offline_kd.store.writer import commit, create_or_resume
from offline_kd.support.console import progress
from offline_kd.support.errors import RecipeError
from offline_kd.views.kind import draw
from offline_kd.views.render import plain_images

BENCH_VIEWS = 4
DRIFT_CODECS: dict[str, AnyCodec] = {"f32": Float32(), "f16": Float16(name="f16"), "int8": Int(name="int")}


def bench(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Path],
    device: torch.device,
    *,
    objective: str | None,
    rounds: int,
    steps: int,
) -> dict[str, Any]:
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
        loader = training_images(recipe, manifest, roots)
        teacher = load_teacher(recipe, manifest, roots, len(loader.dataset.classes), device)
        cache_teacher(recipe, manifest, roots, folder / "store", device)
        store = open_store(folder / "store")
        views = store.identity.groups[0].stop

        from_store = make_loader(recipe, source_of(recipe, loader, [store], terms), 0, device)
        plain = make_loader(recipe, source_of(recipe, loader, [], []), 0, device)
        batch_size = recipe.training.batch_size
        images, _ = plain_images(loader[0], teacher.crop, 0, len(loader[0]))
        num_batches = -(-len(images) // batch_size)

        def ask_bare() -> None:
            for start in range(0, len(images), teacher.batch_size):
                teacher.logits(images[start : start + teacher.batch_size])

        def load_only() -> None:
            for _ in from_store.epoch(0):
                pass

        parts: dict[str, tuple[Callable[[], None], int]] = {
            "ce step": (_training(recipe, loader, plain, [CE(term="ce")], no_signal, device), 1),
            "store step": (
                _training(recipe, loader, from_store, terms, stored_signal([store], terms, device), device),
                1,
            ),
            "online step": (
                _training(recipe, loader, plain, terms, live_signal(teacher, recipe, terms, store, device), device),
                1,
            ),
            "loader alone": (load_only, 1),
            "bare teacher": (ask_bare, 1),
            "stage 1": (_stage_1(recipe, store.identity, store, loader, teacher, folder, device), views),
        }
        parts |= {name: (work, views) for name, work in _writing(store, folder).items()}
        if store.identity.decisions:
            logits_only = store.identity.model_copy(update={"decisions": {}})
            work = _stage_1(recipe, logits_only, store, loader, teacher, folder, device)
            parts["stage 1, logits only"] = (work, views)
        if kd_layer_terms(terms):
            parts["decision losses alone"] = (_losses_alone(recipe, loader, from_store, store, terms, device), 1)
        seconds: dict[str, list[float]] = {part: [] for part in parts}
        with progress("bench", rounds + 1, "rounds") as meter:
            for round_number in range(rounds + 1):
                for part, (work, batches) in parts.items():
                    started = time.perf_counter()
                    work()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if round_number:  # the first round warms up
                        seconds[part].append((time.perf_counter() - started) / (num_batches * batches))
                meter.advance()
    protocol = [
        (commit - bare) / (whole - teacher_alone)
        for commit, bare, whole, teacher_alone in zip(
            *(seconds[part] for part in ("commit", "bare zarr writes", "stage 1", "bare teacher")), strict=True
        )
    ]
    ratios = {
        "store step / ce step": ("store step", "ce step"),
        "online step / store step": ("online step", "store step"),
        "stage 1 / bare teacher": ("stage 1", "bare teacher"),
        "loader alone / ce step": ("loader alone", "ce step"),
        "stage 1 / stage 1, logits only": ("stage 1", "stage 1, logits only"),
        "decision losses alone / store step": ("decision losses alone", "store step"),
    }
    ratios = {name: pair for name, pair in ratios.items() if set(pair) <= set(parts)}
    quartiles = {part: statistics.quantiles(times, n=4) for part, times in seconds.items()}
    return {
        "recipe": recipe.name,
        "objective": objective,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "rounds": rounds,
        "seconds": {
            part: {"median": middle, "low": low, "high": high} for part, (low, middle, high) in quartiles.items()
        },
        "ratios": {
            name: statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
            for name, (above, below) in ratios.items()
        }
        | {"(commit - bare zarr writes) / (stage 1 - bare teacher)": statistics.median(protocol)},
    }


def _small(
    recipe: Recipe, manifest: Manifest, roots: Sequence[Path], folder: Path, steps: int
) -> tuple[Recipe, Manifest]:
    """The recipe on its first `steps` batches and at most BENCH_VIEWS views; the teacher's gate is left out."""
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    wanted = steps * recipe.training.batch_size
    samples: list[Sample] = []
    for tar in split.tars:
        samples += read_tar(locate(f"{dataset.folder}/{tar.file}", roots))[0][: wanted - len(samples)]
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


def _training(
    recipe: Recipe,
    loader: BlockLoader,
    stream: Loader,
    terms: Sequence[AnyTerm],
    ask: AskTeacher,
    device: torch.device,
) -> Callable[[], None]:
    """One epoch of the training loop's own steps, reading included."""
    student = new_student(recipe, loader, 0, device, terms)
    student.network.train()
    optimizer = make_optimizer(recipe.training, student.network)
    set_learning_rate(optimizer, 1e-4)  # the speed is measured, not the student
    weights = [term.weight for term in terms]
    run = Run(recipe, "bench", terms, 0, Path(), device)

    def work() -> None:
        for batch in stream.epoch(0):
            train_step(run, student, optimizer, batch, ask(batch), weights)

    return work


def _stage_1(
    recipe: Recipe,
    identity: StoreIdentity,
    store: Store,
    loader: BlockLoader,
    teacher: Teacher,
    folder: Path,
    device: torch.device,
) -> Callable[[], None]:
    """Read, decode, ask and commit one block and view group, as `cache_teacher` does for this identity."""
    tables = {name: tables_on(store, name, device) for name in identity.decisions}
    inquiry = Inquiry(teacher, identity, tables, device)
    undecoded = BlockLoader(loader.dataset, loader.split, [folder], keep_bytes=0, decode=recipe.views.is_exact)

    def work() -> None:
        place = Folder(folder / "stage-1")
        create_or_resume(place, identity)
        block = undecoded[0]
        parameters = draw(recipe.views, block.key_hash, block.sizes())
        end = identity.groups[0].stop
        chosen = {name: array[:, :end] for name, array in parameters.items()}
        arrays, _ = ask_teacher(inquiry, block, chosen, 0, 0)
        part, views = parts_of(identity)[""], identity.groups[0]
        commit(place, part, 0, 0, views, arrays, tar=block.name, tar_sha256=block.sha256)
        shutil.rmtree(place.path)

    return work


def _writing(store: Store, folder: Path) -> dict[str, Callable[[], None]]:
    """Committing one block and view group, and writing the same arrays with zarr alone."""
    part, views, entry = store.parts[""], store.identity.groups[0], store.entry("", 0, 0)
    arrays = store.read(0, 0, [spec.name for spec in part.specs])

    def commit_block() -> None:
        place = Folder(folder / "committed")
        commit(place, part, 0, 0, views, arrays, tar=entry.tar, tar_sha256=entry.tar_sha256)
        shutil.rmtree(place.path)

    created = LocalStore(folder / "bare.zarr")
    bare = {spec.name: create_array(created, spec) for spec in part.specs}

    def write_bare() -> None:
        for spec in part.specs:
            values = arrays[spec.name]
            values = values[None, None] if spec.name.startswith("probe/") else values
            bare[spec.name][tuple(slice(size) for size in values.shape)] = values

    return {"commit": commit_block, "bare zarr writes": write_bare}


def _losses_alone(
    recipe: Recipe, loader: BlockLoader, stream: Loader, store: Store, terms: Sequence[AnyTerm], device: torch.device
) -> Callable[[], None]:
    """Forward and backward of the losses on KD-layer scores, without the student and its KD layers."""
    student = new_student(recipe, loader, 0, device, terms)
    student.network.train()
    ask = stored_signal([store], terms, device)
    batches = [(batch, ask(batch)) for batch in stream.epoch(0)]
    layer_terms = kd_layer_terms(terms)
    inputs = []
    for batch, _ in batches:
        logits = student.network(normalise(batch.images, recipe.data.normalisation)).detach()
        inputs.append((logits, {after: one.detach() for after, one in kd_layer_scores(student).items()}))

    def work() -> None:
        for (batch, signal), (logits, scores) in zip(batches, inputs, strict=True):
            for term in layer_terms:
                leaf = {term.after: scores[term.after].requires_grad_()}
                value = term(logits, signal, LossBatch(batch.labels, scores=leaf))
                value.backward()  # type: ignore[no-untyped-call]
                leaf[term.after].grad = None

    return work


# ---- drift ---------------------------------------------------------------------------------------------------------


def measure_drift(
    recipe: Recipe, manifest: Manifest, roots: Sequence[Path], steps: int, device: torch.device
) -> dict[str, dict[str, dict[str, float]]]:
    """Train `steps` steps with the live teacher and from a store of each codec, everything else equal.

    Returns, by objective and codec, `distance`, |offline - online| / |online| over all parameters of the student, and
    `top1` in percent. The entry `online` is the live run itself; `other order` is the yardstick: a live run from the
    same initial weights with the samples in another order.
    """
    objectives = {
        name: terms for name, terms in recipe.objectives.items() if needs_teacher(terms) and not kd_layer_terms(terms)
    }
    loader, evaluation = training_images(recipe, manifest, roots), evaluation_images(recipe, manifest, roots)
    teacher = load_teacher(recipe, manifest, roots, len(loader.dataset.classes), device)

    def from_teacher(batch: Rows) -> TeacherSignal:
        return TeacherSignal(teacher.logits(batch.images))

    def train(terms: Sequence[AnyTerm], store: Store | None, ask: AskTeacher, order: int = 0) -> nn.Module:
        student = new_student(recipe, loader, recipe.seeds[0], device)
        stream = make_loader(
            recipe, source_of(recipe, loader, [store] if store else [], terms), recipe.seeds[0] + order, device
        )
        _train(recipe, student, stream, terms, ask, steps)
        return student.network

    def measure(network: nn.Module, live: nn.Module) -> dict[str, float]:
        def predict(images: Tensor) -> Tensor:
            return network(normalise(images, recipe.data.normalisation))

        network.eval()
        here, there = (torch.cat([p.detach().double().flatten() for p in one.parameters()]) for one in (network, live))
        top1 = evaluate(predict, evaluation, 256, device, "evaluation", recipe.evaluation_crop).top1
        return {"distance": ((here - there).norm() / there.norm()).item(), "top1": top1}

    live = {name: train(terms, None, from_teacher) for name, terms in objectives.items()}
    drifts = {name: {"online": measure(live[name], live[name])} for name in objectives}
    for codec_name, codec in DRIFT_CODECS.items():
        with tempfile.TemporaryDirectory() as folder:
            capture = recipe.capture.model_copy(update={"codec": codec, "decisions": {}})
            path = Path(folder) / "store"
            cache_teacher(recipe.model_copy(update={"capture": capture}), manifest, roots, path, device)
            store = open_store(path)
            for name, terms in objectives.items():
                drifts[name][codec_name] = measure(
                    train(terms, store, stored_signal([store], terms, device)), live[name]
                )
    for name, terms in objectives.items():
        drifts[name]["other order"] = measure(train(terms, None, from_teacher, order=1), live[name])
    return drifts


def _train(
    recipe: Recipe,
    student: Student,
    stream: Loader,
    terms: Sequence[AnyTerm],
    ask: AskTeacher,
    steps: int,
) -> None:
    """Exactly `steps` steps of the recipe, without evaluation."""
    optimizer = make_optimizer(recipe.training, student.network)
    student.network.train()
    run = Run(recipe, "drift", terms, recipe.seeds[0], Path(), stream.device)
    for step in range(steps):
        epoch, in_epoch = divmod(step, stream.steps_per_pass)
        if in_epoch == 0:
            batches = stream.epoch(epoch)
        set_learning_rate(optimizer, learning_rate(recipe.training, step / stream.steps_per_pass))
        batch = next(batches)
        weights = [term_weight(term, epoch) for term in terms]
        train_step(run, student, optimizer, batch, ask(batch), weights)

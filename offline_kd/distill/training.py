"""STAGE 2, whole: batches with stored targets -> student. One loop for distillation, live teachers and plain training.

All it knows of stage 1 is the store. A live teacher (`--online`) takes the store's place in the same loop, with the
same views in the same order, and exists to measure that the two agree.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import Manifest, Normalisation
from offline_kd.distill.checkpoint import Progress, load_progress, save_progress
from offline_kd.distill.compatibility import check_groups, check_store, check_teacher
from offline_kd.distill.loader import Batch, Stream
from offline_kd.distill.loss import bare_values, term_weight
from offline_kd.distill.optimisation import learning_rate, make_optimizer, set_learning_rate
from offline_kd.distill.student import Student, kd_layer_scores, new_student
from offline_kd.distill.teacher_signal import (
    AskTeacher,
    Mix,
    Targets,
    decisions_by_store,
    live_targets,
    refuse_bias,
    stored_targets,
)
from offline_kd.models.evaluation import evaluate
from offline_kd.models.networks import build, normalise, parameter_count
from offline_kd.objectives import dtkd_fallbacks
from offline_kd.objectives.ce import CE
from offline_kd.objectives.dtkd import DTKD
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import (
    AnyTerm,
    Recipe,
    TeacherStore,
    Training,
    dump_recipe,
    needs_teacher,
)
from offline_kd.store.downloads import DEFAULT_BYTES
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.store.schema import plan_views_per_group
from offline_kd.support.console import progress, say
from offline_kd.support.errors import RecipeError, TrainingError
from offline_kd.support.files import write_atomically
from offline_kd.support.strict import fingerprint
from offline_kd.views.epochs import view_groups


@dataclass(frozen=True)
class Result:
    """`result.json`: what a finished run achieved."""

    recipe: str
    objective: str
    targets: str  # "store", "online" or "none"
    seed: int
    top1: float  # percent, after the last epoch
    best_top1: float
    nll: float
    ece: float
    epochs: int
    steps: int
    parameters: int  # those of KD layers included
    kd_layer_parameters: int
    seconds_per_epoch: float  # training alone, median over epochs
    seconds_per_step: float
    images_per_second: float
    dtkd_fallbacks: int  # samples for which DTKD's temperatures were undefined
    store_digest: str
    student_sha256: str


def distill(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Path],
    out: Path,
    device: torch.device,
    *,
    objective: str | None = None,
    seed: int | None = None,
    stores: Sequence[str] = (),
    online: bool = False,
    download_bytes: int = DEFAULT_BYTES,
    allow_biased: bool = False,
) -> Result:
    """Train the student of a recipe into the run directory `out`, from stores or with the live teacher.

    Args:
        stores: folders, URLs or manifest names; by default what the recipe says.
        download_bytes: how much of remote stores is kept on the local disk.
        allow_biased: train even where a store's codec has not kept what a term needs.

    Raises StoreMismatch when a store was not made for this recipe's data, views and teacher.
    """
    name, terms = recipe.objective(objective)
    if recipe.training.epochs % recipe.training.views_per_decode:
        raise RecipeError(
            f"training.epochs is {recipe.training.epochs}, training.views_per_decode {recipe.training.views_per_decode}"
            ": so many epochs pass at once, so it must divide their number."
        )
    seed = recipe.seeds[0] if seed is None else seed
    opened, mix = open_stores(recipe, manifest, stores, download_bytes)
    # Where targets are read, the join compares every key, image and label with what the teacher saw.
    loader = training_images(recipe, manifest, roots, prove=online or not opened)
    if needs_teacher(terms) and not opened and not online:
        raise RecipeError(f"objective '{name}' needs a teacher: give --store, or --online for the live teacher.")
    if online and len(opened) > 1:
        raise RecipeError("--online asks the recipe's own teacher: give one --store beside it at most.")
    for store in opened:
        check_store(store, recipe, loader)
        if not (allow_biased or online):
            refuse_bias(store, terms)
        store.check_sizes()
    if len(opened) == 1:
        check_teacher(opened[0], recipe, manifest)
    check_groups(opened)
    student = new_student(recipe, loader, seed, device, terms)
    ask, teacher_crop = None, None
    if needs_teacher(terms):
        if online:
            teacher = load_teacher(recipe, manifest, roots, len(loader.dataset.classes), device)
            teacher_crop = teacher.crop
            ask = live_targets(teacher, recipe, terms, opened[0] if opened else None, device)
        else:
            ask = stored_targets(opened, terms, device, mix)
    groups = groups_for(opened[0], recipe) if opened else None
    read = [] if online else opened
    live_size = teacher_crop.size if teacher_crop else None
    stream = make_stream(recipe, loader, read, terms, seed, device, groups=groups, live_size=live_size)
    return fit(
        recipe=recipe,
        student=student,
        training=recipe.training,
        terms=terms,
        stream=stream,
        evaluation=evaluation_images(recipe, manifest, roots),
        ask=ask,
        out=out,
        device=device,
        seed=seed,
        objective=name,
        targets="none" if ask is None else "online" if online else "store",
        store_digest="+".join(store.digest for store in opened),
    )


def open_stores(
    recipe: Recipe, manifest: Manifest, references: Sequence[str], download_bytes: int = DEFAULT_BYTES
) -> tuple[list[Store], Mix]:
    """The stores that a run learns from, and how their teachers are mixed."""
    if references or recipe.store is None:
        wanted = [TeacherStore(store=reference) for reference in references]
    else:
        wanted = [TeacherStore(store=recipe.store)] if isinstance(recipe.store, str) else recipe.store
    opened = []
    for one in wanted:
        where = manifest.store(one.store)
        opened.append(
            open_store(where.location, targets=where.targets, digest=where.digest, download_bytes=download_bytes)
        )
    return opened, Mix([one.weight for one in wanted], recipe.mix)


def groups_for(store: Store, recipe: Recipe) -> list[range]:
    """The view groups of a store that a recipe uses: the first ones, if the store holds more views."""
    return [group for group in store.identity.groups if group.stop <= recipe.views.num_views]


def train_teacher(recipe: Recipe, manifest: Manifest, roots: Sequence[Path], out: Path, device: torch.device) -> Result:
    """Train the teacher of a recipe with cross-entropy on all labels; `out/student.safetensors` are its weights."""
    if recipe.teacher.model is None or recipe.teacher.training is None:
        raise RecipeError(f"recipe '{recipe.name}': to train a teacher, give teacher.model and teacher.training.")
    loader = training_images(recipe, manifest, roots)
    torch.manual_seed(recipe.seeds[0])
    network = build(recipe.teacher.model, len(loader.dataset.classes), recipe.teacher.model_args).to(device)
    plain = recipe.model_copy(
        update={
            "training": recipe.teacher.training,
            "data": recipe.data.model_copy(
                update={
                    "labelled_fraction": 1.0,
                    "normalisation": recipe.teacher.normalisation or recipe.data.normalisation,
                }
            ),
        }
    )
    return fit(
        recipe=plain,
        student=Student(network, {}),
        training=recipe.teacher.training,
        terms=[CE(term="ce")],
        stream=make_stream(plain, loader, [], [], recipe.seeds[0], device),
        evaluation=evaluation_images(recipe, manifest, roots),
        ask=None,
        out=out,
        device=device,
        seed=recipe.seeds[0],
        objective="teacher",
        targets="none",
        store_digest="",
    )


def training_images(recipe: Recipe, manifest: Manifest, roots: Sequence[Path], *, prove: bool = True) -> BlockLoader:
    """The training split; `prove`: compare the sha256 of every tar with the manifest's whenever it is read."""
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    return BlockLoader(
        dataset,
        split,
        roots,
        keep_bytes=recipe.data.keep_bytes // max(recipe.data.workers, 1),
        decode=recipe.views.is_exact,
        on_bad=recipe.data.bad_images,
        prove=prove,
    )


def evaluation_images(recipe: Recipe, manifest: Manifest, roots: Sequence[Path]) -> BlockLoader:
    split = manifest.split(recipe.data.dataset, recipe.data.evaluation)
    return BlockLoader(
        manifest.dataset(recipe.data.dataset),
        split,
        roots,
        keep_bytes=recipe.data.keep_bytes,
        decode=recipe.evaluation_crop is None,
        on_bad=recipe.data.bad_images,
    )


def make_stream(
    recipe: Recipe,
    loader: BlockLoader,
    stores: Sequence[Store],
    terms: Sequence[AnyTerm],
    seed: int,
    device: torch.device,
    groups: list[range] | None = None,
    live_size: int | None = None,
) -> Stream:
    """The batches of a run, with what its terms want of the stores.

    Args:
        live_size: of the same views for a live teacher.

    Without a store, views are grouped as stage 1 would group them, so that a run with the live teacher sees the same
    views in the same order.
    """
    if groups is None:
        per_group = plan_views_per_group(
            recipe.views,
            rows_per_block=max(tar.count for tar in loader.split.tars),
            num_classes=len(loader.dataset.classes),
            requested=recipe.capture.views_per_group,
        )
        groups = view_groups(recipe.views.num_views, per_group)
    return Stream(
        loader,
        recipe.views,
        groups,
        stores,
        seed=seed,
        batch_size=recipe.training.batch_size,
        pool_blocks=recipe.training.pool_blocks,
        labelled_fraction=recipe.data.labelled_fraction,
        workers=recipe.data.workers,
        decisions=decisions_by_store(stores, terms),
        views_per_decode=recipe.training.views_per_decode,
        live_size=live_size,
        device=device,
    )


# ---- the loop ------------------------------------------------------------------------------------------------------


def fit(
    *,
    recipe: Recipe,
    student: Student,
    training: Training,
    terms: list[AnyTerm],
    stream: Stream,
    evaluation: BlockLoader,
    ask: AskTeacher | None,
    out: Path,
    device: torch.device,
    seed: int,
    objective: str,
    targets: str,
    store_digest: str,
) -> Result:
    """Train `student`, evaluating after every epoch; the same call goes on after the last epoch that was saved.

    Raises TrainingError when the loss is no longer a number, or when `out` holds another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    description = dump_recipe(recipe)
    identity = fingerprint([_what_matters(recipe), objective, seed, targets, store_digest])
    title = f"{objective}, seed {seed}"
    network = student.network
    optimizer = make_optimizer(training, network)
    progressed = load_progress(out, identity, network, optimizer, device) or Progress(sums=[0.0] * len(terms))
    history = progressed.history
    if progressed.epochs_done == training.epochs and (out / "result.json").is_file():
        say(f"{out}: finished already, nothing to do")
        return Result(**json.loads((out / "result.json").read_text()))
    write_atomically(out / "recipe.yaml", description)
    has_mixing = recipe.views.mixes
    passes = range(progressed.epochs_done, training.epochs, stream.views_per_decode)

    @torch.inference_mode()
    def predict(images: Tensor) -> Tensor:
        network.eval()
        return network(normalise(images, recipe.data.normalisation))

    with progress(title, len(passes) * stream.steps_per_pass - progressed.steps_done, "steps") as meter:
        for epoch in passes:
            network.train()
            weights = [term_weight(term, epoch) for term in terms]
            sums = torch.tensor(progressed.sums, dtype=torch.float64).to(device, torch.float32)
            fallbacks = torch.tensor(progressed.fallbacks, device=device)
            images_seen, seconds_before, started = progressed.images, progressed.seconds, time.perf_counter()
            for batch in stream.epoch(epoch, progressed.steps_done):
                at = epoch + batch.step / stream.steps_per_pass * stream.views_per_decode
                set_learning_rate(optimizer, learning_rate(training, at))
                asked = ask(batch) if ask else Targets()
                logits, values = train_step(
                    student, optimizer, batch, asked, terms, weights, training, recipe.data.normalisation, has_mixing
                )
                sums += values
                if asked.logits is not None and any(isinstance(term, DTKD) for term in terms):
                    fallbacks += dtkd_fallbacks(logits, asked.logits)
                images_seen += len(batch.labels)
                meter.advance()
                steps = batch.step + 1
                if training.checkpoint_steps and steps % training.checkpoint_steps == 0 < stream.steps_per_pass - steps:
                    spent = seconds_before + time.perf_counter() - started
                    now = Progress(epoch, steps, sums.tolist(), int(fallbacks), images_seen, spent, history)
                    save_progress(out, identity, network, optimizer, now)
            means = (sums / stream.steps_per_pass).tolist()  # waits for the device, so that the time is the epoch's
            seconds = seconds_before + time.perf_counter() - started
            losses = dict(zip(_loss_names(terms), means, strict=True))
            for name, mean in losses.items():
                if mean != mean or abs(mean) == float("inf"):
                    raise TrainingError(
                        f"{out}: {name} is {mean} in epoch {epoch + 1}: training diverged. The last good state "
                        "is in last.ckpt. Use a smaller training.optimizer.lr and another --out folder."
                    )
            measured = evaluate(predict, evaluation, 256, device, "evaluation", recipe.evaluation_crop)
            epochs_done = epoch + stream.views_per_decode
            history.append(
                {
                    "epoch": epochs_done,
                    **losses,
                    "lr": optimizer.param_groups[0]["lr"],
                    "top1": measured.top1,
                    "nll": measured.nll,
                    "ece": measured.ece,
                    "seconds": seconds,
                    "images": images_seen,
                    "left_out": len(stream.bad),
                    "dtkd_fallbacks": int(fallbacks),
                }
            )
            progressed = Progress(epochs_done, sums=[0.0] * len(terms), history=history)
            save_progress(out, identity, network, optimizer, progressed)
            write_atomically(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    return _finish(out, recipe, student, history, stream, seed, objective, targets, store_digest)


def _loss_names(terms: Sequence[AnyTerm]) -> list[str]:
    """`loss_TERM`, numbered from the second use of a term on."""
    names: list[str] = []
    for term in terms:
        uses = sum(name.startswith(f"loss_{term.term}") for name in names)
        names.append(f"loss_{term.term}" + (f"_{uses + 1}" if uses else ""))
    return names


def train_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    targets: Targets,
    terms: Sequence[AnyTerm],
    weights: Sequence[float],
    training: Training,
    normalisation: Normalisation,
    has_mixing: bool = False,
) -> tuple[Tensor, Tensor]:
    """One update of the student; returns its logits `[B, C]` and the bare value of every term `[terms]`, detached."""
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=training.amp):
        logits = student.network(normalise(batch.images, normalisation))
    logits = logits.float()
    mixing = (batch.other_labels, batch.share) if has_mixing else None
    known = LossBatch(batch.labels, mixing, training.label_smoothing, kd_layer_scores(student))
    bare = bare_values(terms, logits, targets, known)
    optimizer.zero_grad(set_to_none=True)
    (bare * torch.tensor(weights, device=bare.device)).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return logits.detach(), bare.detach()


def _what_matters(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what may change when a run goes on."""
    content = recipe.model_dump(mode="json")
    for field_name in ("workers", "keep_bytes", "root"):
        del content["data"][field_name]
    del content["training"]["checkpoint_steps"]
    return content


def _finish(
    out: Path,
    recipe: Recipe,
    student: Student,
    history: list[dict[str, Any]],
    stream: Stream,
    seed: int,
    objective: str,
    targets: str,
    store_digest: str,
) -> Result:
    weights = {name: tensor.contiguous().cpu() for name, tensor in student.network.state_dict().items()}
    content = safetensors.torch.save(weights)
    write_atomically(out / "student.safetensors", content)
    per_pass = statistics.median(line["seconds"] for line in history)
    result = Result(
        recipe=recipe.name,
        objective=objective,
        targets=targets,
        seed=seed,
        top1=history[-1]["top1"],
        best_top1=max(line["top1"] for line in history),
        nll=history[-1]["nll"],
        ece=history[-1]["ece"],
        epochs=history[-1]["epoch"],
        steps=len(history) * stream.steps_per_pass,
        parameters=parameter_count(student.network),
        kd_layer_parameters=sum(parameter_count(layer.kd_layer) for layer in student.kd_layers.values()),
        seconds_per_epoch=per_pass / stream.views_per_decode,
        seconds_per_step=per_pass / stream.steps_per_pass,
        images_per_second=history[-1]["images"] / per_pass,
        dtkd_fallbacks=sum(line["dtkd_fallbacks"] for line in history),
        store_digest=store_digest,
        student_sha256=hashlib.sha256(content).hexdigest(),
    )
    write_atomically(out / "result.json", json.dumps(asdict(result), indent=2) + "\n")
    return result

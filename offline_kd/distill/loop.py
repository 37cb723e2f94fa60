"""The training loop: batches and a teacher signal in, an evaluated student out, whatever the signal comes from."""

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from offline_kd.data.blocks import BlockLoader
from offline_kd.distill.checkpoint import Progress, load_progress, save_progress
from offline_kd.distill.loader import Loader
from offline_kd.distill.loss import bare_values, term_weight
from offline_kd.distill.optimisation import learning_rate, make_optimizer, set_learning_rate
from offline_kd.distill.run_directory import run_directory
from offline_kd.distill.sampler import ORDER_VERSION
from offline_kd.distill.student import Student, kd_layer_scores
from offline_kd.distill.teacher_signal import AskTeacher, TeacherSignal
from offline_kd.models.evaluation import evaluate
from offline_kd.models.networks import normalise, parameter_count
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import AnyTerm, Recipe, dump_recipe
from offline_kd.store.rows import Rows
from offline_kd.support.console import progress, say
from offline_kd.support.errors import TrainingError
from offline_kd.support.files import file_sha256, write_atomically
from offline_kd.support.strict import fingerprint


@dataclass(frozen=True)
class Run:
    """What a run is: two runs of one description train one student, bit by bit on one machine."""

    recipe: Recipe
    objective: str
    terms: Sequence[AnyTerm]
    seed: int
    out: Path
    device: torch.device
    source: str = "none"  # of the teacher signal: "store", "online" or "none"
    store_digest: str = ""

    @cached_property
    def identity(self) -> str:
        """Fingerprint of everything that must be the same when the run goes on."""
        content = self.recipe.model_dump(mode="json")
        for field_name in ("workers", "keep_bytes", "root"):
            del content["data"][field_name]
        del content["training"]["checkpoint_steps"]
        for one in content["store"] if isinstance(content["store"], list) else []:
            del one["signed_by"]  # where a key lies; what is read is in the digest
        return fingerprint([content, self.objective, self.seed, self.source, self.store_digest, ORDER_VERSION])


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


def fit(run: Run, student: Student, loader: Loader, evaluation: BlockLoader, ask: AskTeacher) -> Result:
    """Train `student`, evaluating after every pass; the same call goes on after the last state that was saved.

    Raises TrainingError when the loss is no longer a number, when `run.out` holds another run, or when another process
    is writing it.
    """
    with run_directory(run.out):
        optimizer = make_optimizer(run.recipe.training, student.network)
        done = load_progress(run.out, run.identity, student.network, optimizer, run.device)
        if done is None:
            _refuse_foreign(run)
            done = Progress(sums=[0.0] * len(run.terms))
        if done.epochs_done == run.recipe.training.epochs and (run.out / "result.json").exists():
            result = _read_result(run)
            say(f"{run.out}: finished already, nothing to do")
            _write_metrics(run, done.history)
            return result
        write_atomically(run.out / "recipe.yaml", dump_recipe(run.recipe))
        _train(run, student, optimizer, loader, evaluation, ask, done)
        return _finish(run, student, loader, done.history)


def _train(
    run: Run,
    student: Student,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    evaluation: BlockLoader,
    ask: AskTeacher,
    done: Progress,
) -> None:
    """The passes that are not done. What they measured is added to the history of `done`."""
    training = run.recipe.training
    passes = range(done.epochs_done, training.epochs, loader.views_per_decode)
    with progress(
        f"{run.objective}, seed {run.seed}", len(passes) * loader.steps_per_pass - done.steps_done, "steps"
    ) as meter:
        for epoch in passes:
            student.network.train()
            weights = [term_weight(term, epoch) for term in run.terms]
            tally = _Tally.after(done, run.device)
            for batch in loader.epoch(epoch, done.steps_done):
                at = epoch + batch.step / loader.steps_per_pass * loader.views_per_decode
                set_learning_rate(optimizer, learning_rate(training, at))
                signal = ask(batch)
                logits, values = train_step(run, student, optimizer, batch, signal, weights)
                tally.add(run, logits, signal, values)
                meter.advance()
                steps = batch.step + 1
                if training.checkpoint_steps and steps % training.checkpoint_steps == 0 < loader.steps_per_pass - steps:
                    now = tally.progress(epoch, steps, done.history)
                    save_progress(run.out, run.identity, student.network, optimizer, now)
            line = _losses(run, tally, loader.steps_per_pass, epoch) | {"lr": optimizer.param_groups[0]["lr"]}
            about = {"seconds": tally.seconds(), "images": tally.images, "left_out": len(loader.bad)}
            about["dtkd_fallbacks"] = int(tally.fallbacks)
            epochs_done = epoch + loader.views_per_decode
            done.history.append({"epoch": epochs_done, **line, **_evaluate(run, student, evaluation), **about})
            done = Progress(epochs_done, sums=[0.0] * len(run.terms), history=done.history)
            save_progress(run.out, run.identity, student.network, optimizer, done)
            _write_metrics(run, done.history)


@dataclass
class _Tally:
    """What is counted over the steps of a pass; the tensors stay on the device, which need not be waited for."""

    sums: Tensor  # [terms] float32
    fallbacks: Tensor  # [] int64
    images: int
    seconds_before: float
    started: float

    @staticmethod
    def after(done: Progress, device: torch.device) -> "_Tally":
        """From where a pass was stopped, or from nothing."""
        sums = torch.tensor(done.sums, dtype=torch.float64).to(device, torch.float32)
        fallbacks = torch.tensor(done.fallbacks, device=device)
        return _Tally(sums, fallbacks, done.images, done.seconds, time.perf_counter())

    def add(self, run: Run, logits: Tensor, signal: TeacherSignal, values: Tensor) -> None:
        self.sums += values
        self.fallbacks += sum(term.fallbacks(logits, signal) for term in run.terms)
        self.images += len(logits)

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def progress(self, epoch: int, steps: int, history: list[dict[str, Any]]) -> Progress:
        spent = self.seconds()
        return Progress(epoch, steps, self.sums.tolist(), int(self.fallbacks), self.images, spent, history)


def _losses(run: Run, tally: _Tally, steps: int, epoch: int) -> dict[str, float]:
    """The mean of every term over a pass; raises TrainingError for one that is no number."""
    means = (tally.sums / steps).tolist()
    losses = dict(zip(_loss_names(run.terms), means, strict=True))
    for name, mean in losses.items():
        if mean != mean or abs(mean) == float("inf"):
            raise TrainingError(
                f"{run.out}: {name} is {mean} in epoch {epoch + 1}: training diverged. The last good state "
                "is in last.ckpt. Use a smaller training.optimizer.lr and another --out folder."
            )
    return losses


def _loss_names(terms: Sequence[AnyTerm]) -> list[str]:
    """`loss_TERM`, numbered from the second use of a term on."""
    names: list[str] = []
    for term in terms:
        uses = sum(name.startswith(f"loss_{term.term}") for name in names)
        names.append(f"loss_{term.term}" + (f"_{uses + 1}" if uses else ""))
    return names


def _evaluate(run: Run, student: Student, evaluation: BlockLoader) -> dict[str, float]:
    """top-1 (percent), nll and ece on the evaluation split; leaves the network in evaluation mode."""

    @torch.inference_mode()
    def predict(images: Tensor) -> Tensor:
        student.network.eval()
        return student.network(normalise(images, run.recipe.data.normalisation))

    measured = evaluate(predict, evaluation, 256, run.device, "evaluation", run.recipe.evaluation_crop)
    return {"top1": measured.top1, "nll": measured.nll, "ece": measured.ece}


# ---- one step ------------------------------------------------------------------------------------------------------


def train_step(
    run: Run,
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: Rows,
    signal: TeacherSignal,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """One update of the student.

    Args:
        weights: of every term of the run, in this epoch.

    Returns:
        Its logits `[B, C]` and the bare value of every term `[terms]`, detached.

    Raises StoreMismatch when decisions were made on another grid than the student's map.
    """
    recipe = run.recipe
    # Of a loader that normalises, the images are the input of the network already.
    inputs = batch.images if batch.images.is_floating_point() else normalise(batch.images, recipe.data.normalisation)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=recipe.training.amp):
        logits = student.network(inputs)
    logits = logits.float()
    mixing = (batch.other_labels, batch.share) if recipe.views.mixes else None
    known = LossBatch(batch.labels, mixing, recipe.training.label_smoothing, kd_layer_scores(student))
    bare = bare_values(run.terms, logits, signal, known)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward((bare * torch.tensor(weights, device=bare.device)).sum())
    optimizer.step()
    return logits.detach(), bare.detach()


# ---- the run directory ---------------------------------------------------------------------------------------------


def _refuse_foreign(run: Run) -> None:
    """Where no checkpoint is, nothing of a run may be: it would be overwritten."""
    for name in ("metrics.jsonl", "student.safetensors", "result.json"):
        if (run.out / name).exists():
            raise TrainingError(
                f"{run.out / name}: belongs to a run whose last.ckpt is not here. Give another --out folder, or delete "
                "this one."
            )
    recipe = run.out / "recipe.yaml"  # of a run that was stopped before its first checkpoint
    if recipe.exists() and recipe.read_bytes() != dump_recipe(run.recipe).encode():
        raise TrainingError(f"{recipe}: is not the recipe of this run. Give another --out folder, or delete the file.")


def _write_metrics(run: Run, history: list[dict[str, Any]]) -> None:
    write_atomically(run.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def _read_result(run: Run) -> Result:
    """What the finished run achieved; raises TrainingError unless it is about this run and the student beside it."""
    file, student = run.out / "result.json", run.out / "student.safetensors"
    again = f"Delete {file} and run the same command again: both are written anew from last.ckpt."
    try:
        result = Result(**json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise TrainingError(f"{file}: is not the result of a run, or torn ({str(error)[:100]}). {again}") from error
    about = (result.recipe, result.objective, result.targets, result.seed, result.store_digest)
    if about != (run.recipe.name, run.objective, run.source, run.seed, run.store_digest):
        raise TrainingError(f"{file}: is the result of another run, {about}. {again}")
    found = file_sha256(student) if student.is_file() else "missing"
    if found != result.student_sha256:
        raise TrainingError(f"{student}: sha256 is {found}, result.json says {result.student_sha256}. {again}")
    return result


def _finish(run: Run, student: Student, loader: Loader, history: list[dict[str, Any]]) -> Result:
    """Write `student.safetensors` and `result.json`."""
    weights = {name: tensor.contiguous().cpu() for name, tensor in student.network.state_dict().items()}
    content = safetensors.torch.save(weights)
    write_atomically(run.out / "student.safetensors", content)
    per_pass = statistics.median(line["seconds"] for line in history)
    result = Result(
        recipe=run.recipe.name,
        objective=run.objective,
        targets=run.source,
        seed=run.seed,
        top1=history[-1]["top1"],
        best_top1=max(line["top1"] for line in history),
        nll=history[-1]["nll"],
        ece=history[-1]["ece"],
        epochs=history[-1]["epoch"],
        steps=len(history) * loader.steps_per_pass,
        parameters=parameter_count(student.network),
        kd_layer_parameters=sum(parameter_count(layer.kd_layer) for layer in student.kd_layers.values()),
        seconds_per_epoch=per_pass / loader.views_per_decode,
        seconds_per_step=per_pass / loader.steps_per_pass,
        images_per_second=history[-1]["images"] / per_pass,
        dtkd_fallbacks=sum(line["dtkd_fallbacks"] for line in history),
        store_digest=run.store_digest,
        student_sha256=hashlib.sha256(content).hexdigest(),
    )
    write_atomically(run.out / "result.json", json.dumps(asdict(result), indent=2) + "\n")
    return result

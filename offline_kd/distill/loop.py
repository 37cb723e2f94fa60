"""The training loop: batches and a teacher signal in, an evaluated student out, whatever the signal comes from."""

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from offline_kd.data.blocks import BlockLoader
from offline_kd.distill.checkpoint import Progress, load_progress, save_progress
from offline_kd.distill.loader import Loader
from offline_kd.distill.loss import own_parts, term_weights
from offline_kd.distill.optimisation import learning_rate, make_optimizer, set_learning_rate
from offline_kd.distill.run_directory import run_directory
from offline_kd.distill.sampler import ORDER_VERSION
from offline_kd.distill.student import Student, among_ranks, kd_layer_scores
from offline_kd.distill.teacher_signal import AskTeacher, TeacherSignal
from offline_kd.models.evaluation import evaluate
from offline_kd.models.networks import normalise, parameter_count
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import AnyTerm, Recipe, dump_recipe
from offline_kd.store.rows import Rows
from offline_kd.support.console import progress, say
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import TrainingError
from offline_kd.support.places import WritablePlace
from offline_kd.support.ranks import copy_from_first, from_first, of_all, rank, total, world
from offline_kd.support.strict import fingerprint

DROPOUT_STREAM = 0x64726F70  # first counter of the draws made here, so that they are independent of all others
MAX_STUDENT_BYTES = 2**40


@dataclass(frozen=True)
class Run:
    """What a run is: two runs of one description train one student, bit by bit on one machine."""

    recipe: Recipe
    objective: str
    terms: Sequence[AnyTerm]
    seed: int
    out: WritablePlace
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
        content["training"].pop("resident", None)
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

    Several ranks train one student together, and the first one alone reads and writes `run.out`. They may be others,
    or another number of them, when a run goes on.

    Raises TrainingError when the loss is no longer a number, when `run.out` holds another run, when another process
    is writing it, or when the ranks were not given the same run.
    """
    with run_directory(run.out):
        _refuse_different_ranks(run)
        optimizer = make_optimizer(run.recipe.training, student.network)
        done = load_progress(run.out, run.identity, student.network, optimizer, run.device)
        result = from_first(lambda: _before(run, done))
        if result is not None:
            return result
        done = done or Progress(sums=[0.0] * len(run.terms))
        student = among_ranks(student, run.recipe.training, run.device)
        _train(run, student, optimizer, loader, evaluation, ask, done)
        return from_first(lambda: _finish(run, student, loader, done.history))


def _before(run: Run, done: Progress | None) -> Result | None:
    """Make the run directory ready; the result, where the run is finished already."""
    if done is None:
        _refuse_foreign(run)
    elif done.epochs_done == run.recipe.training.epochs and run.out.size("result.json") is not None:
        result = _read_result(run)
        say(f"{run.out}: finished already, nothing to do")
        _write_metrics(run, done.history)
        return result
    run.out.put("recipe.yaml", dump_recipe(run.recipe).encode())
    return None


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
            weights = term_weights(run.terms, epoch, run.device)
            tally = _Tally.after(done, run.device)
            for batch in loader.epoch(epoch, done.steps_done):
                if not _of_all_ranks(len(batch)):
                    continue  # nothing but bad images, on any rank
                _draw_by_step(run, epoch, batch.step)
                at = epoch + batch.step / loader.steps_per_pass * loader.views_per_decode
                set_learning_rate(optimizer, learning_rate(training, at))
                signal = ask(batch)
                logits, parts = train_step(run, student, optimizer, batch, signal, weights)
                tally.add(run, logits, signal, parts)
                meter.advance()
                steps = batch.step + 1
                if training.checkpoint_steps and steps % training.checkpoint_steps == 0 < loader.steps_per_pass - steps:
                    now = tally.progress(epoch, steps, done.history)
                    _save(run, student, optimizer, now)
            whole = tally.progress(epoch, loader.steps_per_pass, done.history)
            line = _losses(run, whole.sums, loader.steps_per_pass, epoch) | {"lr": optimizer.param_groups[0]["lr"]}
            about = {
                "seconds": whole.seconds,
                "images": whole.images,
                "left_out": len(set().union(*of_all(loader.bad))),
            }
            about["dtkd_fallbacks"] = whole.fallbacks
            epochs_done = epoch + loader.views_per_decode
            done.history.append({"epoch": epochs_done, **line, **_evaluate(run, student, evaluation), **about})
            done = Progress(epochs_done, sums=[0.0] * len(run.terms), history=done.history)
            _save(run, student, optimizer, done)
            if rank() == 0:
                _write_metrics(run, done.history)


def _of_all_ranks(count: int) -> int:
    """The sum of a number of the host: ranks meet for it on the CPU, and one process alone not at all."""
    return int(total(torch.tensor(count))) if world() > 1 else count


def _draw_by_step(run: Run, epoch: int, step: int) -> None:
    """What dropout draws on several ranks: another number on each, and the same one whenever a run goes on."""
    if world() > 1:
        torch.manual_seed(int(counter_hash(DROPOUT_STREAM, run.seed, epoch, step, rank())[0]))


def _save(run: Run, student: Student, optimizer: torch.optim.Optimizer, done: Progress) -> None:
    if rank() == 0:
        save_progress(run.out, run.identity, student.network, optimizer, done)


@dataclass
class _Tally:
    """What is counted over the steps of a pass; the tensors stay on the device, and are read when `progress` is asked.

    Each rank counts its own part; what was counted before a run went on is with the first one.
    """

    sums: Tensor  # [terms] float32
    fallbacks: Tensor  # [] int64
    images: int
    seconds_before: float
    started: float

    @staticmethod
    def after(done: Progress, device: torch.device) -> "_Tally":
        """From where a pass was stopped, or from nothing."""
        if rank() > 0:
            done = Progress(sums=[0.0] * len(done.sums))
        sums = torch.tensor(done.sums, dtype=torch.float64).to(device, torch.float32)
        fallbacks = torch.tensor(done.fallbacks, device=device)
        return _Tally(sums, fallbacks, done.images, done.seconds, time.perf_counter())

    def add(self, run: Run, logits: Tensor, signal: TeacherSignal, parts: Tensor) -> None:
        self.sums += parts
        self.fallbacks += sum(term.fallbacks(logits, signal) for term in run.terms)
        self.images += len(logits)

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def progress(self, epoch: int, steps: int, history: list[dict[str, Any]]) -> Progress:
        """Of all ranks together, which all ask."""
        sums, fallbacks = total(self.sums).tolist(), int(total(self.fallbacks))
        return Progress(epoch, steps, sums, fallbacks, _of_all_ranks(self.images), self.seconds(), history)


def _losses(run: Run, sums: list[float], steps: int, epoch: int) -> dict[str, float]:
    """The mean of every term over a pass; raises TrainingError for one that is no number."""
    losses = dict(zip(_loss_names(run.terms), (value / steps for value in sums), strict=True))
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
    """top-1 (percent), nll and ece on the evaluation split; leaves the network in evaluation mode.

    Ranks share the images, and evaluate what the first one saves: each has had running statistics of its own.
    """
    copy_from_first(student.network.buffers())

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
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """One update of the student.

    Args:
        weights: `[terms]` float32 on the device, as `term_weights` gives them: of every term of the run, in this epoch.

    Returns:
        Its logits `[B, C]` and this rank's part of the bare value of every term `[terms]`, detached. A rank may have no
        rows: it takes part with an empty batch.

    Raises StoreMismatch when decisions were made on another grid than the student's map.
    """
    recipe = run.recipe
    # Of a loader that normalises, the images are the input of the network already.
    inputs = batch.images if batch.images.is_floating_point() else normalise(batch.images, recipe.data.normalisation)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=recipe.training.amp):
        logits = (student.shared or student.network)(inputs)
    logits = logits.float()
    mixing = (batch.other_labels, batch.share) if recipe.views.mixes else None
    known = LossBatch(batch.labels, mixing, recipe.training.label_smoothing, kd_layer_scores(student))
    parts = own_parts(run.terms, logits, signal, known)
    optimizer.zero_grad(set_to_none=True)
    # What is shared divides the sum of the ranks' gradients by their number.
    loss = world() * (parts * weights).sum()
    # Through the logits too, whatever the terms use: every weight waits for the gradient of every rank.
    torch.autograd.backward([loss, logits], [None, torch.zeros_like(logits)])
    optimizer.step()
    return logits.detach(), parts.detach()


# ---- the run directory ---------------------------------------------------------------------------------------------


def _refuse_different_ranks(run: Run) -> None:
    """All ranks train one student: from one recipe, with one objective and seed, from one store."""
    identities = of_all(fingerprint([run.identity, run.recipe.training.checkpoint_steps]))
    if len(set(identities)) > 1:
        other = next(one for one, identity in enumerate(identities) if identity != identities[0])
        raise TrainingError(
            f"rank {other} was given another run than rank 0. Start all ranks with the same command, recipe, store and "
            "manifest."
        )


def _refuse_foreign(run: Run) -> None:
    """Where no checkpoint is, nothing of a run may be: it would be overwritten."""
    for name in ("metrics.jsonl", "student.safetensors", "result.json"):
        if run.out.size(name) is not None:
            raise TrainingError(
                f"{run.out}/{name}: belongs to a run whose last.ckpt is not here. Give another --out folder, or delete "
                "this one."
            )
    ours = dump_recipe(run.recipe).encode()
    # Of a run that was stopped before its first checkpoint.
    if run.out.size("recipe.yaml") is not None and run.out.read("recipe.yaml") != ours:
        raise TrainingError(
            f"{run.out}/recipe.yaml: is not the recipe of this run. Give another --out folder, or delete the file."
        )


def _write_metrics(run: Run, history: list[dict[str, Any]]) -> None:
    run.out.put("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode())


def _read_result(run: Run) -> Result:
    """What the finished run achieved; raises TrainingError unless it is about this run and the student beside it."""
    file, student = f"{run.out}/result.json", f"{run.out}/student.safetensors"
    again = f"Delete {file} and run the same command again: both are written anew from last.ckpt."
    try:
        result = Result(**json.loads(run.out.read("result.json")))
    except (ValueError, TypeError, RecursionError) as error:
        raise TrainingError(f"{file}: is not the result of a run, or torn ({str(error)[:100]}). {again}") from error
    about = (result.recipe, result.objective, result.targets, result.seed, result.store_digest)
    if about != (run.recipe.name, run.objective, run.source, run.seed, run.store_digest):
        raise TrainingError(f"{file}: is the result of another run, {about}. {again}")
    try:
        found = hashlib.sha256(run.out.read("student.safetensors", MAX_STUDENT_BYTES)).hexdigest()
    except FileNotFoundError:
        found = "missing"
    if found != result.student_sha256:
        raise TrainingError(f"{student}: sha256 is {found}, result.json says {result.student_sha256}. {again}")
    return result


def _finish(run: Run, student: Student, loader: Loader, history: list[dict[str, Any]]) -> Result:
    """Write `student.safetensors` and `result.json`."""
    weights = {name: tensor.contiguous().cpu() for name, tensor in student.network.state_dict().items()}
    content = safetensors.torch.save(weights)
    run.out.put("student.safetensors", content)
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
    run.out.put("result.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
    return result

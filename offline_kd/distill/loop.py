"""The training loop: batches and a teacher signal in, an evaluated student out, whatever the signal comes from."""

import contextlib
import itertools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from offline_kd.distill.checkpoint import Progress, load_progress, save_progress
from offline_kd.distill.heads import end_pass, row_numbers
from offline_kd.distill.judging import Judged, evaluate_student
from offline_kd.distill.loader import Loader
from offline_kd.distill.loss import counts_of, loss_batch, own_parts, term_weights
from offline_kd.distill.optimisation import learning_rate, make_optimizer, set_learning_rate
from offline_kd.distill.results import Result, Run, begin, finish, keep_weights, write_metrics
from offline_kd.distill.run_directory import run_directory
from offline_kd.distill.student import (
    Student,
    among_ranks,
    compiled,
    compiling,
    kd_layer_scores,
    training_mode,
    warn_of_slow_statistics,
    with_states,
)
from offline_kd.distill.teacher_signal import AskTeacher, TeacherSignal, said_of
from offline_kd.distill.tracking import epoch_line, tracking
from offline_kd.models.networks import normalise, refuse_no_logits
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import AnyTerm
from offline_kd.store.rows import Rows
from offline_kd.support.console import progress, say
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import TrainingError
from offline_kd.support.ranks import from_first, of_all, rank, total, world
from offline_kd.support.strict import fingerprint
from offline_kd.training_recipe import Training

DROPOUT_STREAM = 0x64726F70  # first counter of the draws made here, so that they are independent of all others


def fit(run: Run, student: Student, loader: Loader, judged: Judged, ask: AskTeacher) -> Result:
    """Train `student`, evaluating as `training` says; the same call goes on after the last state that was saved.

    Several ranks train one student together, and the first one alone reads and writes `run.out`. They may be others,
    or another number of them, when a run goes on.

    Raises TrainingError when the loss is no longer a number, when `run.out` holds another run, when another process
    is writing it, or when the ranks were not given the same run.
    """
    with run_directory(run.out):
        _refuse_different_ranks(run)
        training = run.recipe.training
        student = with_states(student, training, run.device)
        optimizer = make_optimizer(training, student.network, list(student.heads.values()))
        done = load_progress(run.out, run.identity, student.network, optimizer, run.device, student.beside)
        result = from_first(lambda: begin(run, done))
        if result is not None:
            return result
        done = done or Progress(sums=[0.0] * len(run.terms))
        if not (done.steps_done or done.epochs_done or run.initial_sha256 or rank()):
            warn_of_slow_statistics(student.network, training.epochs // loader.views_per_decode * loader.steps_per_pass)
        if not done.steps_done:
            keep_weights(run, student, judged.evaluation, done.history)
        with compiling(training):
            trained = among_ranks(compiled(student, training), training, run.device)
            _train(run, trained, optimizer, loader, judged, ask, done)
        return from_first(lambda: finish(run, trained, loader, judged.evaluation, done.history))


def _refuse_different_ranks(run: Run) -> None:
    """All ranks train one student: from one recipe, with one objective and seed, from one store."""
    training = run.recipe.training
    identities = of_all(fingerprint([run.identity, training.checkpoint_steps, training.evaluate_every]))
    if len(set(identities)) > 1:
        other = next(one for one, identity in enumerate(identities) if identity != identities[0])
        raise TrainingError(
            f"rank {other} was given another run than rank 0. Start all ranks with the same command, recipe, store and "
            "manifest."
        )


def _train(
    run: Run,
    student: Student,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    judged: Judged,
    ask: AskTeacher,
    done: Progress,
) -> None:
    """The passes that are not done. What they measured is added to the history of `done`."""
    training = run.recipe.training
    passes = range(done.epochs_done, training.epochs, loader.views_per_decode)
    steps_left, started = len(passes) * loader.steps_per_pass - done.steps_done, time.perf_counter()
    with (
        tracking(run, done.history) as track,
        progress(f"{run.objective}, seed {run.seed}", steps_left, "steps") as meter,
    ):
        for number, epoch in enumerate(passes, 1):
            training_mode(student.network, training)
            weights = term_weights(run.terms, epoch, training.epochs, run.device)
            tally = _Tally.after(done, run.device)
            for batch in loader.epoch(epoch, done.steps_done):
                if not _of_all_ranks(len(batch)):
                    continue  # nothing but bad images, on any rank
                _draw_by_step(run, epoch, batch.step)
                at = epoch + batch.step / loader.steps_per_pass * loader.views_per_decode
                set_learning_rate(optimizer, learning_rate(training, at))
                signal = ask(batch)
                logits, parts = train_step(run, student, optimizer, batch, signal, weights)
                tally.add(run, logits, signal, parts, batch)
                meter.advance()
                steps = batch.step + 1
                if training.checkpoint_steps and steps % training.checkpoint_steps == 0 < loader.steps_per_pass - steps:
                    now = tally.progress(epoch, steps, done.history)
                    _save(run, student, optimizer, now)
            whole = tally.progress(epoch, loader.steps_per_pass, done.history)
            losses = _losses(run, whole.sums, loader.steps_per_pass, epoch)
            epochs_done, lr = epoch + loader.views_per_decode, optimizer.param_groups[0]["lr"]
            found = evaluate_student(run, student, judged, epoch, epochs_done)
            counted = _counted(whole, len(set().union(*of_all(loader.bad)))) | end_pass(student.heads.values())
            factors = _scheduled(run, weights)
            done.history.append({"epoch": epochs_done, **losses, **factors, "lr": lr, **found, **counted})
            done = Progress(epochs_done, sums=[0.0] * len(run.terms), history=done.history)
            _save(run, student, optimizer, done)
            keep_weights(run, student, judged.evaluation, done.history)
            if rank() == 0:
                write_metrics(run, done.history)
            seconds_left = (time.perf_counter() - started) * (len(passes) - number) / number
            say(epoch_line(run, done.history[-1], seconds_left))
            track(done.history[-1])


def _of_all_ranks(count: int) -> int:
    """The sum of a number of the host: ranks meet for it on the CPU, and one process alone not at all."""
    return int(total(torch.tensor(count))) if world() > 1 else count


def _draw_by_step(run: Run, epoch: int, step: int) -> None:
    """What dropout draws on several ranks: another number on each, and the same one whenever a run goes on."""
    if world() > 1:
        torch.manual_seed(int(counter_hash(DROPOUT_STREAM, run.seed, epoch, step, rank())[0]))


def _save(run: Run, student: Student, optimizer: torch.optim.Optimizer, done: Progress) -> None:
    if rank() == 0:
        save_progress(run.out, run.identity, student.network, optimizer, done, student.beside)


@dataclass
class _Tally:
    """What is counted over the steps of a pass; the tensors stay on the device, and are read when `progress` is asked.

    Each rank counts its own part; what was counted before a run went on is with the first one.
    """

    sums: Tensor  # [terms] float32
    fallbacks: Tensor  # [] int64
    teacher: Tensor  # [4] float64, as `said_of` gives them
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
        teacher = torch.tensor(done.teacher, dtype=torch.float64, device=device)
        return _Tally(sums, fallbacks, teacher, done.images, done.seconds, time.perf_counter())

    def add(self, run: Run, logits: Tensor, signal: TeacherSignal, parts: Tensor, batch: Rows) -> None:
        self.sums += parts
        if signal.logits is not None and run.recipe.teacher.kind == "classifier":
            self.teacher += said_of(signal.logits, batch)
        self.fallbacks += sum(term.fallbacks(logits, signal) for term in run.terms)
        self.images += len(logits)

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def progress(self, epoch: int, steps: int, history: list[dict[str, Any]]) -> Progress:
        """Of all ranks together, which all ask."""
        sums, fallbacks, teacher = total(self.sums).tolist(), int(total(self.fallbacks)), total(self.teacher).tolist()
        images = _of_all_ranks(self.images)
        return Progress(epoch, steps, sums, fallbacks, images, self.seconds(), history, teacher)


def _counted(whole: Progress, left_out: int) -> dict[str, float]:
    """What a pass has counted and timed, and what the teacher said of its rows."""
    counted: dict[str, float] = {
        "seconds": whole.seconds,
        "images": whole.images,
        "images_per_second": whole.images / whole.seconds,
        "left_out": left_out,
        "dtkd_fallbacks": whole.fallbacks,
    }
    rows, entropy, labelled, right = whole.teacher
    if rows:
        counted["teacher_entropy"] = entropy / rows
    if labelled:
        counted["teacher_top1"] = 100 * right / labelled
    return counted


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


def _scheduled(run: Run, weights: Tensor) -> dict[str, float]:
    """`weight_TERM`, numbered as losses are: the weights in this pass of the terms that have a schedule."""
    if not any(term.schedule for term in run.terms):
        return {}
    named = zip(run.terms, _loss_names(run.terms), weights.tolist(), strict=True)
    return {name.replace("loss_", "weight_", 1): weight for term, name, weight in named if term.schedule}


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

    With `training.accumulate` the parts of the batch pass one after the other, and their gradients add up to that of
    the whole batch; DIST and terms on features compare, and BatchNorm normalises by, the rows of a part.

    Args:
        weights: `[terms]` float32 on the device, as `term_weights` gives them: of every term of the run, in this epoch.

    Returns:
        Its logits `[B, C]` and this rank's part of the bare value of every term `[terms]`, detached. A rank may have no
        rows: it takes part with an empty batch.

    Raises StoreMismatch when decisions were made on another grid than the student's map.
    """
    optimizer.zero_grad(set_to_none=True)
    for head in student.heads.values():
        head.begin_step()
    pieces = _pieces(len(batch), run.recipe.training.accumulate)
    if len(pieces) == 1:
        logits, values = _add_gradients(run, student, batch, signal, weights)
    else:
        whole = loss_batch(batch, 1, mixes=False)  # which labels are known is all that is counted
        counts = [counts_of(run.terms, LossBatch(whole.labels[piece])) for piece in pieces]
        items = total(torch.stack(counts).sum(dim=0))
        found = []
        for piece in pieces:
            with _own_gradients(student, piece is not pieces[-1]):
                rows, said = batch.take(piece), signal.take(piece)
                logits, values = _add_gradients(run, student, rows, said, weights, items)
                found.append((logits.clone(), values))  # a CUDA graph writes the next ones to the same place
        logits = torch.cat([logits for logits, _ in found])
        values = torch.stack([values for _, values in found]).sum(dim=0)
    _update(student, optimizer, run.recipe.training)
    return logits, values


def _pieces(rows: int, wanted: int) -> list[slice]:
    """A batch in parts of nearly the same number of rows: so many on every rank, of which one has two rows in each."""
    if wanted == 1:
        return [slice(0, rows)]
    number = min(wanted, max(1, max(of_all(rows)) // 2))
    edges = [rows * part // number for part in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _own_gradients(student: Student, alone: bool) -> AbstractContextManager[object]:
    """Where `alone`, the gradients of ranks are not shared: those of the last part are, with what was added before."""
    if alone and isinstance(student.trained, DistributedDataParallel):
        return student.trained.no_sync()
    return contextlib.nullcontext()


def _add_gradients(
    run: Run,
    student: Student,
    batch: Rows,
    signal: TeacherSignal,
    weights: Tensor,
    items: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of some rows, which are all of a batch unless `items` `[terms]` says how many there are."""
    recipe, amp = run.recipe, run.recipe.training.amp
    # Of a loader that normalises, the images are the input of the network already.
    inputs = batch.images if batch.images.is_floating_point() else normalise(batch.images, recipe.data.normalisation)
    precision = torch.float16 if amp == "float16" else torch.bfloat16
    with torch.autocast(inputs.device.type, precision, enabled=bool(amp)):
        logits = (student.network if student.trained is None else student.trained)(inputs)
    refuse_no_logits(logits, student.model, len(inputs), student.num_classes)
    logits = logits.float()
    known = replace(
        loss_batch(batch, logits.shape[1], recipe.views.mixes),
        label_smoothing=recipe.training.label_smoothing,
        scores=kd_layer_scores(student),
        features=student.features,
        rows=row_numbers(student, batch),
    )
    parts = own_parts(run.terms, logits, signal, known, items, student.heads)
    # What is shared divides the sum of the ranks' gradients by their number.
    loss = world() * (parts * weights).sum()
    if student.scaler is not None:
        loss = student.scaler.scale(loss)
    # Through the logits too, whatever the terms use: every weight waits for the gradient of every rank.
    torch.autograd.backward([loss, logits], [None, torch.zeros_like(logits)])
    return logits.detach(), parts.detach()


def _update(student: Student, optimizer: torch.optim.Optimizer, training: Training) -> None:
    """From gradients to weights. Nothing here waits for the device but the scaler, which asks once whether all
    gradients are finite, and leaves the step out if not."""
    scaler = student.scaler
    if training.clip_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm, error_if_nonfinite=False)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if student.average is not None:
        student.average.update()

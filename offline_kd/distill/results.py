"""What a run is, what it achieved, and the files of its directory that say so or hold its weights."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.expected import Kind
from offline_kd.distill.checkpoint import Progress
from offline_kd.distill.loader import Loader
from offline_kd.distill.sampler import ORDER_VERSION
from offline_kd.distill.student import Student, has_no_classes
from offline_kd.models.evaluation_file import FILE_OF_TEACHER
from offline_kd.models.networks import parameter_count
from offline_kd.models.student_file import StudentFile, describe_kd_layers, student_bytes
from offline_kd.network_recipe import StudentNetwork
from offline_kd.objectives.features import FeatureTerm, Projection
from offline_kd.recipe import AnyTerm, Recipe, dump_recipe
from offline_kd.store.evaluation_beside import read_evaluation
from offline_kd.store.reader import Store
from offline_kd.support.console import say
from offline_kd.support.errors import TrainingError
from offline_kd.support.places import WritablePlace
from offline_kd.support.ranks import rank
from offline_kd.support.strict import fingerprint
from offline_kd.support.version import __version__
from offline_kd.training_recipe import Every

MAX_STUDENT_BYTES = 2**40
# Of the figures in `metrics.jsonl`, what a result keeps of the last pass, and of the best one.
AT_THE_END = (
    *("top1", "nll", "ece", "top1_ema", "val_top1"),
    *("map", "bce", "map_ema", "val_map"),
    *("knn_top1", "knn_top1_ema", "val_knn_top1", "probe_top1", "probe_top1_ema", "probe_learned_from"),
)
AT_BEST = ("top1", "val_top1", "map", "val_map", "knn_top1")
# What the best pass is chosen by: the first that was measured.
JUDGED_BY = ("val_top1", "top1", "val_map", "map", "val_knn_top1", "knn_top1")


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
    initial_sha256: str = ""  # of the weights that the student begins from
    trained: StudentNetwork | None = None  # where it is not the recipe's student that is trained
    log: str | None = None  # which tracker is told, beside `metrics.jsonl`
    rows_sha256: str = ""  # of the rows that are trained on, where they are not all of the split
    store: Store | None = None  # that is learned from, where it is one

    @property
    def gives_vectors(self) -> bool:
        """Whether what is trained has no classes, so that no logits come out."""
        return self.trained is None and has_no_classes(self.recipe, self.terms)

    @property
    def kind(self) -> Kind:
        """Of what is trained: its teacher's, but that terms on labels make a classifier beside one without classes."""
        of_teacher = self.recipe.teacher.kind
        return "classifier" if of_teacher == "embedding" and not self.gives_vectors else of_teacher

    @property
    def student(self) -> StudentNetwork:
        """The network that is trained."""
        return self.trained or self.recipe.student

    @cached_property
    def identity(self) -> str:
        """Fingerprint of everything that must be the same when the run goes on."""
        content = self.recipe.model_dump(mode="json")
        for field_name in ("workers", "keep_bytes", "root"):
            del content["data"][field_name]
        del content["training"]["checkpoint_steps"]
        content["training"].pop("resident", None)
        content["training"].pop("evaluate_every", None)
        weights = content["student"].pop("weights", None)
        if isinstance(weights, dict):  # not where they lie, but what of them was taken
            content["student"]["weights"] = {name: weights[name] for name in ("key", "prefix")}
        content.pop("published", None)
        content["data"].pop("subset", None)  # which file names them, or by what; the rows are in their digest
        for one in content["store"] if isinstance(content["store"], list) else []:
            del one["signed_by"]  # where a key lies; what is read is in the digest
        about = [content, self.objective, self.seed, self.source, self.store_digest, ORDER_VERSION]
        about += [self.initial_sha256] * bool(self.initial_sha256)
        return fingerprint(about + [f"rows {self.rows_sha256}"] * bool(self.rows_sha256))

    @cached_property
    def recipe_sha256(self) -> str:
        """Fingerprint of what of the recipe makes the student: the same for all seeds, wherever files lie."""
        recipe = self.recipe
        content = recipe.model_dump(mode="json", include={"data", "views", "training"})
        content["student"] = {"model": self.student.model, "model_args": self.student.model_args}
        for field_name in ("workers", "keep_bytes", "root"):
            del content["data"][field_name]
        for field_name in ("checkpoint_steps", "resident", "keep", "evaluate_every"):
            content["training"].pop(field_name, None)
        if self.rows_sha256:
            content["data"]["subset"] = self.rows_sha256
        if self.source == "online":
            content["teacher"] = recipe.teacher.model_dump(mode="json", exclude={"weights"})
        elif isinstance(recipe.store, list):
            content["mix"] = [recipe.mix, *(one.weight for one in recipe.store)]
        terms = [term.model_dump(mode="json") for term in self.terms]
        return fingerprint([content, terms, self.source, self.initial_sha256])


@dataclass(frozen=True, kw_only=True)
class Result:
    """`result.json`: what a finished run achieved."""

    recipe: str
    objective: str
    targets: str  # "store", "online" or "none"
    kind: str | None = None  # "embedding" of a student without classes
    seed: int
    top1: float | None = None  # percent, after the last epoch; this and the next three are of classifiers
    best_top1: float | None = None  # of the epochs after which the evaluation split was evaluated
    nll: float | None = None
    ece: float | None = None
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
    # Of students without classes, on an evaluation split with labels; `neighbours.py` and `probe.py` say how:
    knn_top1: float | None = None  # percent
    best_knn_top1: float | None = None
    probe_top1: float | None = None  # percent, of a linear classifier on the frozen student's vectors
    probe_learned_from: str | None = None
    knn_top1_ema: float | None = None
    probe_top1_ema: float | None = None
    val_knn_top1: float | None = None
    projections: list[str] | None = None  # features of the teacher, for which the student's files have a projection
    # Of options, left out where they are not used:
    initial_sha256: str | None = None  # of the weights that the student began from
    top1_ema: float | None = None  # of the average of the weights
    student_ema_sha256: str | None = None
    best_epoch: int | None = None  # whose weights best.safetensors holds: the first with the best top-1
    best_epoch_ema: int | None = None
    rows: int | None = None  # that an epoch shows, where they are not all of the training split
    rows_sha256: str | None = None
    val_top1: float | None = None  # percent of the validation rows, after the last epoch
    best_val_top1: float | None = None
    # Where labels are sets:
    map: float | None = None  # mean average precision in percent, as of top1
    best_map: float | None = None
    bce: float | None = None  # nats per sample and class
    map_ema: float | None = None
    val_map: float | None = None
    best_val_map: float | None = None

    @property
    def accuracy(self) -> str:
        """What was reached, in words."""
        figures = {
            "validation top-1": self.val_top1,
            "top-1": self.top1,
            "validation mAP": self.val_map,
            "mAP": self.map,
            "validation k-NN top-1": self.val_knn_top1,
            "k-NN top-1": self.knn_top1,
            "linear probe": self.probe_top1,
        }
        return (
            ", ".join(f"{name} {value:.2f} %" for name, value in figures.items() if value is not None) or "not judged"
        )


# ---- beginning and end ---------------------------------------------------------------------------------------------


def begin(run: Run, done: Progress | None) -> Result | None:
    """Make the run directory ready; the result, where the run is finished already."""
    if done is None:
        _refuse_foreign(run)
    elif done.epochs_done == run.recipe.training.epochs and run.out.size("result.json") is not None:
        result = _read_result(run)
        say(f"{run.out}: finished already, nothing to do")
        write_metrics(run, done.history)
        return result
    run.out.put("recipe.yaml", dump_recipe(run.recipe).encode())
    return None


def _refuse_foreign(run: Run) -> None:
    """Where no checkpoint is, nothing of a run may be: it would be overwritten."""
    for name in ("metrics.jsonl", *_weight_files(run), "result.json"):
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


def write_metrics(run: Run, history: list[dict[str, Any]]) -> None:
    run.out.put("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode())


def _read_result(run: Run) -> Result:
    """What the finished run achieved; raises TrainingError unless it is about this run and the student beside it."""
    file = f"{run.out}/result.json"
    again = f"Delete {file} and run the same command again: both are written anew from last.ckpt."
    try:
        result = Result(**json.loads(run.out.read("result.json")))
    except (ValueError, TypeError, RecursionError) as error:
        raise TrainingError(f"{file}: is not the result of a run, or torn ({str(error)[:100]}). {again}") from error
    about = (result.recipe, result.objective, result.targets, result.seed, result.store_digest)
    if about != (run.recipe.name, run.objective, run.source, run.seed, run.store_digest):
        raise TrainingError(f"{file}: is the result of another run, {about}. {again}")
    students = {"student.safetensors": result.student_sha256, "student_ema.safetensors": result.student_ema_sha256}
    for student, sha256 in students.items():
        try:
            found = hashlib.sha256(run.out.read(student, MAX_STUDENT_BYTES)).hexdigest() if sha256 else None
        except FileNotFoundError:
            found = "missing"
        if found != sha256:
            raise TrainingError(f"{run.out}/{student}: sha256 is {found}, result.json says {sha256}. {again}")
    return result


def finish(
    run: Run, student: Student, loader: Loader, evaluation: BlockLoader, history: list[dict[str, Any]]
) -> Result:
    """Write `student.safetensors` and `result.json`."""
    sha256 = {end: put_weights(run, student, "student", end, evaluation) for end in student.networks}
    best = {end: _best_epoch(history, end) for end in student.networks if "best" in run.recipe.training.keep}
    per_pass = statistics.median(line["seconds"] for line in history)
    reached: dict[str, Any] = {name: history[-1].get(name) for name in AT_THE_END}
    reached |= {f"best_{name}": _best(history, name) for name in AT_BEST}
    result = Result(
        recipe=run.recipe.name,
        objective=run.objective,
        targets=run.source,
        kind="embedding" if run.gives_vectors else None,
        seed=run.seed,
        epochs=history[-1]["epoch"],
        steps=len(history) * loader.steps_per_pass,
        parameters=parameter_count(student.network),
        kd_layer_parameters=sum(parameter_count(layer.kd_layer) for layer in student.kd_layers.values()),
        seconds_per_epoch=per_pass / loader.views_per_decode,
        seconds_per_step=per_pass / loader.steps_per_pass,
        images_per_second=history[-1]["images"] / per_pass,
        dtkd_fallbacks=sum(line["dtkd_fallbacks"] for line in history),
        store_digest=run.store_digest,
        student_sha256=sha256[""],
        initial_sha256=run.initial_sha256 or None,
        student_ema_sha256=sha256.get("_ema"),
        best_epoch=best.get(""),
        best_epoch_ema=best.get("_ema"),
        rows=loader.source.images.split.count if run.rows_sha256 else None,
        rows_sha256=run.rows_sha256 or None,
        projections=sorted(projections_of(run, student)) or None,
        **reached,
    )
    used = {name: value for name, value in asdict(result).items() if value is not None}
    run.out.put("result.json", (json.dumps(used, indent=2) + "\n").encode())
    return result


def _best(history: list[dict[str, Any]], name: str) -> float | None:
    return max((line[name] for line in history if name in line), default=None)


def keep_teacher_evaluation(run: Run) -> None:
    """Write what the teacher answered, if that is known, into the run directory, where a report finds it."""
    if run.store is not None and run.out.size(FILE_OF_TEACHER) is None:
        content = read_evaluation(run.store)
        if content is not None:
            run.out.put(FILE_OF_TEACHER, content)


# ---- weights -------------------------------------------------------------------------------------------------------


def keep_weights(run: Run, student: Student, evaluation: BlockLoader, history: list[dict[str, Any]]) -> None:
    """Write what `training.keep` names of the pass that ended last, the one that the checkpoint is of.

    Done again when a run goes on, in case it was killed between the two.
    """
    if rank() > 0 or not history:
        return
    epoch = history[-1]["epoch"]
    for end in student.networks:
        for kept in run.recipe.training.keep:
            if isinstance(kept, Every) and epoch % kept.every == 0:
                put_weights(run, student, f"epoch-{epoch:03d}", end, evaluation)
            elif kept == "best" and epoch == _best_epoch(history, end):
                put_weights(run, student, "best", end, evaluation)


def _best_epoch(history: list[dict[str, Any]], end: str) -> int:
    """The first of those with the best top-1, mean average precision or k-NN top-1, on the validation rows or, without
    such, on the evaluation split.

    0: none was evaluated yet.
    """
    judged = next((name for name in JUDGED_BY if any(name in line for line in history)), "top1") + end
    evaluated = [line for line in history if judged in line]
    return max(evaluated, key=lambda line: line[judged])["epoch"] if evaluated else 0


def put_weights(run: Run, student: Student, name: str, end: str, evaluation: BlockLoader) -> str:
    """Write `NAME.safetensors` of one of the student's networks, `NAME_ema.safetensors` of the average of its weights,
    which says of itself what it is; returns its sha256."""
    network = student.networks[end]
    content = student_bytes(network, _described(run, network, evaluation), projections_of(run, student))
    run.out.put(f"{name}{end}.safetensors", content)
    return hashlib.sha256(content).hexdigest()


def _described(run: Run, network: nn.Module, evaluation: BlockLoader) -> StudentFile:
    """The same whoever trains, and wherever files lie: no time, no path."""
    data, crop = run.recipe.data, run.recipe.evaluation_crop
    height, width = (crop.size, crop.size) if crop else evaluation[0].images.shape[2:]
    return StudentFile(
        model=run.student.model,
        model_args=run.student.model_args,
        kd_layers=describe_kd_layers(network),
        kind=run.kind,
        classes=[] if run.gives_vectors else evaluation.dataset.classes,
        normalisation=data.normalisation,
        input_size=(height, width),
        crop=crop,
        dataset=data.dataset,
        evaluation=data.evaluation,
        recipe=run.recipe.name,
        recipe_sha256=run.recipe_sha256,
        objective=run.objective,
        seed=run.seed,
        stores=run.store_digest.split("+") if run.store_digest else [],
        version=__version__,
    )


def projections_of(run: Run, student: Student) -> dict[str, Projection]:
    """From vectors that a student without classes gives to features of the teacher, by the name of these.

    A term on another module of the student has a projection of that module's vectors, which is none of these.
    """
    found: dict[str, Projection] = {}
    for number, head in student.heads.items() if run.gives_vectors else ():
        term = run.terms[number]
        if isinstance(head, Projection) and isinstance(term, FeatureTerm) and term.student_module is None:
            found.setdefault(term.features, head)
    return found


def _weight_files(run: Run) -> list[str]:
    """All that a run may write."""
    training = run.recipe.training
    names = ["student"]
    for kept in training.keep:
        if isinstance(kept, Every):
            names += [f"epoch-{epoch:03d}" for epoch in range(kept.every, training.epochs + 1, kept.every)]
        else:
            names.append(kept)
    return [f"{name}{end}.safetensors" for name in names for end in ("", *["_ema"] * bool(training.ema))]

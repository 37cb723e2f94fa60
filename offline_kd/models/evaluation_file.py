"""What a network answered for every image of a split, as a file: of a student after its last epoch, of a teacher.

key_hash    [N] uint64    which image, ascending: files of several runs are joined by it
label       [N] int32
predicted   [N] int32     the likeliest class
confidence  [N] float32   its probability
log_probs   [N, C] f16    log-probabilities in nats; left out where they take more than 64 MiB

The metadata names the classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from offline_kd.models.evaluation import ECE_BINS, Answers
from offline_kd.support.errors import TrainingError
from offline_kd.support.places import WritablePlace
from offline_kd.support.ranks import of_all, rank

FILE = "evaluation.safetensors"  # of a run directory: what its student answered
FILE_OF_TEACHER = "teacher_evaluation.safetensors"  # what the teacher did that it learned from
MOST_BYTES = 2**26  # of log-probabilities
MOST_FILE_BYTES = 2**30
DTYPES = {"key_hash": "uint64", "label": "int32", "predicted": "int32", "confidence": "float32"}


@dataclass(frozen=True)
class Predictions:
    classes: list[str]
    key_hash: NDArray[np.uint64]  # [N]
    label: NDArray[np.int32]  # [N]
    predicted: NDArray[np.int32]  # [N]
    confidence: NDArray[np.float32]  # [N]
    log_probs: NDArray[np.float16] | None  # [N, C]

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float((self.predicted == self.label).mean())


# ---- written ------------------------------------------------------------------------------------------------------


def put_predictions(
    out: WritablePlace, answers: Answers, classes: Sequence[str], samples: int, name: str = FILE
) -> None:
    """Write the answers of all ranks, which all call this; the first one writes.

    Args:
        samples: of the whole split.
        name: of the file.
    """
    parts = of_all(_arrays(answers, with_log_probs=2 * samples * len(classes) <= MOST_BYTES))
    if rank() > 0:
        return
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(whole["key_hash"], kind="stable")
    tensors = {name: np.ascontiguousarray(array[order]) for name, array in whole.items()}
    out.put(name, safetensors.numpy.save(tensors, metadata={"classes": json.dumps(list(classes))}))


def _arrays(answers: Answers, with_log_probs: bool) -> dict[str, NDArray[np.generic]]:
    confidence, predicted = answers.logits.softmax(dim=1).max(dim=1)
    arrays: dict[str, NDArray[np.generic]] = {
        "key_hash": answers.key_hash,
        "label": answers.labels.numpy().astype(np.int32),
        "predicted": predicted.numpy().astype(np.int32),
        "confidence": confidence.numpy(),
    }
    if with_log_probs:
        least = torch.finfo(torch.float16).min
        arrays["log_probs"] = answers.logits.log_softmax(dim=1).clamp(min=least).half().numpy()
    return arrays


# ---- read by a report ----------------------------------------------------------------------------------------------


def read_predictions(content: bytes, where: str) -> Predictions:
    """Raises TrainingError for what no run wrote."""
    again = "Damaged, or no run wrote it: run it again, or leave the file out."
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        classes = json.loads(header["__metadata__"]["classes"])
        arrays = safetensors.numpy.load(content)
        found = Predictions(
            [str(name) for name in classes],
            arrays["key_hash"],
            arrays["label"],
            arrays["predicted"],
            arrays["confidence"],
            arrays.get("log_probs"),
        )
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{where}: not readable ({str(error)[:100]}). {again}") from error
    problem = _problem(found)
    if problem:
        raise TrainingError(f"{where}: {problem}. {again}")
    return found


def _problem(found: Predictions) -> str:
    """Why these are not predictions; empty where they are."""
    count, classes = len(found.key_hash), len(found.classes)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {name: (dtype, (count,)) for name, dtype in DTYPES.items()}
    if found.log_probs is not None:
        wanted["log_probs"] = ("float16", (count, classes))
    for name, about in wanted.items():
        array = getattr(found, name)
        if (array.dtype.name, array.shape) != about or not count:
            return f"{name} is {array.dtype.name} {list(array.shape)}, where {about[0]} {list(about[1])} should be"
    for name, numbers in (("label", found.label), ("predicted", found.predicted)):
        if numbers.min() < 0 or numbers.max() >= classes:
            return f"{name} has {numbers.min()} to {numbers.max()}, there are {classes:,} classes"
    if not ((found.confidence >= 0) & (found.confidence <= 1.001)).all():
        return "confidence is no probability"
    return ""


# ---- measured ------------------------------------------------------------------------------------------------------


def reliability(found: Predictions) -> NDArray[np.float64]:
    """`[15, 3]`: of every bin of confidence the number of images, and the sums of confidence and of right answers."""
    bins = (found.confidence * ECE_BINS).astype(np.int64).clip(max=ECE_BINS - 1)
    right = found.predicted == found.label
    sums = [np.bincount(bins, weights, ECE_BINS) for weights in (None, found.confidence, right)]
    return np.stack(sums, axis=1).astype(np.float64)


def right_by_class(found: Predictions) -> NDArray[np.int64]:
    """`[C, 2]`: of every class the number of images, and of right answers."""
    right = found.label[found.predicted == found.label]
    counts = [np.bincount(labels, minlength=len(found.classes)) for labels in (found.label, right)]
    return np.stack(counts, axis=1)


def agreement(one: Predictions, other: Predictions) -> float | None:
    """Percent of the images for which both say the same class; None where they were asked about other images."""
    if not _same_images(one, other):
        return None
    return 100 * float((one.predicted == other.predicted).mean())


def divergence(teacher: Predictions, student: Predictions) -> float | None:
    """Mean KL(teacher || student) in nats at temperature 1, to the precision of float16; None where one has no
    log-probabilities, or other images."""
    if teacher.log_probs is None or student.log_probs is None or not _same_images(teacher, student):
        return None
    log_p, log_q = teacher.log_probs.astype(np.float64), student.log_probs.astype(np.float64)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def _same_images(one: Predictions, other: Predictions) -> bool:
    return one.classes == other.classes and np.array_equal(one.key_hash, other.key_hash)

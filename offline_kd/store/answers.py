"""What a teacher said of some rows of a store, and what in it should make people think twice before they use it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offline_kd.store.codecs.topk import TopK
from offline_kd.store.layout import NO_LABEL
from offline_kd.store.logit_reading import logit_arrays, stored_decoder
from offline_kd.store.reader import Arrays, Store
from offline_kd.store.schema import Fidelity
from offline_kd.support.errors import StoreCorrupt
from offline_kd.views.mixing import WHOLE

MAX_ROWS, MAX_BLOCKS, MAX_EXAMPLES = 50_000, 64, 24
MAX_FLOATS = 2**24  # of logits that are decoded at once
BINS = 15
# What is worth a warning: percent, percentage points, share of the probability, rows of a class.
POOR_TOP1, MUCH_WORSE, POOR_ECE, MUCH_DROPPED, ENOUGH_ROWS = 70.0, 25.0, 10.0, 0.3, 10
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Answers:
    """What the teacher said about n rows."""

    confidence: NDArray[np.float32]  # [n] largest probability
    named: NDArray[np.int64]  # [n] its class
    correct: NDArray[np.bool_]  # [n] whether that is the label, of the image or of the one that is mixed in
    labels: NDArray[np.int64]  # [n]
    dropped: float  # mean probability of classes whose logit was not kept
    examples: list[tuple[NDArray[np.uint8], str]]  # view `[H, W, 3]` and caption

    @property
    def ece(self) -> float:
        """Expected calibration error, in percent."""
        _, confidence, accuracy = calibration(self)
        rows = np.bincount(_bins(self), minlength=BINS)
        return float(100 * (rows[rows > 0] * np.abs(accuracy - confidence)).sum() / rows.sum())


def calibration(answers: Answers) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """By bin of confidence that has rows: how many, their mean confidence, and the share that is right."""
    bins = _bins(answers)
    rows = np.bincount(bins, minlength=BINS)
    used = rows > 0
    sums = [np.bincount(bins, weights=one, minlength=BINS)[used] for one in (answers.confidence, answers.correct)]
    return rows[used], sums[0] / rows[used], sums[1] / rows[used]


def _bins(answers: Answers) -> NDArray[np.int64]:
    return np.minimum((answers.confidence * BINS).astype(np.int64), BINS - 1)


def read_answers(store: Store) -> Answers:
    """What a classifier said about the first view group of evenly spaced blocks, up to MAX_ROWS rows."""
    blocks = store.blocks
    count = min(MAX_BLOCKS, len(blocks))
    found: list[Answers] = []
    for index in range(count):
        examples = sum(len(one.examples) for one in found)
        found.append(_of_block(store, blocks[index * len(blocks) // count], MAX_EXAMPLES - examples))
        if sum(len(one.labels) for one in found) >= MAX_ROWS:
            break
    rows = [len(one.labels) for one in found]
    return Answers(
        np.concatenate([one.confidence for one in found]),
        np.concatenate([one.named for one in found]),
        np.concatenate([one.correct for one in found]),
        np.concatenate([one.labels for one in found]),
        float(np.average([one.dropped for one in found], weights=rows)),
        [example for one in found for example in one.examples],
    )


def _of_block(store: Store, number: int, most_examples: int) -> Answers:
    """Of the first view group of a block."""
    identity = store.identity
    names = logit_arrays(store)
    mixing = ["view/partner", "view/share"] if "partner" in identity.views.arrays() else []
    arrays = store.read(number, 0, ["label", "probe/row", "probe/view", "probe/pixels", *names.values(), *mixing])
    refuse_wild(store, number, arrays)
    # Of many classes a few rows are enough, and all that fit into memory.
    some = max(1, MAX_FLOATS // (identity.views_per_group * identity.num_classes))
    encoded = {part: arrays[name][:some] for part, name in names.items()}
    logits = stored_decoder(store)(encoded)
    probabilities = logits.softmax(-1)  # [rows, views, C]
    confidence, named = (part.numpy() for part in probabilities.max(-1))
    if not np.isfinite(confidence).all():
        raise StoreCorrupt(f"{store.place}: block {number} has logits that are no numbers: run `store verify` on it.")
    labels = arrays["label"].astype(np.int64)
    label = np.broadcast_to(labels[:some, None], named.shape)
    other, share = label, np.ones(named.shape)
    if mixing:
        partner = arrays["view/partner"].astype(np.int64)[:some]
        other = np.where(partner >= 0, labels[partner.clip(min=0)], label)
        share = arrays["view/share"].astype(np.float64)[:some] / WHOLE
    dropped = 0.0
    if isinstance(identity.codec, TopK):
        kept = probabilities.gather(-1, torch.from_numpy(encoded["top_id"].astype(np.int64)))
        dropped = 1 - float(kept.sum(-1).mean())
    examples: list[tuple[NDArray[np.uint8], str]] = []
    for pixels, row, view in zip(arrays["probe/pixels"], arrays["probe/row"], arrays["probe/view"], strict=True):
        if len(examples) < most_examples and row < some:
            at = int(row), int(view)
            caption = _caption(identity.dataset.classes, named[at], confidence[at], label[at], other[at], share[at])
            examples.append((np.asarray(pixels, dtype=np.uint8).transpose(1, 2, 0), caption))
    correct = (named == label) | (named == other)
    return Answers(confidence.ravel(), named.ravel(), correct.ravel(), label.ravel(), dropped, examples)


def _caption(classes: Sequence[str], named: int, confidence: float, label: int, other: int, share: float) -> str:
    """What the teacher says of a view, and what it is where that is another or a mixture."""
    said = f"{classes[named]} {confidence:.0%}"
    if label == NO_LABEL:
        return said
    if share < 1:
        return f"{said}; a mixture of {share:.0%} {classes[label]} and {1 - share:.0%} {classes[other]}"
    return said if named == label else f"{said}, labelled {classes[label]}"


def refuse_wild(store: Store, number: int, arrays: Arrays) -> None:
    """Raise StoreCorrupt for labels, probes and partners that are no class, row or view: the store may be anybody's."""
    rows, identity = len(arrays["label"]), store.identity
    unlabelled = identity.dataset.labels == "none"
    for name, first, end in (
        ("label", NO_LABEL if unlabelled else 0, NO_LABEL + 1 if unlabelled else identity.num_classes),
        ("probe/row", 0, rows),
        ("probe/view", 0, identity.views_per_group),
        ("view/partner", -1, rows),
        ("view/share", 0, WHOLE + 1),
    ):
        values = arrays.get(name)
        if values is not None and (values.min() < first or values.max() >= end):
            raise StoreCorrupt(
                f"{store.place}: block {number} has {name} from {values.min()} to {values.max()}, must be {first} to "
                f"{end - 1}: run `offline-kd store verify` on it."
            )


# ---- warnings ------------------------------------------------------------------------------------------------------


def warnings_of(store: Store, answers: Answers | None, fidelity: Fidelity | None) -> list[str]:
    """What should make people think twice, a sentence each: figures and the threshold that they are beyond.

    Args:
        answers: None for a copy without logits.
    """
    teacher = store.identity.teacher
    warnings = []
    if teacher.imported:
        warnings.append(
            f"Its answers were imported from {teacher.imported.format}. The teacher was never asked here, and saw "
            "views as that program made them, whose pixels may differ a little from those of students here."
        )
    if teacher.measured_top1 is not None and teacher.measured_top1 < POOR_TOP1:
        warnings.append(
            f"The teacher is right about {teacher.measured_top1:.1f} % of {teacher.evaluated_on}, less than "
            f"{POOR_TOP1:g} %: students learn its errors."
        )
    warnings += _of_labels(store, answers) if answers and store.identity.dataset.labels != "none" else []
    if answers and answers.dropped > MUCH_DROPPED:
        warnings.append(
            f"{answers.dropped:.0%} of the probability lies in classes whose logits were not kept, more than "
            f"{MUCH_DROPPED:.0%}: a codec that keeps more serves better."
        )
    for name, figures in (fidelity.decisions if fidelity else {}).items():
        if figures.get("mean_dropped", 0) > MUCH_DROPPED:
            warnings.append(
                f"Decisions '{name}' leave out {figures['mean_dropped']:.0%} of the probability of templates, more "
                f"than {MUCH_DROPPED:.0%}: keep more of them with `top`."
            )
    for name, figures in (fidelity.features if fidelity else {}).items():
        if figures["relative_l2"] > MUCH_DROPPED:
            warnings.append(
                f"Features '{name}' are off by {figures['relative_l2']:.0%} of their length on average, more than "
                f"{MUCH_DROPPED:.0%}: more `subspaces` or `stages` keep more of them."
            )
    return warnings


def _of_labels(store: Store, answers: Answers) -> list[str]:
    """Warnings that need labels."""
    measured, classes = store.identity.teacher.measured_top1, store.identity.dataset.classes
    warnings = []
    top1 = 100 * float(answers.correct.mean())
    if measured is not None and measured - top1 > MUCH_WORSE:
        warnings.append(
            f"It is right about {top1:.1f} % of the stored views, {measured - top1:.0f} points less than of images as "
            f"they are: these views are hard for it, or it sees them in another way than it was trained to."
        )
    if "partner" not in store.identity.views.arrays() and answers.ece > POOR_ECE:
        warnings.append(
            f"Its confidence is off by {answers.ece:.1f} % on average (expected calibration error on stored views), "
            f"more than {POOR_ECE:g} %: look at the curve, and choose the temperature with care."
        )
    rows = np.bincount(answers.labels, minlength=len(classes))
    never = np.flatnonzero((rows >= ENOUGH_ROWS) & (np.bincount(answers.named, minlength=len(classes)) == 0)).tolist()
    if never:
        names = ", ".join(classes[index] for index in never[:NAMES_SHOWN])
        more = f" and {len(never) - NAMES_SHOWN:,} more" if len(never) > NAMES_SHOWN else ""
        warnings.append(
            f"It never names {len(never):,} of {len(classes):,} classes, among {len(answers.labels):,} stored views "
            f"that were looked at: {names}{more}."
        )
    return warnings

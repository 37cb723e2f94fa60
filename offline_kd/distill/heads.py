"""What terms on features train or remember beside the student, and the numbers of the rows that they remember."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.label_sets import one_label
from offline_kd.distill.loader import Loader
from offline_kd.distill.resident import free_bytes
from offline_kd.distill.student import Student
from offline_kd.distill.teacher_signal import AskTeacher
from offline_kd.objectives.features import FeatureTerm
from offline_kd.objectives.term import DatasetRows, Head
from offline_kd.recipe import AnyTerm, feature_terms
from offline_kd.store.layout import NO_LABEL
from offline_kd.store.rows import Rows
from offline_kd.support.console import progress
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import StoreMismatch, TrainingError
from offline_kd.support.ranks import copy_from_first

HEAD_STREAM = 0x68656164  # first counter of the seeds made here, so that they are independent of all others


def with_heads(student: Student, terms: Sequence[AnyTerm], loader: Loader, ask: AskTeacher) -> Student:
    """The student with a head of every term that has one, freshly initialised under the run's seed.

    Each has a seed of its own, so that no other draw of the run depends on whether there are heads.

    Raises StoreMismatch where the teacher says nothing of features that a term names, TrainingError for a head that the
    device has no room for, RecipeError for widths that do not fit.
    """
    if not feature_terms(terms):
        return student
    _refuse_too_large(feature_terms(terms), loader)
    widths, heads = _teacher_widths(feature_terms(terms), loader, ask), dict[int, Head]()
    rows = cache(partial(dataset_rows, loader))
    for number, term in enumerate(terms):
        if isinstance(term, FeatureTerm):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(counter_hash(HEAD_STREAM, loader.options.seed, number)[0]))
                width = student.features[term.student_module].shape[1]
                head = term.head(width, widths[term.features], rows)
            if head is not None:
                heads[number] = head.to(loader.device)
    were_read = rows.cache_info().currsize > 0
    return replace(student, heads=heads, row_hashes=rows().key_hash if were_read else None)


def row_numbers(student: Student, batch: Rows) -> Tensor | None:
    """`[B]` int64 on the device of a batch: the number of each sample in the training split; None: no head asks.

    Raises StoreMismatch for a sample that was not there when the rows were numbered.
    """
    known = student.row_hashes
    if known is None:
        return None
    found = np.searchsorted(known, batch.key_hash)
    strange = known[found.clip(max=len(known) - 1)] != batch.key_hash
    if strange.any():  # it would be remembered as another image
        raise StoreMismatch(
            f"{strange.sum()} of {len(strange)} samples of a batch are none of the {len(known):,} rows that were there "
            "when the run began: the images have changed since. Run the same command again."
        )
    numbers = torch.from_numpy(found)
    if batch.labels.device.type == "cuda":
        numbers = numbers.pin_memory()  # else the copy might wait for what the device is doing
    return numbers.to(batch.labels.device, non_blocking=True)


def end_pass(heads: Iterable[Head]) -> dict[str, int]:
    """What heads counted in a pass, by name in `metrics.jsonl`; afterwards all ranks have those of the first one.

    Every rank has made the same steps of them, but for roundings of different devices, which end here.
    """
    counted: dict[str, int] = {}
    for head in heads:
        copy_from_first(one for one in head.state_dict().values() if isinstance(one, Tensor))
        counted |= head.counts()
    return counted


def dataset_rows(loader: Loader) -> DatasetRows:
    """All rows that are trained on, numbered by their keys: whatever tars a copy of the dataset has.

    Labels are read from a store where it has them, since images are large; the join compares them with those of the
    images, when these are read.
    """
    found, num_tars = list[tuple[NDArray[np.uint64], NDArray[np.int64]]](), len(loader.source.images)
    with progress("labels of all rows", num_tars, "tars") as meter:
        for number in range(num_tars):
            found.append(labels_of_rows(loader, number))
            meter.advance()
    hashes, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    labels = np.where(loader.options.shows_label(hashes), labels, -1)
    order = hashes.argsort(kind="stable")
    return DatasetRows(hashes[order], torch.from_numpy(labels[order]), loader.options.seed)


def labels_of_rows(loader: Loader, number: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Key hashes `[n]` and labels `[n]` of the rows of a tar that are trained on, without what stores have left out;
    -1 where there is no label."""
    source = loader.source
    for store in source.stores:
        block = store.block_of_tar.get(source.images.split.tars[number].sha256)
        if block is not None:
            arrays = store.read(block, 0, ["key_hash", "label"])
            hashes, stored = arrays["key_hash"].astype(np.uint64), one_label(arrays["label"])
            labels, chosen = np.where(stored == NO_LABEL, -1, stored), source.images.chosen
            which = slice(None) if chosen is None else np.isin(hashes, chosen[number])
            return hashes[which], labels[which]
    tar = source.images[number]
    return tar.key_hash, one_label(tar.labels)


def _teacher_widths(terms: Sequence[FeatureTerm], loader: Loader, ask: AskTeacher) -> dict[str, int]:
    """Channels of the teacher's features by name, of a first batch."""
    options = replace(loader.options, workers=0, pool_blocks=1, rank=0, world=1)
    said = ask(next(Loader(loader.source, options, loader.device).epoch(0))).features
    for term in terms:
        if term.features not in said:
            raise StoreMismatch(
                f"term '{term.term}': the teacher says nothing of features '{term.features}'. Capture them, with "
                "capture.features in the recipe."
            )
    return {name: features.shape[1] for name, features in said.items()}


def _refuse_too_large(terms: Sequence[FeatureTerm], loader: Loader) -> None:
    num_rows = sum(tar.count for tar in loader.source.images.split.tars)
    free, batch_size = free_bytes(loader.device), loader.options.batch_size
    for term in terms:
        if (needed := term.memory(batch_size, num_rows)) > free:
            raise TrainingError(
                f"term '{term.term}': needs {needed:,} bytes for {num_rows:,} training rows and batches of "
                f"{batch_size:,}, {free:,} are free on {loader.device}. Use smaller batches, fewer tars, or smaller "
                "fields of the term."
            )

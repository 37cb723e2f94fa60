"""Is a copy of a dataset what its manifest says?"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from offline_kd.data.decoding import UNDECODABLE, decode_image
from offline_kd.data.fetching import Root
from offline_kd.data.labels import labels_of
from offline_kd.data.manifest import Dataset, Split, Tar, folders_of, locate
from offline_kd.data.tars import read_tar
from offline_kd.support.console import counted, say
from offline_kd.support.errors import DataError
from offline_kd.support.strict import fingerprint


def dataset_fingerprint(dataset: Dataset, split: Split) -> str:
    """sha256 over what defines a split: class names in order, count and sha256 of every tar in order, and what says the
    labels, where that is not `.cls`."""
    rule = [] if split.labels == "cls" else [split.labels]
    return fingerprint([dataset.classes, [[tar.count, tar.sha256] for tar in split.tars], *rule])


# ---- proving a copy ------------------------------------------------------------------------------------------------


def check_dataset(
    dataset: Dataset, roots: Sequence[Root], progress: Callable[[Iterable[Tar]], Iterable[Tar]]
) -> dict[str, int]:
    """Prove a copy, as it lies here or afar: sha256, count, keys, labels and decodability of every tar.

    Returns samples per split. Raises DataError naming the first difference: file, sample and both values; and for a
    class without a sample in the largest split, where it would be learned. Other splits may lack some, which is said.
    """
    per_split: dict[str, NDArray[np.int64]] = {}
    first_use: dict[str, str] = {}
    folders = folders_of(dataset, roots)
    for split_name, split in dataset.splits.items():
        labels = labels_of(split.labels, dataset.classes)
        per_class: NDArray[np.int64] = np.zeros(len(dataset.classes), dtype=np.int64)
        for tar in progress(split.tars):
            path = locate(tar.file, folders)
            samples, _ = read_tar(path, expected=tar, labels=labels)
            for sample in samples:
                where = f"{path}: sample '{sample.key}'"
                if (label := max((sample.label, *sample.classes[-1:]))) >= len(dataset.classes):
                    raise DataError(
                        f"{where}: label {label}, the manifest names {len(dataset.classes)} classes. "
                        "Correct `classes` in the manifest, or pack the dataset again."
                    )
                use = f"{split_name}/{sample.key}"
                if use in first_use:
                    raise DataError(
                        f"{where}: its key was used before, in {first_use[use]}. Keys of a split must be unique: "
                        "pack the dataset again."
                    )
                first_use[use] = tar.file
                try:
                    decode_image(sample.encoded)
                except UNDECODABLE as error:
                    raise DataError(f"{where}: cannot be decoded ({error}). Repair or remove it.") from error
                per_class[list(sample.classes) if labels.are_sets else sample.label] += 1
        per_split[split_name] = per_class
    _look_for_classes(dataset, {name: one for name, one in per_split.items() if dataset.splits[name].labels != "none"})
    return {name: split.count for name, split in dataset.splits.items()}  # read_tar compares it


def _look_for_classes(dataset: Dataset, per_split: Mapping[str, NDArray[np.int64]]) -> None:
    """Samples per class: a small split may happen to have none of one, the largest must have some of all."""
    largest = max((int(per_class.sum()) for per_class in per_split.values()), default=0)
    for name, per_class in per_split.items():
        lacking = np.flatnonzero(per_class == 0)
        if not len(lacking):
            continue
        such_as = f"such as {lacking[0]} ('{dataset.classes[lacking[0]]}')"
        missing = (
            f"split '{name}': no sample of {len(lacking):,} of {counted(len(dataset.classes), 'classes')}, {such_as}"
        )
        if per_class.sum() == largest:
            raise DataError(
                f"{missing}, in {largest:,} labels. Correct `classes` in the manifest, or pack the dataset again."
            )
        say(missing)

"""TinyViT (Wu et al. 2022, arXiv:2207.10666): sparse logits of `save_logits.py`, a folder for every epoch.

`FOLDER/logits_topK_epochE/rankR-values.bin` has rows of one size, `rankR-keys.txt` their keys, one a line. A row is the
int32 seed of the image's augmentation, K class ids as int16 and their K probabilities in half precision.

The seed is that of NumPy's PCG64, whose numbers the transforms of that project take one after the other. What a crop
and a flip take is known here. With anything more (RandAugment, jitter, erasing with noise, mixup with whichever image
stood beside it in the batch) the pixels cannot be made again without their code: such stores are refused.
"""

import math
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offline_kd.cache.foreign.answers import Answers, Sample, checked, crops, views_taken
from offline_kd.data.tars import hash_key
from offline_kd.support.console import progress
from offline_kd.support.counter_rng import U64
from offline_kd.support.errors import DataError, RecipeError, shorten
from offline_kd.support.strict_yaml import read_yaml
from offline_kd.views.imported import ImportedCrops
from offline_kd.views.kind import TRIES

FOLDER = re.compile(r"logits_top([1-9]\d{0,3})_epoch(\d{1,6})")
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the crops, which no configuration changes
NONE = (0, 0.0, "none", None)
# What must be switched off in the configuration, for pixels to follow from crop and flip.
OFF = ("MIXUP", "CUTMIX", "CUTMIX_MINMAX", "AUTO_AUGMENT", "COLOR_JITTER", "REPROB")
LOST = [
    "logits: only the probabilities of the likeliest classes are kept, and what is left for all others together",
    "the teacher's weights: the configuration names its network",
]


@dataclass(frozen=True)
class Epoch:
    """What was saved in one epoch: rows of all ranks, found by the hash of their key."""

    values: list[NDArray[np.uint8]]  # of every rank `[n, row bytes]`, mapped, not read
    hashes: U64  # [n] of the keys of all ranks, sorted
    row: NDArray[np.int64]  # [n] rank by rank

    def row_of(self, key: str) -> bytes | None:
        """The bytes of a row; None where there is none."""
        wanted = np.uint64(hash_key(key))
        place = int(np.searchsorted(self.hashes, wanted))
        if place == len(self.hashes) or self.hashes[place] != wanted:
            return None
        row = int(self.row[place])
        for values in self.values:
            if row < len(values):
                return values[row].tobytes()
            row -= len(values)
        return None


@dataclass
class TinyViT:
    """A folder of epochs; each is a view of every image."""

    where: str
    views: ImportedCrops
    k: int
    epochs: list[Epoch]
    teacher: str
    temperature: int = 1
    name: str = "tinyvit"
    lost: list[str] = field(default_factory=lambda: list(LOST))

    @cached_property
    def is_numbered(self) -> bool:
        """Whether keys are places in a dataset, as they are where it has no names."""
        first = self.epochs[0].hashes
        return np.array_equal(first, np.sort(np.array([hash_key(str(n)) for n in range(len(first))], dtype=np.uint64)))

    def content(self, sample: Sample) -> bytes:
        """The rows of all epochs, one after the other."""
        name = sample.key.rpartition("/")[2]
        keys = [str(sample.number)] if self.is_numbered else [sample.key, name]
        rows = [next((row for key in keys if (row := one.row_of(key)) is not None), None) for one in self.epochs]
        if None in rows:
            raise DataError(
                f"{self.where}: epoch folder {rows.index(None)} (from 0) has no row of sample '{sample.key}' (looked "
                f"for {' and '.join(keys)}). Give the dataset that the logits were saved of, or fewer --views."
            )
        return b"".join(row for row in rows if row is not None)

    def answers(self, content: bytes, sample: Sample, num_classes: int) -> Answers:
        """Crop and flip follow from the seed and the image's size."""
        row = np.dtype([("seed", "<i4"), ("id", "<u2", (self.k,)), ("probability", "<f2", (self.k,))])
        rows = np.frombuffer(content, dtype=row)
        drawn = [crop_and_flip(int(seed), *sample.size) for seed in rows["seed"]]
        box, flip = np.array([box for box, _ in drawn]), np.array([flip for _, flip in drawn])
        # Saved as int16, so that ids from 32,768 on are negative there: as uint16 they are right again.
        ids, probabilities = rows["id"].astype(np.int64), rows["probability"].astype(np.float64)
        return checked(
            f"{self.where}: key '{sample.key}'", sample, Answers(crops(box, flip, {}), ids, probabilities), num_classes
        )

    def problem_of_count(self, samples: int) -> str:
        """Places mean nothing where the dataset has another count; names may be those of a part."""
        rows = len(self.epochs[0].hashes)
        if not self.is_numbered or rows == samples:
            return ""
        return (
            f"holds {rows:,} rows an epoch, the dataset {samples:,} images: its keys are places in a dataset, so both "
            "must be the same. Give the dataset that the logits were saved of."
        )


def crop_and_flip(seed: int, height: int, width: int) -> tuple[tuple[int, int, int, int], bool]:
    """Top, left, height, width, and whether it is mirrored: what the transforms take of the numbers of a seed.

    Two numbers for each try, area and ratio; two more for the place of the first box that fits; one for the flip.
    """
    if seed < 0:
        raise DataError(f"seed {seed}: seeds are not negative. The values are damaged: copy them again.")
    random = np.random.Generator(np.random.PCG64(seed)).random
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(TRIES):
        area = (random() * (SCALE[1] - SCALE[0]) + SCALE[0]) * (width * height)
        ratio = math.exp(random() * (high - low) + low)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_width <= width and box_height <= height:
            top, left = (min(int(random() * (free + 1)), free) for free in (height - box_height, width - box_width))
            return (top, left, box_height, box_width), random() < 0.5
    box_width, box_height = width, height
    if width / height < RATIO[0]:
        box_height = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        box_width = round(height * RATIO[1])
    return ((height - box_height) // 2, (width - box_width) // 2, box_height, box_width), random() < 0.5


# ---- opening -------------------------------------------------------------------------------------------------------


def open_tinyvit(source: Path, config: Path, num_views: int | None) -> TinyViT:
    """The epochs in a folder, as the configuration that `save_logits.py` wrote says they were made.

    Args:
        num_views: how many epochs are taken, the first ones; None: all.

    Raises DataError where there are none, RecipeError for augmentations that cannot be made again.
    """
    found = sorted(
        (int(match[2]), int(match[1]), folder)
        for folder in (source.iterdir() if os.path.isdir(source) else ())
        if (match := FOLDER.fullmatch(folder.name)) and folder.is_dir()
    )
    if not found:
        raise DataError(f"{shorten(str(source))}: has no folder logits_topK_epochE. Give the folder that holds them.")
    if len({k for _, k, _ in found}) > 1:
        raise DataError(
            f"{source}: holds epochs of {sorted({k for _, k, _ in found})} likeliest classes. Give one kind."
        )
    count = views_taken(num_views, len(found), str(source))
    size, interpolation, teacher = _read_config(config)
    with progress("reading keys", count, "epochs") as meter:
        epochs = []
        for _, k, folder in found[:count]:
            epochs.append(_epoch(folder, 4 + 4 * k))
            meter.advance()
    spec = {"kind": "imported", "size": size, "interpolation": interpolation, "count": count}
    return TinyViT(str(source), ImportedCrops.model_validate(spec), found[0][1], epochs, teacher)


def _epoch(folder: Path, row_bytes: int) -> Epoch:
    values, hashes = [], []
    for file in sorted(folder.glob("rank*-values.bin"), key=lambda one: (len(one.name), one.name)):
        names = file.with_name(file.name.replace("-values.bin", "-keys.txt"))
        try:
            keys = names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{names}: not readable ({error}). Copy the folder again.") from error
        if file.stat().st_size != len(keys) * row_bytes:
            raise DataError(
                f"{file}: {file.stat().st_size:,} bytes, {len(keys):,} keys of {row_bytes} bytes make "
                f"{len(keys) * row_bytes:,}. It is cut, or not of this kind: copy the folder again."
            )
        if keys:
            values.append(np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, row_bytes))
            hashes.append(np.array([hash_key(key) for key in keys], dtype=np.uint64))
    if not values:
        raise DataError(f"{folder}: holds no rows (rankR-values.bin). Copy the folder again.")
    together = np.concatenate(hashes)
    row = together.argsort(kind="stable")  # a key that two ranks have is that of the first
    return Epoch(values, together[row], row)


def _read_config(file: Path) -> tuple[int, str, str]:
    """Size and interpolation of the crops, name of the teacher; raises RecipeError for other augmentations."""
    content = read_yaml(file)
    content = content if isinstance(content, dict) else {}
    augmentation, data, model = (
        one if isinstance(one := content.get(name), dict) else {} for name in ("AUG", "DATA", "MODEL")
    )
    absent = [f"AUG.{name}" for name in OFF if name not in augmentation]
    absent += [f"DATA.{name}" for name in ("IMG_SIZE", "INTERPOLATION") if name not in data]
    if absent:
        raise RecipeError(
            f"{file}: does not say {', '.join(absent)}. Give the whole configuration, as save_logits.py writes it into "
            "its output folder as config.json."
        )
    if used := [f"AUG.{name} {augmentation[name]}" for name in OFF if augmentation[name] not in NONE]:
        raise RecipeError(
            f"{file}: the teacher saw images with {', '.join(used)}. Of these only a seed was saved, from which their "
            "code alone makes the pixels: imported labels would be those of other pictures. Save logits with crops and "
            "flips alone (--opts AUG.MIXUP 0 AUG.CUTMIX 0 AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0 AUG.REPROB 0), or "
            "capture a store of the same teacher: `offline-kd cache-teacher`."
        )
    size, interpolation = data["IMG_SIZE"], data["INTERPOLATION"]
    if not isinstance(size, int) or size <= 32 or interpolation not in ("bilinear", "bicubic"):
        raise RecipeError(
            f"{file}: crops of {size!r:.20} pixels by {interpolation!r:.20}; what can be made again is more than 32 "
            "pixels, bilinear or bicubic."
        )
    return size, str(interpolation), str(model.get("NAME", ""))[:200]

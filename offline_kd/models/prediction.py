"""What a student says of image files."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from offline_kd.data.decoding import UNDECODABLE, decode_image
from offline_kd.data.tars import IMAGE_EXTENSIONS
from offline_kd.models.student_file import TrainedStudent
from offline_kd.support.console import progress
from offline_kd.support.errors import DataError, shorten
from offline_kd.views.render import Pixels

BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What a student says of one file: the likeliest classes, or why it cannot be read."""

    image: str
    # Name and probability, the likeliest first; of a multi-label student those above .5.
    classes: list[tuple[str, float]]
    problem: str | None = None


def image_files(names: Sequence[str]) -> list[str]:
    """Files, and the images in folders and below, by name; raises DataError for a folder without images."""
    files: list[str] = []
    for name in names:
        if not Path(name).is_dir():
            files.append(name)
            continue
        inside = [path for path in Path(name).rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
        if not inside:
            raise DataError(f"{shorten(name)}: holds no image ({', '.join(IMAGE_EXTENSIONS)}). Name another folder.")
        files += sorted(str(path) for path in inside)
    return files


def read_pixels(student: TrainedStudent, file: str) -> Pixels | str:
    """`[3, H, W]` uint8 of an image as the student takes it, or why it cannot be read."""
    try:
        return student.pixels(decode_image(Path(file).read_bytes()))
    except FileNotFoundError:
        return "no such file"
    except (DataError, *UNDECODABLE) as error:
        return " ".join(str(error).split("<_io")[0].split())[:200] or type(error).__name__


def predict_files(student: TrainedStudent, files: Sequence[str], top: int) -> Iterator[Prediction]:
    """The `top` likeliest classes of every file, in order; the network's device is where it is asked.

    Of a multi-label student, those of them with a probability above .5: maybe none.
    """
    device = next(student.network.parameters()).device
    with progress("predictions", len(files), "images") as meter, ThreadPoolExecutor() as threads:
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            read = list(threads.map(lambda file: read_pixels(student, file), some))
            good = [one for one in read if not isinstance(one, str)]
            found = iter(_likeliest(student, good, top, device) if good else [])
            for file, one in zip(some, read, strict=True):
                yield Prediction(file, [], one) if isinstance(one, str) else Prediction(file, next(found))
            meter.advance(len(some))


def _likeliest(
    student: TrainedStudent, images: Sequence[Pixels], top: int, device: torch.device
) -> list[list[tuple[str, float]]]:
    logits = student.logits(torch.from_numpy(np.stack(images)).to(device)).cpu()
    sets = student.about.kind == "multilabel"
    of_classes = logits.sigmoid() if sets else logits.softmax(dim=1)
    probabilities, indices = of_classes.topk(min(top, logits.shape[1]), dim=1)
    return [
        [
            (student.about.classes[index], probability)
            for index, probability in zip(which, how, strict=True)
            if not sets or probability > 0.5
        ]
        for which, how in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]

"""Pictures of which other programs stored labels, and where those labels lie: see `tests/fixtures/README.md`."""

from pathlib import Path

import numpy as np
from pictures import photograph
from PIL import Image

FIXTURES = Path(__file__).parent / "fixtures" / "foreign"
CLASSES = ["bus", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis"]
NAMES = ["a-1", "a", "b_2"]  # of the files of a class in the order of ImageFolder, which is not that of the names alone
VIEWS, SIZE, TINYVIT_SIZE, SHOWN = 4, 32, 40, 3  # the pixels of the first SHOWN pictures are kept


def picture(number: int) -> Image.Image:
    """Class c is bright in the channels of its bits; every picture has a size of its own."""
    label = number // len(NAMES)
    texture = np.asarray(photograph(number, 41 + 3 * number, 90 - 2 * number)).astype(float) - 128
    colour = [60 + 130 * (label >> channel & 1) for channel in range(3)]
    return Image.fromarray((texture / 4 + colour).clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path) -> Path:
    """`folder/imagenet/train/CLASS/NAME.png`; returns the folder `train`."""
    train = folder / "imagenet" / "train"
    for number in range(len(CLASSES) * len(NAMES)):
        label, name = divmod(number, len(NAMES))
        file = train / CLASSES[label] / f"{NAMES[name]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file)
    return train

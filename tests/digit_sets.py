"""Handwritten digits with sets of labels, as tars: what tests of multi-label teachers work on."""

import io
import json
import tarfile
from pathlib import Path

import yaml
from conftest import invoke

from offline_kd.data.packing import digits_samples

# In the order of their names, as `data index` numbers them. Of a 1 nothing is true.
CLASSES = {"above four": {5, 6, 7, 8, 9}, "even": {0, 2, 4, 6, 8}, "loop": {0, 6, 8, 9}, "prime": {2, 3, 5, 7}}
IMAGES = {"train": (2, 256), "test": (1, 160)}  # tars of a split, and images of each


def classes_of(digit: int) -> list[str]:
    return [name for name, digits in CLASSES.items() if digit in digits]


def write_tar(file: Path, samples: list[tuple[str, bytes, object]], field: str = "tags") -> None:
    """Samples are key, PNG and what the field of `.json` says; None: there is no such field."""
    with tarfile.open(file, "w") as tar:
        for key, png, said in samples:
            content = json.dumps({} if said is None else {field: said}).encode()
            for name, data in ((f"{key}.png", png), (f"{key}.json", content)):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def make_digit_sets(folder: Path) -> list[str]:
    """Tars below `folder` and their manifest; the options with which commands find them."""
    folder.mkdir(parents=True)
    options = ["--manifest", str(folder / "manifest.yaml")]
    for split, (tars, images) in IMAGES.items():
        found = digits_samples()[split]
        for number in range(tars):
            some = found[number * images : (number + 1) * images]
            samples = [(one.key, one.encoded, classes_of(one.label)) for one in some]
            write_tar(folder / f"{split}-{number}.tar", samples)
        label = ["--label", "json-set:tags", "--workers", "1"]
        invoke("data", "index", folder / f"{split}-*.tar", "--name", "tags", "--split", split, *label, *options)
    return options


RECIPE = {
    "name": "tags",
    "data": {"dataset": "tags", "normalisation": {"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]}},
    "teacher": {
        "model": "networks:small",
        "kind": "multilabel",
        "training": {"epochs": 4, "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "cosine"}},
    },
    "views": {"kind": "pad_crop_flip", "padding": 1, "flip": False, "count": 3},
    "capture": {"codec": {"name": "f16"}, "views_per_group": 3, "fidelity_rows": 100},
    "student": {"model": "networks:small", "model_args": {"width": 4}},
    "training": {
        "epochs": 3,
        "batch_size": 64,
        "optimizer": {"name": "sgd", "lr": 0.05},
        "schedule": {"name": "cosine"},
    },
    "objectives": {
        "bce": [{"term": "bce"}],
        "binary_kd": [{"term": "bce", "weight": 0.5}, {"term": "binary_kd", "temperature": 2}],
    },
}


def write_recipe(file: Path, content: dict[str, object] = RECIPE) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file

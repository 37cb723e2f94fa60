"""Students of tests: a recipe of one with KD layers, files of some that nobody trained, and what files say."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import safetensors
import torch
import yaml
from conftest import ROOT, make_recipe
from torch import Tensor

import offline_kd as okd
from offline_kd.data.manifest import Normalisation
from offline_kd.distill import loop
from offline_kd.distill.loop import train_step
from offline_kd.models.kd_layer import insert_kd_layer
from offline_kd.models.networks import build
from offline_kd.models.student_file import ENTRY, StudentFile, describe_kd_layers, student_bytes

LETKD = {
    "name": "letkd",
    "data": {"tars": [0]},
    "views": {"count": 1},
    "capture": {
        "views_per_group": 1,
        "decisions": {
            "last": {"kind": "templates", "module": "body.5", "templates": 8, "iterations": 2, "grid": [2, 2]},
        },
    },
    "training": {"keep": ["best"], "ema": {"decay": 0.5}},
    "objectives": {
        "letkd": [
            {"term": "ce"},
            {"term": "decisions", "decisions": "last"},
            {"term": "decisions", "decisions": "last", "after": "layer3.0"},
        ]
    },
}


@contextmanager
def ended_after(steps: int) -> Iterator[None]:
    """Training ends as by Ctrl-C when so many steps have been made."""
    made = 0

    def stopping(*arguments: object) -> tuple[Tensor, Tensor]:
        nonlocal made
        if made == steps:
            raise KeyboardInterrupt
        made += 1
        return train_step(*arguments)

    with patch.object(loop, "train_step", stopping):
        yield


def letkd_recipe(teacher_weights: Path, folder: Path) -> Path:
    recipe = make_recipe(teacher={"weights": str(teacher_weights)}, **LETKD)
    content = recipe.model_dump(mode="json", exclude_none=True)
    content |= {"objectives": LETKD["objectives"], "student": {"model": "cifar:resnet8"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def options_for(data_root: Path) -> list[str]:
    return ["--manifest", str(ROOT / "data_manifest.yaml"), "--data-root", str(data_root)]


def said(file: Path) -> dict:
    with safetensors.safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()[ENTRY])


def written(folder: Path, model: str, size: int = 32, after: tuple[str, ...] = (), **args: object) -> Path:
    """The file of a student that nobody trained, whose statistics are those of some data."""
    torch.manual_seed(0)
    network = build(model, 10, args)
    example = torch.randn(4, 3, size, size)
    for name in after:
        insert_kd_layer(network, name, 12, value_ratio=1.0, example=example[:1])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # statistics of this batch: with those of before, deep networks say nearly nothing
    network.train()(example)
    about = StudentFile(
        model=model,
        model_args=args,
        kd_layers=describe_kd_layers(network),
        classes=[str(digit) for digit in range(10)],
        normalisation=Normalisation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)),
        input_size=(size, size),
        dataset="made",
        evaluation="test",
        recipe="made",
        recipe_sha256="0" * 64,
        objective="ce",
        seed=0,
        version=okd.__version__,
    )
    (folder / "student.safetensors").write_bytes(student_bytes(network, about))
    return folder / "student.safetensors"

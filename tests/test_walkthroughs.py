"""The commands of the pages for three readers and the loop of README, in their order, on the digits."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import RECIPE, ROOT, merged
from documents import blocks
from networks import small
from test_help_examples import run_line

from offline_kd.data.packing import digits_samples, pack

TEAM = {"s3://team": "team"}  # a folder: tests/test_remote.py has a server
SMALLER = {  # of the engineers' page: the digits in place of photographs, and networks for them
    "--split train": "--split train --workers 1",
    "--rows 2000": "--rows 100",
    "--samples 200": "--samples 5",
    "timm:vit_large_patch16_224": "networks:small",
    "dtype: bfloat16": "dtype: float32",
    "top1: 88.1, tolerance: 0.1": "top1: 70, tolerance: 30",
    "mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]": "mean: [0.3, 0.3, 0.3], std: [0.4, 0.4, 0.4]",
    "size: 224, count: 8": "size: 8, scale: [0.7, 1.0], count: 4",
    "views_per_group: 4": "views_per_group: 2, fidelity_rows: 10",
    "timm:mobilenetv3_large_100": "cifar:resnet8",
    "epochs: 90": "epochs: 1",
    ", warmup_epochs: 5": "",
}
NOT_RUN = {
    "store plan": "seconds of measuring: tests/test_help_examples.py",
    "store sign": "keys, and model-signing: tests/test_signing.py",
    "export": "seconds of compiling: tests/test_usable.py",
    "data pack cifar100": "one's own copy of CIFAR-100: tests/test_data.py",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where a reader begins."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "wds", "weights", "photos/new", "stores", "team/stores", "cifar100"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def walk(page: str, replaced: dict[str, str]) -> list[str]:
    """Do what a page says, and return the commands that were left out."""
    assert all(old in "".join(block.text for block in blocks(page)) for old in replaced)
    left_out = []
    for block in blocks(page):
        for old, new in replaced.items():
            block = block.with_text(block.text.replace(old, new))
        if block.text.startswith("# recipe.yaml"):
            Path("recipe.yaml").write_text(block.text)
        for line in block.commands() if block.language == "sh" else []:
            if any(line.startswith(f"offline-kd {one}") for one in NOT_RUN):
                left_out.append(line)
            else:
                run_line(line)
    return left_out


def test_engineers_get_from_tars_to_a_student_in_use(folder, teacher_weights):
    digits = digits_samples()
    for part, split, count in (("train", "train", 90), ("val", "test", 40)):
        for number, tar in enumerate(pack(digits[split][:count], folder / "wds", part, 40)):
            os.rename(folder / "wds" / tar.file, folder / f"wds/photos-{part}-{number:04}.tar")
    shutil.copy(teacher_weights, "weights/vit_large.safetensors")
    shutil.copy(ROOT / "docs/explore.png", "photos/new")
    left_out = walk("docs/for-engineers.md", TEAM | SMALLER)
    assert len(left_out) == 3
    assert {"report.html", "codecs.svg", "gallery"} <= set(os.listdir())


def test_teammates_look_at_a_store_train_from_it_and_take_a_part(folder, data_root, store_path):
    shutil.copytree(store_path, "team/stores/photos")
    (folder / "data/digits").symlink_to(data_root / "digits")
    changes = {"--views 0:4": "--views 0:3", "training.epochs=5": "training.epochs=1", "--samples 100": "--samples 10"}
    assert walk("docs/for-teammates.md", TEAM | changes) == []
    assert {"first.html", "gallery-of-mine"} <= set(os.listdir())


def test_researchers_run_a_row_of_a_table(folder, data_root, teacher_weights):
    (folder / "data/digits").symlink_to(data_root / "digits")
    changes = {"views": {"count": 3}, "teacher": {"weights": str(teacher_weights)}, "training": {"epochs": 1}}
    recipe = merged(RECIPE, changes | {"data": {"tars": [2]}, "capture": {"fidelity_rows": 20}})
    recipe["student"] = {"model": "cifar:resnet8"}
    recipe["objectives"] = {name: RECIPE["objectives"][name] for name in ("ce", "wttm")}
    Path("cifar100/resnet56_resnet20").write_text(yaml.safe_dump(recipe))  # files win over packaged recipes
    left_out = walk("docs/for-researchers.md", {"0,1,2,3,4": "0", "--data cifar100/test": "--data digits/test"})
    assert len(left_out) == 1
    assert {"wttm.html", "online.html"} <= set(os.listdir())
    assert len(os.listdir("runs/resnet56_resnet20/students")) == 2


def test_the_loop_of_the_readme_trains_from_a_store(folder, data_root, store_path):
    shutil.copytree(store_path, "stores/photos")
    (folder / "data/photos").symlink_to(data_root / "digits")
    (loop,) = (block for block in blocks("README.md") if block.language == "python")
    names: dict[str, object] = {"student": small(10)}
    exec(compile(loop.text, str(loop), "exec"), names)
    assert isinstance(names["loss"], torch.Tensor)
    assert names["loss"].requires_grad

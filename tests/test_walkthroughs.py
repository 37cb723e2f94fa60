"""The commands of the pages for three readers and of README, in their order, on the digits."""

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
SMALLER = {  # of the engineers' recipe: the digits in place of photographs, and networks for them
    "--split train": "--split train --workers 1",
    "timm:vit_large_patch16_224": "networks:small",
    "dtype: bfloat16": "dtype: float32",
    "top1: 88.1, tolerance: 0.1": "top1: 70, tolerance: 30",
    "mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]": "mean: [0.3, 0.3, 0.3], std: [0.4, 0.4, 0.4]",
    "size: 224, count: 8": "size: 8, scale: [0.7, 1.0], count: 4",
    "views_per_group: 4": "views_per_group: 2, fidelity_rows: 50",
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


@pytest.fixture(scope="module")
def workspace(data_root, tmp_path_factory) -> Path:
    """A folder with what the pages begin with: tars, weights, pictures, and a recipe of the name of a published one."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("wds", "weights", "photos/new", "stores", "cifar100"):
        (folder / name).mkdir(parents=True)
    digits = digits_samples()
    for part, split, count in (("train", "train", 150), ("val", "test", 60)):
        for tar in pack(digits[split][:count], folder / "wds", part, 60):
            number = int(tar.file.removeprefix(f"{part}-").removesuffix(".tar"))
            os.rename(folder / "wds" / tar.file, folder / f"wds/photos-{part}-{number:04}.tar")
    shutil.copy(ROOT / "docs/explore.png", folder / "photos/new")
    (folder / "data").mkdir()
    (folder / "data/photos").symlink_to(folder / "wds")
    (folder / "data/digits").symlink_to(data_root / "digits")
    return folder


@pytest.fixture
def weights(teacher_weights, workspace) -> None:
    shutil.copy(teacher_weights, workspace / "weights/vit_large.safetensors")
    changes = {"views": {"count": 3}, "teacher": {"weights": str(teacher_weights)}, "training": {"epochs": 1}}
    recipe = merged(RECIPE, changes | {"data": {"tars": [0]}, "capture": {"fidelity_rows": 20}})
    objectives = {name: RECIPE["objectives"][name] for name in ("ce", "wttm")}
    (workspace / "cifar100/resnet56_resnet20").write_text(yaml.safe_dump(recipe | {"objectives": objectives}))


def walk(page: str, replaced: dict[str, str]) -> list[str]:
    """Do what a page says, and return the commands that were left out."""
    left_out = []
    for block in blocks(page):
        text = block.text
        for old, new in replaced.items():
            text = text.replace(old, new)
        if block.language == "yaml" and text.startswith("# recipe.yaml"):
            Path("recipe.yaml").write_text(text)
        for line in [] if block.language != "sh" else type(block)(page, block.line, "sh", text).commands():
            if any(line.startswith(f"offline-kd {one}") for one in NOT_RUN):
                left_out.append(line)
            else:
                run_line(line)
    return left_out


def test_engineers_get_from_tars_to_a_student_in_use(workspace, weights, monkeypatch):
    monkeypatch.chdir(workspace)
    text = "".join(block.text for block in blocks("docs/for-engineers.md"))
    assert all(one in text for one in SMALLER), [one for one in SMALLER if one not in text]
    left_out = walk("docs/for-engineers.md", TEAM | SMALLER)
    assert len(left_out) == 3
    assert {"report.html", "codecs.svg", "gallery", "team"} <= set(os.listdir())


def test_the_loop_of_the_readme_trains_from_a_store(workspace, weights, monkeypatch):
    monkeypatch.chdir(workspace)
    (loop,) = (block for block in blocks("README.md") if block.language == "python")
    names: dict[str, object] = {"student": small(10)}
    exec(compile(loop.text, str(loop), "exec"), names)
    assert isinstance(names["loss"], torch.Tensor)
    assert names["loss"].requires_grad


def test_teammates_look_at_a_store_train_from_it_and_take_a_part(workspace, weights, monkeypatch):
    monkeypatch.chdir(workspace)
    shutil.copytree("team/stores/photos", "stores/elsewhere")  # their address, whatever this page does
    left_out = walk("docs/for-teammates.md", TEAM | {"--views 0:4": "--views 0:2", "epochs=5": "epochs=1"})
    assert left_out == []
    assert {"first.html", "gallery-of-mine"} <= set(os.listdir())


def test_researchers_run_a_row_of_a_table(workspace, weights, monkeypatch):
    monkeypatch.chdir(workspace)
    left_out = walk("docs/for-researchers.md", {"0,1,2,3,4": "0,1", "--data cifar100/test": "--data digits/test"})
    assert len(left_out) == 1
    assert {"wttm.html", "online.html"} <= set(os.listdir())
    assert len(os.listdir("runs/resnet56_resnet20/students")) == 4

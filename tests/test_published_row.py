"""A whole row of a published table by one command, on made-up images in the official layout of CIFAR-100."""

import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, invoke
from torchvision import datasets

from offline_kd.models.networks import build

SMALLER = [  # what a test has no time for; everything else is as in the recipe
    "teacher.expected=null",
    "views.count=2",
    "training.epochs=2",
    "capture.fidelity_rows=20",
    "objectives.wttm_crd.2.negatives=64",
]


@pytest.fixture
def official(tmp_path, monkeypatch) -> Path:
    """A folder with `cifar-100-python` of 300 and 200 images, whose md5s stand in the place of the published ones."""
    folder, rng, md5 = tmp_path / "own" / datasets.CIFAR100.base_folder, np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    names = yaml.safe_load((ROOT / "data_manifest.yaml").read_text())["datasets"]["cifar100"]["classes"]
    contents: dict[str, dict[str, object]] = {"meta": {"fine_label_names": names}}
    for split, count in (("train", 300), ("test", 200)):
        labels = [index % 100 for index in range(count)]
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[split] = {"data": pixels, "fine_labels": labels}
    for name, content in contents.items():
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        md5[name] = hashlib.md5(raw).hexdigest()
    for split in ("train", "test"):
        monkeypatch.setattr(datasets.CIFAR100, f"{split}_list", [[split, md5[split]]])
    about = {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]}
    monkeypatch.setattr(datasets.CIFAR100, "meta", about)
    return folder.parent


@pytest.mark.slow
def test_one_command_makes_a_row_of_the_table_with_the_published_numbers_beside(official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed = invoke("data", "pack", "cifar100", "--source", official, "--out", "data/cifar100")
    assert packed.exit_code == 0, packed.output
    Path("manifest.yaml").write_text(packed.stdout)
    checkpoint = Path("checkpoints/resnet56_vanilla/ckpt_epoch_240.pth")  # as RepDistiller writes it
    checkpoint.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({"epoch": 240, "model": build("cifar:resnet56", 100).state_dict()}, checkpoint)
    options = [word for setting in SMALLER for word in ("--set", setting)]
    done = invoke("run", "cifar100/resnet56_resnet20", "--manifest", "manifest.yaml", "--out", "runs/row", *options)
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith("│")]
    published = {"teacher": "72.34", "ce": "69.06", "kd": "70.66 ± 0.24", "ttm": "71.83 ± 0.16", "wttm": "71.92 ± 0.40"}
    published |= {"wttm_crd": "72.20 ± 0.15", "wttm_itrd": "72.16 ± 0.28", "dtkd": ""}
    found = {re.split(r"[│\s]+", line)[1]: line for line in table}
    assert set(found) == set(published) - {"teacher"}  # whose weights are given
    assert all(f"│ {published[name]:>12} │" in line for name, line in found.items()), done.stdout
    assert Path("runs/row/report.html").is_file()

"""The kind of view that `docs/extending/view_kind.md` adds, through the command line."""

import pytest
import torch
import yaml
from conftest import ROOT, make_recipe
from extending import extended, run_extended

from offline_kd.models.networks import build


@pytest.mark.slow
def test_a_new_kind_of_view_is_captured_trained_with_and_named_where_kinds_are(tmp_path, data_root):
    package = extended("view_kind", tmp_path)
    weights, file, store = tmp_path / "teacher.pt", tmp_path / "recipe.yaml", tmp_path / "store"
    torch.manual_seed(0)
    torch.save(build("cifar:resnet8", 10).state_dict(), weights)
    recipe = make_recipe().model_dump(mode="json", exclude_none=True)
    recipe |= {
        "teacher": {"model": "cifar:resnet8", "weights": str(weights)},
        "student": {"model": "cifar:resnet8"},
        "views": {"kind": "flip_only"},
        "capture": {"fidelity_rows": 100},
    }
    file.write_text(yaml.safe_dump(recipe))
    where = ["--manifest", ROOT / "data_manifest.yaml", "--data-root", data_root]

    done = run_extended(package, "cache-teacher", file, "--store", store, *where)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 per image" in (store / "README.md").read_text()
    assert "flip_only" in (store / "README.md").read_text()

    run = ["--out", tmp_path / "run", "--objective", "kd", "--set", "training.epochs=2"]
    done = run_extended(package, "distill", file, "--store", store, *run, *where)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()

    run = ["--out", tmp_path / "plain", "--set", "training.epochs=1"]
    done = run_extended(package, "train", file, *run, *where)
    assert done.returncode == 0, done.stderr

    wrong = run_extended(package, "cache-teacher", file, "--store", store, "--set", "views={kind: flip_onyl}", *where)
    assert wrong.returncode == 1
    assert "Did you mean 'flip_only'?" in wrong.stderr
    wrong = run_extended(package, "cache-teacher", file, "--store", store, "--set", "views={kind: qqqq}", *where)
    assert "Known: center_crop, flip_only, imported, none, pad_crop_flip, random_resized_crop." in wrong.stderr

"""The objective that `docs/extending/objective.md` adds, through the command line."""

import json
import shutil

import pytest
from extending import ROOT, extended, run_extended


@pytest.mark.slow
def test_a_new_objective_is_trained_listed_refused_described_and_measured(recipe_file, where, tmp_path):
    (tmp_path / "package").mkdir()
    package, store = extended("objective", tmp_path / "package"), tmp_path / "store"
    shutil.copy(ROOT / "tests" / "networks.py", package)  # the recipe names a network of it
    few = ["--set", "data.tars=[0]", "--set", "views.count=3", "--set", "capture.fidelity_rows=20"]
    few += ["--set", "objectives.mse=[{term: ce}, {term: mse, weight: 0.01}]", "--set", "training.epochs=1", *where]

    capture = run_extended(
        package, "cache-teacher", recipe_file, "--store", store, *few, "--set", "capture.codec.name=f16"
    )
    assert capture.returncode == 0, capture.stderr
    for card in ("README.md", "index.html"):
        assert "dist, nkd, mse" in (store / card).read_text()

    out = ["--objective", "mse", "--out"]
    done = run_extended(package, "distill", recipe_file, "--store", store, *out, tmp_path / "run", *few)
    assert done.returncode == 0, done.stderr
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["loss_mse"] > 0

    listed = run_extended(package, "distill", "--help").stdout
    assert "mse" in listed
    assert "Match the logits themselves, offset included." in " ".join(listed.split())

    bench = run_extended(package, "bench", "codecs", store, "--rows", 200, "--codec", "{name: int}", "--json", *where)
    assert bench.returncode == 0, bench.stderr
    (measured,) = json.loads(bench.stdout)
    assert 0 < measured["change"]["mse"] < 0.1

    codec = ["--set", "capture.codec={name: topk, k: 4}"]
    run_extended(package, "cache-teacher", recipe_file, "--store", tmp_path / "topk", *few, *codec)
    assert "| serves | kd, ttm |" in (tmp_path / "topk" / "README.md").read_text()
    refusal = run_extended(package, "distill", recipe_file, "--store", tmp_path / "topk", *out, tmp_path / "no", *few)
    assert refusal.returncode == 1
    assert "does not serve term 'mse', which it cannot have of the largest logits alone" in refusal.stderr

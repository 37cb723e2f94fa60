"""Several processes train one student as one process does: real ones, started by torchrun."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CPU, ROOT, make_recipe
from rank_steps import steps_of

from offline_kd.cache.pipeline import cache_teacher

OBJECTIVES = {
    "ce": [{"term": "ce"}],
    "kd": [{"term": "ce", "weight": 0.1}, {"term": "kd", "weight": 0.9, "temperature": 4}],
    "wttm": [{"term": "ce"}, {"term": "wttm", "weight": 2, "gamma": 0.3}],
    "dtkd": [{"term": "ce"}, {"term": "dtkd", "temperature": 4, "warmup_epochs": 5}],
    "dist": [{"term": "ce"}, {"term": "dist", "beta": 1, "gamma": 2, "temperature": 2}],
    "others": [
        {"term": "nkd", "gamma": 1.5, "temperature": 1},
        {"term": "dkd", "alpha": 1, "beta": 2, "temperature": 4, "weight": 0.1},
    ],
    "letkd1": [{"term": "ce"}, {"term": "decisions", "decisions": "last"}],
    "letkd2": [{"term": "ce"}, {"term": "subclass_decisions", "decisions": "first", "after": "body.4"}],
    "decisions_alone": [{"term": "decisions", "decisions": "last"}],
}
DECISIONS = {
    "last": {"kind": "templates", "module": "body.5", "templates": 16, "top": 2, "iterations": 5},
    "first": {"kind": "subclasses", "module": "body.5", "per_class": 2, "iterations": 5},
}


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def made(teacher_weights, manifest, roots, data_root, tmp_path_factory) -> dict[str, str]:
    """A recipe with every kind of term and a tenth of the labels, and a store of the smallest tar."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = make_recipe(
        data={"tars": [2], "labelled_fraction": 0.1},
        teacher={"weights": str(teacher_weights)},
        views={"count": 3},
        capture={"decisions": DECISIONS, "fidelity_rows": 20},
        objectives=OBJECTIVES,
    )
    cache_teacher(recipe, manifest, roots, folder / "store", CPU)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    where = {"manifest": str(ROOT / "data_manifest.yaml"), "root": str(data_root)}
    return {"recipe": str(folder / "recipe.yaml"), "store": str(folder / "store"), **where}


def compared(cases: list[dict[str, object]], folder: Path, ranks: int = 2) -> None:
    """What ranks do is what one process does: the same rows at every step, and the losses of all of them."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = torchrun(ranks, ROOT / "tests" / "rank_steps.py", folder / "cases.json", folder / "found.json")
    assert done.returncode == 0, done.stderr
    for case, found in zip(cases, json.loads((folder / "found.json").read_text()), strict=True):
        expected = steps_of(**case)
        assert [one["ids"] for one in found] == [one["ids"] for one in expected]
        worst = 0.0
        for one, other in zip(found, expected, strict=True):
            worst = max([worst, *(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))])
        print(case["objective"], "uneven" if case["uneven"] else "", "worst", worst)
        assert worst < 1e-5, case


def test_ranks_with_any_share_of_the_batch_have_the_losses_of_one_process(made, tmp_path):
    cases = [made | {"objective": name, "steps": 50, "uneven": True, "sets": []} for name in OBJECTIVES]
    compared([*cases, made | {"objective": "kd", "steps": 50, "uneven": False, "sets": []}], tmp_path)

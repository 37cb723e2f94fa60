"""Weights of terms by epoch: which weight when, what is trained while it is 0, and which schedules are refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, invoke, make_recipe, refused
from safetensors.torch import load_file

from offline_kd.distill.tracking import figures
from offline_kd.objectives.kd import KD
from offline_kd.recipe import dump_recipe, load_recipe

SOFT_HARD_SOFT = {0: 1, 0.4: 0, 0.8: 1}


def weights(epochs: int, **fields: object) -> list[float]:
    term = KD.model_validate({"term": "kd", "temperature": 4, **fields})
    return [term.weight_in(epoch, epochs) for epoch in range(epochs)]


def test_a_factor_holds_from_its_share_of_the_epochs_until_the_next_one():
    assert weights(10, schedule=SOFT_HARD_SOFT) == [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert weights(4, schedule=SOFT_HARD_SOFT) == [1, 1, 0, 0]  # epochs begin at 0, 0.25, 0.5 and 0.75
    assert weights(30, schedule={0.1: 5, 0: 2})[2:4] == [2, 5]  # in whatever order, and 3 / 30 is a tenth
    assert weights(1, schedule=SOFT_HARD_SOFT) == [1]


def test_weight_warm_up_and_schedule_multiply():
    found = weights(5, weight=3, warmup_epochs=2, schedule={0: 1, 0.2: 0.5, 0.6: 0})
    assert found == pytest.approx([1.5, 1.5, 1.5, 0, 0])
    assert weights(3, weight=3) == [3, 3, 3]


def test_a_recipe_with_a_schedule_is_read_back_and_one_without_does_not_mention_it(tmp_path):
    assert "schedule:\n    0" not in dump_recipe(make_recipe())
    assert "schedule" not in make_recipe().model_dump(mode="json")["objectives"]["kd"][1]
    scheduled = make_recipe(objectives={"kd": [{"term": "kd", "temperature": 4, "schedule": SOFT_HARD_SOFT}]})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(scheduled))
    assert load_recipe(tmp_path / "recipe.yaml") == scheduled
    assert scheduled.objectives["kd"][0].schedule == SOFT_HARD_SOFT


def test_a_term_that_a_schedule_switches_off_trains_nothing_and_its_weight_is_told(
    recipe_file, where, store_path, tmp_path
):
    command = ["distill", recipe_file, "--objective", "kd", "--store", store_path, "--set", "data.tars=[2]", *where]
    off = invoke(*command, "--set", "objectives.kd.1.schedule={0: 0}", "--out", tmp_path / "off")
    assert off.exit_code == 0, off.output
    alone = invoke(*command, "--set", "objectives.kd=[{term: ce, weight: 0.1}]", "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    ours, others = (load_file(tmp_path / name / "student.safetensors") for name in ("off", "alone"))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in others.items())

    half = invoke(*command, "--set", "objectives.kd.1.schedule={0: 1, 0.5: 0}", "--out", tmp_path / "half")
    assert half.exit_code == 0, half.output
    lines = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    assert [line["weight_kd"] for line in lines] == pytest.approx([0.9, 0])
    assert all("weight_ce" not in line and line["loss_kd"] > 0 for line in lines)
    assert figures(lines[0])["train/weight/kd"] == pytest.approx(0.9)
    assert (
        "finished already"
        in invoke(*command, "--set", "objectives.kd.1.schedule={0.5: 0.0, 0.0: 1.0}", "--out", tmp_path / "half").stderr
    )  # the same schedule in other words
    message = refused(*command, "--out", tmp_path / "half")
    assert "holds a run of another recipe" in message


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("{0.5: 1}", "what counts before 0.5 of the epochs? Add a factor from 0 on"),
        ("{0: 1, 40: 0}", "less than 1"),
        ("{0: -1}", "greater than or equal to 0"),
        ("{0: 1, half: 0}", "valid number"),
        ("{0: .nan}", "finite number"),
        ("[1, 0]", "valid dictionary"),
    ],
)
def test_schedules_that_cannot_be_are_refused_in_one_line(recipe_file, tmp_path, schedule, said):
    text = f"objectives.kd.1.schedule={schedule}"
    message = refused("distill", recipe_file, "--objective", "kd", "--out", tmp_path / "out", "--set", text)
    assert said in message
    assert "schedule" in message
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_soft_hard_soft_has_one_kind_of_target_in_every_epoch():
    recipe = load_recipe(Path(ROOT / "pipelines/hald.yaml"))
    kd, ce = recipe.objectives["hald"]
    epochs = recipe.training.epochs
    both = [(kd.weight_in(epoch, epochs), ce.weight_in(epoch, epochs)) for epoch in range(epochs)]
    assert both == [(1, 0)] * 12 + [(0, 1)] * 12 + [(1, 0)] * 6
    assert recipe.data.validation == 0.1

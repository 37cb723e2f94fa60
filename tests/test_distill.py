"""Offline equals online, resumed equals uninterrupted, and wrong recipes are named."""

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, RECIPE, ROOT, RUN_FILES, invoke, make_recipe, merged, refused
from safetensors.torch import load_file
from torch.nn import functional as F

from offline_kd.cli.bench_drift import measure_drift
from offline_kd.data.decoding import decode_image
from offline_kd.data.packing import encode_png, pack
from offline_kd.data.tars import read_tar
from offline_kd.distill.optimisation import learning_rate
from offline_kd.distill.teacher_signal import TeacherSignal
from offline_kd.distill.training import distill
from offline_kd.objectives import dkd, nkd
from offline_kd.objectives.ce import CE
from offline_kd.objectives.dkd import DKD
from offline_kd.objectives.dtkd import DTKD
from offline_kd.objectives.nkd import NKD
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import load_recipe
from offline_kd.store.opening import open_store
from offline_kd.support.errors import RecipeError
from offline_kd.support.files import file_sha256


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_offline_training_is_online_training(steps, recipe, manifest, roots):
    """The published losses with all views: f32 ends where the live teacher ends."""
    drifts = measure_drift(recipe, manifest, roots, steps, CPU)
    assert set(drifts) == {"kd", "ttm", "wttm", "dtkd"}
    for objective, by_codec in drifts.items():
        assert list(by_codec) == ["online", "f32", "f16", "int8", "other order"]
        distance = {name: part["distance"] for name, part in by_codec.items()}
        assert distance["f32"] < 1e-4, objective
        # Training amplifies the codecs' errors; how far is reported by `bench --drift`, not promised.
        assert distance["f32"] < min(distance["f16"], distance["int8"])
        assert max(distance["f16"], distance["int8"]) < distance["other order"]


def test_the_online_command_runs_the_same_loop(recipe_file, where, store_path, tmp_path):
    common = ("--objective", "wttm", *where)
    assert invoke("distill", recipe_file, "--store", store_path, "--out", tmp_path / "a", *common).exit_code == 0
    assert invoke("distill", recipe_file, "--online", "--out", tmp_path / "b", *common).exit_code == 0
    store_run, live_run = (json.loads((tmp_path / run / "result.json").read_text()) for run in "ab")
    assert (store_run["targets"], live_run["targets"]) == ("store", "online")
    assert store_run["store_digest"] == open_store(store_path).digest
    offline, online = load_file(tmp_path / "a/student.safetensors"), load_file(tmp_path / "b/student.safetensors")
    for name in online:
        torch.testing.assert_close(offline[name], online[name], rtol=1e-3, atol=1e-4)


def test_a_run_directory_holds_what_the_design_says(recipe_file, where, store_path, tmp_path):
    out = tmp_path / "run"
    assert (
        invoke("distill", recipe_file, "--store", store_path, "--out", out, "--objective", "kd", *where).exit_code == 0
    )
    assert {file.name for file in out.iterdir()} == {*RUN_FILES, "teacher_evaluation.safetensors", "run.lock"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    result = json.loads((out / "result.json").read_text())
    assert result["top1"] == lines[-1]["top1"]
    assert result["best_top1"] == max(line["top1"] for line in lines)
    assert result["steps"] == 2 * math.ceil(1438 / 64)
    assert result["student_sha256"] == file_sha256(out / "student.safetensors")
    assert load_recipe(out / "recipe.yaml") == load_recipe(recipe_file)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_student(recipe_file, where, store_path, tmp_path):
    """kill -9 in the middle of training, twice; only whole epochs count."""
    options = ["--store", str(store_path), "--objective", "dtkd", "--set", "training.epochs=25", *where]
    assert invoke("distill", recipe_file, "--out", tmp_path / "whole", *options).exit_code == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "offline_kd", "distill", str(recipe_file), "--out", str(out), *options]
    for epochs in (3, 8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        metrics = out / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < epochs):
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.communicate()
        assert not (out / "result.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch" in done.stderr
    assert file_sha256(out / "student.safetensors") == file_sha256(tmp_path / "whole" / "student.safetensors")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 26))


def test_another_run_is_not_mixed_into_a_run_directory(recipe_file, where, store_path, tmp_path, monkeypatch):
    command = ("distill", recipe_file, "--store", store_path, "--out", tmp_path / "run", *where)
    assert invoke(*command, "--objective", "kd").exit_code == 0
    assert "holds a run of another recipe" in refused(*command, "--objective", "ttm")
    assert "holds a run of another recipe" in refused(*command, "--objective", "kd", "--seed", "7")
    assert "finished already" in invoke(*command, "--objective", "kd").stderr
    # Nor a run of earlier code, whose order was another.
    monkeypatch.setattr("offline_kd.distill.results.ORDER_VERSION", 1)
    assert "in another order" in refused(*command, "--objective", "kd")


def test_seeds_change_the_student_and_nothing_else_does(recipe, manifest, roots, store_path, tmp_path):
    students = [
        distill(recipe, manifest, roots, tmp_path / str(run), CPU, objective="kd", seed=seed, stores=[str(store_path)])
        for run, seed in enumerate((0, 0, 1))
    ]
    assert students[0].student_sha256 == students[1].student_sha256 != students[2].student_sha256


def test_divergence_is_a_message(recipe_file, where, store_path, tmp_path):
    options = ("--store", store_path, "--out", tmp_path / "run", "--objective", "kd", *where)
    message = refused("distill", recipe_file, *options, "--set", "training.optimizer.lr=1e12")
    assert "training diverged" in message


def test_an_objective_with_a_teacher_needs_one(recipe_file, where, tmp_path):
    out = ("--out", tmp_path / "run", *where)
    assert "give --store, or --online" in refused("distill", recipe_file, "--objective", "kd", *out)
    assert "pick one with --objective: ce, dtkd, kd" in refused("distill", recipe_file, *out)
    assert "Did you mean 'wttm'?" in refused("distill", recipe_file, "--objective", "wtm", *out)


def test_a_store_of_other_views_or_classes_is_refused(recipe_file, where, store_path, tmp_path, manifest):
    command = ("distill", recipe_file, "--store", store_path, "--objective", "kd", "--out", tmp_path / "run")
    message = refused(*command, *where, "--set", "views.padding=2")
    assert "views.padding: 1 in the store, 2 in the recipe" in message
    content = yaml.safe_load((ROOT / "data_manifest.yaml").read_text())
    content["datasets"]["digits"]["classes"].append("ten")
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(content))
    message = refused(*command, "--manifest", tmp_path / "more.yaml", *where[2:])
    assert "has targets for 10 classes, dataset 'digits' has 11" in message
    content["datasets"]["digits"]["classes"] = ["1", "0", *content["datasets"]["digits"]["classes"][2:10]]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(content))
    message = refused(*command, "--manifest", tmp_path / "more.yaml", *where[2:])
    assert "class 0 is '0', in dataset 'digits' it is '1'" in message


# ---- terms -----------------------------------------------------------------------------------------------------------


def test_an_image_that_changed_after_the_capture_is_found_with_and_without_a_store(
    recipe_file, data_root, store_path, tmp_path
):
    """With one, every image is compared with what the teacher saw, so that tars need no sha256 of their own."""
    shutil.copytree(data_root, tmp_path / "data")
    (changed,) = (tmp_path / "data").rglob("train-000001.tar")
    samples, _ = read_tar(changed)
    samples[7] = replace(samples[7], encoded=encode_png(255 - np.asarray(decode_image(samples[7].encoded))))
    pack(samples, tmp_path / "packed", "train", len(samples))
    (tmp_path / "packed/train-000000.tar").replace(changed)
    common = ("--objective", "kd", "--data-root", tmp_path / "data")
    message = refused("distill", recipe_file, "--store", store_path, "--out", tmp_path / "a", *common)
    assert "train-000001.tar: sha256 is" in message
    content = yaml.safe_load((ROOT / "data_manifest.yaml").read_text())
    for tar in content["datasets"]["digits"]["splits"]["train"]["tars"]:
        tar.pop("sha256")
    (tmp_path / "unproven.yaml").write_text(yaml.safe_dump(content))
    unproven = (*common, "--manifest", tmp_path / "unproven.yaml")
    message = refused("distill", recipe_file, "--store", store_path, "--out", tmp_path / "a", *unproven)
    assert f"train-000001.tar: the image of sample '{samples[7].key}' (and 0 more) has sha256" in message
    plain = ("--objective", "ce", "--data-root", tmp_path / "data")
    message = refused("distill", recipe_file, "--out", tmp_path / "b", *plain)
    assert "train-000001.tar: sha256 is" in message


def test_hidden_labels_do_not_enter_the_cross_entropy():
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, -1, 2, -1, -1, 3])
    known = labels >= 0
    expected = F.cross_entropy(z[known], labels[known])
    assert CE(term="ce")(z, TeacherSignal(), LossBatch(labels)).item() == pytest.approx(expected.item())
    assert CE(term="ce")(z, TeacherSignal(), LossBatch(torch.full((6,), -1))).item() == 0
    smooth = F.cross_entropy(z[known], labels[known], label_smoothing=0.1)
    assert CE(term="ce")(z, TeacherSignal(), LossBatch(labels, label_smoothing=0.1)).item() == pytest.approx(
        smooth.item()
    )


def test_terms_that_use_a_label_take_the_teachers_where_it_is_hidden():
    generator = torch.Generator().manual_seed(1)
    z_s, z_t = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    labels = torch.tensor([0, -1, 2, -1, 1])
    filled = torch.where(labels >= 0, labels, z_t.argmax(1))
    one = DKD(term="dkd", alpha=1, beta=2, temperature=4)(z_s, TeacherSignal(z_t), LossBatch(labels))
    assert one == dkd(z_s, z_t, filled, alpha=1, beta=2, temperature=4)
    other = NKD(term="nkd", gamma=1.5, temperature=1)(z_s, TeacherSignal(z_t), LossBatch(labels))
    assert other == nkd(z_s, z_t, filled, gamma=1.5, temperature=1)


def test_warm_up_counts_epochs_from_one():
    term = DTKD(term="dtkd", weight=3, temperature=4, warmup_epochs=20)
    assert [term.weight_in(epoch, 300) for epoch in (0, 4, 18, 19, 200)] == pytest.approx([0.15, 0.75, 2.85, 3, 3])
    assert CE(term="ce", weight=0.1).weight_in(0, 1) == 0.1


def test_the_step_schedule_has_exactly_150_epochs_at_the_first_rate():
    training = load_recipe(ROOT / "pipelines/cifar100/resnet56_resnet20.yaml").training
    rates = [learning_rate(training, epoch + 0.5) for epoch in range(240)]
    assert rates[:150] == [0.05] * 150
    assert rates[150:180] == pytest.approx([0.005] * 30)
    assert rates[180:210] == pytest.approx([0.0005] * 30)
    assert rates[210:] == pytest.approx([0.00005] * 30)


def test_the_cosine_schedule_warms_up_and_ends_where_it_is_told():
    schedule = {"name": "cosine", "warmup_epochs": 2, "final_fraction": 0.1}
    training = make_recipe(training={"epochs": 10, "schedule": schedule}).training
    assert learning_rate(training, 1.0) == pytest.approx(0.025, rel=0.01)
    assert learning_rate(training, 2.0) == pytest.approx(0.05)
    assert learning_rate(training, 6.0) == pytest.approx(0.05 * 0.55)
    assert learning_rate(training, 10.0) == pytest.approx(0.005)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trianing": {}}, "unknown field 'trianing'. Did you mean 'training'?"),
        ({"training": {"batchsize": 3}}, "unknown field 'training.batchsize'. Did you mean 'batch_size'?"),
        ({"views": {"kind": "pad_crop"}}, "unknown name 'pad_crop'. Did you mean 'pad_crop_flip'?"),
        ({"objectives": {"x": [{"term": "wtm", "gamma": 1}]}}, "unknown name 'wtm'. Did you mean 'wttm'?"),
        ({"objectives": {"x": [{"term": "kd", "temprature": 4}]}}, "Did you mean 'temperature'?"),
        ({"objectives": {"x": [{"term": "kd", "temperature": 0}]}}, "greater than 0, got 0"),
        ({"training": {"epochs": "many"}}, "'training.epochs': Input should be a valid integer"),
        ({"capture": {"codec": {"name": "f166"}}}, "unknown name 'f166'. Did you mean 'f16'?"),
    ],
)
def test_recipe_mistakes_are_named_with_the_nearest_right_name(change, message, tmp_path, where):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(merged(RECIPE, change)))
    assert message in refused("run", file, "--out", tmp_path / "out", *where)


def test_recipes_extend_others_and_options_override_both(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    over = {"extends": "base.yaml", "name": "child", "training": {"epochs": 9}, "capture": {"codec": {"name": "int"}}}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(over))
    child = load_recipe(tmp_path / "child.yaml", ["training.batch_size=32", "objectives.kd.1.temperature=2"])
    assert (child.name, child.training.epochs, child.training.batch_size) == ("child", 9, 32)
    assert child.objectives["kd"][1].temperature == 2
    assert child.capture.codec.name == "int"
    assert child.training.optimizer.lr == 0.05
    for name, content, message in (
        ("loop", {"extends": "loop.yaml"}, "extends itself"),
        ("gone", {"extends": "nowhere.yaml"}, "no such recipe"),
        ("list", [1], "a recipe is a mapping"),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / f"{name}.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not readable as YAML"):
        load_recipe(tmp_path / "broken.yaml")
    for override, message in (("epochs", "write path.to.field=value"), ("name.x=1", "has no fields")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "child.yaml", [override])


RECIPES = sorted(
    path
    for path in (ROOT / "pipelines").rglob("*.yaml")
    if path.name != "base.yaml" and path.parent.name != "cluster"  # jobs, no recipes
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_can_be_read_and_built(path: Path, manifest):
    from offline_kd.models.networks import build, parameter_count

    recipe = load_recipe(path)
    # Users enter their own ImageNet, and their own pictures, into the manifest.
    known = manifest.datasets.get(recipe.data.dataset, manifest.dataset("imagenet_sample"))
    teacher = recipe.teacher.model or manifest.teachers[recipe.teacher.weights].model
    assert parameter_count(build(teacher, len(known.classes))) > 0
    assert parameter_count(build(recipe.student.model, len(known.classes))) > 0
    assert path.read_text().startswith("# ")
    assert f" {path.relative_to(ROOT / 'pipelines').with_suffix('')} --" in path.read_text()


def test_the_published_pairs_have_their_published_hyperparameters():
    """Three rows of the appendix of arXiv:2402.11148 and of DTKD's configs."""

    def pair(name):
        return load_recipe(ROOT / f"pipelines/cifar100/{name}.yaml").objectives

    assert len([path for path in RECIPES if path.parent.name == "cifar100"]) == 13
    for name, ttm, wttm, weights in (
        ("wrn40_2_wrn16_2", (0.1, 101), (0.1, 4), (3, 1)),
        ("resnet56_resnet20", (0.3, 7), (0.3, 1.5), (1, 0.5)),
        ("wrn40_2_shufflenetv1", (0.3, 8), (0.3, 3), (2, 0.5)),
        ("resnet32x4_shufflenetv2", (0.4, 40), (0.4, 16), (3, 1)),
    ):
        terms = pair(name)
        assert (terms["ttm"][1].gamma, terms["ttm"][1].weight) == ttm
        assert (terms["wttm"][1].gamma, terms["wttm"][1].weight) == wttm
        assert (terms["dtkd"][1].weight, terms["dtkd"][2].weight) == weights
        assert (terms["kd"][0].weight, terms["kd"][1].weight, terms["kd"][1].temperature) == (0.1, 0.9, 4)


def test_wttm_with_features_has_its_published_hyperparameters():
    """Of arXiv:2402.11148: gamma, beta and mu of both sums, what belongs to ITRD, and what they reached."""
    for name, crd, itrd, alpha, information, reached in (
        ("resnet56_resnet20", (0.3, 0.6), (0.5, 5), 1.01, 1, (72.20, 72.16)),
        ("wrn40_2_wrn40_1", (0.1, 2), (0.4, 0.08), 1.01, 1, (74.94, 75.34)),
        ("vgg13_vgg8", (0.2, 4), (0.1, 0.5), 1.01, 1, (74.71, 75.13)),
        ("resnet50_mobilenetv2", (0.3, 3), (0.2, 0.02), 1.5, 0, (70.84, 71.56)),
        ("resnet32x4_shufflenetv2", (0.4, 12), (0.4, 0.8), 1.5, 1, (77.04, 77.68)),
    ):
        recipe = load_recipe(ROOT / f"pipelines/cifar100/{name}.yaml")
        (_, wttm, one), (_, other_wttm, other) = (recipe.objectives[sum_] for sum_ in ("wttm_crd", "wttm_itrd"))
        assert ((wttm.gamma, wttm.weight), (other_wttm.gamma, other_wttm.weight)) == (crd, itrd)
        assert (one.weight, one.width, one.negatives, one.temperature, one.momentum) == (0.8, 128, 16384, 0.07, 0.5)
        assert (other.weight, other.alpha, other.correlation_weight, other.information_weight) == (
            1,
            alpha,
            2,
            information,
        )
        assert tuple(recipe.published.top1[sum_][0] for sum_ in ("wttm_crd", "wttm_itrd")) == reached

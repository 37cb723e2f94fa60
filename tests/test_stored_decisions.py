"""Decisions through the store: what was decided comes back, with the teacher's own templates, and trains students."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, ROOT, invoke, make_recipe, refused

from offline_kd.cache import asking as cache
from offline_kd.cache.pipeline import cache_teacher
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.manifest import Dataset, Split
from offline_kd.data.packing import pack
from offline_kd.data.tars import read_tar
from offline_kd.distill.student import new_student
from offline_kd.distill.teacher_signal import TeacherSignal, live_signal, stored_signal
from offline_kd.distill.training import distill, make_loader, source_of, training_images
from offline_kd.models.taps import TapPoint
from offline_kd.objectives import decisions as decision_loss
from offline_kd.objectives.decisions import Decisions, SubclassTerm
from offline_kd.objectives.term import LossBatch
from offline_kd.recipe import load_recipe
from offline_kd.store.decisions import (
    decide,
)
from offline_kd.store.join import tables_on
from offline_kd.store.opening import open_store
from offline_kd.support.errors import RecipeError, StoreCorrupt

DECISIONS = {
    "last": {"kind": "templates", "module": "body.5", "templates": 48, "top": 4, "iterations": 8},
    "hard": {"kind": "templates", "module": "body.5", "templates": 48, "top": 1, "grid": [2, 2]},
    "first": {"kind": "subclasses", "module": "body.2", "per_class": 3, "components": 9, "grid": [4, 4]},
}
OBJECTIVES = {
    "letkd1": [{"term": "ce"}, {"term": "decisions", "decisions": "last"}],
    "letkd2": [
        {"term": "ce"},
        {"term": "decisions", "decisions": "last", "after": "body.5"},
        {"term": "subclass_decisions", "decisions": "first", "after": "body.4"},
        {"term": "wttm", "weight": 1, "gamma": 0.3},
    ],
    "assigned": [{"term": "ce"}, {"term": "decisions", "decisions": "last", "assignment": "hard"}],
    "wrong_grid": [{"term": "ce"}, {"term": "decisions", "decisions": "hard"}],
}


@pytest.fixture(scope="module")
def letkd(teacher_weights):
    return make_recipe(
        teacher={"weights": str(teacher_weights)},
        capture={"decisions": DECISIONS},
        student={"model_args": {"width": 4}},
        objectives=OBJECTIVES,
    )


@pytest.fixture(scope="module")
def letkd_store(letkd, manifest, roots, tmp_path_factory):
    path = tmp_path_factory.mktemp("letkd") / "store"
    cache_teacher(letkd, manifest, roots, path, CPU)
    return path


@pytest.fixture
def letkd_file(letkd, tmp_path):
    file = tmp_path / "letkd.yaml"
    file.write_text(yaml.safe_dump(letkd.model_dump(mode="json", exclude_none=True)))
    return file


def test_decisions_from_the_store_are_those_of_the_live_teacher(letkd, letkd_store, manifest, roots):
    """Loss against random scores, per location: the store's top 4 against all 48 of the live teacher."""
    store = open_store(letkd_store)
    loader = training_images(letkd, manifest, roots)
    teacher = load_teacher(letkd, manifest, roots, 10, CPU)
    terms = letkd.objectives["letkd2"]
    stream = make_loader(letkd, source_of(letkd, loader, [store], terms), 0, CPU)
    offline, online = stored_signal([store], terms, CPU), live_signal(teacher, letkd, terms, store, CPU)
    centroids = tables_on(store, "last", CPU)["centroids"]
    for epoch in range(0, 9, 4):
        for batch in stream.epoch(epoch):
            stored, live = offline(batch), online(batch)
            assert torch.equal(stored.decisions["first"]["subclass"].long(), live.decisions["first"]["subclass"])
            _, (maps,) = teacher.logits_and_maps(batch.images, [TapPoint(module="body.5")])
            every = decide(maps, centroids, top=48, temperature=1.0)
            scores = torch.randn(len(batch.labels), 48, 4, 4, generator=torch.Generator().manual_seed(epoch))
            probs = stored.decisions["last"]["prob"]
            of_store = per_location(scores, stored.decisions["last"]["id"], probs)
            truncated = decide(maps, centroids, top=4, temperature=1.0)
            of_top = per_location(scores, truncated.ids, truncated.probs)
            assert (of_store - of_top).abs().mean() < 1e-4
            # Four probabilities, each rounded by up to 1/32766, times log p and a score, together up to 15.
            assert (of_store - of_top).abs().max() < 4 / 32766 * 15
            # What was dropped bounds the rest: total variation is exactly the dropped mass.
            of_all = per_location(scores, every.ids, every.probs)
            dropped = truncated.dropped
            reach = (scores.amax(1) - scores.amin(1)) + 2 * np.log(48)
            entropy = -(torch.xlogy(dropped, dropped) + torch.xlogy(1 - dropped, 1 - dropped))
            assert ((of_store - of_all).abs() <= dropped * reach + entropy + 1e-3).all()


@pytest.mark.slow
def test_decisions_of_a_real_teacher_on_photographs_come_back(real_data, manifest, tmp_path):
    """300 CIFAR-10 images, 8 views, the pretrained ResNet-56, 64 templates of its last map."""
    samples = read_tar(real_data / "cifar10" / "train-000000.tar.gz")[0][:300]
    tars = pack(samples, tmp_path / "cifar10", "train", 300)
    classes = manifest.dataset("cifar10").classes
    small = Dataset(folder="cifar10", classes=classes, splits={name: Split(tars=tars) for name in ("train", "test")})
    teachers = {"cifar10_resnet56": manifest.teachers["cifar10_resnet56"].model_copy(update={"expected": None})}
    changed = manifest.model_copy(update={"datasets": {"cifar10": small}, "teachers": teachers})
    about = {"kind": "templates", "module": "layer3", "templates": 64, "iterations": 10}
    recipe = load_recipe(ROOT / "pipelines/cifar10/resnet56_resnet20_letkd.yaml").model_copy(
        update={
            "data": make_recipe(data={"dataset": "cifar10"}).data,
            "capture": make_recipe(capture={"decisions": {"last": about}, "views_per_group": None}).capture,
            "objectives": {"letkd1": [Decisions(term="decisions", decisions="last")]},
        }
    )
    roots = [tmp_path, real_data]
    cache_teacher(recipe, changed, roots, tmp_path / "store", CPU)
    store = open_store(tmp_path / "store")
    teacher = load_teacher(recipe, changed, roots, 10, CPU)
    stream = make_loader(
        recipe,
        source_of(recipe, training_images(recipe, changed, roots), [store], recipe.objectives["letkd1"]),
        0,
        CPU,
    )
    offline = stored_signal([store], recipe.objectives["letkd1"], CPU)
    centroids = tables_on(store, "last", CPU)["centroids"]
    for batch in list(stream.epoch(3))[:2]:
        kept = offline(batch).decisions["last"]
        _, (maps,) = teacher.logits_and_maps(batch.images, [TapPoint(module="layer3")])
        truncated = decide(maps, centroids, top=4, temperature=1.0)
        scores = torch.randn(len(batch.labels), 64, 8, 8, generator=torch.Generator().manual_seed(0))
        of_store = decision_loss(scores, kept["id"], kept["prob"]).item()
        assert of_store == pytest.approx(decision_loss(scores, truncated.ids, truncated.probs).item(), abs=1e-4)
        every = decide(maps, centroids, top=64, temperature=1.0)
        dropped = truncated.dropped.mean().item()
        of_all = decision_loss(scores, every.ids, every.probs).item()
        reach = (scores.amax() - scores.amin()).item() + 2 * np.log(64)
        assert abs(of_store - of_all) <= dropped * reach + 2 * np.sqrt(dropped) + 1e-4


def per_location(scores, ids, probs):
    """`[B, H, W]`, by the very function that training uses."""
    batch, _, height, width = scores.shape
    flat = scores.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
    top = ids.shape[-1]
    values = [
        decision_loss(one[None], i[None], p[None])
        for one, i, p in zip(flat, ids.reshape(-1, 1, 1, top), probs.reshape(-1, 1, 1, top), strict=True)
    ]
    return torch.stack(values).view(batch, height, width)


@pytest.mark.parametrize("objective", ["letkd1", "letkd2", "assigned"])
def test_students_train_from_decisions_as_with_the_live_teacher(objective, letkd_file, letkd_store, where, tmp_path):
    options = ("--store", letkd_store, "--objective", objective, *where)
    assert invoke("distill", letkd_file, "--out", tmp_path / "offline", *options).exit_code == 0
    assert invoke("distill", letkd_file, "--out", tmp_path / "online", "--online", *options).exit_code == 0
    offline, online = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("offline", "online"))
    assert offline["kd_layer_parameters"] > 2 * 48 * 8
    assert offline["parameters"] == online["parameters"]
    one, other = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("offline", "online")
    )
    for name in one[0]:
        if name.startswith("loss_"):
            assert one[-1][name] == pytest.approx(other[-1][name], rel=1e-2)
    assert one[-1]["loss_decisions"] < one[0]["loss_decisions"]


def test_capture_with_decisions_resumes_and_its_digest_covers_the_templates(
    letkd, letkd_store, manifest, roots, tmp_path
):
    again = tmp_path / "again"
    cache_teacher(letkd, manifest, roots, again, CPU)
    assert open_store(again).digest == open_store(letkd_store).digest
    for name in ("manifest.json", "ledger/000001-00003-00006.json", "ledger/templates-first.json"):
        (again / name).unlink()
    cache_teacher(letkd, manifest, roots, again, CPU)
    store = open_store(again)
    assert store.digest == open_store(letkd_store).digest
    assert not list(again.glob("scratch-*"))
    statistics = {name: store.tables_statistics(name) for name in letkd.capture.decisions}
    assert statistics["last"]["vectors"] == 1438 * 16
    assert statistics["last"]["dead"] == 0
    assert 0 < statistics["last"]["utilisation"] <= 1
    fidelity = store.manifest.fidelity[""].decisions
    assert all(part["agreement"] > 0.999 for part in fidelity.values())
    assert 0 < fidelity["last"]["mean_first_probability"] <= 1
    assert 0 <= fidelity["last"]["mean_dropped"] <= fidelity["last"]["max_dropped"] < 1
    assert "decisions 'last'" in (again / "README.md").read_text()
    assert statistics["first"]["components"] == 8  # the tap has 8 channels


def test_decisions_that_are_not_the_teachers_keep_a_store_from_being_finished(
    letkd, letkd_store, manifest, roots, tmp_path, monkeypatch
):
    """A faulty writer that shifts decisions by one sample: every checksum is right, the teacher disagrees."""
    honest = cache.pack

    def shifted(*arguments):
        return {name: values.roll(1, dims=0) for name, values in honest(*arguments).items()}

    monkeypatch.setattr(cache, "pack", shifted)
    with pytest.raises(StoreCorrupt, match=r"of the decisions '.*' are those that the teacher takes again"):
        cache_teacher(letkd, manifest, roots, tmp_path / "store", CPU)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_damaged_templates_are_found(letkd_file, letkd_store, where, tmp_path):
    path = Path(shutil.copytree(letkd_store, tmp_path / "copy"))
    file = path / "targets.zarr/templates/first/table/c/0/0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    message = refused(
        "distill", letkd_file, "--store", path, "--objective", "letkd2", "--out", tmp_path / "run", *where
    )
    assert "templates/first/table/c/0/0: sha256" in message


def test_decision_arrays_are_small(letkd_store):
    """Near the entropy floor: 16 places of log2(48) bits are 11.2 bytes."""
    sizes, rows = open_store(letkd_store).manifest.bytes_by_array, 1438 * 9
    assert sizes["decisions/hard/id"] / rows < 4 * np.log2(48) / 8 * 1.2
    assert "decisions/hard/prob" not in sizes


def test_sub_classes_do_not_give_hidden_labels_away(letkd, letkd_store, manifest, roots):
    term = SubclassTerm(term="subclass_decisions", decisions="first", after="body.4")
    store = open_store(letkd_store)
    table = tables_on(store, "first", CPU)["table"]
    scores = torch.randn(4, 30, 4, 4, requires_grad=True)
    decided = {"subclass": torch.zeros(4, 4, 4, dtype=torch.uint8), "table": table}
    said, logits = TeacherSignal(decisions={"first": decided}), torch.zeros(4, 10)

    def value(labels):
        return term(logits, said, LossBatch(labels, scores={"body.4": scores}))

    value(torch.tensor([3, -1, 5, -1])).backward()
    assert scores.grad[[1, 3]].abs().max() == 0
    assert scores.grad[[0, 2]].abs().max() > 0
    assert value(torch.full((4,), -1)).item() == 0


def test_wrong_decisions_are_messages(letkd_file, letkd_store, recipe_file, store_path, where, tmp_path, letkd):
    out = ("--out", tmp_path / "run", *where)
    with_store = ("distill", letkd_file, "--store", letkd_store, *out)
    message = refused(*with_store, "--objective", "wrong_grid")
    assert "were made on a grid of [2, 2], the student's map behind 'penultimate' is [4, 4]" in message
    message = refused(*with_store, "--objective", "letkd1", "--set", "capture.decisions.last.templates=20")
    assert re.search(r"capture.decisions.last.templates: \d+ in the store, 20 in the recipe", message)
    message = refused("distill", letkd_file, "--store", store_path, "--objective", "letkd1", *out)
    assert "holds no decisions 'last'" in message
    message = refused(*with_store, "--objective", "letkd1", "--set", "objectives.letkd1.1.decisions=lsat")
    assert "Did you mean 'last'?" in message
    message = refused(*with_store, "--objective", "letkd1", "--set", "objectives.letkd1.1.after=body.55")
    assert "no module 'body.55' of the student gives a feature map. Did you mean 'body.5'?" in message
    capture = ("cache-teacher", letkd_file, "--store", tmp_path / "new", *where)
    message = refused(*capture, "--set", "capture.decisions.last.module=body.6x")
    assert "the network has no module 'body.6x'" in message
    message = refused(*capture, "--set", "capture.decisions.last.module=head")
    assert "tap 'head': gives [1, 10], neither a map [B, D, H, W] nor tokens" in message
    message = refused(*capture, "--set", "capture.decisions.last.max_vectors=20", "--set", "data.tars=[2]")
    assert "48 templates from" in message
    with pytest.raises(RecipeError, match="cannot use decisions 'first' of kind 'subclasses'"):
        letkd.decisions_of(letkd.objectives["letkd1"][1].model_copy(update={"decisions": "first"}))
    message = refused("distill", letkd_file, "--online", "--objective", "letkd1", *out)
    assert "give --store beside --online" in message


def test_a_tap_whose_map_changes_its_size_or_is_not_finite_is_refused(letkd_file, teacher_weights, where, tmp_path):
    command = ("cache-teacher", letkd_file, *where, "--store")
    message = refused(*command, tmp_path / "a", "--set", "teacher.model=networks:changing_map")
    assert "gives" in message
    assert "before it gave" in message
    message = refused(*command, tmp_path / "b", "--set", "teacher.model=networks:infinite_map")
    assert "tap 'body.5': features of sample '" in message


def test_kd_layers_inside_and_behind_a_stage_go_together(letkd, manifest, roots):
    """In the order of a recipe the outer layer may come first; it changes the names of what is inside."""
    both = [
        Decisions(term="decisions", decisions="last"),
        SubclassTerm(term="subclass_decisions", decisions="first", after="layer3.0"),
    ]
    deep = letkd.model_copy(
        update={"student": letkd.student.model_copy(update={"model": "cifar:resnet8", "model_args": {}})}
    )
    loader = training_images(deep, manifest, roots)
    student = new_student(deep, loader, 0, CPU, both)
    student.network.train()(torch.randn(2, 3, 8, 8))
    assert student.kd_layers["penultimate"].scores.shape == (2, 48, 2, 2)
    assert student.kd_layers["layer3.0"].scores.shape == (2, 30, 2, 2)
    with pytest.raises(RecipeError, match="two KD layers behind one module"):
        new_student(deep, loader, 0, CPU, [both[0], both[0].model_copy(update={"after": "layer3"})])


def test_an_unsupervised_kd_layer_is_a_weight_of_zero(letkd, letkd_store, manifest, roots, tmp_path):
    terms = [letkd.objectives["letkd1"][0], letkd.objectives["letkd1"][1].model_copy(update={"weight": 0.0})]
    free = letkd.model_copy(update={"objectives": {"free": terms}})
    result = distill(free, manifest, roots, tmp_path / "run", CPU, stores=[str(letkd_store)])
    assert result.kd_layer_parameters > 0
    assert TeacherSignal().decisions == {}


def test_the_inspect_page_shows_views_classes_and_templates(letkd_store, where, tmp_path):
    page = tmp_path / "page.html"
    command = ("store", "inspect", letkd_store, "--out", page, *where, "--key")
    assert invoke(*command, "0000").exit_code == 0
    text = page.read_text()
    assert text.count('<div class="view">') == 8
    assert text.count('class="bar"') == 40
    assert "templates of last over view 0" in text
    assert 1 <= text.split("<h2>Templates of last")[1].split("<h2>")[0].count('class="template"') <= 12
    assert "http" not in text.replace("http-equiv", "")
    assert "holds no sample '12345678'. Keys look like '0000'" in refused(*command, "12345678")


def test_the_command_line_lists_what_can_be_tapped():
    output = invoke("taps", "cifar:resnet8", "--size", "32").stdout
    assert "layer3.0" in output
    assert "64 x 8 x 8" in output
    assert "no network 'cifar:resnt8'" in refused("taps", "cifar:resnt8")

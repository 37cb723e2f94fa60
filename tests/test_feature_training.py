"""Terms on features in the training loop: what they train beside the student, and how a run goes on with it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, invoke, make_recipe, merged, refused
from safetensors.torch import load_file
from students import ended_after
from torch import Tensor, nn

from offline_kd.distill import heads
from offline_kd.distill.chosen_rows import chosen_images
from offline_kd.distill.heads import dataset_rows, row_numbers, with_heads
from offline_kd.distill.judging import Judged
from offline_kd.distill.loop import fit, train_step
from offline_kd.distill.loss import term_weights
from offline_kd.distill.optimisation import make_optimizer
from offline_kd.distill.results import Result, Run
from offline_kd.distill.student import Student, compiled, new_student, with_states
from offline_kd.distill.teacher_signal import TeacherSignal
from offline_kd.distill.training import evaluation_images, make_loader, source_of, training_images
from offline_kd.models.networks import CIFAR, build, classifier_of
from offline_kd.models.taps import TapPoint, put_vector_taps
from offline_kd.recipe import Recipe
from offline_kd.store.opening import open_store
from offline_kd.store.rows import Rows
from offline_kd.support.errors import ModelError, RecipeError, StoreMismatch, TrainingError
from offline_kd.support.files import file_sha256
from offline_kd.support.places import Folder

TERMS = [
    {"term": "ce"},
    {"term": "crd", "features": "made", "width": 8, "negatives": 30},
    {"term": "itrd", "features": "made", "weight": 0.1},
    {"term": "embedding", "features": "made", "student_module": "body.5"},
    {"term": "relational", "features": "map", "weight": 0.01},
]
OPTIONS = {
    "ema": {"decay": 0.9},
    "amp": "float16",
    "accumulate": 2,
    "clip_norm": 5.0,
    "optimizer": {"no_decay": ["bias", "heads.*"]},
    "checkpoint_steps": 2,
}


def recipe_with(terms: Sequence[dict[str, object]] = TERMS, **training: object) -> Recipe:
    data = {"tars": [2], "labelled_fraction": 0.5}
    return make_recipe(data=data, training=training, objectives={"one": list(terms)})


def ask(batch: Rows) -> TeacherSignal:
    """A teacher whose features are some of the pixels; one channel never varies."""
    pixels = batch.images[:, :, ::2, ::2] / 64
    vectors = torch.cat([pixels[:, 0].flatten(1), torch.full((len(batch), 1), 0.1)], dim=1)
    return TeacherSignal(features={"made": vectors, "map": pixels})


def prepared(recipe: Recipe, manifest, roots, out: Path, seed: int = 0):
    images, terms = training_images(recipe, manifest, roots), recipe.objectives["one"]
    loader = make_loader(recipe, source_of(recipe, images), seed, CPU)
    student = with_heads(new_student(recipe, images, seed, CPU, terms), terms, loader, ask)
    return Run(recipe, "one", terms, seed, Folder(out), CPU, "online"), student, loader


def trained(recipe: Recipe, manifest, roots, out: Path) -> Result:
    run, student, loader = prepared(recipe, manifest, roots, out)
    return fit(run, student, loader, Judged(evaluation_images(recipe, manifest, roots)), ask)


def saved(out: Path) -> dict[str, object]:
    return torch.load(out / "last.ckpt", weights_only=True)["beside"]["heads"]


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(manifest, roots, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "run"
    trained(recipe_with(**OPTIONS), manifest, roots, out)
    return out


@pytest.mark.parametrize("steps", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_its_heads_and_memory(finished, manifest, roots, tmp_path, steps):
    with ended_after(steps), pytest.raises(KeyboardInterrupt):
        trained(recipe_with(**OPTIONS), manifest, roots, tmp_path)
    trained(recipe_with(**OPTIONS), manifest, roots, tmp_path)
    for name in ("student.safetensors", "student_ema.safetensors"):
        assert file_sha256(tmp_path / name) == file_sha256(finished / name)
    ours, whole = saved(tmp_path), saved(finished)
    assert set(ours) == set(whole)
    for key, one in whole.items():
        assert torch.equal(ours[key], one) if isinstance(one, Tensor) else ours[key] == one, key
    (last,) = (one["updates"] for key, one in whole.items() if key.endswith("_extra_state"))
    steps_of_run = json.loads((finished / "result.json").read_text())["steps"]
    assert 0 < last <= steps_of_run  # a step in float16 may have been left out


def test_a_student_is_used_without_what_was_trained_beside_it(finished):
    plain = build("networks:small", 10, {"width": 4})
    weights = load_file(finished / "student.safetensors")
    assert set(weights) == set(plain.state_dict())
    result = json.loads((finished / "result.json").read_text())
    assert result["parameters"] == sum(one.numel() for one in plain.parameters())
    heads_of_terms = {key.split(".")[0] for key in saved(finished)}
    assert heads_of_terms == {"1", "2", "3"}
    losses = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"loss_{term['term']}" for term in TERMS} <= set(losses)
    passes = OPTIONS["accumulate"] * result["steps"] // result["epochs"]  # of parts of batches, in an epoch
    assert losses["itrd_dropped"] >= passes


def test_heads_change_no_other_draw_of_a_run(manifest, roots, tmp_path):
    """With terms that count nothing, the student is that of cross-entropy alone."""
    silent = [TERMS[0], *(term | {"weight": 0} for term in TERMS[1:])]
    for name, terms in (("plain", TERMS[:1]), ("silent", silent)):
        trained(recipe_with(terms, epochs=1), manifest, roots, tmp_path / name)
    plain, silent_too = (load_file(tmp_path / name / "student.safetensors") for name in ("plain", "silent"))
    assert all(torch.equal(one, silent_too[key]) for key, one in plain.items())


def test_a_run_does_not_go_on_with_other_rows(manifest, roots, tmp_path, monkeypatch):
    recipe = recipe_with(TERMS[:2], epochs=1)
    trained(recipe, manifest, roots, tmp_path)
    (tmp_path / "result.json").unlink()

    def relabelled(loader):
        rows = dataset_rows(loader)
        return replace(rows, labels=rows.labels.flip(0))

    monkeypatch.setattr(heads, "dataset_rows", relabelled)
    with pytest.raises(TrainingError, match="images or labels of the training split have changed"):
        trained(recipe, manifest, roots, tmp_path)


def test_a_step_that_the_optimizer_leaves_out_is_not_remembered(manifest, roots, tmp_path):
    recipe = recipe_with(amp="float16")
    run, student, loader = prepared(recipe, manifest, roots, tmp_path)
    student = with_states(student, recipe.training, CPU)
    optimizer = make_optimizer(recipe.training, student.network, list(student.heads.values()))
    weights, batches = term_weights(run.terms, 0, 1, CPU), loader.epoch(0)
    memory, updates = student.heads[1].memory_s, []
    for scale, same in ((torch.inf, True), (1.0, False), (torch.inf, True)):
        student.scaler.load_state_dict(student.scaler.state_dict() | {"scale": scale})
        before, batch = memory.clone(), next(batches)
        train_step(run, student, optimizer, batch, ask(batch), weights)
        changed = (memory != before).any(dim=1)
        assert changed.any() != same
        if not same:
            assert set(changed.nonzero().flatten().tolist()) == set(row_numbers(student, batch).tolist())
        updates.append(student.heads[1].updates)
    assert updates == [0, 1, 1]


def test_every_head_is_in_the_group_of_the_student_or_where_patterns_put_it(manifest, roots, tmp_path):
    _, student, _ = prepared(recipe_with(), manifest, roots, tmp_path)
    of_terms = list(student.heads.values())
    (group,) = make_optimizer(recipe_with().training, student.network, of_terms).param_groups
    parameters = [*student.network.parameters(), *(one for head in of_terms for one in head.parameters())]
    assert [id(one) for one in group["params"]] == [id(one) for one in parameters]
    assert group["weight_decay"] == 5e-4
    _, spared = make_optimizer(
        recipe_with(optimizer={"no_decay": ["heads.0.*"]}).training, student.network, of_terms
    ).param_groups
    assert spared["weight_decay"] == 0
    assert [id(one) for one in spared["params"]] == [id(one) for one in of_terms[0].parameters()]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_numbered_by_key_whether_a_store_or_the_images_say_so(recipe, manifest, roots, store_path, tmp_path):
    images = training_images(recipe, manifest, roots)
    by_images, by_store = (
        make_loader(recipe, source_of(recipe, images, stores), 0, CPU) for stores in ([], [open_store(store_path)])
    )
    rows, again = dataset_rows(by_images), dataset_rows(by_store)
    assert rows.fingerprint == again.fingerprint
    assert len(rows.labels) == sum(len(block) for block in images)
    student = Student(nn.Linear(1, 1), {}, row_hashes=rows.key_hash)
    for batch in by_images.epoch(0):
        numbers = row_numbers(student, batch)
        assert (rows.key_hash[numbers.numpy()] == batch.key_hash).all()
        assert torch.equal(rows.labels[numbers], batch.labels)


@pytest.mark.parametrize("strange", [0, 2**64 - 1])
def test_a_sample_that_is_no_row_is_not_remembered_as_another(recipe, manifest, roots, strange):
    images = training_images(recipe, manifest, roots)
    loader = make_loader(recipe, source_of(recipe, images), 0, CPU)
    student = Student(nn.Linear(1, 1), {}, row_hashes=dataset_rows(loader).key_hash)
    batch = next(loader.epoch(0))
    batch.key_hash[3] = strange
    with pytest.raises(StoreMismatch, match=f"1 of {len(batch)} samples of a batch are none of the"):
        row_numbers(student, batch)


def test_rows_that_are_not_trained_on_are_not_remembered(recipe, manifest, roots, store_path):
    data = recipe.data.model_copy(update={"validation": 0.3})
    cut, stores = recipe.model_copy(update={"data": data}), [open_store(store_path)]
    images = chosen_images(cut, training_images(recipe, manifest, roots), stores).trained
    trained_on = sorted(key for block in images for key in block.key_hash.tolist())
    for some in ([], stores):
        rows = dataset_rows(make_loader(cut, source_of(cut, images, some), 0, CPU))
        assert rows.key_hash.tolist() == trained_on


# ---- which features --------------------------------------------------------------------------------------------------


SOME = ("resnet8", "resnet20_a", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2")  # of every family
NETWORKS = [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in CIFAR if name not in SOME)]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_features_of_a_network_give_its_logits_through_its_classifier(name):
    name = f"cifar:{name}"
    network = build(name, 10).eval()
    classifier = network.get_submodule(classifier_of(name, 10))
    vectors = put_vector_taps(network, {None: TapPoint(module=classifier_of(name, 10), at="input")})
    logits = network(torch.randn(2, 3, 32, 32))
    assert vectors[None].shape == (2, classifier.in_features)
    torch.testing.assert_close(classifier(vectors[None]), logits)
    with torch.no_grad():
        seen = vectors[None]
        network(torch.randn(2, 3, 32, 32))
    assert vectors[None] is seen


def test_maps_are_averaged_and_gradients_reach_the_student(manifest, roots, tmp_path):
    network = build("networks:small", 10, {"width": 4})
    vectors = put_vector_taps(network, {"map": TapPoint(module="body.5"), "vector": TapPoint(module="body.6")})
    network(torch.randn(3, 3, 8, 8))
    assert {name: list(one.shape) for name, one in vectors.items()} == {"map": [3, 8], "vector": [3, 128]}
    vectors["map"].sum().backward()
    assert network.body[3].weight.grad.abs().sum() > 0
    assert network.head.weight.grad is None


@pytest.mark.parametrize(
    ("term", "error", "message"),
    [
        ({"term": "itrd", "features": "mde"}, StoreMismatch, "the teacher says nothing of features 'mde'"),
        ({"term": "itrd", "features": "made", "student_module": "bdy.5"}, ModelError, "no module 'bdy.5'"),
        (
            {"term": "embedding", "features": "made", "projection": False},
            RecipeError,
            "the student's features are 128 wide, 'made' of the teacher 17",
        ),
        ({"term": "crd", "features": "made", "width": 2**30}, TrainingError, r"term 'crd': needs [\d,]+ bytes for"),
    ],
)
def test_what_cannot_be_compared_is_one_line(term, error, message, manifest, roots, tmp_path):
    with pytest.raises(error, match=message):
        prepared(recipe_with([term]), manifest, roots, tmp_path)


def test_a_network_without_one_classifier_needs_a_module_named():
    with pytest.raises(ModelError, match="Name a module: `student_module`"):
        classifier_of("networks:no_classes", 10)


def test_a_store_without_features_is_refused_by_the_command_line(recipe, where, store_path, tmp_path):
    import yaml

    content = merged(
        recipe.model_dump(mode="json", exclude_none=True), {"objectives": {"itrd": TERMS[:1] + TERMS[2:3]}}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = ("distill", tmp_path / "recipe.yaml", "--objective", "itrd", "--out", tmp_path / "run", *where)
    assert "'made'" in refused(*command, "--store", store_path)
    assert "crd" in invoke("distill", "--help").output


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"compile": True}, {"amp": True}])
def test_a_compiled_student_has_the_features_of_the_plain_one(options, manifest, roots, tmp_path):
    found = []
    for name, training in (("plain", {}), ("other", options)):
        recipe = recipe_with(TERMS[1:], **training)
        run, student, loader = prepared(recipe, manifest, roots, tmp_path / name)
        student = compiled(student, recipe.training)
        optimizer = make_optimizer(recipe.training, student.network, list(student.heads.values()))
        weights, batches = term_weights(run.terms, 0, 1, CPU), loader.epoch(0)
        values = []
        for _ in range(3):
            batch = next(batches)
            values.append(train_step(run, student, optimizer, batch, ask(batch), weights)[1])
        assert all(one.dtype == torch.float32 for one in student.features.values())
        found.append(torch.stack(values))
    torch.testing.assert_close(*found, rtol=0.02 if "amp" in options else 1e-3, atol=1e-3)

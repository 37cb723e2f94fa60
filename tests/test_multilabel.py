"""Teachers of sigmoids, on images with sets of labels: through the command line, from tars to a report."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import RECIPE as ONE_LABEL
from conftest import invoke, refused
from digit_sets import CLASSES, RECIPE, classes_of, make_digit_sets, write_recipe, write_tar
from documents import blocks
from test_ranks import torchrun

import offline_kd as okd
from offline_kd.data.label_sets import names_in, unpack_sets
from offline_kd.data.packing import digits_samples
from offline_kd.store.opening import open_store
from offline_kd.support.places import place_at


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return make_digit_sets(tmp_path_factory.mktemp("sets") / "data")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """What `offline-kd run` made of it: teacher, store, two students, report."""
    out = tmp_path_factory.mktemp("runs") / "tags"
    result = invoke("run", write_recipe(out.parent / "recipe.yaml"), "--out", out, *data)
    assert result.exit_code == 0, result.stderr
    assert "mAP" in result.output
    assert "top-1" not in result.output
    return out


@pytest.fixture
def recipe_file(run, tmp_path) -> Path:
    """With the teacher that was trained."""
    return write_recipe(tmp_path / "recipe.yaml", yaml.safe_load((run / "recipe.yaml").read_text()))


def said(file: Path) -> dict:
    return json.loads(file.read_text())


# ---- from tars to a report -----------------------------------------------------------------------------------------


def test_a_teacher_trained_with_bce_teaches_a_student_with_binary_kd(run):
    teacher, student = (said(run / name / "result.json") for name in ("teacher", "students/binary_kd-0"))
    assert teacher["map"] > 80
    assert student["map"] > 60
    assert teacher["best_map"] >= teacher["map"]
    for result in (teacher, student):
        assert not {"top1", "best_top1", "nll", "ece"} & set(result)
    lines = [json.loads(line) for line in (run / "students/binary_kd-0/metrics.jsonl").read_text().splitlines()]
    assert {"map", "bce", "loss_bce", "loss_binary_kd"} <= set(lines[-1])
    assert not {"top1", "teacher_top1", "teacher_entropy"} & set(lines[-1])
    assert lines[-1]["map"] == student["map"]


def test_the_store_says_what_was_measured_under_its_name(run, data):
    teacher = said(run / "store/store.json")["teacher"]
    assert teacher["kind"] == "multilabel"
    assert teacher["measured_map"] == said(run / "teacher/result.json")["map"]
    assert "measured_top1" not in teacher
    (fidelity,) = said(run / "store/manifest.json")["fidelity"].values()
    assert 0 < max(fidelity["sigmoid_error"].values()) < 1e-3
    assert fidelity["max_sigmoid_error"] < 1e-2
    assert not {"kl", "total_variation", "top1_agreement"} & set(fidelity)
    shown = invoke("store", "info", run / "store", *data[:2]).output
    assert "mAP" in shown
    assert "binary_kd" in shown
    assert not any(word in shown for word in ("top-1", "wttm", "KL("))
    card = (run / "store/README.md").read_text()
    assert "teacher mAP" in card
    assert "top-1" not in card


def test_reports_say_map_and_never_top_1(run):
    page = (run / "report.html").read_text()
    assert "mAP %" in page
    assert "mean average precision" in page
    assert "top-1" not in page
    (line,) = [
        line
        for line in csv.DictReader((run / "report.csv").read_text().splitlines())
        if line["objective"] == "binary_kd"
    ]
    assert float(line["map_mean"]) == said(run / "students/binary_kd-0/result.json")["map"]
    assert not [name for name in line if "top1" in name and name != "published_top1"]
    assert line["difference_to"] == "bce"


def test_students_of_both_kinds_are_not_in_one_report(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run / "students/bce-0", other)
    result = said(other / "result.json")
    top1 = {"top1": 50.0, "best_top1": 50.0, "student_sha256": "another"}
    (other / "result.json").write_text(json.dumps({k: v for k, v in result.items() if "map" not in k} | top1))
    message = refused("report", run / "students/bce-0", other, "--out", tmp_path / "report.html")
    assert "is measured by mAP" in message
    assert "top-1" in message


def test_evaluate_says_what_the_run_has_measured_and_predict_the_classes_above_a_half(run, data, tmp_path):
    student, network = run / "students/binary_kd-0", ["--network", "networks:small"]
    found = json.loads(invoke("evaluate", student, *network, *data, "--json").stdout)
    assert found["map"] == pytest.approx(said(student / "result.json")["map"], abs=1e-9)
    assert [one["name"] for one in found["classes"]] == list(CLASSES)
    assert np.mean([one["ap"] for one in found["classes"]]) == pytest.approx(found["map"])
    assert "average precision" in invoke("evaluate", student, *network, *data).output
    eight = next(one for one in digits_samples()["test"] if one.label == 8)
    (tmp_path / "8.png").write_bytes(eight.encoded)
    (predicted,) = json.loads(
        invoke("predict", run / "teacher", tmp_path / "8.png", *network, "--format", "json").stdout
    )
    probabilities = {one["class"]: one["probability"] for one in predicted["classes"]}
    assert "even" in probabilities
    assert all(0.5 < value <= 1 for value in probabilities.values())
    assert sum(probabilities.values()) > 1  # no softmax


def test_a_store_trains_from_the_recipe_beside_it(run, data, tmp_path):
    recipe = yaml.safe_load((run / "store/recipe.yaml").read_text())
    assert [term["term"] for term in recipe["objectives"]["binary_kd"]] == ["bce", "binary_kd"]
    small = ["--set", "training.epochs=1", "--set", "student.model=networks:small"]
    out = tmp_path / "out"
    command = ["distill", run / "store/recipe.yaml", "--store", run / "store", "--out", out]
    assert invoke(*command, *small, *data).exit_code == 0
    assert said(out / "result.json")["map"] > 30


# ---- sets in stores and batches ------------------------------------------------------------------------------------


def test_rows_of_a_store_have_the_sets_of_their_images(run):
    store = open_store(place_at(run / "store"))
    digits = {one.key: one.label for one in digits_samples()["train"]}
    arrays = store.read(1, 0, ["key", "label"])
    keys = [bytes(key).rstrip(b"\0").decode() for key in arrays["key"]]
    assert len(keys) == 256
    for key, label in zip(keys, arrays["label"], strict=True):
        assert names_in(label, list(CLASSES)) == classes_of(digits[key])


def test_verify_proves_sets_of_labels_and_finds_one_that_cannot_be(run, data, monkeypatch):
    assert invoke("store", "verify", run / "store", "--dataset", *data).exit_code == 0
    # A capture that forgot the last bit: the objects are what was committed, and what they hold cannot be.
    from offline_kd.store import verification

    decode = verification.decode_chunk

    def forgetful(spec, *arguments):
        chunk = decode(spec, *arguments)
        return chunk & 0b1111 if spec.name == "label" else chunk

    monkeypatch.setattr(verification, "decode_chunk", forgetful)
    result = invoke("store", "verify", run / "store", *data)
    assert result.exit_code == 1
    assert "sets of labels were never written" in result.output


def test_another_set_of_one_image_is_refused_when_it_is_joined(run, recipe_file, data, tmp_path):
    changed = tmp_path / "data"
    options = ["--manifest", str(changed / "manifest.yaml")]
    shutil.copytree(Path(data[1]).parent, changed)
    samples = [(one.key, one.encoded, classes_of(one.label)) for one in digits_samples()["train"][:256]]
    samples[3] = (*samples[3][:2], ["loop"])
    write_tar(changed / "train-0.tar", samples)
    manifest = yaml.safe_load((changed / "manifest.yaml").read_text())
    del manifest["datasets"]["tags"]["splits"]["train"]
    (changed / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    label = ["--label", "json-set:tags", "--workers", "1"]
    invoke("data", "index", changed / "train-*.tar", "--name", "tags", "--split", "train", *label, *options)
    out = ["--objective", "binary_kd", "--store", run / "store", "--out", tmp_path / "out"]
    message = refused("distill", recipe_file, *out, *options)
    assert f"sample '{samples[3][0]}' (and 0 more) has label {{loop}}" in message
    assert "in the store" in message
    assert "train-0.tar" in message


def test_tables_on_the_device_and_batches_that_are_read_make_one_student(run, recipe_file, data, tmp_path):
    """With half of the labels hidden, which is not the same as images without any class."""
    figures = {}
    for resident in ("never", "always"):
        out = tmp_path / resident
        settings = ["--set", f"training.resident={resident}", "--set", "data.labelled_fraction=0.5"]
        command = ["distill", recipe_file, "--objective", "binary_kd", "--store", run / "store", "--out", out]
        assert invoke(*command, *settings, "--set", "training.epochs=1", *data).exit_code == 0
        figures[resident] = json.loads((out / "metrics.jsonl").read_text())
    assert figures["never"]["loss_bce"] == pytest.approx(figures["always"]["loss_bce"], rel=1e-6)
    assert figures["never"]["map"] == pytest.approx(figures["always"]["map"], abs=1e-6)


@pytest.mark.parametrize(
    ("codec", "name", "most"),
    [
        ("{name: int, bits: 4}", "int", 0.05),
        pytest.param("{name: auto, error_budget: 0.01}", "f16", 0.01, marks=pytest.mark.slow),
        pytest.param(
            "{name: auto, error_budget: {objective: binary_kd, temperature: 2, change: 0.1}}",
            "f16",
            0.01,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_codecs_say_how_far_probabilities_are_off(recipe_file, data, tmp_path, codec, name, most):
    store = tmp_path / "store"
    result = invoke("cache-teacher", recipe_file, "--store", store, "--set", f"capture.codec={codec}", *data)
    assert result.exit_code == 0, result.stderr
    assert "mean error of a probability" in result.output
    assert said(store / "store.json")["codec"]["name"] == name  # of four classes f16 takes fewer bytes than any int
    (fidelity,) = said(store / "manifest.json")["fidelity"].values()
    assert most > max(fidelity["sigmoid_error"].values()) > 0
    assert fidelity["max_sigmoid_error"] > fidelity["sigmoid_error"]["1"]


def test_sets_are_served_by_features_and_the_last_layer(recipe_file, data, tmp_path):
    store, features = tmp_path / "store", "capture.features={f: {module: head, at: input, code: {name: f16}}}"
    changes = ["--set", features, "--set", "capture.codec={name: last_layer, features: f}"]
    result = invoke("cache-teacher", recipe_file, "--store", store, *changes, *data)
    assert result.exit_code == 0, result.stderr
    (fidelity,) = said(store / "manifest.json")["fidelity"].values()
    assert fidelity["max_sigmoid_error"] < 0.01
    assert "binary_kd" in invoke("store", "info", store).output


# ---- labels that are no sets ---------------------------------------------------------------------------------------

BAD_LABELS = {
    "even": "the labels are 'even', no list of classes",
    ("even", "even"): "the labels have 'even' twice",
    ("even", 1): "the labels have 'even' twice",
    ("evn",): "the label is 'evn', no class of the dataset. Did you mean",
    (-1,): "the label is -1, no index and no name of a class",
    (True,): "the label is True, no index and no name of a class",
    (0.5,): "the label is 0.5, no index and no name of a class",
    (9,): "label 9, the manifest names 4 classes",
    None: "expected one image (png, jpg, jpeg, webp) and a .json that says its label",
}


@pytest.mark.parametrize("said_of_it", BAD_LABELS, ids=str)
def test_labels_that_are_no_set_of_classes_are_refused_with_sample_and_tar(said_of_it, tmp_path):
    png = digits_samples()["train"][0].encoded
    good = [(f"good{index}", png, [index]) for index in range(4)]
    wrong = list(said_of_it) if isinstance(said_of_it, tuple) else said_of_it
    write_tar(tmp_path / "a.tar", [*good, ("bad", png, wrong)])
    about = {"folder": ".", "location": ".", "classes": list(CLASSES)}
    about["splits"] = {"train": {"tars": [{"file": "a.tar", "count": 5}], "labels": "json-set:tags"}}
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"manifest_version": 1, "datasets": {"tags": about}}))
    message = refused("data", "check", "tags", "--manifest", manifest)
    assert BAD_LABELS[said_of_it] in message
    assert "a.tar: sample 'bad'" in message


def test_a_dataset_is_checked_with_its_empty_sets_and_indexed_by_names(data):
    checked = invoke("data", "check", "tags", *data)
    assert checked.exit_code == 0, checked.stderr
    entry = yaml.safe_load(Path(data[1]).read_text())["datasets"]["tags"]
    assert entry["classes"] == list(CLASSES)
    assert entry["splits"]["train"]["labels"] == "json-set:tags"


# ---- what a softmax would do silently ------------------------------------------------------------------------------

SOFTMAX_TERMS = [
    "term: ce",
    "term: kd, temperature: 4",
    "term: ttm, gamma: 0.3",
    "term: wttm, gamma: 0.3",
    "term: dtkd, temperature: 4",
    "term: dkd, alpha: 1, beta: 2, temperature: 4",
    "term: dist, beta: 1, gamma: 1, temperature: 1",
    "term: nkd, gamma: 1.5, temperature: 1",
    "term: crd, features: f",
]


@pytest.mark.parametrize("term", SOFTMAX_TERMS)
def test_terms_of_one_class_are_refused_for_sets(term, recipe_file, data, tmp_path):
    features = "capture.features={f: {module: head, at: input}}"
    changes = ["--set", f"objectives={{one: [{{{term}}}]}}", "--set", features]
    message = refused("distill", recipe_file, *changes, "--out", tmp_path / "out", *data)
    name = yaml.safe_load(f"{{{term}}}")["term"]
    assert f"objective 'one': term '{name}' takes an image to be of one class" in message
    assert "use bce and binary_kd" in message


@pytest.mark.parametrize("term", ["term: bce", "term: binary_kd, temperature: 2"])
def test_terms_of_sets_are_refused_for_one_class(term, where, tmp_path):
    file = write_recipe(tmp_path / "recipe.yaml", {**ONE_LABEL, "objectives": {"one": [yaml.safe_load(f"{{{term}}}")]}})
    message = refused("distill", file, "--out", tmp_path / "out", *where)
    assert "asks of every class whether the image is of it, and teacher.kind is classifier" in message


WRONG_CAPTURES = {
    "capture.codec={name: topk, k: 2, tail_temperature: 4}": "'topk' keeps what a softmax needs",
    "capture.codec={name: klt}": "'klt' keeps what a softmax needs",
    "capture.codec={name: klt_means, step: 1}": "'klt_means' keeps what a softmax needs",
    "capture.codec={name: auto, error_budget: {objective: kd, temperature: 4, change: 0.1}}": "term 'kd' takes",
    "capture.decisions={d: {kind: subclasses, module: body.2, per_class: 2, components: 3}}": "sub-classes are parts",
    "teacher.expected={dataset: tags, split: test, top1: 90, tolerance: 1}": "is measured by map, not by top1",
    "teacher.expected={dataset: tags, split: test, tolerance: 1}": "or map of one of kind multilabel",
    "teacher.classes={above four: [0, 1], even: 2, loop: 3, prime: 4}": "classes of a multilabel teacher are one each",
    "teacher.kind=classifier": "is measured by top1, not by map",
    "teacher.expected={dataset: tags, split: test, map: 20, tolerance: 1}": "mAP on tags/test is",
    "data.train=test_of_one_label": "has no split",
}


@pytest.mark.parametrize("change", WRONG_CAPTURES)
def test_what_is_only_right_for_a_softmax_is_refused_before_anything_is_stored(change, recipe_file, data, tmp_path):
    store = tmp_path / "store"
    message = refused("cache-teacher", recipe_file, "--store", store, "--set", change, *data)
    assert WRONG_CAPTURES[change] in message
    assert not store.exists()


def test_labels_of_the_other_kind_are_refused(recipe_file, data, where, tmp_path):
    """By the recipe's teacher, in both stages."""
    plain = yaml.safe_load(recipe_file.read_text())
    del plain["teacher"]["kind"], plain["teacher"]["expected"]
    file = write_recipe(tmp_path / "plain.yaml", {**plain, "objectives": {"kd": [{"term": "kd", "temperature": 4}]}})
    for command in (["cache-teacher", file, "--store", tmp_path / "s"], ["distill", file, "--out", tmp_path / "o"]):
        message = refused(*command, *(["--online"] if command[0] == "distill" else []), *data)
        assert "has sets of labels (`labels: json-set:tags` in the manifest), but teacher.kind is classifier" in message
    file = write_recipe(tmp_path / "digits.yaml", {**RECIPE, "data": ONE_LABEL["data"]})
    message = refused("distill", file, "--objective", "bce", "--out", tmp_path / "o", *where)
    assert "has one label of every sample (`labels: cls` in the manifest), but teacher.kind is multilabel" in message
    assert not (tmp_path / "s").exists()


def test_what_looks_at_a_store_through_a_softmax_is_refused(run, recipe_file, data, tmp_path):
    store = run / "store"
    assert "is of a multi-label teacher" in refused("store", "explore", store, "--out", tmp_path / "e", *data[:2])
    assert "is of a multi-label teacher" in refused("bench", "codecs", store, *data[:2])
    subset = ["--set", "data.subset={score: margin, order: highest, keep: 0.5}"]
    out = ["--objective", "binary_kd", "--store", store, "--out", tmp_path / "out"]
    assert "is of a multi-label teacher" in refused("distill", recipe_file, *out, *subset, *data)
    both = ["--set", f"store=[{{store: {store}}}, {{store: {store}}}]"]
    message = refused("distill", recipe_file, "--objective", "binary_kd", "--out", tmp_path / "out", *both, *data)
    assert "several multi-label teachers are averaged as logits" in message


def test_a_recipe_says_kind_of_its_teacher_without_losing_what_it_extends(recipe_file, tmp_path):
    from offline_kd.recipe import load_recipe

    child = tmp_path / "child.yaml"
    base = yaml.safe_load(recipe_file.read_text())
    base["objectives"] = {"embedding": [{"term": "embedding", "features": "f"}]}
    base["capture"] = {"features": {"f": {"module": "head", "at": "input"}}}
    del base["teacher"]["kind"], base["teacher"]["expected"]
    write_recipe(recipe_file, base)
    child.write_text("extends: recipe.yaml\nteacher: {kind: multilabel}\n")
    found = load_recipe(child)
    assert found.teacher == load_recipe(recipe_file).teacher.model_copy(update={"kind": "multilabel"})


def test_the_loop_of_the_document_trains_on_packed_sets(run, data):
    (block,) = (one for one in blocks("docs/multi-label.md") if one.language == "python")
    loader = okd.open_store(run / "store").loader(Path(data[1]).parent, batch_size=32, seed=0)
    batch = next(iter(loader.epoch(0)))
    about: dict[str, object] = {"okd": okd, "batch": batch, "num_classes": 4}
    about["logits"] = batch.teacher_logits.clone()
    exec(block.text, about)
    sets = unpack_sets(batch.labels, 4)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(batch.teacher_logits, sets)
    torch.testing.assert_close(about["loss"], expected)


@pytest.mark.slow
def test_mixed_views_are_stored_and_trained_and_pages_of_samples_name_their_sets(recipe_file, data, tmp_path):
    store, out = tmp_path / "store", tmp_path / "out"
    views = ["--set", "views={kind: random_resized_crop, size: 8, count: 3, mixing: {mixup: 1.0}}"]
    views += ["--set", "teacher.expected.tolerance=50", *data]  # such views are cropped when they are evaluated
    captured = invoke("cache-teacher", recipe_file, "--store", store, *views)
    assert captured.exit_code == 0, captured.stderr
    options = ["--objective", "binary_kd", "--store", store, "--out", out, "--set", "training.epochs=1"]
    assert invoke("distill", recipe_file, *options, *views).exit_code == 0
    assert said(out / "result.json")["map"] > 0
    key = next(one.key for one in digits_samples()["train"] if one.label == 8)
    page = tmp_path / "page.html"
    inspected = invoke("store", "inspect", store, "--key", key, "--out", page, *data)
    assert inspected.exit_code == 0, inspected.output
    assert "above four, even, loop" in page.read_text()


@pytest.mark.slow
def test_two_ranks_measure_what_one_process_measures(run, recipe_file, data, tmp_path):
    """Each has half of the images, and precision depends on the order of all."""
    out = tmp_path / "two"
    options = ["--objective", "binary_kd", "--store", run / "store", "--out", out, "--set", "training.epochs=1"]
    done = torchrun(2, [], "-m", "offline_kd", "distill", recipe_file, *options, *data)
    assert done.returncode == 0, done.stderr
    alone = json.loads(invoke("evaluate", out, "--network", "networks:small", *data, "--json").stdout)
    assert said(out / "result.json")["map"] == pytest.approx(alone["map"], abs=1e-9)
    assert said(out / "result.json")["bce"] == pytest.approx(alone["bce"], rel=1e-6)


@pytest.mark.slow
def test_terms_on_features_and_decisions_are_for_sets_too(recipe_file, data, tmp_path):
    """And the teacher is asked live, of which reports say nothing that a softmax would."""
    decisions = "{last: {kind: templates, module: body.5, templates: 8, top: 2, iterations: 3}}"
    terms = [
        "{term: binary_kd, temperature: 2}",
        "{term: decisions, decisions: last, after: body.5}",
        "{term: itrd, features: made}",
        "{term: embedding, features: made}",
        "{term: relational, features: made, distance_weight: 1, angle_weight: 1}",
    ]
    changes = [f"capture.decisions={decisions}", "capture.features={made: {module: body.5}}", "training.epochs=1"]
    changes.append(f"objectives={{all: [{', '.join(terms)}]}}")
    settings = [one for change in changes for one in ("--set", change)] + data
    captured = invoke("cache-teacher", recipe_file, "--store", tmp_path / "store", *settings)
    assert captured.exit_code == 0, captured.stderr
    for name, online in (("stored", []), ("live", ["--online"])):
        out = tmp_path / name
        done = invoke("distill", recipe_file, "--store", tmp_path / "store", "--out", out, *online, *settings)
        assert done.exit_code == 0, done.stderr
        line = json.loads((out / "metrics.jsonl").read_text())
        assert line["map"] > 0
        assert not {"teacher_top1", "teacher_entropy"} & set(line)

"""Teachers without classes: captured without logits, measured by neighbours, learned from with or without labels."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, invoke, merged, refused
from documents import blocks
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from students import ended_after, said
from test_ranks import torchrun

import offline_kd as okd
from offline_kd.data.manifest import load_manifest
from offline_kd.distill.probe import FROM_EVALUATION, FROM_TRAINING
from offline_kd.models.neighbours import knn_top1
from offline_kd.models.networks import build, build_without_head
from offline_kd.recipe import recipe_of
from offline_kd.store.opening import open_store
from offline_kd.store.reader import Store
from offline_kd.support.errors import ModelError, StoreMismatch
from offline_kd.support.places import Folder

RECIPE = {
    "name": "towers",
    "data": {
        "dataset": "digits",
        "tars": [0],
        "normalisation": {"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]},
    },
    "teacher": {"kind": "embedding", "model": "networks:small"},
    "views": {"kind": "pad_crop_flip", "padding": 1, "flip": False, "count": 2},
    "capture": {"features": {"tower": {"code": {"name": "f16"}}}, "views_per_group": 1, "fidelity_rows": 60},
    "student": {"model": "cifar:resnet8"},
    "training": {
        "epochs": 2,
        "batch_size": 64,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "cosine"},
    },
    "objectives": {
        "both": [
            {"term": "embedding", "features": "tower"},
            {"term": "relational", "features": "tower", "weight": 0.1, "angle_weight": 0},
        ],
    },
}


def written(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(merged(RECIPE, changes)))
    return folder / "recipe.yaml"


def done(*arguments: object) -> str:
    """What a command that must succeed said, on both streams."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def captured_at(place: Path) -> Store:
    return open_store(Folder(place))


@pytest.fixture(scope="module")
def options(data_root) -> list[str]:
    return ["--manifest", str(ROOT / "data_manifest.yaml"), "--data-root", str(data_root), "--device", "cpu"]


@pytest.fixture(scope="module")
def captured(teacher_weights, options, tmp_path_factory) -> Path:
    """A folder with `recipe.yaml` and a finished `store`; what the capture said is in `said.txt`."""
    folder = tmp_path_factory.mktemp("towers")
    recipe = written(folder, teacher={"weights": str(teacher_weights)})
    (folder / "said.txt").write_text(done("cache-teacher", recipe, "--store", folder / "store", *options))
    return folder


@pytest.fixture(scope="module")
def trained(captured, options) -> Path:
    """The same folder, with the finished run `run`."""
    given = ["--store", captured / "store", "--out", captured / "run"]
    done("distill", captured / "recipe.yaml", *given, *options, "--set", "training.keep=[best]")
    return captured


@pytest.fixture(scope="module")
def bare(data_root, tmp_path_factory) -> Path:
    """A manifest of the same digits without labels and classes, and of those that have them as `labelled`."""
    labelled = load_manifest(ROOT / "data_manifest.yaml").dataset("digits").model_dump(mode="json", exclude_none=True)
    splits = {name: {**split, "labels": "none"} for name, split in labelled["splits"].items()}
    digits = {"folder": labelled["folder"], "splits": splits}
    file = tmp_path_factory.mktemp("bare") / "data_manifest.yaml"
    file.write_text(yaml.safe_dump({"manifest_version": 1, "datasets": {"digits": digits, "labelled": labelled}}))
    return file


# ---- the teacher and its gate ----------------------------------------------------------------------------------------


def test_nearest_neighbours_vote_as_scikit_learns_do():
    draw = np.random.default_rng(0)
    vectors, labels = draw.normal(size=(80, 5)).astype(np.float32), draw.integers(0, 4, 80)  # votes are often equal
    vectors += 0.8 * np.eye(5, dtype=np.float32)[labels]
    for neighbours in (1, 8):
        right = 0
        for index in range(len(labels)):
            others = np.arange(len(labels)) != index
            model = KNeighborsClassifier(neighbours, metric="cosine").fit(vectors[others], labels[others])
            right += int(model.predict(vectors[index : index + 1])[0] == labels[index])
        found = knn_top1(torch.from_numpy(vectors), torch.from_numpy(labels), neighbours)
        assert found == pytest.approx(100 * right / len(labels))


def test_the_gate_measures_neighbours_and_refuses_what_was_not_expected(captured, options, tmp_path):
    teacher = captured_at(captured / "store").identity.teacher
    found = teacher.measured_neighbours
    assert (teacher.kind, teacher.measured_top1, teacher.evaluated_on) == ("embedding", None, "digits/test")
    assert (found.features, found.neighbours) == ("tower", 20)
    assert 60 < found.top1 < 100
    assert (
        f"k-NN top-1 of 'tower' (20 neighbours) {found.top1:.2f} % on digits/test"
        in (captured / "said.txt").read_text()
    )
    expected = "teacher.expected={dataset: digits, split: test, knn: %s, tolerance: 0.5}"
    capture = ["cache-teacher", captured / "recipe.yaml", *options, "--store"]
    message = refused(*capture, tmp_path / "wrong", "--set", expected % (found.top1 - 5))
    measured = f"k-NN top-1 of 'tower' (20 neighbours) on digits/test is {found.top1:.2f} %"
    assert f"{measured}, expected {found.top1 - 5:.2f}" in message
    assert not (tmp_path / "wrong" / "store.json").exists()
    assert "expected 9" in done(
        *capture, tmp_path / "right", "--set", expected % found.top1, "--set", "data.tars=[2]"
    ) or (found.top1 < 90)


def test_a_head_is_left_out_and_that_is_said(captured):
    assert "its head is left out (head.weight, head.bias)" in (captured / "said.txt").read_text()


@pytest.mark.parametrize(
    ("name", "args", "width"),
    [
        ("cifar:resnet8", {}, 64),
        pytest.param("torchvision:mobilenet_v2", {}, 1280, marks=pytest.mark.slow),
        ("timm:vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 192),
        ("timm:vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 24}, 24),
        ("networks:no_classes", {}, 10),
    ],
)
def test_networks_without_their_head_give_what_came_into_it(name, args, width):
    size = 8 if name.startswith("networks") else 32
    network, head = build_without_head(name, args)
    with torch.no_grad():
        assert network.eval()(torch.randn(2, 3, size, size)).shape == (2, width)
    whole = build(name, 2, {key: value for key, value in args.items() if key != "num_classes"}).state_dict()
    assert set(whole) - set(network.state_dict()) == set(head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capture.features": "{}"}, "capture.features is empty"),
        ({"capture.codec": "{name: f16}"}, "capture.codec: f16 is of logits"),
        ({"teacher.kind": "classifier"}, "say which module's"),
        ({"teacher.kind": "classifier", "capture": "{codec: {name: none}}"}, "is of teachers without logits"),
        ({"teacher.expected": "{dataset: digits, split: test, top1: 9, tolerance: 1}"}, "by knn, not by top1"),
        ({"teacher.expected": "{dataset: digits, split: test, tolerance: 1}"}, "give top1 of a classifier, knn of"),
        ({"objectives": "{kd: [{term: kd, temperature: 4}]}"}, "term 'kd' needs the teacher's logits"),
        ({"capture.features.tower.module": "body.9"}, "no module 'body.9'"),
        ({"teacher.training": yaml.safe_dump(RECIPE["training"])}, "leave training out"),
        ({"data.subset": "{score: teacher_entropy, keep: 0.5, order: highest}"}, "holds no logits"),
        ({"student.head": "new"}, "has no head"),
    ],
)
def test_what_makes_no_sense_without_classes_is_refused_in_a_line(captured, options, tmp_path, changes, message):
    sets = [word for field, value in changes.items() for word in ("--set", f"{field}={value}")]
    command = ["distill", "--out", tmp_path / "run"] if "subset" in str(changes) or "student" in str(changes) else []
    command = command or ["cache-teacher"]
    store = captured / "store" if command[0] == "distill" else tmp_path / "store"
    assert message in refused(*command, captured / "recipe.yaml", *options, *sets, "--store", store)
    assert not (tmp_path / "store" / "store.json").exists()


# ---- the store -------------------------------------------------------------------------------------------------------


def test_a_store_of_features_alone_is_proven_and_says_so(captured, options, tmp_path):
    place, store = captured / "store", captured_at(captured / "store")
    assert not [name for name in store.arrays if name.startswith("logits/")]
    assert not (place / "targets.zarr" / "logits").exists()
    assert json.loads((place / "store.json").read_text())["codec"] == {"name": "none"}
    assert "about 60 of 1,024 rows" in done(
        "store", "verify", place, "--teacher", "60", "--recipe", captured / "recipe.yaml", *options[:4]
    )
    told = json.loads(invoke("store", "info", place, "--json").stdout)
    assert told["serves"] == [f"{name}(tower)" for name in ("crd", "itrd", "embedding", "relational")]
    assert "top1_agreement" not in told["fidelity"]
    assert told["fidelity"]["features"]["tower"]["cosine"] > 0.999
    assert "k-NN top-1" in done("store", "info", place)
    card = (place / "README.md").read_text()
    assert "A teacher's features of stored augmentations" in card
    assert "teacher k-NN top-1" in card
    assert yaml.safe_load((place / "recipe.yaml").read_text())["teacher"]["kind"] == "embedding"
    assert "holds no logits" in refused("store", "explore", place, "--out", tmp_path / "gallery", *options[:4])
    opened = okd.open_store(place)
    done("store", "inspect", place, "--key", opened.keys()[0], "--out", tmp_path / "sample.html", *options[:4])
    assert "likeliest" not in (tmp_path / "sample.html").read_text()
    assert opened.features("tower", opened.keys()[:3]).shape == (3, 2, 256)
    with pytest.raises(StoreMismatch, match="holds no logits, because its teacher has no classes"):
        opened.logits(opened.keys()[:3])


def test_a_damaged_store_is_found_repaired_and_grows(captured, options, tmp_path):
    place = tmp_path / "store"
    shutil.copytree(captured / "store", place)
    found = next(one for one in (place / "targets.zarr" / "features").rglob("c/*/*/*") if one.is_file())
    flipped = bytearray(found.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    found.write_bytes(flipped)
    assert invoke("store", "verify", place).exit_code == 1
    done("store", "repair", place, captured / "recipe.yaml", *options)
    done("store", "verify", place)
    assert captured_at(place).digest == captured_at(captured / "store").digest
    done("cache-teacher", captured / "recipe.yaml", "--store", place, *options, "--set", "views.count=3")
    assert captured_at(place).identity.views.num_views == 3
    done("store", "pull", place, tmp_path / "part", "--only", "features")
    done("store", "verify", tmp_path / "part")


def test_a_classifier_is_added_to_the_store_of_a_tower(captured, teacher_weights, options, tmp_path):
    place = tmp_path / "store"
    shutil.copytree(captured / "store", place)
    teacher = {"kind": "classifier", "weights": str(teacher_weights)}
    kd = {"training": {"epochs": 1}, "objectives": {"kd": [{"term": "kd", "temperature": 4}]}}
    recipe = written(tmp_path, name="classes", teacher=teacher, **kd)
    logits = {"capture": {"codec": {"name": "f16"}, "views_per_group": 1, "fidelity_rows": 60}}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | logits | {"objectives": kd["objectives"]}))
    given = [recipe, "--store", f"{place}#classes", "--out", tmp_path / "run", *options, "--objective", "kd"]
    done("cache-teacher", recipe, "--store", place, "--add", *options)
    done("store", "verify", place)
    assert (open_store(Folder(place), targets="classes").has_logits, captured_at(place).has_logits) == (True, False)
    done("distill", *given)
    wrong = refused("distill", recipe, "--store", place, "--out", tmp_path / "other", *options, "--objective", "kd")
    assert "holds no logits, because its teacher has no classes, and term 'kd' needs them" in wrong
    plain = ("--set", "objectives={kd: [{term: ce}]}")
    wrong = refused("distill", recipe, "--store", place, "--out", tmp_path / "other", *options, *plain)
    assert "with kind embedding, the recipe's teacher has classifier" in wrong


def test_a_module_in_memory_may_have_no_classes(data_root, tmp_path):
    network, _ = build_without_head("networks:small")
    views, normalisation = {"kind": "none"}, {"mean": [0.3] * 3, "std": [0.4] * 3}
    (tmp_path / "digits").mkdir()
    shutil.copy(min((data_root / "digits").glob("test*")), tmp_path / "digits")
    store = okd.cache_teacher(
        network,
        tmp_path / "digits",
        views=views,
        out=tmp_path / "store",
        normalisation=normalisation,
        kind="embedding",
        features={"tower": {}, "map": {"module": "body.5", "pool": "none"}},
    )
    loader = store.loader(batch_size=32, seed=0, features=["tower", "map"])
    batch = next(iter(loader.epoch(0)))
    assert torch.equal(batch.teacher_features["tower"], batch.teacher_features["map"].flatten(1))
    with pytest.raises(StoreMismatch, match="no logits"):
        _ = batch.teacher_logits


# ---- students --------------------------------------------------------------------------------------------------------


def test_a_student_without_classes_is_judged_by_neighbours_and_a_probe(trained, options):
    result = json.loads((trained / "run" / "result.json").read_text())
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not {"top1", "best_top1", "nll", "ece"} & set(result)
    assert not any("top1" in line for line in lines)
    assert result["kind"] == "embedding"
    assert [line["knn_top1"] for line in lines][-1] == result["knn_top1"]
    assert result["best_knn_top1"] == max(line["knn_top1"] for line in lines)
    assert result["probe_learned_from"] == FROM_TRAINING
    assert lines[-1]["loss_embedding"] < lines[0]["loss_embedding"]
    assert result["knn_top1"] > 50
    table = done("report", trained / "run", "--out", trained / "report.html")
    assert f"{result['knn_top1']:.2f}" in table
    assert f"{result['probe_top1']:.2f}" in table
    page = (trained / "report.html").read_text()
    assert "k-NN top-1 %" in page
    assert "linear probe %" in page
    assert "which has learned from labels of the training split" in page
    assert 'data-column="top1_mean"' not in page
    assert json.loads((trained / "report.json").read_text())["rows"][0]["knn_top1_mean"] == result["knn_top1"]


def test_the_figures_of_a_student_are_those_of_its_file_by_scikit_learn(trained, data_root):
    student = okd.load_student(trained / "run")
    result = json.loads((trained / "run" / "result.json").read_text())
    normalisation, found = student.about.normalisation, {}
    for name in ("train", "test"):
        tars = sorted((data_root / "digits").glob(f"{name}*"))
        folder = trained / name
        folder.mkdir()
        shutil.copy(tars[0], folder)
        batches = okd.evaluation_loader(folder, batch_size=512, normalisation=normalisation)
        with torch.no_grad():
            pairs = [(student.network(images).double().numpy(), labels.numpy()) for images, labels in batches]
        found[name] = tuple(np.concatenate(part) for part in zip(*pairs, strict=True))
    (x, y), (test_x, test_y) = found["train"], found["test"]
    scaler = StandardScaler().fit(x)
    probe = LogisticRegression(max_iter=1000).fit(scaler.transform(x), y)
    assert result["probe_top1"] == pytest.approx(100 * probe.score(scaler.transform(test_x), test_y), abs=0.6)
    nearest = KNeighborsClassifier(21, metric="cosine").fit(test_x, test_y).kneighbors(test_x, return_distance=False)
    votes = np.stack([np.bincount(test_y[row[1:]], minlength=10) for row in nearest])
    assert result["knn_top1"] == pytest.approx(100 * (votes.argmax(axis=1) == test_y).mean(), abs=0.6)


def test_a_saved_student_gives_vectors_in_the_space_of_its_teacher(trained, options):
    student = okd.load_student(trained / "run")
    about, tensors = said(trained / "run" / "student.safetensors"), load_file(trained / "run" / "student.safetensors")
    assert about["kind"] == "embedding"
    assert about["classes"] == []
    assert json.loads((trained / "run" / "result.json").read_text())["projections"] == ["tower"]
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    own, projected = student.vectors(images), student.vectors(images, "tower")
    assert (own.shape, projected.shape) == ((5, 64), (5, 256))
    heads = torch.load(trained / "run" / "last.ckpt", weights_only=True)["beside"]["heads"]
    assert torch.allclose(projected, own @ heads["0.embed.weight"].T + heads["0.embed.bias"], atol=1e-5)
    assert not [name for name in tensors if name.startswith("linear.")]
    with pytest.raises(ModelError, match=r"no projection to features 'towre'\. Did you mean 'tower'"):
        student.vectors(images, "towre")
    with pytest.raises(ModelError, match="has no classes, and gives vectors"):
        student.logits(images)
    figures = json.loads(done("evaluate", trained / "run", "--json", *options))
    result = json.loads((trained / "run" / "result.json").read_text())
    assert figures["knn_top1"] == result["knn_top1"]
    assert figures["knn_top1_tower"] > 50
    assert "k-NN top-1 % in 'tower'" in done("evaluate", trained / "run", *options)


def test_the_page_has_pieces_of_recipes():
    for piece in (block for block in blocks("docs/embedding-teachers.md") if block.language == "yaml"):
        read = recipe_of(merged(RECIPE, yaml.safe_load(piece.text)), str(piece))
        assert read.capture.codec.name == "none"


def test_the_page_is_right_about_a_saved_student(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "runs" / "both")
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (program,) = [block for block in blocks("docs/embedding-teachers.md") if block.language == "python"]
    exec(program.text, {})
    assert "has no classes, and gives vectors" in refused("predict", "runs/both", "photo.jpg")


def test_a_stopped_student_without_classes_goes_on_to_the_same_file(trained, options, tmp_path):
    given = ["distill", trained / "recipe.yaml", "--store", trained / "store", "--out", tmp_path / "run", *options]
    given += ["--set", "training.keep=[best]", "--set", "training.checkpoint_steps=3"]
    with ended_after(11):
        assert invoke(*given).exit_code == 130
    done(*given)
    for name in ("student.safetensors", "best.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / "run" / name).read_bytes()


@pytest.mark.slow
def test_the_live_teacher_trains_nearly_the_same_student(trained, options, tmp_path):
    done("distill", trained / "recipe.yaml", "--online", "--out", tmp_path / "run", *options)
    stored, live = (
        json.loads((run / "run" / "metrics.jsonl").read_text().splitlines()[-1]) for run in (trained, tmp_path)
    )
    assert live["loss_embedding"] == pytest.approx(stored["loss_embedding"], rel=0.02)


def test_labels_beside_the_features_make_a_student_with_classes(trained, options, tmp_path):
    terms = "objectives={labels: [{term: ce}, {term: embedding, features: tower}]}"
    given = ["--store", trained / "store", "--out", tmp_path / "run", *options, "--set", terms]
    done("distill", trained / "recipe.yaml", *given)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["top1"] > 20
    assert "knn_top1" not in result
    both = done("report", trained / "run", tmp_path / "run", "--out", tmp_path / "report.html")
    assert "k-NN top-1 %" in both
    assert "best top-1 %" in both
    assert okd.load_student(tmp_path / "run").classes == [str(digit) for digit in range(10)]


@pytest.mark.slow
def test_two_ranks_train_and_judge_a_student_without_classes_as_one_process_does(captured, options, tmp_path):
    given = ["distill", captured / "recipe.yaml", "--store", captured / "store", *options]
    given += ["--set", "student.model=networks:group_norm"]  # BatchNorm would see parts of a batch
    done(*given, "--out", tmp_path / "one")
    ended = torchrun(2, [], "-m", "offline_kd", *given, "--out", tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    for name in ("knn_top1", "probe_top1"):
        assert two[name] == pytest.approx(one[name], abs=1)


@pytest.mark.slow
def test_a_student_without_classes_is_exported(trained, options, tmp_path):
    told = done("export", trained / "run", "--format", "torch-export", "--out", tmp_path / "one.pt2", *options[:4])
    assert "vectors of" in told


# ---- images without labels -------------------------------------------------------------------------------------------


def test_images_without_labels_are_captured_and_trained_on(teacher_weights, bare, data_root, tmp_path):
    options = ["--manifest", bare, "--data-root", data_root, "--device", "cpu"]
    terms = [
        {"term": "embedding", "features": "tower", "distance": "smooth_l1"},
        {"term": "crd", "features": "tower", "width": 8, "negatives": 30},
        {"term": "itrd", "features": "tower"},
    ]
    objectives = {"all": terms, "one": terms[:1], "labels": [{"term": "ce"}, terms[0]]}
    changes = {"views": {"count": 1}, "training": {"epochs": 1}, "objectives": objectives}
    recipe = written(tmp_path, teacher={"weights": str(teacher_weights)}, **changes)
    told = done("cache-teacher", recipe, "--store", tmp_path / "store", *options)
    assert "NOTHING WAS MEASURED, digits/test has no labels" in told
    teacher = captured_at(tmp_path / "store").identity.teacher
    assert (teacher.measured_top1, teacher.measured_neighbours) == (None, None)
    done("store", "verify", tmp_path / "store", *options[:4])
    distill = ["distill", recipe, "--store", tmp_path / "store", "--out", tmp_path / "run", *options, "--objective"]
    assert "has no labels: the student is not judged" in done(*distill, "all")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert not [name for name in result if "top1" in name]
    assert (result["kind"], result["projections"]) == ("embedding", ["tower"])
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {name for name in line if name.startswith("loss_")} == {"loss_embedding", "loss_crd", "loss_itrd"}
    done("report", tmp_path / "run", "--out", tmp_path / "report.html")
    assert "has no labels" in refused(*distill, "labels")
    keep = ("--set", "training.keep=[best]")
    assert "best is by labels of the evaluation split" in refused(*distill, "all", *keep, "--out", tmp_path / "other")
    # Where other images have labels, the student is judged on those, and the probe has nothing else to learn from.
    judged = ("--set", "data.evaluation=labelled/test", "--out", tmp_path / "judged")
    done(*distill, "one", *judged)
    result = json.loads((tmp_path / "judged" / "result.json").read_text())
    assert result["probe_learned_from"] == FROM_EVALUATION
    assert result["probe_top1"] > 30
    classifier = (
        "--set",
        "teacher.kind=classifier",
        "--set",
        "capture={codec: {name: f16}}",
        "--set",
        "objectives={a: [{term: ce}]}",
    )
    told = refused("cache-teacher", recipe, "--store", tmp_path / "other", *options, *classifier)
    assert "has no classes, of which a classifier gives logits" in told


# ---- real networks ---------------------------------------------------------------------------------------------------


def test_a_vision_transformer_without_head_goes_through_both_stages(options, tmp_path):
    args = {"img_size": 8, "patch_size": 4, "depth": 2}
    torch.manual_seed(0)
    weights = build("timm:vit_tiny_patch16_224", 0, args).to(memory_format=torch.contiguous_format).state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    teacher = {"model": "timm:vit_tiny_patch16_224", "model_args": args, "weights": str(tmp_path / "vit.safetensors")}
    features = {"tower": {"code": {"name": "pq", "subspaces": 8, "centroids": 16, "iterations": 2}}}
    changes = {"teacher": teacher, "views": {"count": 1}, "capture": {"features": features}}
    changes |= {"training": {"epochs": 1}}
    changes["objectives"] = {"both": [{"term": "embedding", "features": "tower"}]}
    recipe = written(tmp_path, **changes)
    assert "k-NN top-1" in done("run", recipe, "--out", tmp_path / "all", *options)
    assert captured_at(tmp_path / "all" / "store").identity.features["tower"].shape == (192,)
    (run,) = (tmp_path / "all" / "students").iterdir()
    assert okd.load_student(run).vectors(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "tower").shape == (
        1,
        192,
    )


@pytest.mark.slow
def test_a_real_tower_is_a_good_teacher_of_vectors(real_data, tmp_path):
    where = ["--data-root", real_data, "--device", "cpu"]
    small = ["--set", "views.count=2", "--set", "training.epochs=2"]
    done("cache-teacher", "cifar100_filtered/lite0_tower", "--store", tmp_path / "store", *where, *small)
    given = ["--store", tmp_path / "store", "--out", tmp_path / "run", *where, *small, "--objective", "cosine"]
    done("distill", "cifar100_filtered/lite0_tower", *given)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["knn_top1"] > 5  # of 100 classes
    assert result["probe_top1"] > result["knn_top1"]

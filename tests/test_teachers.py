"""Teachers as people have them: checkpoints as they lie around, fine-tuned, with other classes, of one's own code."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CPU, invoke, make_recipe, refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline_kd.cache.teacher import gate, load_teacher
from offline_kd.distill.teacher_training import trained_teacher
from offline_kd.models.class_map import names_of_classes, select
from offline_kd.models.networks import build, head_of
from offline_kd.models.weights import load_weights
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.store.opening import open_store

State = dict[str, Tensor]
# One tar, one view of every image: the least that a capture or a training can be.
LITTLE = ("data.tars=[2]", "views={kind: none}", "capture.views_per_group=1", "training.epochs=1")
BRIEF = ("data.tars=[2]", "views={kind: none}", "capture.views_per_group=1", "teacher.training.epochs=1")


def sets(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def said(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def trained(teacher_weights) -> State:
    return load_file(teacher_weights)


@pytest.fixture(scope="module")
def other() -> State:
    """Weights of the same network that know nothing."""
    torch.manual_seed(5)
    return {name: tensor.clone() for name, tensor in build("networks:small", 10).state_dict().items()}


def beginning(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(file: Path) -> State:
    network = build("networks:small", 10)
    load_weights(network, file)
    return network.state_dict()


def equal(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("timm", lambda state, other: {"epoch": 3, "arch": "x", "state_dict": other, "state_dict_ema": state}),
        (
            "torchvision",
            lambda state, other: {
                "model": other,
                "model_ema": beginning(state, "module.") | {"n_averaged": torch.tensor(7)},
                "optimizer": {"state": {}, "param_groups": []},
            },
        ),
        (
            "Lightning",
            lambda state, other: {
                "pytorch-lightning_version": "2.4.0",
                "state_dict": beginning(state, "model.") | {"criterion.weight": torch.ones(10)},
                "hyper_parameters": {"lr": 0.1},
            },
        ),
        ("Lightning, another name", lambda state, other: {"state_dict": beginning(state, "net.backbone.")}),
        ("Lightning, compiled", lambda state, other: {"state_dict": beginning(state, "model._orig_mod.")}),
        ("DDP, compiled", lambda state, other: {"model": beginning(state, "module._orig_mod.")}),
        (
            "a part in DataParallel",
            lambda state, other: {n.replace("body.", "body.module."): t for n, t in state.items()},
        ),
        ("a nested one", lambda state, other: {"model": {"state_dict": state}, "ema": {"decay": 0.9}}),
    ],
)
def test_checkpoints_as_training_programs_write_them_load(name, wrap, trained, other, tmp_path, capsys):
    torch.save(wrap(trained, other), tmp_path / "checkpoint.pth")
    assert equal(loaded(tmp_path / "checkpoint.pth"), trained)
    message = said(capsys.readouterr().err)
    if name == "timm":
        assert "holds state_dict and state_dict_ema: state_dict_ema is taken" in message
        assert "key: state_dict}" in message
    if name == "Lightning":
        assert "what begins with model. is taken, 1 others are not, such as criterion.weight" in message


def test_a_checkpoint_that_would_have_to_be_unpickled_is_one_sentence(trained, tmp_path, recipe_file, where):
    arguments = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *where)
    content = {"model": trained, "args": argparse.Namespace(lr=0.1, model="small")}
    for legacy in (False, True):
        file = tmp_path / f"deit{legacy}.pth"
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        message = refused(*arguments, *sets(f"teacher.weights={file}"))
        assert (
            "it also holds argparse.Namespace, which would have to be unpickled. Pickled code is never run" in message
        )
        assert "torch.save(network.state_dict(), FILE)" in message
        assert "weights_only" not in message
        assert message.isprintable()
    (tmp_path / "torn.pth").write_bytes((tmp_path / "deitFalse.pth").read_bytes()[:5000])
    message = refused(*arguments, *sets(f"teacher.weights={tmp_path / 'torn.pth'}"))
    assert "it is damaged, or was not written by torch.save" in message
    assert not (tmp_path / "store").exists()


def test_which_part_of_a_checkpoint_was_asked_is_recorded_and_another_is_not_mixed_in(
    trained, other, tmp_path, recipe_file, where
):
    file = tmp_path / "both.pth"
    torch.save({"model": trained, "model_ema": other}, file)
    capture = ("cache-teacher", recipe_file, *where, *sets(*LITTLE))
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    assert invoke(*capture, "--store", averaged, *sets(f"teacher.weights={file}")).exit_code == 0
    assert invoke(*capture, "--store", plain, *sets(f"teacher.weights={{file: {file}, key: model}}")).exit_code == 0
    assert open_store(averaged).identity.teacher.weights_part == "model_ema"
    assert open_store(averaged).identity.teacher.measured_top1 < 50 < open_store(plain).identity.teacher.measured_top1
    assert "model_ema" in (averaged / "README.md").read_text()
    # What earlier versions would have taken is described as by them.
    assert "weights_part" not in json.loads((plain / "store.json").read_text())["teacher"]
    for store, weights in ((plain, file), (averaged, f"{{file: {file}, key: model}}")):
        message = refused(*capture, "--store", store, *sets(f"teacher.weights={weights}"))
        assert "its teacher.weights_part is" in message


def test_of_two_networks_in_one_file_the_prefix_says_which(
    trained, other, tmp_path, recipe_file, where, manifest, roots
):
    file = tmp_path / "module.ckpt"
    torch.save({"state_dict": beginning(trained, "teacher.") | beginning(other, "student.")}, file)
    arguments = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *where)
    message = refused(*arguments, *sets(f"teacher.weights={file}"))
    assert "the network is in it as 'teacher.' and as 'student.'. Say which: weights: {file:" in message
    chosen = f"teacher.weights={{file: {file}, prefix: student.}}"
    teacher = load_teacher(load_recipe(recipe_file, [chosen]), manifest, roots, 10, CPU)
    assert equal(teacher.network.state_dict(), other)
    assert teacher.weights_part == "student."
    wrong = {
        "prefix: studnt.": "Did you mean 'student.'?",
        "key: model": "no state dict (a mapping of names to tensors) at",
    }
    for one, expected in wrong.items():
        assert expected in refused(*arguments, *sets(f"teacher.weights={{file: {file}, {one}}}"))


def test_names_that_do_not_fit_are_counted_and_a_prefix_is_proposed(trained, tmp_path, recipe_file, where):
    state = {f"encoder.{name}": tensor for name, tensor in trained.items() if name != "head.bias"}
    torch.save({"generator": state, "epoch": 3}, tmp_path / "some.pth")
    arguments = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *where)
    message = refused(*arguments, *sets(f"teacher.weights={tmp_path / 'some.pth'}"))
    assert "under a name that is known. Entries: generator, epoch. To take one, write weights: " in message
    chosen = f"teacher.weights={{file: {tmp_path / 'some.pth'}, key: generator}}"
    message = refused(*arguments, *sets(chosen))
    assert "lacks 'body.0.weight' [8, 3, 3, 3] (12 of the network's 12 tensors are missing)" in message
    assert "(13 of the file's 13) has no place in the network" in message
    assert "With prefix: encoder. 11 of 12 would be there." in message


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.fixture
def for_seven_classes(trained, tmp_path) -> Path:
    """What the trained teacher sees, with a head for another number of classes."""
    file = tmp_path / "seven.safetensors"
    save_file(trained | {"head.weight": torch.zeros(7, 256), "head.bias": torch.zeros(7)}, file)
    return file


def top1(out: Path) -> float:
    top: float = json.loads((out / "result.json").read_text())["top1"]
    return top


def test_fine_tuning_beats_training_from_nothing_at_equal_steps(for_seven_classes, recipe_file, where, tmp_path):
    train = ("train", recipe_file, "--teacher", *where, *sets(*BRIEF, "teacher.training.optimizer.lr=0.02"))
    tuned, fresh = tmp_path / "tuned", tmp_path / "fresh"
    begins = sets(f"teacher.weights={for_seven_classes}")
    message = refused(*train, "--out", tuned, *begins)
    assert "is for 7 classes, the dataset has 10. To begin with a new head: teacher.head: new" in message
    done = invoke(*train, "--out", tuned, *begins, *sets("teacher.head=new"))
    assert done.exit_code == 0
    assert "head.weight, head.bias begin anew" in said(done.stderr)
    assert invoke(*train, "--out", fresh, *sets("teacher.weights=null")).exit_code == 0
    assert top1(tuned) > top1(fresh) + 10, (top1(tuned), top1(fresh))
    # What was trained has the name of what it is, and the lines of the recipe are said.
    assert (tuned / "teacher.safetensors").read_bytes() == (tuned / "student.safetensors").read_bytes()
    assert f"set in the recipe: teacher.weights: {tuned}/teacher.safetensors" in said(done.stderr)
    assert "set in the recipe: teacher.head: null" in said(done.stderr)
    capture = ("cache-teacher", recipe_file, *where, "--store", tmp_path / "store", *sets(*LITTLE))
    message = refused(*capture, *begins, *sets("teacher.head=new"))
    assert "teacher.head says that teacher.training begins from teacher.weights. Train it" in message
    result = invoke(*capture, *sets(f"teacher.weights={tuned}/teacher.safetensors"))
    assert result.exit_code == 0
    assert open_store(tmp_path / "store").identity.teacher.measured_top1 == pytest.approx(top1(tuned))


def test_run_fine_tunes_gates_and_asks_the_teacher_and_goes_on(for_seven_classes, recipe_file, where, tmp_path):
    out = tmp_path / "out"
    weights = (
        f"teacher.weights={for_seven_classes}",
        "teacher.head=new",
        "objectives={kd: [{term: kd, temperature: 4}]}",
    )
    run = ("run", recipe_file, "--out", out, *where, *sets(*LITTLE, "teacher.training.epochs=1", *weights))
    first = invoke(*run)
    assert first.exit_code == 0, first.stderr
    resolved = load_recipe(out / "recipe.yaml").teacher
    assert (resolved.weights, resolved.head) == (str(out / "teacher" / "student.safetensors"), None)
    assert resolved.expected is not None
    assert resolved.expected.top1 == pytest.approx(open_store(out / "store").identity.teacher.measured_top1)
    again = invoke(*run)
    assert again.exit_code == 0
    assert "finished already" in again.stderr
    # Weights beside a training, and nothing about their head: they are the teacher's, as ever.
    unspoken = sets(f"teacher.weights={out / 'teacher' / 'teacher.safetensors'}")
    kept = invoke(*run[:2], "--out", tmp_path / "kept", *run[4:], *unspoken, *sets("teacher.head=null"))
    assert kept.exit_code == 0
    assert "teacher.weights are the teacher's, it is not trained" in said(kept.stderr)
    assert not (tmp_path / "kept" / "teacher").exists()


def test_a_linear_probe_trains_the_head_alone(trained, recipe_file, where, tmp_path):
    """Parameters and statistics of all else stay bit by bit: of a teacher, and of a student with its own prefix."""
    file = tmp_path / "plain.safetensors"
    save_file(beginning(trained, "encoder."), file)
    probe = ("train", recipe_file, *where, *sets(*LITTLE, *BRIEF))
    weights = f"weights={{file: {file}, prefix: encoder.}}"
    of_teacher = sets(f"teacher.{weights}", "teacher.head=new", "teacher.training.train=head")
    of_student = sets(f"student.{weights}", "student.model_args={}", "student.head=new", "training.train=head")
    for name, options in (("teacher", ["--teacher", *of_teacher]), ("student", of_student)):
        result = invoke(*probe, "--out", tmp_path / name, *options)
        assert result.exit_code == 0, result.stderr
        assert "head.weight, head.bias begin anew" in said(result.stderr)
        after = load_file(tmp_path / name / "student.safetensors")
        for key, tensor in trained.items():
            assert torch.equal(after[key], tensor) == (not key.startswith("head.")), key
    message = refused(*probe, "--out", tmp_path / "none", *sets("training.train=head"))
    assert "training.train: head keeps the rest as weights to begin from have it, and none are given" in message


def test_the_head_is_what_depends_on_the_number_of_classes():
    assert head_of("cifar:resnet8", 10) == {"fc.weight": 0, "fc.bias": 0}
    assert head_of("cifar:resnet20_a", 10) == {"linear.weight": 0, "linear.bias": 0}
    before = torch.get_rng_state()
    assert head_of("networks:small", 10, {"width": 4}) == {"head.weight": 0, "head.bias": 0}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.head=other", "Input should be 'keep' or 'new'"),
        ("teacher={model: 'networks:small', weights: x.pt, head: new}", "give training and weights too"),
        ("teacher={model: 'networks:small', head: new}", "give training and weights too"),
        ("training.train=body", "Input should be 'all' or 'head'"),
        ("student.weights={file: x.pt, kee: model}", "unknown field"),
        ("teacher.weights={key: model}", "'teacher.weights.file.file': Field required"),
    ],
)
def test_what_recipes_cannot_mean_is_one_line(override, message, recipe_file, where, tmp_path):
    assert message in refused("run", recipe_file, "--out", tmp_path / "out", *where, *sets(override))


# ---- pretrained ------------------------------------------------------------------------------------------------------


def test_pretrained_networks_of_timm_come_from_its_cache_with_their_normalisation(
    recipe_file, where, tmp_path, monkeypatch
):
    """A cache of Hugging Face as its own downloads leave it: nothing is fetched in a test."""
    import timm
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = "test_efficientnet.r160_in1k"
    chosen = (f"teacher.model=timm:{model}", "teacher.weights=pretrained", "teacher.head=new", "data.workers=0")
    train = ("train", recipe_file, "--teacher", "--out", tmp_path / "out", *where, *sets(*BRIEF, *chosen))
    message = refused(*train, *sets("teacher.training.train=head"))
    assert f"'timm:{model}': timm could not fetch its pretrained weights (" in message
    assert "name the file: teacher.weights: FILE.safetensors" in message
    repository = tmp_path / "hub" / f"models--timm--{model}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    torch.manual_seed(3)
    published = {key: tensor.contiguous() for key, tensor in timm.create_model(model).state_dict().items()}
    save_file(published, repository / "snapshots" / ("0" * 40) / "model.safetensors")
    done = invoke(*train, *sets("teacher.training.train=head"))
    assert done.exit_code == 0, done.stderr
    after = load_file(tmp_path / "out" / "teacher.safetensors")
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, published[key])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert after["classifier.weight"].shape[0] == 10
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    config = timm.get_pretrained_cfg(model)
    assert recipe["data"]["normalisation"] == {"mean": [*config.mean], "std": [*config.std]}
    wrong = refused(*train, *sets("teacher.model=networks:small"))
    assert "weights 'pretrained' are of timm:NAME and torchvision:NAME, the network is 'networks:small'" in wrong


def test_a_trained_teacher_sees_images_as_it_was_trained_to(manifest):
    """torchvision knows how its own weights see, and nothing of the file that they became."""
    chosen = {"model": "torchvision:resnet18", "weights": "pretrained", "head": "new"}
    views = {"kind": "random_resized_crop", "size": 64, "count": 2}
    recipe = Recipe.model_validate({**make_recipe(teacher=chosen).model_dump(), "views": views})
    after = trained_teacher(recipe, manifest, "runs/teacher.safetensors")
    assert after.normalisation is not None
    assert after.normalisation.mean == (0.485, 0.456, 0.406)
    assert after.crop == recipe.evaluation_crop
    from_nothing = make_recipe(teacher={"model": "timm:resnet10t"})
    assert trained_teacher(from_nothing, manifest, "x").normalisation == recipe.data.normalisation
    assert trained_teacher(make_recipe(), manifest, "x").normalisation is None  # nothing else would be taken


def test_the_names_of_classes_that_libraries_know(manifest):
    assert names_of_classes("torchvision:resnet18", "pretrained", manifest)[0][:2] == ["tench", "goldfish"]
    synsets, described = names_of_classes("timm:test_resnet.r160_in1k", "pretrained", manifest)
    assert (synsets[1], described[1]) == ("n01443537", "goldfish")
    of_digits = names_of_classes(None, "cifar10_resnet56", manifest)
    assert of_digits == [manifest.datasets["cifar10"].classes]
    assert names_of_classes("timm:test_resnet.r160_in1k", "mine.pt", manifest) == []


# ---- classes ---------------------------------------------------------------------------------------------------------

MAP = {"0": 11, "1": 3, "2": 4, "3": 1, "4": 0, "5": 9, "6": 8, "7": [6, 12], "8": 5, "9": 2}


@pytest.fixture
def of_thirteen(trained, tmp_path) -> Path:
    """The trained teacher among 13 classes: some in another order, one in two halves, two that mean nothing."""
    weight, bias = torch.randn(13, 256), torch.full((13,), 50.0)
    for name, indices in MAP.items():
        several = [indices] if isinstance(indices, int) else indices
        for index in several:
            weight[index] = trained["head.weight"][int(name)]
            bias[index] = trained["head.bias"][int(name)] - torch.tensor(float(len(several))).log()
    torch.save({"model": trained | {"head.weight": weight, "head.bias": bias}}, tmp_path / "thirteen.pth")
    return tmp_path / "thirteen.pth"


def test_a_teacher_with_more_classes_says_what_one_of_ours_says(
    of_thirteen, recipe_file, recipe, where, manifest, roots, tmp_path
):
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({int(name): index for name, index in MAP.items()}))
    content = yaml.safe_load(recipe_file.read_text())
    content["teacher"] |= {"weights": str(of_thirteen), "classes": "map.yaml"}
    recipe_file.write_text(yaml.safe_dump(content))
    mapped = load_recipe(recipe_file)
    ours, theirs = (load_teacher(one, manifest, roots, 10, CPU) for one in (recipe, mapped))
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(theirs.logits(images), ours.logits(images), rtol=1e-5, atol=1e-4)
    assert theirs.network(torch.zeros(1, 3, 8, 8)).shape == (1, 13)
    measured = [gate(one, its, manifest, roots, CPU)[1].top1 for one, its in ((theirs, mapped), (ours, recipe))]
    assert measured[0] == measured[1]
    store = tmp_path / "store"
    result = invoke("cache-teacher", recipe_file, "--store", store, *where, *sets(*LITTLE))
    assert result.exit_code == 0, result.stderr
    identity = json.loads((store / "store.json").read_text())
    assert identity["teacher"]["classes"] == [[one] if isinstance(one, int) else one for one in MAP.values()]
    assert "7: 6, 12" in (store / "README.md").read_text()
    verify = invoke("store", "verify", store, "--teacher", "50", "--recipe", recipe_file, *where)
    assert verify.exit_code == 0, verify.output
    train = ("distill", recipe_file, *where, *sets(*LITTLE), "--objective", "kd")
    runs = [(*train, "--store", store, "--out", tmp_path / "stored"), (*train, "--online", "--out", tmp_path / "live")]
    for run in runs:
        assert invoke(*run).exit_code == 0
    stored, live = (load_file(tmp_path / name / "student.safetensors") for name in ("stored", "live"))
    for key, tensor in stored.items():
        torch.testing.assert_close(live[key], tensor, rtol=1e-3, atol=1e-3)
    swapped = "teacher.classes=" + json.dumps(MAP | {"0": 3, "1": 11})
    message = refused(*train, "--store", store, "--out", tmp_path / "other", *sets(swapped))
    assert "with classes [[11], [3]," in message
    assert "the recipe's teacher has [[3], [11]," in message
    capture = ("cache-teacher", recipe_file, "--store", store, *where, *sets(*LITTLE))
    assert "its teacher.classes is" in refused(*capture, *sets(swapped))


def test_several_classes_count_together_as_their_probabilities_do():
    logits = 3 * torch.randn(20, 7)
    mapped = select(logits, [[4], [0, 2, 5], [1]])
    assert torch.equal(mapped[:, 0], logits[:, 4])
    probabilities = logits.double().softmax(1)
    summed = torch.stack([probabilities[:, list(some)].sum(1) for some in ((4,), (0, 2, 5), (1,))], dim=1)
    expected = summed / summed.sum(1, keepdim=True)
    torch.testing.assert_close(mapped.double().softmax(1), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(select(logits, [[6], [2]]), logits[:, [6, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"9": None}, "names 9 of the dataset's 10 classes, '9' is missing"),
        ({"10": 10}, "'10' is no class of the dataset"),
        ({"4": 3}, "'1' and '4' both have class 3 of the teacher"),
        ({"7": [6, 6]}, "'7' and '7' both have class 6 of the teacher"),
        ({"4": 13}, "'4' is class 13 of the teacher, which has 13 (0 to 12)"),
        ({"4": "four"}, "'4' is 'four', but what this teacher's classes are called is not known. Write the index"),
        ({"4": -1}, "greater than or equal to 0"),
        ({"4": []}, "at least 1 item"),
        ({"4": True}, "'teacher.classes.4.0"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_maps_of_classes_that_are_wrong_are_one_line(change, message, of_thirteen, recipe_file, where, tmp_path):
    classes: object = change
    if isinstance(change, dict):
        classes = {name: one for name, one in (MAP | change).items() if one is not None}
    chosen = (f"teacher.weights={of_thirteen}", f"teacher.classes={json.dumps(classes)}")
    capture = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *where, *sets(*LITTLE, *chosen))
    assert message in refused(*capture)
    assert not (tmp_path / "store").exists()
    if isinstance(change, str):
        tuned = sets("teacher.head=new", f"teacher.classes={json.dumps(MAP)}")
        assert "has the classes of the dataset: leave classes out" in refused(*capture, *tuned)

"""`offline-kd init`: a folder of pictures, as people have them, becomes a dataset and a recipe that runs."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, invoke, refused
from PIL import Image

from offline_kd.data.decoding import decode_image
from offline_kd.data.folders import Photos, look_through
from offline_kd.data.manifest import load_manifest
from offline_kd.data.splitting import split_by_key
from offline_kd.data.tars import read_tar
from offline_kd.first_plan import Seconds, plan, seconds_of_network
from offline_kd.models.networks import build
from offline_kd.recipe import load_recipe
from offline_kd.support.errors import DataError, ModelError

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (210, 50, 40)}


def picture(seed: int, colour: tuple[int, int, int], height: int, width: int, kind: str = "PNG") -> bytes:
    """A class can be told by its colour, under noise."""
    rng = np.random.default_rng(seed)
    pixels = np.array(colour) + rng.normal(0, 40, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def small_pictures(folder: Path, each: int = 12) -> Path:
    for label, (name, colour) in enumerate(COLOURS.items()):
        for number in range(each):
            put(folder / name / f"{number}.png", picture(100 * label + number, colour, 16, 16))
    return folder


def large_pictures(folder: Path, each: int = 4, side: int = 70) -> Path:
    """In splits, of different sizes."""
    for part, count in (("training", each), ("test", 2), ("Valid", 2)):
        for label, (name, colour) in enumerate(COLOURS.items()):
            for number in range(count):
                content = picture(1000 * label + number + len(part) * 50, colour, side + number, side + 9, "JPEG")
                put(folder / part / name / f"{number}.JPG", content)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder, where nothing is to be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def init(*more: object, images: str = "photos", teacher: str = "cifar:resnet8") -> str:
    result = invoke("init", "--images", images, "--teacher", teacher, "--device", "cpu", "--minutes", 1, *more)
    assert result.exit_code == 0, result.output
    return result.output


def test_two_lines_make_students_of_a_folder(here):
    small_pictures(here / "photos", each=8)
    said = init("--student", "cifar:resnet8")
    assert "24 pictures of 3 classes" in said
    assert "one of 5 pictures, by its key, is held out" in said
    assert "warning: a teacher that begins with nothing and learns from 21 pictures may know no more" in said
    assert "# 2 steps an epoch" in (here / "recipe.yaml").read_text()
    assert said.splitlines()[-1] == "offline-kd run recipe.yaml"
    short = ("teacher.training.epochs=2", "training.epochs=2", "views.count=2")
    result = invoke("run", "recipe.yaml", *(word for one in short for word in ("--set", one)), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (here / "runs/photos/students").iterdir()} == {"kd-0", "ce-0"}
    sentence = next(line for line in result.stderr.splitlines() if line.startswith("Students "))
    assert sentence in (here / "runs/photos/report.html").read_text()
    assert invoke("data", "check", "photos").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_pictures, large_pictures])
def test_a_first_recipe_runs_as_it_is_and_its_networks_learn(here, make):
    make(here / "photos", each=40)
    init()
    result = invoke("run", "recipe.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    summary = yaml.safe_load((here / "runs/photos/summary.json").read_text())
    assert all(one["top1_mean"] > 80 for one in summary["objectives"]), summary


def test_a_recipe_for_pictures_in_splits_names_them_and_says_why_of_every_setting(here):
    large_pictures(here / "photos")
    said = init("--out", "new folder", "--name", "null", "--side", 64)
    assert "photos: 24 pictures of 24 with more than 64 pixels on the shorter side will be packed with 64" in said
    text = (here / "new folder/recipe.yaml").read_text()
    recipe = load_recipe(here / "new folder/recipe.yaml")
    assert (recipe.name, recipe.data.train, recipe.data.evaluation) == ("null", "training", "Valid")
    assert recipe.views.output_size == 64
    assert "; of larger pictures with 64 pixels on the shorter side" in text
    samples, _ = read_tar(here / "new folder/data/null/training-000000.tar")
    assert {min(decode_image(one.encoded).size) for one in samples} == {64}
    assert recipe.teacher.crop == recipe.evaluation_crop
    assert recipe.training.epochs == 3 * recipe.views.num_views
    settings = [line for line in text.splitlines() if line.startswith("  ") and not line.strip().endswith(":")]
    without = {line.split(":")[0].strip() for line in settings if "#" not in line}
    # Of these the lines before or after speak.
    assert without <= {"epochs", "schedule", "kd", "normalisation", "train"}, without
    dataset = load_manifest(here / "new folder/data_manifest.yaml").dataset("null")
    assert {part: split.count for part, split in dataset.splits.items()} == {"Valid": 6, "test": 6, "training": 12}


def test_init_overwrites_nothing_unless_it_is_told_to(here):
    small_pictures(here / "photos", each=3)
    for name in ("recipe.yaml", "data_manifest.yaml"):
        (here / name).write_text("# mine\nmanifest_version: 1\n")
    again = ("init", "--images", "photos", "--teacher", "cifar:resnet8")
    assert "recipe.yaml exists. Give another --out, or --force" in refused(*again)
    assert (here / "recipe.yaml").read_text().startswith("# mine")
    os.remove(here / "recipe.yaml")
    init()
    assert (here / "data_manifest.yaml").read_text().startswith("# mine\n")
    os.remove(here / "recipe.yaml")
    assert "data/photos exists. Give another --out or --name, or --force" in refused(*again)
    before = (here / "data/photos/train-000000.tar").read_bytes()
    init("--force")
    assert (here / "data/photos/train-000000.tar").read_bytes() == before


def test_what_is_no_picture_is_left_out_and_told_by_init(here):
    photos = small_pictures(here / "photos", each=3)
    put(photos / "red/notes.txt", b"hello")
    put(photos / "red/cut.png", picture(1, COLOURS["red"], 16, 16)[:300])
    (photos / "empty").mkdir()
    said = init()
    assert "left out what is no picture: .txt (1)" in said
    assert "photos/red/cut.png: image file is truncated" in said
    assert load_manifest(here / "data_manifest.yaml").dataset("photos").classes == ["blue", "green", "red"]


def test_weights_of_ones_own_are_used_as_they_are_or_with_a_new_last_layer(here):
    small_pictures(here / "photos", each=3)
    for classes in (3, 7):
        torch.save(build("cifar:resnet8", classes).state_dict(), here / f"{classes}.pth")
    said = init("--weights", "3.pth")
    assert "it has 3 outputs, and is used as it is" in said
    assert "warning" not in said
    teacher = load_recipe(here / "recipe.yaml").teacher
    assert (teacher.weights, teacher.training) == ("3.pth", None)
    init("--weights", "7.pth", "--out", "other")
    fields = yaml.safe_load((here / "other/recipe.yaml").read_text())["teacher"]
    assert fields["weights"] == str(here / "7.pth")
    assert fields["head"] == "new"
    assert (fields["training"]["train"], fields["training"]["optimizer"]["lr"]) == ("head", 1e-3)
    arguments = ("init", "--images", "photos", "--out", "third", "--teacher")
    assert "3.pth: lacks 'block1.layer.0.bn1.weight'" in refused(*arguments, "cifar:wrn_16_1", "--weights", "3.pth")
    assert "--weights none.pth: no such file" in refused(*arguments, "cifar:resnet8", "--weights", "none.pth")
    assert not (here / "third").exists()


def test_pretrained_weights_are_taken_where_they_can_be_had(here):
    """What timm has fetched before lies in the hub's cache; without it and without a network, none can be had."""
    timm = pytest.importorskip("timm")
    small_pictures(here / "photos", each=3)
    network = "timm:mobilenetv3_small_050"
    said = init("--weights", "auto", teacher=network)
    assert "it learns from nothing: timm's weights are not here, and nothing is to be reached" in said
    assert load_recipe(here / "recipe.yaml").teacher.weights is None
    arguments = ("init", "--images", "photos", "--out", "new", "--teacher", network, "--weights", "pretrained")
    assert "Give --weights FILE, or --weights none" in refused(*arguments)
    folder = here / "hub" / f"models--{timm.get_pretrained_cfg(network[5:]).hf_hub_id.replace('/', '--')}"
    put(folder / "refs/main", b"abc")
    put(folder / "snapshots/abc/model.safetensors", b"weights")
    assert invoke(*arguments).exit_code == 0
    fields = yaml.safe_load((here / "new/recipe.yaml").read_text())["teacher"]
    assert (fields["weights"], fields["head"]) == ("pretrained", "new")
    assert "training" in fields


WRONG = {
    "no folder": ("--images nowhere", "nowhere: no such folder"),
    "no classes": ("--images photos/red", "red: 0 class folders, at least 2 are needed"),
    "an unknown network": ("--teacher cifar:resnet9", "no network 'cifar:resnet9'. Did you mean"),
    "an unknown student": ("--student cifar:resnet9", "no network 'cifar:resnet9'. Did you mean"),
    "a name that is a path": ("--name a/b", "--name a/b: letters, digits"),
    "tars among the pictures": ("--out photos", "lies in the folder of the pictures"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_init_cannot_use_is_refused_before_anything_is_written(here, arguments, message):
    small_pictures(here / "photos", each=2)
    before = sorted(here.rglob("*"))
    usual = ("--images", "photos", "--teacher", "cifar:resnet8", "--device", "cpu")
    assert message in refused("init", *usual, *arguments.split())
    assert sorted(here.rglob("*")) == before


def test_init_without_pictures_or_teacher_says_the_two_lines(here):
    two_lines = "`offline-kd init --images FOLDER --teacher timm:resnet50`, `offline-kd run recipe.yaml`"
    for arguments, missing in (((), "--images and --teacher"), (("--images", "photos"), "--teacher")):
        message = refused("init", *arguments)
        assert f"init: {missing} missing" in message
        assert two_lines in message


def test_a_table_of_labels_takes_the_place_of_folders_of_classes(here):
    lines = ["file,class,note"]
    for label, (name, colour) in enumerate(COLOURS.items()):
        for number in range(4):
            file = put(
                here / f"photos/set {label}/{name[0]}{number}.png", picture(100 * label + number, colour, 16, 16)
            )
            lines.append(f"{file.relative_to(here / 'photos').with_suffix('' if number else '.png')},{name},-")
    put(here / "photos/unknown.png", picture(1, (0, 0, 0), 16, 16))
    table = put(here / "photos/labels.csv", "\n".join(lines).encode("utf-8-sig"))
    said = init("--labels", table)
    assert "photos: left out what labels.csv does not name: 1 file" in said
    dataset = load_manifest(here / "data_manifest.yaml").dataset("photos")
    assert dataset.classes == sorted(COLOURS)
    samples = [one for part in dataset.splits for one in read_tar(here / f"data/photos/{part}-000000.tar")[0]]
    assert len(samples) == 12
    assert {one.label for one in samples if one.key.startswith("set_1/")} == {dataset.classes.index("green")}
    again = ("init", "--images", "photos", "--teacher", "cifar:resnet8", "--force")
    wrong = {
        "photos/nothing.png,red": "line 14: 'photos/nothing.png' is no file in photos",
        "set 0/b1,red": "line 14: 'set 0/b1' is 'red' here and 'blue' before",
        "unknown.png,": "line 14: 'unknown.png' has no class",
    }
    for line, message in wrong.items():
        put(table, "\n".join([*lines, line]).encode())
        assert message in refused(*again, "--labels", table)
    assert "none.csv: is no table that can be read" in refused(*again, "--labels", "none.csv")


# ---- splits --------------------------------------------------------------------------------------------------------


def test_pictures_stay_in_their_split_and_the_same_picture_lies_in_one(tmp_path):
    photos = small_pictures(tmp_path / "photos", each=30)
    same = picture(7, (9, 9, 9), 16, 16)
    for number in range(20):
        put(photos / "red" / f"same{number}.png", same)

    def split() -> dict[str, set[str]]:
        found = split_by_key(look_through(photos))
        return {
            part: {one.path.name for one in those if one.class_name == "red"} for part, those in found.splits.items()
        }

    before = split()
    assert 0 < len(before["val"]) < len(before["train"])
    copies = {f"same{number}.png" for number in range(20)}
    assert sum(bool(copies & names) for names in before.values()) == 1
    for number in range(30):
        put(photos / "red" / f"new{number}.png", picture(5000 + number, COLOURS["red"], 16, 16))
    after = split()
    assert all(before[part] <= after[part] for part in before)


def test_classes_of_two_pictures_are_in_both_splits(tmp_path):
    photos = split_by_key(look_through(small_pictures(tmp_path / "photos", each=2)))
    assert [photos.counts(part) for part in photos.splits] == [dict.fromkeys(COLOURS, 1)] * 2


def test_what_splits_have_in_common_is_told_and_what_cannot_be_learned_refused(tmp_path, capsys):
    photos = large_pictures(tmp_path / "photos")
    put(photos / "Valid/blue/copy.jpg", (photos / "training/blue/0.JPG").read_bytes())
    put(photos / "Valid/red/copy.jpg", (photos / "training/blue/1.JPG").read_bytes())
    look_through(photos)
    said = capsys.readouterr().err
    assert "in another split too, byte for byte: 2 pictures" in said
    assert "in another class too, byte for byte: 1 picture, such as" in said
    (photos / "training/white").mkdir()
    put(photos / "training/white/1.jpg", picture(1, (255, 255, 255), 70, 70, "JPEG"))
    assert "Valid" in _said_of(photos, capsys, "no picture of 1 of 4 classes, such as 'white'")
    put(photos / "test/black/1.jpg", picture(1, (0, 0, 0), 70, 70, "JPEG"))
    with pytest.raises(DataError, match="class 'black' has 1 picture in test and none in training"):
        look_through(photos)


def _said_of(folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> str:
    found = look_through(folder)
    assert isinstance(found, Photos)
    return next(line for line in capsys.readouterr().err.splitlines() if what in line)


# ---- time ----------------------------------------------------------------------------------------------------------


def test_more_time_gives_larger_views_and_more_rounds_and_a_given_teacher_leaves_more():
    one = Seconds(teaching=0.02, answering=0.005, learning=0.006, reading=0.004)
    plans = [plan(one, 1000, 200, (224, 128, 64), 60.0 * minutes) for minutes in (1, 8, 30, 1000)]
    assert [plan.size for plan in plans] == [64, 64, 128, 224]
    assert plans[0].rounds == 4  # there is too little time for more, and the recipe says so
    assert plans[0].seconds > 60
    assert all(plan.seconds <= 60 * minutes for plan, minutes in zip(plans[1:], (8, 30, 1000), strict=True))
    assert plans[3].rounds == 34  # 100,000 pictures shown
    trained = Seconds(teaching=0, answering=0.005, learning=0.006, reading=0.004, asked_at=224)
    assert plan(trained, 1000, 200, (224, 128, 64), 480).rounds > plans[1].rounds


def test_a_network_that_takes_no_such_pictures_is_named():
    with pytest.raises(ModelError, match="'networks:small' does not take 16x16 pixels"):
        seconds_of_network("networks:small", 3, 16, CPU)

"""What was trained can be used: files that say what they are, built, measured, asked, written for other programs."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from conftest import CPU, ROOT, invoke, make_recipe, refused
from networks import Small
from pictures import command_line, encoded, make_samples, photograph, photographs
from PIL import Image
from students import letkd_recipe, options_for, said, written
from torch import nn

import offline_kd as okd
from offline_kd.cli import main as cli
from offline_kd.data.packing import digits_samples
from offline_kd.data.tars import read_tar
from offline_kd.distill.results import Run
from offline_kd.models.networks import normalise
from offline_kd.models.student_file import ENTRY
from offline_kd.support.errors import DataError, ModelError
from offline_kd.support.files import file_sha256
from offline_kd.support.places import Folder
from offline_kd.views.render import evaluation_crop


@pytest.fixture(scope="module")
def letkd(teacher_weights, data_root, tmp_path_factory) -> Path:
    """A folder with a finished run of a student with two KD layers, one inside the other: `run`."""
    folder = tmp_path_factory.mktemp("letkd")
    recipe, options = letkd_recipe(teacher_weights, folder), [*options_for(data_root), "--device", "cpu"]
    assert invoke("cache-teacher", recipe, "--store", folder / "store", *options).exit_code == 0
    done = invoke("distill", recipe, "--store", folder / "store", "--out", folder / "run", *options)
    assert done.exit_code == 0, done.output
    return folder


# ---- what a file says ------------------------------------------------------------------------------------------------


def test_a_student_file_says_what_it_is_of(letkd):
    about = said(letkd / "run" / "student.safetensors")
    store = json.loads(invoke("store", "info", letkd / "store", "--json").stdout)
    assert about["model"] == "cifar:resnet8"
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert about["normalisation"] == {"mean": [0.3] * 3, "std": [0.4] * 3}
    assert about["input_size"] == [8, 8]
    assert [layer["after"] for layer in about["kd_layers"]] == ["layer3", "layer3.module.0"]
    assert (about["dataset"], about["evaluation"], about["objective"], about["seed"]) == ("digits", "test", "letkd", 0)
    assert [f"sha256:{digest}" for digest in about["stores"]] == [store["digest"]]
    assert about["version"] == okd.__version__
    assert said(letkd / "run" / "best_ema.safetensors") == about


def test_the_files_of_a_run_are_the_same_wherever_it_is_trained(letkd, data_root, tmp_path):
    shutil.copytree(letkd / "store", tmp_path / "elsewhere")
    changes = ["data.keep_bytes=0", "training.checkpoint_steps=2", "training.keep=[]", "seeds=[0,5]"]
    given = [text for change in changes for text in ("--set", change)]
    command = ("distill", letkd / "recipe.yaml", "--store", tmp_path / "elsewhere", *options_for(data_root), *given)
    assert invoke(*command, "--device", "cpu", "--out", tmp_path / "run").exit_code == 0
    for name in ("student.safetensors", "student_ema.safetensors"):
        assert file_sha256(tmp_path / "run" / name) == file_sha256(letkd / "run" / name)


def test_the_recipe_digest_is_of_what_makes_the_student():
    def digest(**changes: object) -> str:
        recipe = make_recipe(**changes)
        return Run(recipe, "kd", recipe.objectives["kd"], 0, Folder(Path()), CPU).recipe_sha256

    usual = digest()
    for same in (
        {"name": "other", "seeds": [3], "teacher": {"weights": "elsewhere.pt"}, "student": {"weights": "begin.pt"}},
        {"data": {"workers": 2, "root": "elsewhere"}, "training": {"resident": "never", "keep": ["best"]}},
        {"objectives": {"ce": [{"term": "ce", "weight": 2}]}, "store": "elsewhere"},
    ):
        assert digest(**same) == usual
    for other in (
        {"training": {"optimizer": {"name": "sgd", "lr": 0.04}}},
        {"views": {"padding": 2}},
        {"student": {"model_args": {"width": 5}}},
        {"objectives": {"kd": [{"term": "kd", "temperature": 4}]}},
    ):
        assert digest(**other) != usual


def test_a_trained_teacher_says_that_it_is_the_teacher(teacher_weights):
    about = said(teacher_weights)
    assert (about["model"], about["model_args"], about["objective"]) == ("networks:small", {}, "teacher")
    assert "stores" not in about or about["stores"] == []
    teacher = okd.load_student(teacher_weights, network="networks:small")
    assert teacher.network.head.in_features == 256


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_loaded_student_has_its_kd_layers_and_takes_pictures(letkd):
    student = okd.load_student(letkd / "run")
    assert not student.network.training
    assert student.classes[3] == "3"
    inside = student.network.get_submodule("layer3.module.0.kd_layer.templates")
    assert inside.weight.shape == (8, 64)
    sample = digits_samples()["test"][0]
    image = Image.open(io.BytesIO(sample.encoded))
    ready = student.preprocess(image)
    assert ready.dtype == torch.float32
    assert ready.shape == (3, 8, 8)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    assert torch.equal(ready[None], normalise(pixels, student.about.normalisation))
    with torch.inference_mode():
        assert torch.equal(student.network(ready[None]), student.logits(pixels))
    larger = image.resize((20, 16))
    assert torch.equal(student.preprocess(larger), student.preprocess(np.array(larger.convert("RGB"))))
    assert student.preprocess(larger).shape == (3, 8, 8)
    with pytest.raises(DataError, match="images are 16x16, the student takes 8x8"):
        student.logits(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["student", "best", "student_ema"])
def test_evaluate_gives_the_figures_of_the_run_itself(letkd, where, name):
    result = json.loads((letkd / "run" / "result.json").read_text())
    lines = [json.loads(line) for line in (letkd / "run" / "metrics.jsonl").read_text().splitlines()]
    line = lines[result["best_epoch"] - 1 if name == "best" else -1]
    end = "_ema" if name.endswith("_ema") else ""
    done = invoke("evaluate", letkd / "run" / f"{name}.safetensors", "--json", *where)
    found = json.loads(done.stdout)
    assert {figure: found[figure] for figure in ("top1", "nll", "ece")} == {
        figure: line[f"{figure}{end}"] for figure in ("top1", "nll", "ece")
    }
    classes = found["classes"]
    assert sum(one["images"] for one in classes) == found["samples"] == 359
    assert sum(one["predicted"] for one in classes) == 359
    assert sum(one["images"] * one["top1"] for one in classes) / 359 == pytest.approx(found["top1"])
    assert sum(one["images"] * one["top5"] for one in classes) / 359 == pytest.approx(found["top5"])
    assert 100 >= found["top5"] > found["top1"]


def test_evaluate_shows_the_worst_classes_and_takes_other_splits(letkd, where):
    shown = invoke("evaluate", letkd / "run", "--data", "digits/train", *where).stdout
    assert "on digits/train" in " ".join(shown.split())
    assert "1,438" in shown
    assert "classes, worst first" in shown
    assert "has no split 'tset'" in refused("evaluate", letkd / "run", "--data", "digits/tset", *where)
    assert "has 100 classes, the student 10: class 0 is 'apple', the student's '0'" in refused(
        "evaluate", letkd / "run", "--data", "cifar100_filtered", *where
    )


def test_a_student_of_photographs_sees_them_as_it_was_evaluated(tmp_path):
    recipe, manifest = photographs(tmp_path, make_samples())
    file, given = command_line(tmp_path, recipe, manifest)
    training = ["--set", "training.epochs=1", "--device", "cpu", "--objective", "ce"]
    assert invoke("distill", file, *training, "--out", tmp_path / "run", *given).exit_code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found = json.loads(invoke("evaluate", tmp_path / "run", "--json", *given).stdout)
    assert (found["top1"], found["nll"], found["ece"]) == (result["top1"], result["nll"], result["ece"])
    student = okd.load_student(tmp_path / "run")
    crop = student.about.crop
    assert student.about.input_size == (16, 16)
    image = photograph(3, 50, 70)
    assert np.array_equal(student.pixels(image), evaluation_crop(np.asarray(image), crop))


def test_a_file_from_before_files_said_what_they_are_of_names_the_way_out_and_it_works(letkd, data_root, tmp_path):
    run = Path(shutil.copytree(letkd / "run", tmp_path / "run"))
    tensors = safetensors.torch.load_file(run / "student.safetensors")
    safetensors.torch.save_file(tensors, run / "student.safetensors")
    result = json.loads((run / "result.json").read_text())
    result["student_sha256"] = file_sha256(run / "student.safetensors")
    (run / "result.json").write_text(json.dumps(result))
    command = ("distill", letkd / "recipe.yaml", "--store", letkd / "store", "--out", run, *options_for(data_root))
    assert "finished already" in invoke(*command, "--device", "cpu").stderr
    with pytest.raises(ModelError, match=r"does not say which network.*delete result\.json and run the same command"):
        okd.load_student(run)
    (run / "result.json").unlink()
    assert invoke(*command, "--device", "cpu").exit_code == 0
    assert file_sha256(run / "student.safetensors") == file_sha256(letkd / "run" / "student.safetensors")


# ---- files of strangers ----------------------------------------------------------------------------------------------


def changed(file: Path, out: Path, **fields: object) -> Path:
    """The same weights, which say something else of themselves."""
    content = {name: value for name, value in (said(file) | fields).items() if value is not ...}
    metadata = {ENTRY: json.dumps(content)}
    out.write_bytes(safetensors.torch.save(safetensors.torch.load_file(file), metadata=metadata))
    return out


def test_code_that_a_file_names_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("from networks import small\n")
    monkeypatch.syspath_prepend(tmp_path)
    ours = written(tmp_path, "networks:small", 8, width=4)
    file = changed(ours, tmp_path / "theirs.safetensors", model="stranger:small")
    photograph(0, 8, 8).save(tmp_path / "photo.png")
    message = refused("predict", file, tmp_path / "photo.png")
    assert "is code of your own, 'stranger:small', which is not imported because a file says so" in message
    assert "--network stranger:small" in message
    assert "stranger" not in sys.modules
    done = invoke("predict", file, tmp_path / "photo.png", "--network", "stranger:small", "--format", "json")
    assert len(json.loads(done.stdout)[0]["classes"]) == 5
    assert "stranger" in sys.modules
    own = okd.load_student(file, network=Small(10, width=4))
    named = okd.load_student(ours, network="networks:small")
    noise = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(own.logits(noise), named.logits(noise))


def test_a_file_cannot_make_a_network_fetch_or_read_other_weights(tmp_path):
    file = written(tmp_path, "torchvision:mobilenet_v3_small", 64)
    asks = changed(file, tmp_path / "asks.safetensors", model_args={"weights": "DEFAULT", "pretrained": True})
    noise = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(okd.load_student(asks).logits(noise), okd.load_student(file).logits(noise))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "cifar:resnet14"}, r"lacks 'layer1\.1"),
        ({"model": "cifar:resnet9"}, r"Did you mean 'resnet"),
        ({"classes": ["a", "b"]}, "Weights of another architecture or another number of classes"),
        ({"kd_layers": []}, r"'layer3.*kd_layer.*' \(18 of .*\) has no place in the network"),
        ({"kd_layers": [{"after": "layer9", "value_ratio": 1.0}]}, "behind 'layer9', which the network lacks"),
        ({"kd_layers": [{"after": "conv1", "value_ratio": 1.0}]}, "lacks the weights of the KD layer behind 'conv1'"),
        ({"file_version": 2}, "'file_version': Input should be less than or equal to 1"),
        ({"input_size": [0, 8]}, "'input_size"),
        ({"normalisation": ...}, "'normalisation': Field required"),
        ({"clases": []}, "unknown field 'clases'. Did you mean 'classes'"),
    ],
)
def test_what_a_file_says_wrongly_is_one_line(letkd, tmp_path, fields, message):
    file = changed(letkd / "run" / "student.safetensors", tmp_path / "other.safetensors", **fields)
    with pytest.raises(okd.OfflineKDError, match=message) as raised:
        okd.load_student(file)
    assert str(file) in str(raised.value) or "cifar:resnet9" in str(raised.value)


def test_what_is_no_student_is_one_line(letkd, tmp_path):
    assert "no such file. Name a finished run directory" in refused("predict", tmp_path, "x.png")
    assert "no such file" in refused("predict", tmp_path / "none.safetensors", "x.png")
    assert "no such file" in refused("predict", letkd / "recipe.yaml", "x.png")
    whole = (letkd / "run" / "student.safetensors").read_bytes()
    entry = json.dumps({"__metadata__": {ENTRY: "[" * 100_000}}).encode()
    for content in (b"", b"torn", whole[:100], whole[:-7], len(entry).to_bytes(8, "little") + entry):
        (tmp_path / "bad.safetensors").write_bytes(content)
        assert "readable as safetensors" in refused("predict", tmp_path / "bad.safetensors", "x.png")


# ---- asking ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures_of_digits(data_root, tmp_path) -> Path:
    """`photos/` with twelve digits, one of them larger, and what is no picture."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    samples, _ = read_tar(next((data_root / "digits").glob("test*.tar")))
    for sample in samples[:11]:
        (folder / f"{sample.key}.png").write_bytes(sample.encoded)
    (folder / "deeper" / "large.jpg").write_bytes(encoded(photograph(1, 40, 60)))
    (folder / "notes.txt").write_text("mine")
    return folder


def test_predict_gives_the_probabilities_of_the_student(letkd, pictures_of_digits, data_root):
    done = invoke("predict", letkd / "run", pictures_of_digits, "--format", "json", "--top", 10)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert len(found) == 12
    assert found[-1]["image"].endswith("deeper/large.jpg") or found[0]["image"].endswith("deeper/large.jpg")
    student = okd.load_student(letkd / "run")
    for one in found:
        assert sum(each["probability"] for each in one["classes"]) == pytest.approx(1)
        ready = student.preprocess(Image.open(one["image"]))
        with torch.inference_mode():
            expected = student.network(ready[None])[0].softmax(0)
        for each in one["classes"]:
            assert each["probability"] == pytest.approx(expected[int(each["class"])].item(), abs=1e-6)
        assert one["classes"] == sorted(one["classes"], key=lambda each: -each["probability"])


def test_predict_takes_names_from_standard_input_and_writes_a_csv(letkd, pictures_of_digits):
    files = sorted(str(file) for file in pictures_of_digits.glob("*.png"))
    arguments = ["predict", str(letkd / "run"), "-", "--format", "csv", "--top", "2"]
    done = CliRunner().invoke(cli.main, arguments, input="\n".join(files) + "\n")
    lines = done.stdout.splitlines()
    assert lines[0] == "image,rank,class,probability"
    assert [line.split(",")[:2] for line in lines[1:]] == [[file, rank] for file in files for rank in ("1", "2")]
    best = lines[1].split(",")
    table = invoke("predict", letkd / "run", files[0], "--top", 1).stdout
    assert f" {best[2]} {float(best[3]):.4f} " in table


def test_images_that_cannot_be_read_are_listed_and_the_others_are_told_of(letkd, pictures_of_digits):
    (pictures_of_digits / "cut.png").write_bytes((next(pictures_of_digits.glob("0*.png"))).read_bytes()[:60])
    absent = pictures_of_digits / "absent.png"
    done = invoke(
        "predict", letkd / "run", pictures_of_digits, absent, pictures_of_digits / "notes.txt", "--format", "json"
    )
    assert done.exit_code == 1
    said_of = done.stderr.splitlines()
    assert said_of[-1].startswith("Error: 3 of 15 images cannot be read")
    assert f"{absent}: no such file" in said_of
    assert any("cut.png: " in line for line in said_of)
    found = json.loads(done.stdout)
    assert sum("problem" in one for one in found) == 3
    assert sum(len(one.get("classes", [])) == 5 for one in found) == 12
    (pictures_of_digits / "empty").mkdir()
    assert "holds no image" in refused("predict", letkd / "run", pictures_of_digits / "empty")


# ---- other programs --------------------------------------------------------------------------------------------------

FAMILIES = {
    "resnet": ("cifar:resnet8", 32, {}),
    "resnet_a": ("cifar:resnet20_a", 32, {}),
    "resnet50": ("cifar:resnet50", 32, {}),
    "wide": ("cifar:wrn_16_1", 32, {}),
    "vgg": ("cifar:vgg8", 32, {}),
    "mobilenetv2": ("cifar:mobilenetv2", 32, {}),
    "shufflenetv1": ("cifar:shufflenetv1", 32, {}),
    "shufflenetv2": ("cifar:shufflenetv2", 32, {}),
    "torchvision": ("torchvision:mobilenet_v3_small", 64, {}),
    "vit": ("timm:vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 2}),
    "timm": ("timm:resnet10t", 64, {}),
}
QUICK = ("vgg",)


def ask_onnx(file: Path, images: np.ndarray) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def some_photographs(folder: Path, size: int) -> tuple[Path, torch.Tensor]:
    (folder / "photos").mkdir()
    images = [photograph(number, size, size) for number in range(7)]
    for number, image in enumerate(images):
        image.save(folder / "photos" / f"{number}.png")
    return folder / "photos", torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_onnx_gives_the_logits_of_the_student(family, tmp_path):
    model, size, args = FAMILIES[family]
    file = written(tmp_path, model, size, **args)
    photos, images = some_photographs(tmp_path, size)
    out = tmp_path / "student.onnx"
    done = invoke("export", file, "--format", "onnx", "--out", out, "--images", photos)
    assert done.exit_code == 0, done.output
    assert "logits of 7 images differ by" in done.stderr
    expected = okd.load_student(file).logits(images).numpy()
    assert expected.std(axis=0).max() > 1e-3, "all images have the same logits: nothing is compared"
    for rows in (1, 2, 7):
        assert np.abs(ask_onnx(out, images[:rows].numpy()) - expected[:rows]).max() <= 1e-4


@pytest.mark.parametrize(
    "takes", ["uint8", *(pytest.param(one, marks=pytest.mark.slow) for one in ("float", "normalised"))]
)
def test_a_student_with_kd_layers_is_exported_to_onnx_and_says_what_it_is(letkd, where, tmp_path, takes, data_root):
    onnx = pytest.importorskip("onnx")
    out = tmp_path / "new" / "student.onnx"
    done = invoke("export", letkd / "run", "--format", "onnx", "--out", out, "--input", takes, *where)
    assert done.exit_code == 0, done.output
    assert "logits of 16 images of digits/test differ by" in done.stderr
    student = okd.load_student(letkd / "run")
    samples, _ = read_tar(next((data_root / "digits").glob("test*.tar")))
    pixels = np.stack([student.pixels(Image.open(io.BytesIO(sample.encoded))) for sample in samples[:20]])
    images = torch.from_numpy(pixels)
    fed = {"uint8": images, "float": images / 255, "normalised": normalise(images, student.about.normalisation)}[takes]
    assert np.abs(ask_onnx(out, fed.numpy()) - student.logits(images).numpy()).max() <= 1e-4
    metadata = {one.key: one.value for one in onnx.load(out).metadata_props}
    assert json.loads(metadata[ENTRY]) == said(letkd / "run" / "student.safetensors")


def test_a_student_with_kd_layers_is_exported_to_torch_export(letkd, where, tmp_path):
    out = tmp_path / "student.pt2"
    done = invoke("export", letkd / "run", "--format", "torch-export", "--out", out, "--input", "float", *where)
    assert done.exit_code == 0, done.output
    extra = {f"{ENTRY}.json": ""}
    network = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra[f"{ENTRY}.json"])["model"] == "cifar:resnet8"
    noise = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(
            network(noise / 255), okd.load_student(letkd / "run").logits(noise), rtol=0, atol=1e-4
        )


@pytest.mark.slow
def test_timm_loads_what_is_exported_for_it(tmp_path):
    timm = pytest.importorskip("timm")
    file = written(tmp_path, "timm:resnet10t", 64)
    photos, images = some_photographs(tmp_path, 64)
    done = invoke("export", file, "--format", "timm", "--out", tmp_path / "timm", "--images", photos)
    assert done.exit_code == 0, done.output
    student = okd.load_student(file)
    network = timm.create_model("resnet10t", num_classes=10, checkpoint_path=str(tmp_path / "timm/model.safetensors"))
    ready = normalise(images, student.about.normalisation)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(ready), student.logits(images))
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["architecture"] == "resnet10t"
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    assert config["pretrained_cfg"]["label_names"] == student.classes
    # Arguments of timm that fetch or read other weights are nothing that a file may ask for.
    theirs = {"pretrained": True, "checkpoint_path": str(tmp_path / "none.pth"), "cache_dir": str(tmp_path / "cache")}
    asks = okd.load_student(changed(file, tmp_path / "asks.safetensors", model_args=theirs))
    assert torch.equal(asks.logits(images), student.logits(images))


def test_what_timm_does_not_know_is_not_exported_for_it(tmp_path, letkd, where):
    command = ("export", letkd / "run", "--format", "timm", "--out", tmp_path / "no", *where)
    assert "has KD layers inside, which timm does not know" in refused(*command)
    assert "--input uint8: timm's models take normalised images" in refused(*command, "--input", "uint8")
    file = written(tmp_path, "cifar:resnet8")
    assert "the student is 'cifar:resnet8': timm loads its own models only" in refused(*command[:1], file, *command[2:])
    assert not (tmp_path / "no").exists()


class TurnsByTheMean(nn.Module):
    """What a graph cannot hold: which way it goes depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean(dim=(2, 3)) if x.mean() > 0 else x.amax(dim=(2, 3)))


def turning(num_classes: int) -> nn.Module:
    return TurnsByTheMean()


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    file = written(tmp_path, "test_usable:turning", 8)
    command = ("export", file, "--network", "test_usable:turning", "--out", tmp_path / "out")
    assert "test_usable:turning: cannot be exported" in refused(*command, "--format", "torch-export")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "onnxscript is not installed: pip install 'offline-kd[onnx]'" in refused(*command, "--format", "onnx")


def test_without_images_a_student_is_compared_on_noise_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, "networks:small", 8)
    command = ("export", file, "--network", "networks:small", "--format", "torch-export", "--out", tmp_path / "s.pt2")
    # The smallest difference that there may be: rounding alone is then too much, and nothing is written.
    monkeypatch.setattr("offline_kd.models.export.TOLERANCE", -1.0)
    assert "from the student's, whose largest is" in refused(*command)
    assert not (tmp_path / "s.pt2").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    done = invoke(*command)
    assert "compared on noise" in done.stderr
    assert "logits of 16 images of noise differ by" in done.stderr
    assert (tmp_path / "s.pt2").is_file()


# ---- documents -------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_on_students_runs(letkd, pictures_of_digits, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(pictures_of_digits, "photos/val/digits")
    shutil.copytree(letkd / "run", "runs/wttm")
    Path("photo.jpg").write_bytes(encoded(photograph(1, 40, 60)))
    page = (ROOT / "docs" / "students.md").read_text()
    for example in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(example, "docs/students.md", "exec"), {})
    assert capsys.readouterr().out

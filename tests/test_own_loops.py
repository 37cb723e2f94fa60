"""docs/own-loops.md: every block runs as it stands, and what frameworks ask of a loader is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import CPU, ROOT, invoke
from torch.nn import functional as F
from torch.utils.data import DataLoader

import offline_kd as okd
from offline_kd.data.blocks import BlockLoader
from offline_kd.models.evaluation import evaluate
from offline_kd.models.networks import normalise
from offline_kd.support.errors import DataError, RecipeError

TIMM_TRAIN = "OFFLINE_KD_TIMM_TRAIN"  # names timm's train.py
GREY = {"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]}
PAGE = (ROOT / "docs/own-loops.md").read_text()


def blocks(heading: str, language: str = "python") -> list[str]:
    """The blocks of code below a heading of the page."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    found = re.findall(rf"^```{language}\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert found, heading
    return found


@pytest.fixture
def folder(store_path, data_root, tmp_path, monkeypatch) -> Path:
    """As `offline-kd run digits --out runs/digits` leaves it; the current folder."""
    (tmp_path / "runs/digits/data").mkdir(parents=True)
    (tmp_path / "runs/digits/store").symlink_to(store_path)
    (tmp_path / "runs/digits/data/digits").symlink_to(data_root / "digits")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_program(*parts: str) -> str:
    """What a program prints in a process of its own, in the current folder."""
    Path("program.py").write_text("\n".join(parts))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the page ------------------------------------------------------------------------------------------------------


def test_plain_pytorch_and_readers_of_arrays_run_as_they_stand(folder, capsys):
    names: dict[str, object] = {"__name__": "__main__"}
    for block in [*blocks("Plain PyTorch"), *blocks("The arrays alone")]:
        exec(compile(block, "docs/own-loops.md", "exec"), names)
    assert float(re.search(r"top-1 ([\d.]+)%", capsys.readouterr().out)[1]) > 80
    assert len(names["with_tensorstore"]) == 512


def test_the_lines_for_timm_give_its_loop_what_it_asks_for(folder):
    """The added lines, in a loop that asks of loaders and task what timm's train.py asks."""
    task_of_timm = pytest.importorskip("timm.task").ClassificationTask
    added = [line[1:].strip() for line in blocks("timm's train.py", "diff")[0].splitlines() if line.startswith("+")]
    assert len(added) <= 5
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    args = SimpleNamespace(batch_size=100, seed=3, data_dir="runs/digits/data/digits")
    names = {"torch": torch, "model": model, "args": args, "device": CPU, "data_config": GREY}
    names["ClassificationTask"] = task_of_timm
    exec("\n".join(added), names)
    train, task = names["loader_train"], names["task"]
    train.dataset.set_epoch(1)
    assert not hasattr(train.batch_sampler, "set_epoch")
    own = okd.open_store("runs/digits/store", data=args.data_dir).loader(batch_size=100, seed=3, normalisation=GREY)
    assert len(train) == len(own) == 15
    for (images, target), batch in zip(train, own.epoch(1), strict=True):
        assert target.key_hash.tolist() == batch.key_hash.tolist()
        assert target.to(device=CPU) is target
        expected = okd.objectives.kd(model(batch.images), batch.teacher_logits, temperature=4.0)
        assert torch.equal(task(images, target)["loss"], expected)
    seen = [(model(images).shape, labels.dtype) for images, labels in names["loader_eval"]]
    assert len(seen) == len(names["loader_eval"]) == 4
    assert seen[-1] == ((59, 10), torch.int64)


# ---- what frameworks ask of a loader -------------------------------------------------------------------------------


def test_an_epoch_that_is_set_is_the_one_that_is_shown_and_a_part_that_was_shown_is_not_shown_again(folder):
    store = okd.open_store("runs/digits/store", data="runs/digits/data/digits")
    loader = store.loader(batch_size=400)
    order = {epoch: [batch.key_hash.tolist() for batch in loader.epoch(epoch)] for epoch in (0, 5)}
    assert order[0] != order[5]
    loader.set_epoch(5)
    assert [batch.key_hash.tolist() for batch in DataLoader(loader, batch_size=None)] == order[5]
    assert loader.state_dict() == {"epoch": 6, "step": 0}
    loader.load_state_dict({"epoch": 5, "step": 2})
    loader.set_epoch(5)
    assert [batch.key_hash.tolist() for batch in loader] == order[5][2:]
    loader.load_state_dict({"epoch": 5, "step": 2})
    loader.set_epoch(0)
    assert [target.key_hash.tolist() for _, target in loader.pairs()] == order[0]


def test_workers_of_a_dataloader_around_it_are_refused_since_each_would_show_every_batch(folder):
    loader = okd.open_store("runs/digits/store", data="runs/digits/data/digits").loader(batch_size=400)
    with pytest.raises(RecipeError, match=r"num_workers=0, and the loader of the store workers=N"):
        next(iter(DataLoader(loader, batch_size=None, num_workers=1)))


def test_a_batch_that_is_moved_takes_its_teacher_along(folder):
    loader = okd.open_store("runs/digits/store", data="runs/digits/data/digits").loader(batch_size=50)
    batch = next(iter(loader))
    moved = batch.to("meta", non_blocking=True)
    assert {tensor.device.type for tensor in (moved.images, moved.labels, moved.teacher_logits)} == {"meta"}
    assert moved.teacher_logits.shape == (50, 10)
    assert batch.to(torch.device("cpu")) is batch


# ---- images to measure on ------------------------------------------------------------------------------------------


def test_an_evaluation_loader_shows_what_distill_measures_on(folder, manifest, roots):
    split = BlockLoader(manifest.dataset("digits"), manifest.split("digits", "test"), roots)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
    normalisation = okd.api.parse(okd.api.Normalisation, GREY, where="")
    expected = evaluate(lambda images: network(normalise(images, normalisation)), split, 100, CPU, "")
    batches = okd.evaluation_loader("digits/test", "runs/digits/data/digits", batch_size=100, normalisation=GREY)
    with torch.inference_mode():
        logits = torch.cat([network(images) for images, _ in batches])
    assert torch.equal(logits, expected.answers.logits)
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels, expected.answers.labels)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(expected.nll)
    assert len(batches) == 4


def test_a_folder_of_tars_is_an_evaluation_set_and_a_crop_gives_images_one_size(folder, data_root):
    whole = okd.evaluation_loader(
        data_root / "digits", batch_size=512, normalisation=GREY, crop={"size": 4, "resize": 6}
    )
    shapes = [tuple(images.shape) for images, _ in whole]
    assert shapes == [(359, 3, 4, 4), (512, 3, 4, 4), (512, 3, 4, 4), (414, 3, 4, 4)]


def test_what_cannot_be_measured_on_is_said_in_one_line(folder, tmp_path):
    how = {"batch_size": 100, "normalisation": GREY}
    with pytest.raises(RecipeError, match=r"'digits': no such folder\. To evaluate, name a folder of tars, or DATASET"):
        okd.evaluation_loader("digits", **how)
    with pytest.raises(RecipeError, match=r"has no split 'tests'\. Did you mean 'test'\?"):
        okd.evaluation_loader("digits/tests", **how)
    with pytest.raises(RecipeError, match=r"no dataset 'digit' in the manifest\. Did you mean 'digits'\?"):
        okd.evaluation_loader("digit/test", **how)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"test-000000\.tar"):
        okd.evaluation_loader("digits/test", tmp_path / "empty", **how)
    with pytest.raises(RecipeError, match=r"crop.*size"):
        okd.evaluation_loader("digits/test", crop={"size": 0, "resize": 4}, **how)
    with pytest.raises(RecipeError, match="batches of 0: give at least 1"):
        okd.evaluation_loader("digits/test", batch_size=0, normalisation=GREY)


# ---- frameworks: they take seconds to import -----------------------------------------------------------------------

RESUMED_LIGHTNING = """
from lightning.pytorch.callbacks import ModelCheckpoint

class Watched(Student):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.shown = []

    def training_step(self, batch, number):
        self.shown.append(batch.key_hash.tolist())
        return super().training_step(batch, number)

def fit(steps, **how):
    keep = ModelCheckpoint("runs/checkpoints", every_n_train_steps=30, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=9, max_steps=steps, accelerator="cpu", logger=False, callbacks=[keep], num_sanity_val_steps=0
    )
    student = Watched()
    trainer.fit(student, Digits(), weights_only=True, **how)
    return student

whole, first = fit(60), fit(30)
rest = fit(60, ckpt_path="runs/checkpoints/epoch=1-step=30.ckpt")
assert len(whole.shown) == 60 and whole.shown[:23] != whole.shown[23:46]
assert first.shown + rest.shown == whole.shown
for name, tensor in whole.state_dict().items():
    assert torch.equal(tensor, rest.state_dict()[name]), name
"""

RESUMED_TRAINER = """
class Watched(StoredKD):
    def compute_loss(self, model, inputs, *others, **more):
        self.shown.append(inputs["images"].sum().item())
        return super().compute_loss(model, inputs, *others, **more)

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 30 and "parted" in args.output_dir:
            control.should_save = control.should_training_stop = True

def fit(folder, **how):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)]
    arguments = TrainingArguments(folder, save_strategy="no", **about)
    trainer = Watched(nn.Sequential(*layers), arguments, callbacks=[Epochs(), Stop()])
    trainer.shown = []
    trainer.train(**how)
    return trainer

whole, first = fit("runs/whole"), fit("runs/parted")
rest = fit("runs/parted", resume_from_checkpoint=True)
assert len(whole.shown) == 69 and len(first.shown) == 30
assert first.shown + rest.shown == whole.shown
for name, tensor in whole.model.state_dict().items():
    assert torch.equal(tensor, rest.model.state_dict()[name]), name
"""


@pytest.mark.slow
def test_lightning_trains_from_a_store_and_goes_on_in_the_middle_of_an_epoch(folder):
    pytest.importorskip("lightning")
    said = run_program(*blocks("Plain PyTorch"), *blocks("Lightning"), RESUMED_LIGHTNING)
    assert float(re.findall(r"top-1 ([\d.]+)%", said)[1]) > 75


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_from_a_store_and_goes_on_in_the_middle_of_an_epoch(folder):
    pytest.importorskip("transformers")
    said = run_program(*blocks("Plain PyTorch"), *blocks("The Trainer of transformers"), RESUMED_TRAINER)
    assert float(re.findall(r"top-1 ([\d.]+)%", said)[1]) > 75


@pytest.mark.slow
def test_the_notebook_of_a_new_objective_runs_as_it_stands_and_keeps_what_it_said(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs/new-objective.ipynb", as_version=4)
    kept = _printed(notebook)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}).execute()
    said = _printed(notebook)
    for text in (kept, said):
        assert min(float(top1) for top1 in re.findall(r"top-1 ([\d.]+) %", text)) > 70
        assert re.sub(r"\d+( views|\.\d)", "", text) == re.sub(r"\d+( views|\.\d)", "", said)


def _printed(notebook) -> str:
    outputs = [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]
    return "".join(one.text for one in outputs if one.output_type == "stream" and one.name == "stdout")


# ---- timm's train.py -----------------------------------------------------------------------------------------------

DRIVER = """
import json
import train

class Watched(train.ClassificationTask):
    def forward(self, input, target):
        result = super().forward(input, target)
        losses.append(result["loss"].item())
        return result

losses = []
train.ClassificationTask = Watched
train.main()
print("losses", json.dumps(losses))
"""
ALIKE = "--opt momentum --momentum 0.9 --lr 0.02 --weight-decay 5e-4 --sched cosine --sched-on-updates".split()
ALIKE += "--warmup-epochs 0 --epochs 1 --seed 3 --channels-last --device cpu --workers 0 --experiment timm".split()
TRAINING = {
    "epochs": 1,
    "batch_size": 50,
    "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "no_decay": ["bias", "norm"]},
    "schedule": {"name": "cosine"},
}


@pytest.fixture
def timms_train() -> str:
    """The text of timm's train.py."""
    if TIMM_TRAIN not in os.environ:
        pytest.skip(
            "timm's packages do not contain its train.py: let OFFLINE_KD_TIMM_TRAIN name that of a clone of "
            "huggingface/pytorch-image-models"
        )
    return Path(os.environ[TIMM_TRAIN]).read_text()


def changed(script: str, names: dict[str, str]) -> str:
    """timm's script with the lines of the page, where these names stand instead of those of the digits."""
    (diff,) = blocks("timm's train.py", "diff")
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if not line.startswith("+"))
    new = "".join(line[1:] for line in lines if not line.startswith("-"))
    assert sum(line[0] in "+-" for line in lines) <= 5
    for name, other in names.items():
        assert name in new
        new = new.replace(name, other)
    before, found, after = script.partition("\n" + old)
    assert found, "train.py has no such lines"
    return f"{before}\n{new}{after}"


def steps_of_timm(script: str, *arguments: object) -> tuple[list[float], float]:
    """The loss of every step, and top-1 in percent, of one epoch of a changed train.py."""
    Path("train.py").write_text(script)
    Path("driver.py").write_text(DRIVER)
    command = [sys.executable, "driver.py", *ALIKE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    (losses,) = re.findall(r"^losses (.*)$", done.stdout, re.MULTILINE)
    top1 = json.loads(done.stdout.partition("--result\n")[2].partition("\nlosses")[0])[0]["validation"]["top1"]
    return json.loads(losses), top1


def steps_of_distill(monkeypatch, *arguments: object) -> tuple[list[float], float]:
    """The same of `offline-kd distill`."""
    from offline_kd.distill import loop

    losses, own = [], loop.train_step

    def watched(*given):
        logits, parts = own(*given)
        losses.append(parts.sum().item())
        return logits, parts

    monkeypatch.setattr(loop, "train_step", watched)
    result = invoke("distill", *arguments, "--objective", "kd", "--seed", 3, "--out", "runs/ours", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    return losses, json.loads(Path("runs/ours/result.json").read_text())["top1"]


def same_steps(timm: tuple[list[float], float], ours: tuple[list[float], float], steps: int) -> None:
    assert len(ours[0]) == steps
    assert timm[0] == pytest.approx(ours[0], abs=1e-4)
    assert len(set(ours[0])) == steps
    assert timm[1] == pytest.approx(ours[1], abs=0.3)  # percent: a row or two may tie


@pytest.mark.slow
def test_timms_train_py_makes_the_steps_of_distill_on_digits(timms_train, folder, recipe_file, where, monkeypatch):
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe |= {"student": {"model": "timm:resnet10t"}, "training": TRAINING}
    recipe["objectives"] = {"kd": [{"term": "kd", "temperature": 4}]}
    recipe_file.write_text(yaml.safe_dump(recipe))
    ours = steps_of_distill(monkeypatch, recipe_file, "--store", "runs/digits/store", *where)
    tars = ["--train-split", "train-{000000..000002}.tar|1438", "--val-split", "test-000000.tar|359"]
    about = ["--data-dir", "runs/digits/data/digits", "--dataset", "wds/digits", *tars, "--mean", 0.3, 0.3, 0.3]
    about += ["--std", 0.4, 0.4, 0.4, "--model", "resnet10t", "--num-classes", 10, "--img-size", 8, "-b", 50]
    same_steps(steps_of_timm(changed(timms_train, {}), *about), ours, 29)


@pytest.mark.slow
def test_timms_train_py_makes_the_steps_of_distill_on_photographs(timms_train, real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((ROOT / "pipelines/imagenet_sample/lite2_lite0.yaml").read_text())
    recipe |= {"student": {"model": "timm:resnet10t"}, "training": TRAINING}
    recipe["objectives"] = {"kd": [{"term": "kd", "temperature": 4}]}
    recipe["data"]["crop"] = {"size": 64, "resize": 73}
    recipe["teacher"] = {"weights": "imagenet_efficientnet_lite0"}
    recipe["views"] = {"kind": "random_resized_crop", "size": 64, "count": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    where = ["--data-root", real_data, "--device", "cpu"]
    assert invoke("cache-teacher", "recipe.yaml", "--store", "store", *where).exit_code == 0
    ours = steps_of_distill(monkeypatch, "recipe.yaml", "--store", "store", *where[:2])
    images = f'"imagenet_sample/val", args.data_dir, crop={recipe["data"]["crop"]}'
    names = {"runs/digits/store": "store", '"digits/test", args.data_dir': images}
    tars = ["--train-split", "val-000000.tar.gz|1000", "--val-split", "val-000000.tar.gz|1000"]  # never read
    about = ["--data-dir", real_data / "imagenet_sample", "--dataset", "wds/sample", *tars, "--mean", 0.5, 0.5, 0.5]
    about += ["--std", 0.5, 0.5, 0.5, "--model", "resnet10t", "--num-classes", 1000, "--img-size", 64, "-b", 50]
    same_steps(steps_of_timm(changed(timms_train, names), *about), ours, 20)

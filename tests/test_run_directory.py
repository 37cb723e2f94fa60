"""A run directory: one process writes it, what is in it is proven, and what is damaged is said in one line."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CPU, RECIPE, ROOT, invoke, merged, refused
from torch import nn

from offline_kd.distill.checkpoint import Progress, load_progress, save_progress
from offline_kd.distill.compatibility import check_teachers, refuse_bias
from offline_kd.distill.teacher_signal import TeacherSignal
from offline_kd.objectives.dtkd import DTKD
from offline_kd.objectives.ttm import WTTM
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.info import measured
from offline_kd.store.opening import open_store
from offline_kd.support.errors import StoreMismatch, TrainingError
from offline_kd.support.files import file_sha256
from offline_kd.support.places import Folder


@pytest.fixture(scope="module")
def finished(data_root, tmp_path_factory) -> tuple[list[object], Path]:
    """A command that trains without a teacher for two epochs, and the run directory it made."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(merged(RECIPE, {"data": {"tars": [2]}})))
    options = ["--manifest", ROOT / "data_manifest.yaml", "--data-root", data_root, "--device", "cpu"]
    command = ["distill", folder / "recipe.yaml", "--objective", "ce", *options]
    assert invoke(*command, "--out", folder / "run").exit_code == 0
    return command, folder / "run"


def unfinished(run: Path, folder: Path) -> Path:
    """A copy as it was after the last checkpoint and before the end."""
    shutil.copytree(run, folder)
    (folder / "result.json").unlink()
    (folder / "student.safetensors").unlink()
    return folder


# ---- one process -----------------------------------------------------------------------------------------------------


def test_processes_that_do_not_know_each_other_train_no_student_together(finished, tmp_path, monkeypatch):
    command, _ = finished
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe, where = command[1], command[4:]
    for name, more in (("distill", ["--objective", "ce"]), ("train", []), ("train", ["--teacher"])):
        message = refused(name, recipe, *more, "--out", tmp_path / "out", *where)
        assert "WORLD_SIZE is 2, and RANK, MASTER_ADDR, MASTER_PORT not set: start several processes with" in message
    assert "WORLD_SIZE is 2: `run` is one process" in refused("run", recipe, "--out", tmp_path / "out", *where)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun says of one
    assert invoke(*command, "--out", tmp_path / "out").exit_code == 0


HOLD = """
import os, sys, time
from pathlib import Path
from offline_kd.distill.run_directory import run_directory, run_place
with run_directory(run_place(sys.argv[1])):
    worker = os.fork()
    if worker == 0:
        time.sleep(60)  # as a worker that reads images, and outlives the training process
    print(worker, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["distill", "train", "run"])
def test_a_run_directory_is_written_by_one_process_until_that_dies(finished, tmp_path, name):
    command, _ = finished
    out, worker = tmp_path / "out", 0
    again = [name, command[1], *command[4:], "--out", out]
    again += ["--objective", "ce"] if name == "distill" else []
    start = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        try:
            assert holder.stdout is not None
            worker = int(holder.stdout.readline())
            assert f"process {holder.pid} on " in refused(*again)
            assert [file.name for file in out.iterdir()] == ["run.lock"]
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            os.kill(worker, 0)  # it lives
            if name == "distill":
                assert invoke(*again).exit_code == 0
        finally:
            holder.kill()
            if worker:
                os.kill(worker, signal.SIGKILL)


def test_what_a_killed_run_was_writing_is_swept(finished, tmp_path):
    command, run = finished
    out = unfinished(run, tmp_path / "run")
    for name in ("last.ckpt.17-140.partial", "metrics.jsonl.17-140.partial"):
        (out / name).write_text("half")
    (out / "notes.partial").write_text("mine")
    assert invoke(*command, "--out", out).exit_code == 0
    assert [file.name for file in out.glob("*.partial")] == ["notes.partial"]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def flipped(place: float) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return damage


DAMAGES = {
    "a bit at the start": flipped(0.0),
    "a bit of a weight": flipped(0.2),
    "a bit in the middle": flipped(0.5),
    "a bit of the sha256": flipped(1.0),
    "torn": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another program's": lambda content: pickle.dumps({"epoch": 3}),
}


QUICK = ("a bit of a weight", "a bit of the sha256", "torn", "another program's")


@pytest.mark.parametrize(
    "damage",
    [pytest.param(one, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, one in DAMAGES.items()],
)
def test_a_damaged_checkpoint_does_not_change_the_student(finished, tmp_path, damage):
    """The previous one is used, and said; what is wrong with both is one line."""
    command, run = finished
    out = unfinished(run, tmp_path / "run")
    newest = out / "last.ckpt"
    newest.write_bytes(damage(newest.read_bytes()))
    result = invoke(*command, "--out", out)
    assert result.exit_code == 0, result.output
    assert "going on from previous.ckpt" in result.stderr
    assert "resuming after epoch 1" in result.stderr
    assert file_sha256(out / "student.safetensors") == file_sha256(run / "student.safetensors")
    for name in ("last.ckpt", "previous.ckpt"):
        (out / name).write_bytes(damage((run / name).read_bytes()))
    (out / "result.json").unlink()
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "run.lock"}
    assert "this run cannot go on" in refused(*command, "--out", out)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.name != "run.lock"} == before


def test_a_run_goes_on_from_the_checkpoint_that_is_there(finished, tmp_path):
    """The one before, where the newest was lost."""
    command, run = finished
    out = unfinished(run, tmp_path / "run")
    (out / "last.ckpt").unlink()
    assert "resuming after epoch 1" in invoke(*command, "--out", out).stderr
    assert file_sha256(out / "student.safetensors") == file_sha256(run / "student.safetensors")
    assert not list(out.glob("*.partial"))


def test_a_full_disk_is_one_line_and_loses_nothing(finished, tmp_path):
    command, run = finished
    out, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # no file may grow beyond: as on a full disk
    try:
        assert "What was committed is safe" in refused(*command, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {file.name for file in out.iterdir()} == {"recipe.yaml", "run.lock"}
    assert invoke(*command, "--out", out).exit_code == 0
    assert file_sha256(out / "student.safetensors") == file_sha256(run / "student.safetensors")


def test_a_checkpoint_that_does_not_fit_the_network_is_one_line(tmp_path):
    small, large = nn.Linear(2, 2), nn.Linear(2, 3)
    save_progress(Folder(tmp_path), "same", small, torch.optim.SGD(small.parameters(), 0.1), Progress())
    with pytest.raises(TrainingError, match="does not fit the network that the recipe builds"):
        load_progress(Folder(tmp_path), "same", large, torch.optim.SGD(large.parameters(), 0.1), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_on_a_gpu_goes_on_where_it_was(tmp_path):
    device = torch.device("cuda")
    network = nn.Linear(2, 2).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    save_progress(Folder(tmp_path), "same", network, optimizer, Progress())
    expected = torch.rand(8, device=device)
    load_progress(Folder(tmp_path), "same", network, optimizer, device)
    assert torch.equal(torch.rand(8, device=device), expected)


# ---- what a finished run has written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"top1": 9', b"[]", b"\xff", b'{"top1": 99.0}', b"[" * 100_000])
def test_a_torn_or_foreign_result_is_one_line_and_can_be_written_anew(finished, tmp_path, content):
    command, run = finished
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "result.json").write_bytes(content)
    assert "is not the result of a run, or torn" in refused(*command, "--out", out)
    (out / "result.json").unlink()
    assert invoke(*command, "--out", out).exit_code == 0
    assert json.loads((out / "result.json").read_text()) == json.loads((run / "result.json").read_text())


def test_a_result_of_another_run_or_student_is_not_taken_for_this_one(finished, tmp_path):
    command, run = finished
    out = tmp_path / "run"
    shutil.copytree(run, out)
    result = json.loads((run / "result.json").read_text())
    (out / "result.json").write_text(json.dumps(result | {"seed": 4, "top1": 99.9}))
    assert "is the result of another run" in refused(*command, "--out", out)
    (out / "result.json").write_text(json.dumps(result))
    (out / "student.safetensors").write_bytes(b"another student")
    assert f"result.json says {result['student_sha256']}" in refused(*command, "--out", out)
    shutil.copy(run / "student.safetensors", out)
    (out / "metrics.jsonl").write_text('{"epoch": 1, "top')
    assert "finished already" in invoke(*command, "--out", out).stderr
    assert (out / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "student.safetensors", "result.json"])
def test_files_of_something_else_are_not_overwritten(finished, tmp_path, name):
    command, _ = finished
    (tmp_path / name).write_text("mine")
    assert f"{tmp_path / name}: " in refused(*command, "--out", tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_an_out_that_is_a_file_or_below_one_is_one_line(finished, tmp_path):
    command, _ = finished
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{out}: is a file, or lies below one. Give another" in refused(*command, "--out", out)


# ---- whose store it is -----------------------------------------------------------------------------------------------


GREY = {"mean": [0.5, 0.5, 0.5], "std": [0.4, 0.4, 0.4]}
CHANGES = {
    "normalisation": ({"teacher": {"normalisation": GREY}}, "normalisation"),
    "the student's, which the teacher takes": ({"data": {"normalisation": GREY}}, "normalisation"),
    "model": ({"teacher": {"model": "networks:other"}}, "with model networks:small"),
    "arguments": ({"teacher": {"model_args": {"width": 16}}}, "with model args.width not there, .* has 16"),
}


def changed(recipe, change):
    return type(recipe).model_validate(merged(recipe.model_dump(mode="json", exclude_none=True), change))


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_store_of_another_teacher_than_the_recipes_is_refused(recipe, manifest, store_path, change, message, pinned):
    """Whatever recipe and store both know is compared, though the weights' file is not here."""
    other = changed(changed(recipe, {"teacher": {"weights": "not/here.pt"}}), change)
    with pytest.raises(StoreMismatch, match=message):
        check_teachers([open_store(store_path)], [pinned], other, manifest)


def test_weights_are_compared_wherever_their_sha256_is_known(recipe, manifest, store_path, monkeypatch):
    """Files that the manifest lists, and torchvision's, whose first digits stand in their address."""
    store = open_store(store_path)
    entry = type(manifest).model_validate({"files": {"mine": {"file": "mine.pt", "sha256": "0" * 64}}})
    with pytest.raises(StoreMismatch, match=f"the recipe's teacher has {'0' * 64}"):
        check_teachers([store], [True], changed(recipe, {"teacher": {"weights": "mine"}}), entry)
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    named = changed(recipe, {"teacher": {"weights": "ResNet18_Weights.IMAGENET1K_V1"}})
    with pytest.raises(StoreMismatch, match="the recipe's teacher has f37072fd"):
        check_teachers([store], [True], named, manifest)


def test_what_nothing_proves_is_said(recipe, manifest, store_path, capsys):
    store = open_store(store_path)
    unknown = changed(recipe, {"teacher": {"weights": None}})
    check_teachers([store], [False], unknown, manifest)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"@sha256:{store.digest}" in said
    assert "not compared" in said
    check_teachers([store], [True], unknown, manifest)
    check_teachers([store], [False], recipe, manifest)
    assert capsys.readouterr().err == ""


def test_of_several_stores_one_is_the_recipes_and_the_others_are_said(recipe, manifest, store_path, capsys):
    store = open_store(store_path)
    foreign = store.identity.teacher.model_copy(update={"weights_sha256": "1" * 64, "name": "foreign"})
    other = replace(store, identity=store.identity.model_copy(update={"teacher": foreign}))
    check_teachers([store, other], [False, False], recipe, manifest)
    assert "is of teacher 'foreign'" in capsys.readouterr().err
    check_teachers([store, other], [False, True], recipe, manifest)
    assert capsys.readouterr().err == ""
    with pytest.raises(StoreMismatch, match="1111, the recipe's teacher has"):
        check_teachers([other, other], [True, True], recipe, manifest)


def test_the_command_says_that_weights_were_not_compared(recipe_file, where, store_path, tmp_path):
    options = (
        "--store",
        store_path,
        "--objective",
        "kd",
        "--set",
        "teacher.weights=gone.pt",
        "--out",
        tmp_path / "run",
    )
    assert "are not known here and no digest is pinned" in invoke("distill", recipe_file, *options, *where).stderr


# ---- not measured is not perfect -------------------------------------------------------------------------------------


def test_an_error_that_was_not_measured_is_not_taken_for_none(store_path):
    store = open_store(store_path)
    assert store.manifest is not None
    fidelity = store.manifest.fidelity[""].model_copy(
        update={"wttm_weight_error": None, "dtkd_temperature_error": None}
    )
    manifest = store.manifest.model_copy(update={"fidelity": {"": fidelity}})
    lossy = store.identity.model_copy(update={"codec": Int(name="int", bits=4)})
    for term in (WTTM(term="wttm", gamma=0.5), DTKD(term="dtkd", temperature=4)):
        with pytest.raises(StoreMismatch, match=r"error was not measured.*--allow-biased"):
            refuse_bias(replace(store, identity=lossy, manifest=manifest), [term])
        with pytest.raises(StoreMismatch, match="error was not measured"):
            refuse_bias(replace(store, identity=lossy, manifest=manifest.model_copy(update={"fidelity": {}})), [term])
        refuse_bias(replace(store, manifest=manifest), [term])  # f32 keeps the logits whole
    assert (
        measured(store.identity.teacher, fidelity)["WTTM weight / DTKD temperature error"]
        == "not measured / not measured"
    )


def test_only_a_loss_that_falls_back_counts_fallbacks():
    student, teacher = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), TeacherSignal(torch.tensor([[-1.0, -2.0], [1.0, 0.0]]))
    assert int(DTKD(term="dtkd", temperature=4).fallbacks(student, teacher)) == 1
    assert int(DTKD(term="dtkd", temperature=4, sharpness="logsumexp").fallbacks(student, teacher)) == 0
    assert WTTM(term="wttm", gamma=0.5).fallbacks(student, teacher) == 0

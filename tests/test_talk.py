"""What a run tells while it trains: lines for people, `metrics.jsonl`, and trackers of experiments."""

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import struct
import sys
import termios
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, RECIPE, ROOT, invoke, make_recipe, merged, refused
from rich.console import Console
from students import ended_after
from test_ranks import torchrun

from offline_kd.cli.options import read_inputs
from offline_kd.distill.results import Run
from offline_kd.distill.teacher_signal import said_of, stored_signal
from offline_kd.distill.tracking import figures, tracking
from offline_kd.distill.training import distill, make_loader, source_of, training_images
from offline_kd.store.opening import open_store
from offline_kd.store.rows import Rows
from offline_kd.support import console as support_console
from offline_kd.support.console import duration_text, rate_text
from offline_kd.support.errors import TrainingError
from offline_kd.support.places import place_at

EPOCHS = 3


@pytest.fixture
def plain(data_root, tmp_path) -> list[object]:
    """A command that trains without a teacher for three short epochs."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(merged(RECIPE, {"data": {"tars": [2]}})))
    options = ["--manifest", ROOT / "data_manifest.yaml", "--data-root", data_root, "--device", "cpu"]
    return ["train", tmp_path / "recipe.yaml", "--set", f"training.epochs={EPOCHS}", *options]


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stop_once(command: list[object], steps: int) -> None:
    """Begin the command, and end it as Ctrl-C does after so many steps."""
    with ended_after(steps):
        assert invoke(*command).exit_code != 0


# ---- for people ----------------------------------------------------------------------------------------------------


def test_an_epoch_is_one_line_and_its_figures_are_those_of_metrics(
    recipe, manifest, roots, recipe_file, where, store_path, tmp_path
):
    command = ["distill", recipe_file, "--store", store_path, "--objective", "kd", "--device", "cpu", *where]
    done = invoke(*command, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("kd, seed 0: epoch ")]
    history = metrics(tmp_path / "run")
    assert len(lines) == len(history) == 2
    for number, (line, told) in enumerate(zip(lines, history, strict=True), 1):
        assert line.startswith(
            f"kd, seed 0: epoch {number} of 2, loss ce {told['loss_ce']:.4g}, kd {told['loss_kd']:.4g}, "
            f"top-1 {told['top1']:.2f} %, lr {told['lr']:.3g}, {rate_text(told['images_per_second'], 'images')}"
        )
        assert told["images_per_second"] == pytest.approx(told["images"] / told["seconds"])
    assert lines[0].endswith(" left")
    assert not lines[1].endswith(" left")

    # What the teacher said of the rows of each epoch, counted by hand.
    stores, terms = [open_store(store_path)], recipe.objectives["kd"]
    source = source_of(recipe, training_images(recipe, manifest, roots), stores, terms)
    loader, ask = make_loader(recipe, source, 0, CPU), stored_signal(stores, terms, CPU)
    for epoch, told in enumerate(history):
        batches = list(loader.epoch(epoch))
        logits = torch.cat([ask(batch).logits for batch in batches]).double()
        labels = torch.cat([batch.labels for batch in batches])
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        assert told["teacher_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert told["teacher_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert history[0]["teacher_entropy"] != history[1]["teacher_entropy"]  # of other views

    stopped = [*command, "--out", tmp_path / "stopped", "--set", "training.checkpoint_steps=10"]
    stop_once(stopped, 36)
    assert "resuming after epoch 1 and 10 steps" in invoke(*stopped).stderr
    timed = {"seconds": 0, "images_per_second": 0}
    assert [line | timed for line in metrics(tmp_path / "stopped")] == [line | timed for line in history]


def test_hidden_labels_are_left_out_and_of_a_mixed_image_the_larger_share_counts():
    labels, others = torch.tensor([0, -1, 0, 0]), torch.tensor([0, -1, 1, 1])
    rows = Rows(np.zeros(4, np.uint64), labels, others, torch.tensor([1, 1, 0.7, 0.2]))
    logits = torch.tensor([[5.0, 0, 0], [0, 0, 0], [0, 9, 0], [0, 9, -float("inf")]])
    entropies = torch.distributions.Categorical(logits=logits[:3].double()).entropy().sum() + 0.00123402
    told = said_of(logits, rows)
    assert told.dtype == torch.float64
    assert told.tolist() == pytest.approx([4, entropies.item(), 3, 2], rel=1e-4)
    assert said_of(logits[:0], rows.take(slice(0, 0))).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (123456.7, "123,457 steps/s"),
        (9.96, "10.0 steps/s"),
        (1, "1.0 steps/s"),
        (0.4, "2.5 s/step"),
        (0.0005, "2,000.0 s/step"),
        (0, "0 steps/s"),
    ],
)
def test_a_slow_rate_is_said_as_seconds(rate, said):
    assert rate_text(rate, "steps") == said
    assert rate_text(0.5, "passes") == "2.0 s/pass"
    assert rate_text(0.5, "images") == "2.0 s/image"


def test_durations_are_said_as_people_say_them():
    seconds = [0, 45.4, 89, 91, 3_600, 12_000, 500_000]
    assert [duration_text(one) for one in seconds] == [
        "0 s",
        "45 s",
        "89 s",
        "2 min",
        "60 min",
        "3 h 20 min",
        "5 d 18 h",
    ]


def test_a_terminal_shows_a_live_bar_and_the_lines_above_it(plain, tmp_path, monkeypatch):
    """A real terminal: a pseudo-terminal of the kernel."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # at the end of the other side
            while part := os.read(ours, 2**16):
                written.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    recipe, manifest, roots, device = read_inputs(
        plain[1], (f"training.epochs={EPOCHS}",), ROOT / "data_manifest.yaml", (str(plain[7]),), "cpu"
    )
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(support_console, "console", Console(stderr=True))  # as of a process that begins there
        distill(recipe, manifest, roots, tmp_path / "run", device, objective="ce")
    reader.join()
    os.close(ours)
    shown = b"".join(written).decode()
    for epoch in range(1, EPOCHS + 1):
        assert shown.count(f"ce, seed 0: epoch {epoch} of {EPOCHS}, loss ce ") == 1
    assert "\x1b[2K" in shown  # what is drawn over itself
    assert re.search(r"steps/s|s/step", shown)
    assert re.search(r"\d+/21", shown)
    assert re.search(r"\d:\d\d:\d\d", shown)


# ---- for trackers --------------------------------------------------------------------------------------------------


def test_names_are_the_same_in_every_tracker():
    line = {"epoch": 2, "loss_kd": 1.5, "loss_kd_2": 1, "lr": 0.1, "top1": 50.0, "nll_ema": 1.0, "teacher_top1": 99.0}
    assert figures(line | {"seconds": 3.0, "note": "text"}) == {
        "epoch": 2,
        "train/loss/kd": 1.5,
        "train/loss/kd_2": 1,
        "lr": 0.1,
        "val/top1": 50.0,
        "val/nll_ema": 1.0,
        "teacher/top1": 99.0,
        "train/seconds": 3.0,
    }


def as_told(out: Path) -> list[dict[str, float]]:
    return [figures(line) for line in metrics(out)]


def of_tensorboard(folder: Path) -> list[dict[str, float]]:
    """What TensorBoard shows, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    shown: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for scalar in events.Scalars(name):
            told = shown.setdefault(scalar.step, {})
            assert name not in told, f"{name}: step {scalar.step} twice"
            told[name] = scalar.value
    return [shown[step] for step in sorted(shown)]


def of_wandb(folder: Path) -> list[dict[str, float]]:
    """What a run directory of wandb holds: a log in blocks of 32 KiB, of records that are protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    content, at, history, record = file.read_bytes(), 7, [], b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no room for the head of another piece
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            found = Record.FromString(record)
            if found.WhichOneof("record_type") == "history":
                items = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found.history.item
                }
                history.append({name: value for name, value in items.items() if not name.startswith("_")})
            record = b""
    return history


def test_tensorboard_shows_a_stopped_run_as_one_that_was_not(plain, tmp_path):
    out = tmp_path / "run"
    command = [*plain, "--out", out, "--log", "tensorboard"]
    stop_once(command, 16)  # in the third epoch
    assert len(of_tensorboard(out)) == 2
    assert invoke(*command).exit_code == 0
    shown, told = of_tensorboard(out), as_told(out)
    assert [step["epoch"] for step in shown] == [1, 2, 3]
    for one, other in zip(shown, told, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    files = len(list((out / "tensorboard").iterdir()))
    assert "finished already" in invoke(*command).stderr
    assert len(list((out / "tensorboard").iterdir())) == files == 2


def test_wandb_offline_holds_every_epoch_once_under_one_id(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    command = [*plain, "--out", out, "--log", "wandb"]
    stop_once(command, 16)
    assert invoke(*command).exit_code == 0
    first, second = sorted(out.glob("wandb/offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == (out / "tracking.id").read_text()
    told = as_told(out)
    for folder, expected in ((first, told[:2]), (second, told)):
        for one, other in zip(of_wandb(folder), expected, strict=True):
            assert one == pytest.approx(other)


def test_trackio_goes_on_under_the_same_name(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage", reason="trackio is not installed")
    out = tmp_path / "run"
    command = [*plain, "--out", out, "--log", "trackio"]
    stop_once(command, 16)
    assert invoke(*command).exit_code == 0
    shown = storage.SQLiteStorage.get_logs("test", f"run-{(out / 'tracking.id').read_text()}")
    assert [one["step"] for one in shown] == [1, 2, 3]
    for one, other in zip(shown, as_told(out), strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other)


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed")
def test_a_tracker_that_is_not_there_is_one_line_before_anything_is_trained(plain, recipe_file, where, tmp_path):
    for command in (plain, ["distill", *plain[1:], "--objective", "ce"], ["run", *plain[1:]], [*plain, "--teacher"]):
        message = refused(*command, "--out", tmp_path / "run", "--log", "trackio")
        assert "trackio is not installed. Install it: pip install 'offline-kd[trackio]'" in message
    assert not (tmp_path / "run").exists()


def test_tensorboard_writes_no_bucket():
    run = Run(make_recipe(), "ce", [], 0, place_at("s3://team/run"), CPU, log="tensorboard")
    with pytest.raises(TrainingError, match="s3://team/run is a bucket"), tracking(run, []):
        pass


@pytest.mark.slow
def test_of_several_ranks_the_first_one_alone_is_heard(plain, tmp_path):
    command = ["-m", "offline_kd", *plain, "--out", tmp_path / "run", "--tracker", "tensorboard"]
    done = torchrun(2, [], *command)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    assert [step["epoch"] for step in of_tensorboard(tmp_path / "run")] == [1, 2, 3]
    assert done.stderr.count("ce, seed 0: epoch 2 of 3") == 1

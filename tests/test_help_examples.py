"""The examples of every `--help`, run as they stand in a folder of digits, in the order in which a person would."""

import glob
import inspect
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import RECIPE, ROOT, invoke, merged
from test_end_to_end import all_commands

from offline_kd.cli import main as cli

# What they build on comes first; all others follow in the order of the help.
FIRST = [
    "offline-kd run digits",
    "offline-kd run digits --out runs/digits",
    "offline-kd store inspect runs/digits/store --key 0042 --data-root runs/digits/data --out 0042.html",
    "offline-kd data pack digits",
    "offline-kd cache-teacher cifar10/resnet56_resnet20_cpu --store stores/cifar10-resnet56",
    "offline-kd store push runs/digits/store s3://team/stores/digits",
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
    "openssl ec -in key.pem -pubout -out public.pem",
    "offline-kd store sign stores/cifar10 --key key.pem",
]
# Seconds each, or in need of a server or another program: run by the long test.
LONG = re.compile(
    r"s3://team|^openssl|store sign|--signed-by|^offline-kd bench|data index|store plan|--teacher 1000|run digits$"
)
NOT_RUN = {
    "--sweep": "nine students and more: tests/test_sweep.py",
    "offline-kd init": "networks of 25 million weights, and their download: tests/test_init.py",
    "offline-kd export": "a minute of compiling: tests/test_usable.py",
    "find . -name": "two programs and a pipe: tests/test_usable.py has the one that is ours",
    "store import": "labels of ImageNet that other programs made: tests/test_importing.py has those of 24 pictures",
    "--engine ray": "a Ray cluster: tests/test_ray.py",
    "torchrun --nproc-per-node 8": "eight GPUs: tests/test_ranks.py has two processes",
    "--source DIR": "one's own copy of CIFAR-100",
    "s3://bucket/": "1,282 tars of ImageNet",
    "stores/imagenet": "a store of a thousand classes",
    "https://example.org": "a web server of the team: tests/test_remote.py",
    "@sha256:0123...": "the digest of one's own store",
    "--worker 3/16": "fifteen other workers: tests/test_job_array.py",
}


def examples() -> list[str]:
    """The lines of code of every help, continued lines joined."""
    found = []
    for path, command in [((), cli.main), *all_commands(cli.main)]:
        blocks = re.findall(r"^\x08\n((?:.+\n?)+)", inspect.cleandoc(command.help or ""), re.MULTILINE)
        assert blocks, f"{' '.join(path)}: no example"
        found += [line.strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    return [re.sub(" +", " ", line) for line in dict.fromkeys(found)]


def in_order(lines: list[str]) -> list[str]:
    return sorted(lines, key=lambda line: FIRST.index(line) if line in FIRST else len(FIRST))


RUN = in_order([line for line in examples() if not any(reason in line for reason in NOT_RUN)])
SHORT = [line for line in RUN if not LONG.search(line)]


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """A folder where the names that examples use are small: recipes of digits, four photographs, the team's store."""
    photos = tmp_path / "photos"
    changes = {
        "data": {"tars": [0]},
        "views": {"count": 2},
        "capture": {"codec": {"name": "f16"}, "views_per_group": 1, "fidelity_rows": 20},
        "training": {"epochs": 1, "keep": ["best"]},
        "teacher": {"training": {"epochs": 1}},
    }
    small = merged(RECIPE, changes)
    small["student"] = {"model": "cifar:resnet8"}  # a file of a network of one's own would have to be trusted
    small["objectives"] = {name: small["objectives"][name] for name in ("kd", "wttm")}
    (tmp_path / "digits").write_text(yaml.safe_dump(small | {"objectives": {"kd": small["objectives"]["kd"]}}))
    untrained = {**small["teacher"], "training": None, "weights": "runs/digits/teacher/student.safetensors"}
    for name in ("recipe.yaml", "cifar10/resnet56_resnet20_cpu"):  # files win over packaged recipes
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(small | {"name": "own", "teacher": untrained}))
    for picture in ("train/a/1", "train/b/2", "val/a/3", "val/b/4"):
        (photos / picture).parent.mkdir(parents=True)
        shutil.copy(ROOT / "pipelines/cifar10/resnet56_resnet20_letkd.png", photos / f"{picture}.png")
    (tmp_path / "imagenet_classes.txt").write_text("a\nb\n")
    assert invoke("data", "pack", "imagefolder", "--source", photos, "--out", tmp_path / "laion").exit_code == 0
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores/cifar10").symlink_to("cifar10-resnet56")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(line: str) -> None:
    """One example, as a shell would run it."""
    program, *words = shlex.split(line)
    words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else []) or [word]]
    if program != "offline-kd":
        subprocess.run([program, *words], check=True, capture_output=True)
        return
    words, output = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
    result = invoke(*words)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    if output is not None:
        Path(output).write_text(result.stdout)


def test_the_examples_of_every_help_run_as_they_stand(workspace):
    assert len(SHORT) > 20
    for line in SHORT:
        run_line(line)
    assert {"0042.html", "comparison.html", "recipe.schema.json"} <= set(os.listdir())


@pytest.mark.slow
def test_the_long_examples_of_every_help_run_as_they_stand(workspace, monkeypatch):
    pytest.importorskip("obstore")
    from test_remote import environment_of, run_server

    with run_server(workspace) as server:
        for name, value in environment_of(server.endpoint, workspace / "downloads").items():
            monkeypatch.setenv(name, value)
        for line in RUN:
            run_line(line)
            if "store sign" in line:  # the team's copy has the signature, too
                run_line("offline-kd store push stores/cifar10 s3://team/stores/cifar10")


def test_what_is_not_run_is_an_example_and_says_why():
    for part, why in NOT_RUN.items():
        assert why
        assert any(part in line for line in examples()), f"{part}: no example has it any more"
    assert set(FIRST) <= set(RUN)

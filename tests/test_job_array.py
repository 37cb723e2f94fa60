"""Which worker a process is, by what torchrun, SLURM and Kubernetes tell it; and the job files that rely on it."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import click
import pytest
import yaml
from conftest import ROOT, invoke, refused

from offline_kd.cli import main as cli
from offline_kd.cli.cache import which_worker
from offline_kd.cli.main import COMMANDS
from offline_kd.support.errors import RecipeError
from offline_kd.support.job_array import Told, told_by

ARRAY = "SLURM_ARRAY_TASK_"
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}
TASK = {f"{ARRAY}ID": "2", f"{ARRAY}COUNT": "16", f"{ARRAY}MIN": "0", f"{ARRAY}STEP": "1"}
POD = {"JOB_COMPLETION_INDEX": "7", "JOB_COMPLETIONS": "9"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, None),
        (TORCHRUN, Told(3, 8, "RANK", False)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "3"}, None),
        ({"WORLD_SIZE": "8"}, None),
        (SRUN, Told(5, 6, "SLURM_PROCID", False)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        (TASK, Told(2, 16, f"{ARRAY}ID", True)),
        (TASK | {f"{ARRAY}MIN": "1"}, Told(1, 16, f"{ARRAY}ID", True)),
        (TASK | {f"{ARRAY}ID": "30", f"{ARRAY}MIN": "10", f"{ARRAY}STEP": "10"}, Told(2, 16, f"{ARRAY}ID", True)),
        ({f"{ARRAY}ID": "4", f"{ARRAY}COUNT": "5"}, Told(4, 5, f"{ARRAY}ID", True)),
        ({f"{ARRAY}ID": "0", f"{ARRAY}COUNT": "1"}, Told(0, 1, f"{ARRAY}ID", True)),
        (POD, Told(7, 9, "JOB_COMPLETION_INDEX", True)),
        ({"JOB_COMPLETION_INDEX": "7"}, None),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"} | POD, Told(7, 9, "JOB_COMPLETION_INDEX", True)),
        (POD | TORCHRUN, Told(3, 8, "RANK", False)),
        (SRUN | TORCHRUN, Told(3, 8, "RANK", False)),
        (SRUN | TORCHRUN | TASK, Told(2, 16, f"{ARRAY}ID", True)),
    ],
)
def test_a_process_knows_which_one_it_is(environment, told):
    assert told_by(environment) == told


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "8"}, "RANK is 8 and WORLD_SIZE 8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (TORCHRUN | {"WORLD_SIZE": "0", "RANK": "0"}, "RANK is 0 and WORLD_SIZE 0"),
        (SRUN | {"SLURM_PROCID": "5.0"}, "SLURM_PROCID is '5.0'"),
        (SRUN | {"SLURM_NTASKS": "٤"}, "SLURM_NTASKS is '٤'"),
        (TASK | {f"{ARRAY}ID": "16"}, f"{ARRAY}ID is 16, which is none of 16 tasks from 0 on in steps of 1"),
        (TASK | {f"{ARRAY}ID": "2", f"{ARRAY}STEP": "3"}, f"{ARRAY}ID is 2, which is none of"),
        (TASK | {f"{ARRAY}MIN": "3"}, f"{ARRAY}ID is 2, which is none of 16 tasks from 3 on"),
        (TASK | {f"{ARRAY}STEP": "x"}, f"{ARRAY}STEP is 'x'"),
        (TASK | {f"{ARRAY}COUNT": "9" * 99}, f"{ARRAY}COUNT is '9999"),
        (POD | {"JOB_COMPLETIONS": "7"}, "JOB_COMPLETION_INDEX is 7 and JOB_COMPLETIONS 7"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_the_variable(environment, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        told_by(environment)


def test_a_task_of_an_array_does_its_share_and_an_explicit_worker_wins(
    recipe_file, where, tmp_path, monkeypatch, store_path
):
    from offline_kd.store.opening import open_store

    command = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *where)
    for name, value in {**TASK, f"{ARRAY}COUNT": "2", f"{ARRAY}ID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    said = invoke(*command).stderr
    assert "worker 0 of 2, from SLURM_ARRAY_TASK_ID: does its own share of the blocks" in said
    assert {file.name[:6] for file in tmp_path.glob("store/ledger/*.json")} == {"000000", "000002"}
    monkeypatch.setenv(f"{ARRAY}ID", "7")
    assert refused(*command).startswith("Error: SLURM_ARRAY_TASK_ID is 7, which is none of 2 tasks")
    assert "from SLURM" not in invoke(*command, "--worker", "1/2").stderr
    assert open_store(tmp_path / "store").digest == open_store(store_path).digest
    for name in TASK:
        monkeypatch.delenv(name)
    assert which_worker(None).blocks(8) == [*range(8)]
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert which_worker(None).blocks(8) == [4, 5, 6, 7, 0, 1, 2, 3]


# ---- files ready to copy -------------------------------------------------------------------------------------------

FILES = sorted((ROOT / "pipelines" / "cluster").iterdir())


def commands_in(text: str) -> list[list[str]]:
    """The arguments of every offline-kd command in a job file."""
    joined = re.sub(r"\\\n#?\s*", "", text)
    found = re.findall(r"offline[-_]kd ([a-z-]+ [^'\n&]*)", joined)
    for job in yaml.safe_load_all(text) if "kind: Job" in text else []:
        found += [shlex.join(one["command"][1:]) for one in job["spec"]["template"]["spec"]["containers"]]
    return [words for words in map(shlex.split, found) if words[0] in COMMANDS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_job_files_are_read_by_what_will_read_them_and_their_commands_exist(path):
    text = path.read_text()
    commands = commands_in(text)
    assert commands
    for name, *arguments in commands:
        command = cli.main.get_command(click.Context(cli.main), name)
        command.make_parser(click.Context(command)).parse_args(arguments)
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("# "))
    for part in (f"pipelines/cluster/{path.name}", "# Edit ", "# How ", "# Tried ", "NOT TRIED on"):
        assert part in head
    if path.suffix == ".sbatch":
        subprocess.run(["bash", "-n", path], check=True)
        assert not [line for line in text.splitlines() if line.startswith("#SBATCH") and "--" not in line]
        return
    job = yaml.safe_load(text)
    if "spec" in job:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        counts = [job["spec"]["completions"], *(int(one["value"]) for one in container["env"])]
        assert counts == [counts[0]] * 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'offline-kd[ray]'")
def test_ray_accepts_its_cluster_file():
    code = (
        "import sys, yaml; from ray.autoscaler._private.util import prepare_config, validate_config;"
        "validate_config(prepare_config(yaml.safe_load(sys.stdin)))"
    )
    text = (ROOT / "pipelines/cluster/ray_cluster.yaml").read_text()
    wrong = text.replace("max_workers:", "most_workers:", 1)
    assert wrong != text
    accepted = [subprocess.run([sys.executable, "-c", code], input=one, text=True).returncode for one in (text, wrong)]
    assert accepted == [0, 1]

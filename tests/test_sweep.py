"""Sweeps: which students they have, what is trained again and what not, and what the report says of them."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import RECIPE, ROOT, invoke, make_recipe, merged, refused
from safetensors.torch import load_file

from offline_kd.distill.sweep import plan, with_sweeps
from offline_kd.recipe import load_recipe
from offline_kd.support.errors import RecipeError
from offline_kd.support.files import file_sha256

GAMMA = "objectives.wttm.1.gamma"


@pytest.fixture
def small(teacher_weights, tmp_path) -> Path:
    """A recipe about the smallest tar, one epoch and two views, whose teacher is there."""
    changes = {
        "data": {"tars": [2]},
        "teacher": {"weights": str(teacher_weights)},
        "views": {"count": 2},
        "capture": {"views_per_group": 2, "fidelity_rows": 20},
        "training": {"epochs": 1},
    }
    recipe = merged(RECIPE, changes)
    recipe["objectives"] = {name: recipe["objectives"][name] for name in ("ce", "kd", "wttm")}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def students(out: Path) -> dict[str, str]:
    """The sha256 of every student by its run directory, each of which says what it is."""
    found = {}
    for folder in sorted((out / "students").iterdir()):
        result = json.loads((folder / "result.json").read_text())
        recipe = load_recipe(folder / "recipe.yaml")
        assert list(recipe.objectives) == [result["objective"]]
        assert recipe.seeds == [result["seed"]]
        found[folder.name] = file_sha256(folder / "student.safetensors")
    return found


def test_what_is_missing_of_a_sweep_is_trained_and_nothing_again(small, where, tmp_path):
    command = ["run", small, "--out", tmp_path / "out", "--device", "cpu", *where]
    first = [*command, "--sweep", f"{GAMMA}=.1,.4", "--seeds", "0"]
    done = invoke(*first)
    assert done.exit_code == 0, done.output
    before = students(tmp_path / "out")
    assert list(before) == ["wttm_gamma=0.1_seed0", "wttm_gamma=0.4_seed0"]
    assert len(set(before.values())) == 2
    assert re.search(r"wttm gamma=0.4, seed 0: top-1 .* \(2 of 2 students\)", done.stderr)

    (tmp_path / "out/students/wttm_gamma=0.4_seed0/result.json").unlink()  # as of one that was killed
    more = [*command, "--sweep", f"{GAMMA}=0.1,.2,.4", "--seeds", "0,1", "--objective", "wttm", "--objective", "ce"]
    done = invoke(*more)
    assert done.exit_code == 0, done.output
    after = students(tmp_path / "out")
    both = [f"wttm_gamma={gamma}_seed{seed}" for gamma in (0.1, 0.2, 0.4) for seed in (0, 1)]
    assert sorted(after) == sorted(["ce_seed0", "ce_seed1", *both])
    assert before.items() <= after.items()
    assert done.stderr.count("finished already, nothing to do") == 1
    assert done.stderr.count("_seed0: resuming after epoch 1") == 2  # of the two that were there
    assert done.stderr.count(": epoch 1 of 1, loss ") == 6
    assert load_recipe(tmp_path / "out/recipe.yaml").sweep == {GAMMA: [0.1, 0.2, 0.4]}
    for gamma in ("0.1", "0.2", "0.4"):
        assert re.search(rf"│ wttm\s+│\s+{gamma} │\s+store │\s+2 │", done.stdout), done.stdout
    assert re.search(r"│ ce\s+│\s+- │\s+none │\s+2 │", done.stdout), done.stdout


def test_a_sweep_in_a_recipe_is_that_of_the_command_line():
    swept = make_recipe(sweep={GAMMA: [0.1, 0.2], "training.optimizer.lr": [0.1]})
    typed = with_sweeps(make_recipe(), [f"{GAMMA}=.1,.2", "training.optimizer.lr=1e-1"])
    assert plan(swept) == plan(typed)
    assert list(plan(swept)) == ["wttm_gamma=0.1_lr=0.1_seed0", "wttm_gamma=0.2_lr=0.1_seed0"]


def test_fields_of_all_students_are_swept_for_every_objective_and_those_of_one_for_it_alone():
    recipe = with_sweeps(
        make_recipe(), ["student.model_args={width: 4},{width: 8}", "objectives.dtkd.1.temperature=2,4"]
    )
    planned = plan(recipe, ["ce", "dtkd"], [3, 5, 3])
    assert len(planned) == 2 * 2 + 4 * 2
    for name, one in planned.items():
        assert name.endswith(f"_seed{one.seed}")
        assert one.recipe.sweep == {}
        assert one.recipe.student.model_args["width"] in (4, 8)
    temperatures = {one.terms[1].temperature for one in planned.values() if one.objective == "dtkd"}
    assert temperatures == {2, 4}
    assert all("temperature" not in name for name, one in planned.items() if one.objective == "ce")
    alike = with_sweeps(make_recipe(), ["objectives.kd.1.temperature=2", "objectives.dtkd.1.temperature=2"])
    assert list(plan(alike)) == ["kd_kd.1.temperature=2.0_seed0", "dtkd_dtkd.1.temperature=2.0_seed0"]


def test_without_a_sweep_runs_are_what_they_were_before_there_were_any():
    recipe = make_recipe(seeds=[0, 7])
    assert list(plan(recipe, ["kd", "ce"])) == ["kd-0", "kd-7", "ce-0", "ce-7"]
    assert all(one.recipe == recipe for one in plan(recipe).values())
    assert "sweep" not in recipe.model_dump(mode="json")


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("views.count=1,2", "all students of a sweep learn from one store, so a field that stage 1 may depend on"),
        ("teacher.model=a,b", "cannot be swept"),
        ("seeds=0,1", "Give --seeds 0,1,2"),
        ("objectives.wtm.1.gamma=1", "Did you mean 'wttm'?"),
        ("objectives.wttm.1.gama=1", "unknown field"),
        ("objectives.wttm.7.gamma=1", "no position in a list of 2"),
        (f"{GAMMA}=-1,.2", "greater than 0"),
        (f"{GAMMA}=", "write path.to.field=VALUE,VALUE"),
        (GAMMA, "write path.to.field=VALUE,VALUE"),
        (f"{GAMMA}=.1]", "not readable as YAML"),
        ("training..lr=1", "write path.to.field=value"),
        (f"{GAMMA}={','.join(map(str, range(1, 10_002)))}", "a sweep of 10,001 students"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line_and_begins_nothing(sweep, said, where, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    message = refused("run", recipe, "--out", tmp_path / "out", "--sweep", sweep, *where)
    assert said in message
    assert not list((tmp_path / "out").glob("*"))


def test_students_that_nobody_has_are_refused(where, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    command = ["run", recipe, "--out", tmp_path / "out", *where]
    assert "Did you mean 'wttm'?" in refused(*command, "--objective", "wtm")
    assert "--jobs: on Ray" in refused(*command, "--engine", "ray", "--jobs", "2")
    for seeds in ("-1", "0,x", "", str(2**64)):
        assert invoke(*command, "--seeds", seeds).exit_code == 2
    with pytest.raises(RecipeError, match="two students of the sweep would be called"):
        plan(make_recipe(sweep={"student.model_args.norm": [True, "true"]}))


# ---- killed, and at once -------------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "offline_kd", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_to_six_runs_in_three_groups(small, where, tmp_path):
    """kill -9 between its second student and its last one, in the middle of one."""
    out = tmp_path / "out"
    command = ["run", small, "--out", out, "--device", "cpu", *where, "--set", "training.epochs=4"]
    command += ["--sweep", f"{GAMMA}=.1,.2,.4", "--seeds", "0,1"]
    process = start(*command)
    while process.poll() is None and len(list(out.glob("students/*/last.ckpt"))) < 3:
        time.sleep(0.005)
    assert process.poll() is None, "the sweep ended before it could be killed"
    process.kill()
    process.communicate()
    finished = {file: file.stat().st_mtime_ns for file in out.glob("students/*/result.json")}
    assert len(finished) == 2
    again = start(*command)
    shown, said = again.communicate()
    assert again.returncode == 0, said
    assert len(students(out)) == 6
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert said.count("finished already, nothing to do") == 2
    for gamma in ("0.1", "0.2", "0.4"):
        assert re.search(rf"│ wttm\s+│\s+{gamma} │\s+store │\s+2 │", shown), shown
    summary = json.loads((out / "summary.json").read_text())
    assert [line["runs"] for line in summary["objectives"]] == [2, 2, 2]


@pytest.mark.slow
def test_students_trained_at_once_are_those_of_one_process_and_end_with_it(small, where, tmp_path):
    command = ["run", small, "--device", "cpu", *where, "--set", "training.optimizer.lr=0.01", "--objective", "kd"]
    out, swept = tmp_path / "out", ["--seeds", "0,1,2", "--jobs", "2"]
    killed = start(*command, "--out", out, *swept, "--set", "training.epochs=500")
    while killed.poll() is None and len(list(out.glob("students/*/last.ckpt"))) < 2:
        time.sleep(0.01)
    assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate()  # which waits for its children: they have its standard output
    assert len(list(out.glob("students/*"))) == 2

    alone = invoke(*command, "--out", tmp_path / "alone", "--seeds", "0,1,2")
    assert alone.exit_code == 0, alone.output
    both = start(*command, "--out", tmp_path / "both", *swept)
    shown, said = both.communicate()
    assert both.returncode == 0, said
    assert re.search(r"│ kd\s+│\s+store │\s+3 │", shown), shown
    assert "kd, seed 2: top-1 " in said
    for one, other in zip(*(sorted(tmp_path.glob(f"{run}/students/*")) for run in ("alone", "both")), strict=True):
        assert one.name == other.name
        ours, theirs = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)

    bad = ["--sweep", "training.optimizer.lr=0.01,1e9", *swept]
    failed = start(*command, "--out", tmp_path / "bad", *bad)
    said = failed.communicate()[1]
    assert failed.returncode == 1
    (error,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert "training diverged" in error
    assert "Traceback" not in said

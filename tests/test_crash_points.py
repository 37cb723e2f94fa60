"""A process that is ended at any durable call: the same command completes, and nothing wrong or foreign is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OPERATIONS = ("capture", "growth", "add", "finish", "push", "pull", "repair")
CALLS = {"write_file", "fsync", "link", "replace", "unlink", "mkdir", "rmdir"}


def ended_at(folder: Path, per_operation: int, *operations: str) -> list[dict]:
    """What `crash_points.py` found, by operation."""
    command = [sys.executable, str(ROOT / "tests" / "crash_points.py"), str(folder), str(per_operation), *operations]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_operations_ended_at_a_durable_call_of_every_kind_complete_and_leave_nothing(tmp_path):
    found = ended_at(tmp_path, 1)
    assert [one["failures"] for one in found] == [[]] * len(OPERATIONS)
    assert tuple(one["operation"] for one in found) == OPERATIONS
    assert {kind for one in found for kind in one["kinds"]} == CALLS


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_ended_at_any_durable_call_completes_and_leaves_nothing(operation, tmp_path):
    (found,) = ended_at(tmp_path, 0, operation)
    assert found["failures"] == []
    assert found["tried"] == found["calls"]

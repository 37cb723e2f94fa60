"""The command line answers at once: what needs no image and no network imports neither torch nor zarr."""

import os
import subprocess
import sys

import click
import pytest
from conftest import ROOT

from offline_kd.cli import main as cli
from offline_kd.cli import options
from offline_kd.data import manifest
from offline_kd.distill import tracking
from offline_kd.store import sync
from offline_kd.support import downloads

HEAVY = ("torch", "ray", "zarr", "numpy", "numba", "pydantic", "rich", "yaml", "model_signing")
ENTRY = (
    "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=open(sys.argv.pop(), 'w')));"
    "from offline_kd.cli.main import main; sys.argv[0] = 'offline-kd';"
    "main(sys.argv[1:-1], prog_name='offline-kd')"
)


def in_a_new_process(arguments, folder, **environment):
    """The command line, and the modules that it imported."""
    command = [sys.executable, "-c", ENTRY, *arguments, str(folder / "modules")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done, set((folder / "modules").read_text().split())


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "Every stage of RECIPE"),
        (["--version"], 0, "offline-kd 0.1.0"),
        (["distill", "--help"], 0, "offline-kd distill recipe.yaml --store s3://team/stores/cifar10"),
        (["store", "verify", "--help"], 0, "Prove a store"),
        (["store", "sign", "--help"], 0, "Sign a finished store"),
        (["distil"], 2, "No such command 'distil'"),
        (["distill", "recipe.yaml"], 2, "Missing option '--out'"),
        (["store", "pull", "from", "to", "--only", "everything"], 2, "'everything' is not one of"),
    ],
)
def test_help_version_and_typing_errors_import_nothing_heavy(arguments, status, said, tmp_path):
    done, modules = in_a_new_process(arguments, tmp_path)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert "click" in modules
    assert not modules.intersection(HEAVY)


def test_a_store_without_image_means_is_opened_without_the_compiler(tmp_path):
    # Only a codec that has been compiled needs it, and loading it takes as long as all the rest.
    done, modules = in_a_new_process(
        ["store", "info", str(ROOT / "tests" / "fixtures" / "store_v4" / "store")], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "numpy" in modules
    assert not modules.intersection({"numba", "llvmlite"})


def test_help_imports_no_command(tmp_path):
    _, modules = in_a_new_process(["--help"], tmp_path)
    assert {name for name in modules if name.startswith("offline_kd.cli.")} == {"offline_kd.cli.main"}


def test_a_misspelt_command_is_told_its_neighbour(tmp_path):
    done, _ = in_a_new_process(["distil"], tmp_path)
    assert "Did you mean 'distill'?" in done.stderr


def test_completion_lists_commands_and_options(tmp_path):
    def completed(words):
        environment = {"_OFFLINE_KD_COMPLETE": "bash_complete", "COMP_WORDS": words}
        place = str(len(words.split(" ")) - 1)
        done, modules = in_a_new_process([], tmp_path, COMP_CWORD=place, **environment)
        assert not modules.intersection(HEAVY)
        return {line.split(",")[1] for line in done.stdout.splitlines()}

    assert completed("offline-kd ") == set(cli.COMMANDS)
    assert completed("offline-kd store re") == {"repair"}
    assert {"--store", "--objective", "--seed"} <= completed("offline-kd distill --")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name):
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command.name == name
    listed = cli.COMMANDS[name][1].rstrip(".")
    assert (command.help or "").replace("\n", " ").startswith(listed)


def test_what_help_shows_is_what_the_library_uses():
    assert options.MANIFEST_NAME == manifest.MANIFEST_NAME
    assert options.DOWNLOAD_BYTES == downloads.DEFAULT_BYTES
    assert options.TARGET_KINDS == sync.KINDS
    assert options.TRACKERS == tuple(tracking.TRACKERS)

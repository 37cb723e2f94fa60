"""`docs/extending/engine.md`: a way of running stage 1, from one file and one line."""

import shutil

import pytest
from conftest import ROOT, refused
from extending import extended, run_extended

from offline_kd.store.opening import open_store
from offline_kd.store.verification import verify
from offline_kd.support.places import Folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = extended("engine", tmp_path_factory.mktemp("extended"))
    shutil.copy(ROOT / "tests" / "networks.py", folder)  # the recipe's teacher
    return folder


@pytest.mark.slow
def test_an_added_engine_makes_the_same_store(copy, recipe_file, where, store_path, tmp_path):
    options = ("--store", tmp_path / "store", "--engine", "processes", *where)
    result = run_extended(copy, "cache-teacher", recipe_file, *options)
    assert result.returncode == 0, result.stderr
    assert open_store(tmp_path / "store").digest == open_store(store_path).digest
    assert verify(Folder(tmp_path / "store")).faults == []
    assert not list((tmp_path / "store" / "leases").iterdir())


@pytest.mark.slow
def test_what_fails_in_an_added_engine_is_one_line(copy, recipe_file, where, data_root, tmp_path):
    damaged = tmp_path / "data" / "digits"
    damaged.mkdir(parents=True)
    for file in (data_root / "digits").iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content if file.name != "train-000002.tar" else content[:-1] + b"\1")
    # The teacher was measured before, so that the images of the last block are first read by the engine.
    options = ("--store", tmp_path / "store", "--engine", "processes", "--data-root", tmp_path / "data")
    result = run_extended(copy, "cache-teacher", recipe_file, *options, *where)
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if "train-000002.tar" in line and "sha256" in line]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_an_added_engine_is_listed_and_an_unknown_one_refused(copy, recipe_file, where, tmp_path):
    assert "local, ray, processes" in " ".join(run_extended(copy, "cache-teacher", "--help").stdout.split())
    options = ("--store", tmp_path / "store", *where)
    result = run_extended(copy, "cache-teacher", recipe_file, *options, "--engine", "proceses")
    assert result.returncode == 1
    assert "--engine proceses: no such engine. Did you mean 'processes'?" in result.stderr
    assert "Known: local, ray." in refused("cache-teacher", recipe_file, *options, "--engine", "processes")
    assert not (tmp_path / "store").exists()

"""Stage 1 and students on a real Ray cluster: what comes out is what one process makes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CPU, ROOT, invoke, merged, refused
from ray_nodes import ray_nodes

from offline_kd.cache.pipeline import cache_teacher
from offline_kd.recipe import dump_recipe, load_recipe
from offline_kd.store.opening import open_store
from offline_kd.store.verification import verify
from offline_kd.support.places import Folder

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'offline-kd[ray]'")
WITHOUT_RAY = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from offline_kd.cli.main import main
main()
"""


def start(*arguments: object, code: str | None = None) -> "subprocess.Popen[str]":
    """The command line in a process of its own, with one thread as the cluster's workers have."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "offline_kd"))]
    return subprocess.Popen(
        [*command, *(str(one) for one in arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> str:
    """What it said; it must have gone well."""
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return said


def watched_recipe(recipe, folder: Path, dies_at: int, deaths: int = 1) -> Path:
    """The recipe with a teacher that notes what workers of Ray ask it, and ends some of them."""
    args = {"log": str(folder / "asked.log"), "dies_at": dies_at, "deaths": deaths}
    changed = merged(
        recipe.model_dump(mode="json", exclude_none=True),
        {"teacher": {"model": "networks:watched", "model_args": args}},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(changed))
    return folder / "recipe.yaml"


def images_asked(folder: Path) -> Counter[str]:
    """How many images every worker asked the teacher about."""
    asked: Counter[str] = Counter()
    for line in (folder / "asked.log").read_text().splitlines():
        worker, count = line.split()
        asked[worker] += int(count)
    return asked


@needs_ray
@pytest.mark.slow
def test_ray_makes_the_store_of_one_process_when_an_actor_dies(recipe, manifest, roots, where, tmp_path):
    path = watched_recipe(recipe, tmp_path, dies_at=30)  # of 24 batches in the first view group of a block
    with ray_nodes(1, cpus=2) as nodes:
        options = ("--engine", "ray", "--ray-address", nodes.address, "--min-actors", "2")
        said = ended(start("cache-teacher", path, "--store", tmp_path / "store", *where, *options)).splitlines()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache_teacher(load_recipe(path), manifest, roots, tmp_path / "alone", CPU)
    torch.set_num_threads(threads)
    assert open_store(tmp_path / "store").digest == open_store(tmp_path / "alone").digest
    assert verify(Folder(tmp_path / "store")).faults == []
    assert len(list((tmp_path / "store" / "ledger").iterdir())) == 9
    assert not list((tmp_path / "store" / "leases").iterdir())
    assert (
        sum(images_asked(tmp_path).values()) - 1438 * 9 <= 2 * 512 * 3
    )  # two groups of views: one was asked about, one being committed
    assert len([line for line in said if line.startswith("ray: an actor was lost (block ")]) == 1
    assert len([line for line in said if "ray: 3 blocks, 1 retries; " in line and "img/s" in line]) == 1
    assert not [line for line in said if "pid=" in line or "WARNING" in line or "Traceback" in line], said


def test_what_ray_cannot_do_is_one_line(recipe_file, where, tmp_path):
    command = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *where)
    absent = start(*command, "--engine", "ray", code=WITHOUT_RAY)
    assert "--max-actors: engine 'local' has no such option" in refused(*command, "--max-actors", "2")
    assert "--gpus-per-run" in refused("run", recipe_file, *where, "--out", tmp_path / "run", "--gpus-per-run", "1")
    for flag in ("--gpus-per-run", "--gpus-per-actor"):
        wrong = invoke("run", recipe_file, *where, "--engine", "ray", flag, "1.5")
        assert wrong.exit_code == 2
        assert "1.5: a share of one GPU" in wrong.stderr
    said = absent.communicate()[1]
    assert absent.returncode == 1
    assert said == "Error: --engine ray: Ray is not installed. Install it: pip install 'offline-kd[ray]'\n"
    assert not (tmp_path / "store").exists()


@needs_ray
@pytest.mark.slow
def test_no_cluster_at_an_address_is_one_line(recipe_file, where, tmp_path):
    command = ("cache-teacher", recipe_file, "--store", tmp_path / "store", *where, "--engine", "ray")
    for address in ("127.0.0.1:1", "rubbish", "ray://127.0.0.1:1", "127.0.0.1:99999999"):
        process = start(*command, "--ray-address", address)
        said = process.communicate()[1]
        assert process.returncode == 1
        assert said.splitlines()[-1].startswith(f"Error: --engine ray: no Ray cluster at {address} (")
        assert "Traceback" not in said


@pytest.fixture(scope="module")
def many_tars(tmp_path_factory) -> list[str]:
    """The digits in tars of 128: 12 blocks to train on."""
    folder = tmp_path_factory.mktemp("many")
    manifest = folder / "data_manifest.yaml"
    packed = invoke("data", "pack", "digits", "--out", folder / "digits", "--samples-per-tar", 128)
    manifest.write_text(yaml.safe_dump({"manifest_version": 1, **yaml.safe_load(packed.stdout)}))
    return ["--manifest", str(manifest), "--data-root", str(folder)]


def wait_for_entries(store: Path, count: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while len(list(store.glob("ledger/*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_ray
@pytest.mark.slow
def test_a_capture_outlives_an_actor_a_node_and_its_driver(recipe, many_tars, tmp_path):
    small = merged(recipe.model_dump(mode="json"), {"capture": {"batch_size": 16}})
    path = watched_recipe(type(recipe).model_validate(small), tmp_path, dies_at=60)
    store = tmp_path / "store"
    ended(start("cache-teacher", path, "--store", tmp_path / "alone", *many_tars))
    lost = 1  # ends itself
    with ray_nodes(3) as nodes:
        options = ("--engine", "ray", "--ray-address", nodes.address, "--min-actors", "3")
        command = ("cache-teacher", path, "--store", store, *many_tars, *options)
        driver = start(*command)
        wait_for_entries(store, 6, driver)
        nodes.remove()
        lost += 1
        wait_for_entries(store, 12, driver)
        driver.send_signal(signal.SIGKILL)
        lost += 3
        driver.communicate()
        assert len(list(store.glob("ledger/*.json"))) < 36
        said = ended(start(*command))
    assert "resuming: " in said
    assert (tmp_path / "asked.died").exists()
    assert open_store(store).digest == open_store(tmp_path / "alone").digest
    assert verify(Folder(store)).faults == []
    assert len(list(store.glob("ledger/*.json"))) == 36
    assert sum(images_asked(tmp_path).values()) - 1438 * 9 <= lost * 128 * 3


@needs_ray
@pytest.mark.slow
def test_a_block_that_ends_every_actor_is_named(recipe, where, tmp_path):
    path = watched_recipe(recipe, tmp_path, dies_at=10, deaths=9)
    with ray_nodes(1) as nodes:
        options = ("--engine", "ray", "--ray-address", nodes.address)
        driver = start("cache-teacher", path, "--store", tmp_path / "store", *where, *options)
        said = driver.communicate()[1]
    assert driver.returncode == 1
    assert said.splitlines()[-1].startswith("Error: block ")
    assert "3 actors were lost over it" in said.splitlines()[-1]
    assert (tmp_path / "asked.died").read_text() == "xxx"
    assert "Traceback" not in said


@needs_ray
@pytest.mark.slow
def test_a_damaged_tar_and_a_missing_module_fail_the_capture_with_one_line(recipe_file, data_root, where, tmp_path):
    damaged = tmp_path / "data" / "digits"
    damaged.mkdir(parents=True)
    for file in (data_root / "digits").iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content if file.name != "train-000002.tar" else content[:-1] + b"\1")
    elsewhere = tmp_path / "modules"
    elsewhere.mkdir()
    (elsewhere / "networks_of_mine.py").write_text((ROOT / "tests" / "networks.py").read_text())
    other = tmp_path / "other.yaml"
    other.write_text(recipe_file.read_text().replace("model: networks:small", "model: networks_of_mine:small"))
    with ray_nodes(1) as nodes:
        options = ("--engine", "ray", "--ray-address", nodes.address, "--manifest", ROOT / "data_manifest.yaml")
        bad = start("cache-teacher", recipe_file, "--store", tmp_path / "a", *options, "--data-root", tmp_path / "data")
        said = bad.communicate()[1]
        assert bad.returncode == 1
        assert "train-000002.tar: sha256 is" in said.splitlines()[-1]
        assert "Traceback" not in said
        code = f"import sys; sys.path.append({str(elsewhere)!r}); from offline_kd.cli.main import main; main()"
        missing = start("cache-teacher", other, "--store", tmp_path / "b", *where, *options[:4], code=code)
        said = missing.communicate()[1]
        assert missing.returncode == 1
        assert "No module named 'networks_of_mine'" in said.splitlines()[-1]
        assert "Every node needs offline-kd" in said
        assert "Traceback" not in said


@needs_ray
@pytest.mark.slow
def test_students_on_ray_are_those_of_one_process(recipe, where, tmp_path):
    path = tmp_path / "recipe.yaml"
    kept = {name: recipe.objectives[name] for name in ("ce", "kd")}
    path.write_text(dump_recipe(recipe.model_copy(update={"objectives": kept, "seeds": [0, 1]})))
    ended(start("run", path, *where, "--out", tmp_path / "alone"))
    with ray_nodes(2) as nodes:
        options = ("--engine", "ray", "--ray-address", nodes.address)
        said = ended(start("run", path, *where, "--out", tmp_path / "ray", *options))
    for student in ("ce-0", "ce-1", "kd-0", "kd-1"):
        results = [
            json.loads((tmp_path / run / "students" / student / "result.json").read_text())["student_sha256"]
            for run in ("alone", "ray")
        ]
        assert results[0] == results[1]
        objective, seed = student.split("-")
        assert len([line for line in said.splitlines() if line.startswith(f"{objective}, seed {seed}: top-1 ")]) == 1

"""The package alone: recipes and manifest come with it, and a folder with nothing else in it is enough."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import RECIPE, ROOT, invoke, refused

from offline_kd.data.manifest import load_manifest
from offline_kd.recipe import load_recipe
from offline_kd.support.packaged import recipe_names

# `run digits`, of which nothing but the amount of work is changed.
TINY = {
    "capture.decisions": "{}",
    "data.tars": "[0]",
    "objectives": "{kd: [{term: kd, temperature: 4}]}",
    "seeds": "[0]",
    "student.model": "cifar:resnet8",
    "teacher.model": "cifar:resnet8",
    "teacher.training.epochs": "1",
    "training.epochs": "1",
    "views.count": "1",
}
RUN_TINY = ("run", "digits", *(f"--set={field}={value}" for field, value in TINY.items()), "--device", "cpu")


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """The current folder, with nothing in it."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


# ---- recipes by name -------------------------------------------------------------------------------------------------


def test_a_recipe_is_run_by_its_name_in_an_empty_folder(empty):
    small = [f"--set={who}.model=networks:small" for who in ("teacher", "student")]
    result = invoke(*RUN_TINY, *small)
    assert result.exit_code == 0, result.output
    assert "│ kd" in result.stdout
    assert (empty / "runs/digits/students/kd-0/student.safetensors").is_file()
    assert sorted(os.listdir(empty)) == ["runs"]


def test_a_file_wins_over_a_packaged_recipe_of_its_name(empty):
    (empty / "digits").mkdir()  # a folder is no recipe
    assert load_recipe(Path("digits")).name == "digits"
    (empty / "digits").rmdir()
    (empty / "digits").write_text(yaml.safe_dump(RECIPE | {"name": "mine"}))
    assert load_recipe(Path("digits")).name == "mine"


def test_a_wrong_name_is_told_the_near_ones(empty):
    assert "no such recipe. Did you mean digits?" in refused("run", "digit")
    assert "Did you mean digits?" in refused("run", "pipelines/digits.yaml")
    assert "cifar10/resnet56_resnet20_cpu" in refused("run", "resnet56_resnet20_cpu")
    said = refused("run", "nothing-like-it")
    assert said.endswith("no such recipe. `offline-kd recipe list` shows the packaged ones.")
    assert "no such recipe" in refused("run", "cluster/ray_cluster")
    assert "no such recipe" in refused("run", "../data_manifest")


def test_a_recipe_of_ones_own_starts_from_a_packaged_one(empty):
    (empty / "recipe.yaml").write_text("extends: cifar10/resnet56_resnet20_cpu\nname: mine\n")
    mine, packaged = load_recipe(Path("recipe.yaml")), load_recipe(Path("cifar10/resnet56_resnet20_cpu"))
    assert mine == packaged.model_copy(update={"name": "mine"})
    (empty / "recipe.yaml").write_text("extends: cifar10/basis\n")
    assert "(extended by recipe.yaml). Did you mean cifar10/base" in refused("run", "recipe.yaml")


def test_recipe_list_has_every_recipe_that_can_be_run():
    shown = invoke("recipe", "list").stdout
    listed = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│ ")]
    files = [file.relative_to(ROOT / "pipelines").with_suffix("") for file in (ROOT / "pipelines").rglob("*.yaml")]
    runnable = [str(file) for file in files if file.name != "base" and file.parts[0] != "cluster"]
    assert [name for name in listed if name] == sorted(runnable)
    assert "Handwritten digits, 8x8 pixels" in shown


def test_recipe_show_prints_the_file_and_what_it_means(empty):
    name = "cifar10/resnet56_resnet20_cpu"
    assert invoke("recipe", "show", name).stdout == (ROOT / f"pipelines/{name}.yaml").read_text()
    (empty / "resolved.yaml").write_text(invoke("recipe", "show", name, "--resolved").stdout)
    assert "extends" not in (empty / "resolved.yaml").read_text()
    assert load_recipe(Path("resolved.yaml")) == load_recipe(Path(name))
    (empty / "bytes").write_bytes(b"\xff\xfe")
    assert invoke("recipe", "show", "bytes").exit_code == 0
    assert "not readable as YAML" in refused("recipe", "show", "bytes", "--resolved")


@pytest.mark.parametrize("name", ["digits", "cifar10/resnet56_resnet20_cpu", "cifar100_letkd/base"])
def test_a_copied_recipe_says_the_same_and_nothing_is_overwritten(name, empty):
    assert invoke("recipe", "copy", name).exit_code == 0
    copy = Path(f"{Path(name).name}.yaml")
    assert copy.read_text().splitlines()[0] == (ROOT / f"pipelines/{name}.yaml").read_text().splitlines()[0]
    if "base" in name:  # no whole recipe
        assert "extends: cifar100/base\n" in copy.read_text()
    else:
        assert load_recipe(copy) == load_recipe(Path(name))
    copy.write_text("mine")
    assert "exists already" in refused("recipe", "copy", name)
    (empty / "folder").mkdir()
    assert invoke("recipe", "copy", name, "folder").exit_code == 0
    assert invoke("recipe", "copy", name, "other.yaml").exit_code == 0
    assert sorted(os.listdir(empty)) == sorted([copy.name, "folder", "other.yaml"])
    assert copy.read_text() == "mine"
    for wrong in ("digit", "../data_manifest", "cluster/ray_cluster", str(ROOT / "pipelines/digits")):
        assert "no packaged recipe" in refused("recipe", "copy", wrong)


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_without_a_manifest_there_is_the_packaged_one(empty):
    shown = invoke("data", "list").stdout
    assert shown.startswith("in the package\n")
    assert "│ cifar10_resnet56 " in shown
    assert "no such manifest" in refused("data", "list", "--manifest", "other.yaml")


def test_entries_of_a_local_manifest_win_over_packaged_ones(empty):
    known = yaml.safe_load((ROOT / "data_manifest.yaml").read_text())
    digits = known["datasets"]["digits"] | {"folder": "mine"}
    weights = {"file": "mine.safetensors", "sha256": "0" * 64}
    local = {"datasets": {"digits": digits}, "files": {"cifar10_resnet56": weights}}
    (empty / "data_manifest.yaml").write_text(yaml.safe_dump({"manifest_version": 1} | local))
    found = load_manifest(Path("data_manifest.yaml"))
    assert found.dataset("digits").folder == "mine"
    assert found.dataset("cifar10") == load_manifest(ROOT / "data_manifest.yaml").dataset("cifar10")
    assert found.weights("cifar10_resnet56").file == "mine.safetensors"  # though the package has a teacher of that name
    assert found.weights("cifar10_resnet20").file == known["teachers"]["cifar10_resnet20"]["weights"]["file"]
    shown = invoke("data", "list").stdout
    assert shown.startswith("in data_manifest.yaml and the package\n")
    assert re.search("│ cifar10_resnet56 +│ +file │ +mine.safetensors │", shown)
    assert not re.search("│ cifar10_resnet56 +│ +teacher │", shown)


def test_what_is_packed_is_written_into_the_local_manifest_alone(empty):
    before = (ROOT / "data_manifest.yaml").read_bytes()
    for kind in ("digits", "imagefolder"):
        if kind == "imagefolder":  # a name that the package knows with other classes
            shutil.copytree(ROOT / "docs", empty / "photos/a", ignore=lambda *_: os.listdir(ROOT / "docs"))
            for label in ("a", "b"):
                (empty / "photos" / label).mkdir(exist_ok=True)
                shutil.copy(ROOT / "pipelines/cifar10/resnet56_resnet20_letkd.png", empty / "photos" / label / "1.png")
        options = ("--source", "photos", "--out", "cifar10") if kind == "imagefolder" else ()
        result = invoke("data", "pack", kind, *options, "--write", "data_manifest.yaml")
        assert result.exit_code == 0, result.output
    written = yaml.safe_load((empty / "data_manifest.yaml").read_text())
    assert list(written["datasets"]) == ["digits", "cifar10"]
    assert load_manifest(Path("data_manifest.yaml")).dataset("cifar10").classes == ["a", "b"]
    assert (ROOT / "data_manifest.yaml").read_bytes() == before


# ---- wheel and sdist -------------------------------------------------------------------------------------------------


def build(kind: str, tree: Path, out: Path) -> Path:
    """A wheel or an sdist of a source tree, by the build backend that pyproject.toml names."""
    out.mkdir(exist_ok=True)
    script = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What a checkout has, without what was built in it."""
    tree = tmp_path_factory.mktemp("package") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "data_manifest.yaml"):
        shutil.copy(ROOT / name, tree)
    for name in ("offline_kd", "pipelines", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    return build("wheel", tree, tree.parent / "wheel")


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The wheel, unpacked alone: a folder for PYTHONPATH, before which nothing else of this package is found."""
    zipfile.ZipFile(wheel).extractall(wheel.parent.parent / "site")
    return wheel.parent.parent / "site"


def run_installed(site: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "offline_kd", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    code = [file.relative_to(ROOT) for file in (ROOT / "offline_kd").rglob("*") if file.is_file()]
    expected = {str(file) for file in code if "__pycache__" not in file.parts}
    recipes = (file.relative_to(ROOT) for file in (ROOT / "pipelines").rglob("*.yaml"))
    expected |= {f"offline_kd/packaged/{file}" for file in (*recipes, "data_manifest.yaml")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_alone_knows_its_recipes_in_an_empty_folder(installed, empty):
    where = [sys.executable, "-c", "import offline_kd; print(offline_kd.__file__)"]
    found = subprocess.run(where, cwd=empty, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True)
    assert Path(found.stdout.decode().strip()).is_relative_to(installed)
    listed = run_installed(installed, empty, "recipe", "list")
    assert listed.returncode == 0, listed.stderr
    assert all(f" {name} " in listed.stdout for name in recipe_names() if "base" not in name)
    shown = run_installed(installed, empty, "recipe", "show", "cifar10/resnet56_resnet20_cpu")
    assert shown.stdout == (ROOT / "pipelines/cifar10/resnet56_resnet20_cpu.yaml").read_text()


@pytest.mark.slow
def test_the_wheel_alone_runs_a_recipe_by_name_and_finds_its_manifest(installed, empty):
    done = run_installed(installed, empty, *RUN_TINY)
    assert done.returncode == 0, done.stderr
    assert "│ kd" in done.stdout
    listed = run_installed(installed, empty, "data", "list")
    assert "│ cifar10_resnet56 " in listed.stdout


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(tree, wheel, tmp_path):
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (again,) = (tmp_path / "unpacked").iterdir()
    other = zipfile.ZipFile(build("wheel", again, tmp_path / "again"))
    one = zipfile.ZipFile(wheel)
    assert sorted(other.namelist()) == sorted(one.namelist())
    assert all(other.read(name) == one.read(name) for name in one.namelist())


@pytest.mark.slow
def test_pip_installs_the_wheel_and_the_checkout_as_it_stands(tree, wheel, tmp_path, empty):
    """The wheel, and an editable install, which copies nothing: each in an environment that has no other copy."""
    for number, what in enumerate([[str(wheel)], ["--no-build-isolation", "--editable", str(tree)]]):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / f"venv{number}")], check=True)
        python = tmp_path / f"venv{number}/bin/python"
        # Pip and the dependencies are those of this environment, behind everything that is installed in the new one.
        here = next(path for path in sys.path if path.endswith("site-packages"))
        (site,) = (tmp_path / f"venv{number}").glob("lib/python*/site-packages")
        (site / "zz_dependencies.pth").write_text(f"{here}\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *what]
        done = subprocess.run(install, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        command = [str(python.parent / "offline-kd"), "recipe", "show", "digits"]
        shown = subprocess.run(command, cwd=empty, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
        assert shown.stdout == (ROOT / "pipelines/digits.yaml").read_text(), shown.stderr

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from offline_kd.cli import main as cli
from offline_kd.data.manifest import Manifest, data_roots, load_manifest
from offline_kd.distill.run import pack_digits
from offline_kd.recipe import Recipe

# How long an example takes says nothing here: the machine is shared, and first calls import and compile.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

RECIPE = {
    "name": "test",
    "data": {"dataset": "digits", "normalisation": {"mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]}},
    "teacher": {
        "model": "networks:small",
        "training": {
            "epochs": 3,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": {"name": "cosine"},
        },
    },
    "views": {"kind": "pad_crop_flip", "padding": 1, "flip": False, "count": "all"},
    "capture": {"codec": {"name": "f32"}, "views_per_group": 3, "fidelity_rows": 200},
    "student": {"model": "networks:small", "model_args": {"width": 4}},
    "training": {
        "epochs": 2,
        "batch_size": 64,
        "optimizer": {"name": "sgd", "lr": 0.05},
        "schedule": {"name": "cosine"},
    },
    "objectives": {
        "ce": [{"term": "ce"}],
        "kd": [{"term": "ce", "weight": 0.1}, {"term": "kd", "weight": 0.9, "temperature": 4}],
        "ttm": [{"term": "ce"}, {"term": "ttm", "weight": 5, "gamma": 0.3}],
        "wttm": [{"term": "ce"}, {"term": "wttm", "weight": 2, "gamma": 0.3}],
        "dtkd": [{"term": "ce"}, {"term": "dtkd", "temperature": 4, "warmup_epochs": 5}],
    },
}


# What a finished run has written.
RUN_FILES = {
    "recipe.yaml",
    "metrics.jsonl",
    "evaluation.safetensors",
    "result.json",
    "student.safetensors",
    "last.ckpt",
    "previous.ckpt",
}


def merged(base: dict, over: dict) -> dict:
    return {**base, **{k: merged(base[k], v) if isinstance(v, dict) and k in base else v for k, v in over.items()}}


def make_recipe(**changes: object) -> Recipe:
    return Recipe.model_validate(merged(RECIPE, changes))


def invoke(*arguments: object) -> Result:
    """The real command line, in this process; a bug would show as `result.exception`."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object) -> str:
    """The message of a command that must fail in the expected way: one line, exit status 1, no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("Error: "), result.stderr
    assert "Traceback" not in result.stderr
    return message


@pytest.fixture(scope="session", autouse=True)
def _clean_environment(tmp_path_factory):
    """Tests say themselves where data lies; networks.py can be named in recipes, in subprocesses too."""
    os.environ["OFFLINE_KD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_MODE"] = "offline"
    os.environ["REAL_DATA"] = os.environ.pop("OFFLINE_KD_DATA", "")
    os.environ["PYTHONPATH"] = str(ROOT / "tests")
    sys.path.insert(0, str(ROOT / "tests"))
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # one process a core, or one for both
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_data(_clean_environment) -> Path:
    """The folder with CIFAR-10, its ResNets and the ImageNet sample."""
    folder = Path(os.environ["REAL_DATA"] or "missing")
    if not (folder / "cifar10" / "train-000000.tar.gz").is_file():
        pytest.skip(
            "needs real images and teachers: set OFFLINE_KD_DATA to a folder with the cifar10, cifar100_filtered, "
            "imagenet_sample and teachers files that data_manifest.yaml names"
        )
    return folder


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return load_manifest(ROOT / "data_manifest.yaml")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    pack_digits(root / "digits")
    return root


@pytest.fixture(scope="session")
def roots(data_root) -> list[Path]:
    return data_roots([data_root])


@pytest.fixture(scope="session")
def teacher_weights(manifest, roots, tmp_path_factory) -> Path:
    """A teacher trained on the digits for a few epochs: it has opinions."""
    from offline_kd.distill.teacher_training import train_teacher

    out = tmp_path_factory.mktemp("teacher")
    result = train_teacher(make_recipe(), manifest, roots, out, CPU)
    assert result.top1 > 85
    return out / "student.safetensors"


@pytest.fixture(scope="session")
def recipe(teacher_weights) -> Recipe:
    return make_recipe(teacher={"weights": str(teacher_weights)})


@pytest.fixture(scope="session")
def store_path(recipe, manifest, roots, tmp_path_factory) -> Path:
    """A finished store: 3 blocks, 9 views in 3 groups, f32. Tests that damage it copy it first."""
    from offline_kd.cache.pipeline import cache_teacher

    path = tmp_path_factory.mktemp("stores") / "digits"
    cache_teacher(recipe, manifest, roots, path, CPU)
    return path


@pytest.fixture
def recipe_file(recipe, tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return file


@pytest.fixture
def where(data_root) -> list[str]:
    """Options that every command needs in tests."""
    return ["--manifest", str(ROOT / "data_manifest.yaml"), "--data-root", str(data_root)]

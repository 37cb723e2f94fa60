"""Whatever is typed: a result, or one line that says what is wrong. Never a traceback, never a file somewhere else."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import RECIPE, ROOT, invoke, merged
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy
from safetensors.torch import save_file

from offline_kd.cli import main as cli
from offline_kd.data.packing import digits_samples, pack
from offline_kd.models.networks import build

LONG = "n" * 5000
RECIPE_FIELDS = {"recipe_path": "recipe.yaml", "manifest_path": "manifest.yaml", "data_root": "data"}
# What a command that succeeds is given, by the name of the parameter. What is not named here is left out, or made up.
USUAL = RECIPE_FIELDS | {
    "device": "cpu",
    "form": "torch-export",
    "images": "photo.png",
    "key": "0000",
    "kind": "digits",
    "model": "networks:small",
    "name": "tiny",
    "network": "networks:small",
    "objective": "kd",
    "out": "made/new",
    "reference": "store",
    "runs": "run",
    "source": "store",
    "store": "store",
    "stores": "store",
    "student": "run",
    "target": "made/copy",
}


# ---- every command and option, from click itself -------------------------------------------------------------------


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = list(leaves(cli.main))
# `bench steps` repeats what it measures: its own options are tried by the long test.
QUICK = [(path, command) for path, command in COMMANDS if path != ("bench", "steps")]

NAMES = [
    *("", ".", "missing", "made/deep/new", "store", "store/store.json", "run", "data", "recipe.yaml", "manifest.yaml"),
    *("loop", "nowhere", "recipe.yaml/below", "/proc/none/x", "n" * 300, LONG, "a/" * 2500, "nul\0", "lone\ud800"),
    *("byte\udcff", "\N{SNOWMAN}", "line\nfeed", "-", "--", "a b", "*", "%s", "$HOME", "\x1b[31m"),
]
TEXTS = [
    *NAMES,
    *(
        "nosuch://x",
        "s3:",
        "://",
        "store#none",
        "store#",
        "store@sha256:00",
        f"store@sha256:{'0' * 64}",
        "#",
        "@sha256:",
    ),
    *("0:1", "1:0", "0:99", "0/1", "9/1", ":", "/", "1", "-1", "2.5", "none", "null", "[", "{", "{name: f32}"),
    *("{name: int, bits: 99}", "[[[]]]", "cuda", "cuda:99", "meta", "mps", "xpu:0", "cpu:0", "auto", "vulkan"),
    *("networks:none", "none:none", "cifar:resnet9", "os:getcwd", "kd", "ce", "local", "digits", "tiny"),
]
VALUES = ["-1", "0", "1", "", "null", "x", "[]", "{}", "true", ".nan", "1e400", '"a\\0b"', f"{2**70}", "[[[[1]]]]"]
TOO_FEW = "capture.decisions.last={kind: templates, module: body.5, templates: 4, top: 9}"
OVERRIDES = [
    *("seeds=[-1]", f"seeds=[{2**70}]", "seeds=[]", "seeds", "=", "=1", ".=1", "..=", "name=", "store=recipe.yaml"),
    TOO_FEW,
    *(f"{field}={value}" for field in ("seeds", "training.batch_size", "views.count") for value in VALUES),
    *(f"{field}={value}" for field in ("data.root", "teacher.weights", "student.model", "views") for value in VALUES),
]


def strings_for(parameter: click.Parameter) -> SearchStrategy[str]:
    """What may be typed for a parameter: right, wrong and absurd."""
    kind = parameter.type
    if isinstance(kind, click.IntRange):
        assert kind.min is not None, f"{parameter.name}: below what is a number refused?"
        edges = [kind.min - 1, kind.min, 2**70] + ([] if kind.max is None else [kind.max + 1])
        return st.sampled_from([*map(str, edges), "x", "", "1.5", "\N{ARABIC-INDIC DIGIT THREE}"])
    if isinstance(kind, click.FloatRange):
        assert kind.min is not None, f"{parameter.name}: below what is a number refused?"
        return st.sampled_from([str(kind.min - 1), str(kind.min), "0.3", "1.5", "inf", "nan", "1e400", "x", ""])
    if isinstance(kind, click.Choice):
        return st.sampled_from([*kind.choices, "none", ""])
    if isinstance(kind, click.Path):
        return st.sampled_from(NAMES) | st.text(max_size=20)
    if parameter.name == "overrides":
        return st.sampled_from(OVERRIDES) | st.text(max_size=20)
    assert isinstance(kind, click.types.StringParamType), f"{parameter.name}: what may be typed for a {kind}?"
    return st.sampled_from(TEXTS) | st.text(max_size=20)


def typed(data: DataObject, path: tuple[str, ...], command: click.Command) -> list[str]:
    """A command line: the usual values, and up to three parameters with others."""
    parameters = [one for one in command.params if one.name != "help"]
    names = [one.name for one in parameters]
    other = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=3)) if names else set()
    options, arguments = list(path), []
    for parameter in parameters:
        usual = USUAL.get(parameter.name or "")
        if isinstance(parameter, click.Option) and parameter.is_flag:
            options += [parameter.opts[0]] if parameter.name in other else []
            continue
        if parameter.name in other:
            values = data.draw(st.lists(strings_for(parameter), max_size=2 if parameter.multiple else 1))
        else:
            values = [usual] if usual is not None else []
        if isinstance(parameter, click.Argument):
            arguments += values
        else:
            options += [text for value in values for text in (parameter.opts[0], value)]
    return [*options, "--", *arguments]


# ---- where it is tried -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A folder with all that a command may want: 40 digits, a recipe, a store of them, a finished run."""
    folder = tmp_path_factory.mktemp("typed")
    samples = digits_samples()
    splits = {
        "train": {"tars": [tar.model_dump() for tar in pack(samples["train"][:40], folder / "data/tiny", "train", 20)]},
        "test": {"tars": [tar.model_dump() for tar in pack(samples["test"][:16], folder / "data/tiny", "test", 16)]},
    }
    tiny = {"folder": "tiny", "classes": [str(digit) for digit in range(10)], "splits": splits}
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"manifest_version": 1, "datasets": {"tiny": tiny}}))
    torch.manual_seed(0)
    weights = {name: tensor.contiguous() for name, tensor in build("networks:small", 10).state_dict().items()}
    save_file(weights, folder / "teacher.safetensors")
    changes = {
        "data": {"dataset": "tiny"},
        "views": {"count": 2},
        "capture": {"views_per_group": 1, "fidelity_rows": 20},
        "training": {"epochs": 1, "batch_size": 16},
    }
    recipe = merged(RECIPE, changes) | {"teacher": {"model": "networks:small", "weights": "teacher.safetensors"}}
    recipe["objectives"] = {name: recipe["objectives"][name] for name in ("ce", "kd")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "photo.png").write_bytes(samples["test"][0].encoded)
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("missing")
    with contextlib.chdir(folder):
        options = ("recipe.yaml", "--manifest", "manifest.yaml", "--data-root", "data", "--device", "cpu")
        assert invoke("cache-teacher", *options, "--store", "store").exit_code == 0
        assert invoke("distill", *options, "--store", "store", "--out", "run", "--objective", "kd").exit_code == 0
    return folder


@contextlib.contextmanager
def elsewhere(template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder is a copy of the template; afterwards nothing may be new anywhere but in it."""
    with tempfile.TemporaryDirectory() as top:
        for name in ("home", "scratch"):
            (Path(top) / name).mkdir()
        shutil.copytree(template, Path(top) / "here", symlinks=True)
        with monkeypatch.context() as patch, contextlib.chdir(Path(top) / "here"):
            patch.setenv("HOME", f"{top}/home")
            patch.setenv("OFFLINE_KD_CACHE", f"{top}/home/cache")
            patch.setattr(tempfile, "tempdir", f"{top}/scratch")
            before = listing(Path(top))
            yield Path(top)
            assert listing(Path(top)) == before


def listing(top: Path) -> list[str]:
    """Everything that a command might write to and should not, beside the folder it runs in."""
    folders = (Path("/"), ROOT / "offline_kd", top, top / "scratch")
    return [f"{folder}: {sorted(os.listdir(folder))}" for folder in folders]


def check_typed(arguments: list[str]) -> int:
    """Exit 0, 1 or 2; what was expected to go wrong is one line; a bug would be an exception."""
    result = CliRunner().invoke(cli.main, arguments)
    shown = [argument[:60] for argument in arguments]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{shown}: a traceback") from result.exception
    assert result.exit_code in (0, 1, 2), shown
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    if result.exit_code == 1 and arguments[1] not in ("verify", "repair"):  # which list what is wrong
        assert errors == lines[-1:], result.stderr
    return result.exit_code


def try_many(template: Path, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    # A counterexample is short as it is: finding a shorter one would cost hundreds of commands.
    phases = (Phase.explicit, Phase.generate)

    @settings(max_examples=examples, phases=phases, suppress_health_check=list(HealthCheck), database=None)
    @seed(examples)
    @given(st.data())
    def tried(data: DataObject) -> None:
        path, command = data.draw(st.sampled_from(COMMANDS if examples > 100 else QUICK))
        arguments = typed(data, path, command)
        with elsewhere(template, monkeypatch):
            check_typed(arguments)

    tried()


def test_anything_typed_is_a_result_or_one_line(template, monkeypatch):
    try_many(template, monkeypatch, 30)


@pytest.mark.slow
def test_a_thousand_things_typed_are_results_or_one_line(template, monkeypatch):
    try_many(template, monkeypatch, 1500)


DISTILL = ("distill", "recipe.yaml", "--objective", "kd", "--manifest", "manifest.yaml", "--data-root", "data")
TRIED = {
    "a store that is a file": [*DISTILL, "--store", "recipe.yaml", "--out", "new"],
    "a run directory that is a file": [*DISTILL, "--store", "store", "--out", "recipe.yaml"],
    "a long store": [*DISTILL, "--store", LONG, "--out", "new"],
    "a long run directory": [*DISTILL, "--store", "store", "--out", LONG],
    "a long recipe": ["run", LONG],
    "a long page": ["report", "run", "--out", LONG],
    "a long key": ["store", "inspect", "store", "--key", LONG, "--out", LONG, *DISTILL[4:]],
    "NUL in a path": [*DISTILL, "--store", "sto\0re", "--out", "new"],
    "NUL in a recipe's path": [*DISTILL, "--out", "new", "--set", 'store="a\\0b"'],
    "half a character as key": ["store", "inspect", "store", "--key", "\ud800", "--out", "new.html", *DISTILL[4:]],
    "an empty value": [*DISTILL, "--store", "", "--out", "new"],
    "an empty value, joined": [*DISTILL, "--store=", "--out", "new"],
    "a seed below 0": [*DISTILL, "--store", "store", "--out", "new", "--seed", "-5"],
    "seeds below 0": [*DISTILL, "--store", "store", "--out", "new", "--set", "seeds=[-1]"],
    "a seed of 71 bits": [*DISTILL, "--store", "store", "--out", "new", "--seed", f"{2**70}"],
    "seeds of 71 bits": [*DISTILL, "--store", "store", "--out", "new", "--set", f"seeds=[{2**70}]"],
    "a view's seed of 71 bits": [*DISTILL, "--store", "store", "--out", "new", "--set", f"views.seed={2**70}"],
    "9 of 4 templates": ["cache-teacher", "recipe.yaml", "--store", "new", *DISTILL[4:], "--set", TOO_FEW],
    "a plot of no kind": ["bench", "codecs", "store", "--out", "plot.xyz"],
    "images too small": ["taps", "networks:small", "--size", "5"],
    "a long student": ["predict", LONG, "photo.png"],
    "a long picture": ["predict", "run", "--network", "networks:small", LONG],
    "a student that is a recipe": ["evaluate", "recipe.yaml"],
    "a student to be written over a folder": [
        *("export", "run", "--network", "networks:small", "--format", "torch-export", "--out", "data"),
    ],
    **{f"device {name}": [*DISTILL, "--out", "new", "--device", name] for name in ("meta", "mps", "xpu:0", "cuda:99")},
}


@pytest.mark.parametrize("arguments", TRIED.values(), ids=TRIED)
def test_what_cannot_be_is_refused_in_one_line(template, monkeypatch, arguments):
    with elsewhere(template, monkeypatch):
        before = sorted(os.listdir())
        assert check_typed(arguments) != 0
        assert sorted(os.listdir()) == before


def test_every_number_has_bounds_and_every_option_a_known_kind():
    """So that the test above can try what lies beyond them, of options that are yet to come, too."""
    for path, command in COMMANDS:
        for parameter in command.params:
            numbers = click.IntRange, click.FloatRange
            known = (*numbers, click.Choice, click.Path, click.types.StringParamType, click.types.BoolParamType)
            assert isinstance(parameter.type, known), f"{' '.join(path)}: {parameter.name}"

"""Whatever is typed: a result, or one line that says what is wrong. Never a traceback, never a file somewhere else."""

import contextlib
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import RECIPE, ROOT, invoke, merged, refused
from hypothesis import HealthCheck, example, given, settings
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
    "key": "0000",
    "kind": "digits",
    "model": "networks:small",
    "name": "tiny",
    "objective": "kd",
    "out": "made/new",
    "reference": "store",
    "runs": "run",
    "source": "store",
    "store": "store",
    "stores": "store",
    "target": "made/copy",
}


# ---- every command and option, from click itself -----------------------------------------------------------------------


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

NAMES = [
    *("", ".", "missing", "made/deep/new", "store", "store/store.json", "run", "data", "recipe.yaml", "manifest.yaml"),
    *("loop", "nowhere", "recipe.yaml/below", "/proc/none/x", "n" * 300, LONG, "a/" * 2500, "nul\0", "lone\ud800"),
    *("byte\udcff", "\N{SNOWMAN}", "line\nfeed", "-", "--", "a b", "*", "%s", "$HOME", "\x1b[31m"),
]
TEXTS = [
    *NAMES,
    *("nosuch://x", "s3:", "://", "store#none", "store#", "store@sha256:00", f"store@sha256:{'0' * 64}", "#", "@sha256:"),
    *("0:1", "1:0", "0:99", "0/1", "9/1", ":", "/", "1", "-1", "2.5", "none", "null", "[", "{", "{name: f32}"),
    *("{name: int, bits: 99}", "[[[]]]", "cuda", "cuda:99", "meta", "mps", "xpu:0", "cpu:0", "auto", "vulkan"),
    *("networks:none", "none:none", "cifar:resnet9", "os:getcwd", "kd", "ce", "local", "digits", "tiny"),
]
VALUES = ["-1", "0", "1", "", "null", "x", "[]", "{}", "true", ".nan", "1e400", '"a\\0b"', f"{2**70}", "[[[[1]]]]"]
OVERRIDES = [
    *("seeds=[-1]", f"seeds=[{2**70}]", "seeds=[]", "seeds", "=", "=1", ".=1", "..=", "name=", "store=recipe.yaml"),
    "capture.decisions.last={kind: templates, module: body.5, templates: 4, top: 9}",
    *(f"{field}={value}" for field in ("seeds", "training.batch_size", "views.count") for value in VALUES),
    *(f"{field}={value}" for field in ("data.root", "teacher.weights", "student.model", "views") for value in VALUES),
]


def strings_for(parameter: click.Parameter) -> SearchStrategy[str]:
    """What may be typed for a parameter: right, wrong and absurd."""
    kind = parameter.type
    if isinstance(kind, click.IntRange):
        assert kind.min is not None, f"{parameter.name}: below what is a number refused?"
        edges = [kind.min - 1, kind.min, 2**70] + ([] if kind.max is None else [kind.max, kind.max + 1])
        return st.sampled_from([*map(str, edges), "x", "", "1.5", "\N{ARABIC-INDIC DIGIT THREE}"])
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
    other = data.draw(st.sets(st.sampled_from([one.name for one in parameters]), max_size=3))
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

"""Documents say what is so: every block of code is run or read by a test, or says why not; links lead somewhere."""

import itertools
import os
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import click
import pytest
import torch
import yaml
from conftest import ROOT
from documents import PAGES, Block, anchors, blocks, inline, links
from test_end_to_end import all_commands

from offline_kd.cache.engines import local
from offline_kd.cli import main as cli
from offline_kd.recipe import Recipe, load_recipe
from offline_kd.support.errors import RecipeError

# Programs that other tests run: the file of the test.
RUN_BY = {
    "README.md": "test_walkthroughs.py",
    "docs/api.md": "test_api_examples.py",
    "docs/students.md": "test_usable.py",
    **{f"docs/extending/{name}.md": f"test_extending_{name}.py" for name in ("codec", "objective", "operation")},
    **{f"docs/extending/{name}.md": f"test_extending_{name}.py" for name in ("engine", "view_kind")},
}
# What is neither run nor understood by a parser: how it begins, and why.
NOT_RUN = {
    "README.md": {
        "make demo": "minutes; tests/test_end_to_end.py runs the recipe of it",
        "digits: student": "what a command printed",
        "support/": "the file map: tests/test_end_to_end.py compares it with the imports",
    },
    "docs/command-line.md": {"_OFFLINE_KD_COMPLETE=": "a shell's own start-up files: tests/test_start_up.py completes"},
    "docs/embedding-teachers.md": {
        "teacher:\n  kind": "a piece of a recipe of that kind: tests/test_embedding_teachers.py reads it",
        "teacher:\n  expected": "likewise",
    },
    "docs/images.md": {"imagenet:\n  folder": "an entry with sha256 that are left out: tests/test_index.py makes it"},
    "docs/measurements.md": {"digits: student": "what a command printed", "after 200 steps": "what a command printed"},
    "docs/own-loops.md": {"python train.py": "timm's own program: tests/test_own_loops.py runs it where there is one"},
    "docs/sharing.md": {
        "NAME/store.json": "the files of a store: tests/test_store.py",
        "stores:": "two files, with a digest that is left out: tests/test_signing.py",
        "python -m model_signing": "another program: tests/test_signing.py runs it",
    },
    "docs/store-format.md": {
        "store.json ": "the files of a store: tests/test_store_format_doc.py reads them",
        "state = ": "formulas: tests/test_bench_codecs.py follows them",
        "length[i] = ": "formulas: tests/test_bench_codecs.py follows them",
        "at first: ": "formulas: tests/test_bench_codecs.py follows them",
        "total = ": "formulas: tests/test_bench_codecs.py follows them",
    },
    "docs/training.md": {"kd, seed 0: ": "what a command printed"},
}
EVERY = [block for page in PAGES for block in blocks(page)]


def not_run(block: Block) -> str | None:
    reasons = NOT_RUN.get(block.page, {})
    return next((why for begins, why in reasons.items() if block.text.startswith(begins)), None)


@cache
def run_by(page: str) -> str | None:
    """The test file that runs the programs of a page: one that is named above, or one that names the page."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    naming = (one.name for one in tests if one.name != Path(__file__).name and Path(page).name in one.read_text())
    return RUN_BY.get(page) or next(naming, None)


def of_kind(*languages: str) -> list[Block]:
    return [block for block in EVERY if block.language in languages and not not_run(block)]


# ---- every block has its fate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_read_or_says_why_not(page):
    for block in blocks(page):
        if block.language in ("python", "diff"):
            assert block in SHORT or run_by(page), f"{block}: run it in a test, and name that in RUN_BY"
        elif block.language != "yaml" and not not_run(block):
            assert block.words_after_our_name(), f"{block}: no command of ours: say in NOT_RUN why nobody runs it"


def test_what_is_named_as_not_run_or_run_elsewhere_is_there():
    for page, reasons in NOT_RUN.items():
        for begins in reasons:
            assert any(block.text.startswith(begins) for block in blocks(page)), f"{page}: no block begins: {begins}"
    for page, test in RUN_BY.items():
        text = (ROOT / "tests" / test).read_text()
        assert Path(page).stem in text, f"tests/{test} does not speak of {page}"


# ---- commands --------------------------------------------------------------------------------------------------------

OPTIONS = {"--help", "--version"} | {
    name for _, command in all_commands(cli.main) for one in command.params for name in (*one.opts, *one.secondary_opts)
}
# Options of other programs, and whose they are.
TIMM = "--resume", "--start-epoch", "--mixup-off-epoch", "--smoothing", "--img-size", "--val-split", "--dataset"
OF_OTHERS = {
    "--max-restarts": "torchrun",
    "--array": "sbatch",
    "--threads": "tests/bench_decisions.py",
    **dict.fromkeys(TIMM, "timm's train.py"),
    **dict.fromkeys(("--use_fp16", "--temp"), "FKD's generate_soft_label.py"),
}


def understand(words: Sequence[str]) -> None:
    """What the command line makes of its arguments before it does anything; raises click.UsageError."""
    command: click.Command = cli.main
    context, left = click.Context(command), list(words)
    while isinstance(command, click.Group):
        if not left or left[0] == "...":  # a sentence about the group
            return
        _, found, left = command.resolve_command(context, left)
        assert found is not None
        command, context = found, click.Context(found, parent=context)
    command.make_context(str(command.name), left, parent=context.parent)


@pytest.mark.parametrize("page", PAGES)
def test_the_command_line_understands_every_command(page):
    for block in blocks(page):
        if block.language in ("", "bash", "console", "sh") and not not_run(block):
            for words in block.words_after_our_name():
                try:
                    understand(shlex.split(words))
                except click.UsageError as error:
                    pytest.fail(f"{block}: offline-kd {words}: {error.message}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_in_sentences_exist(page):
    for code in inline(page):
        if code.startswith("offline-kd ") and "--help" not in code and "--version" not in code:
            try:
                understand(shlex.split(code.partition(" > ")[0])[1:])
            except click.MissingParameter:  # of which the sentence does not speak
                pass
            except click.UsageError as error:
                pytest.fail(f"{page}: {code}: {error.message}")
        if option := re.match(r"--[a-z][\w-]+", code):
            assert option[0] in OPTIONS or option[0] in OF_OTHERS, f"{page}: {code}: no command has it"


def test_a_command_that_does_not_exist_is_found():
    for wrong in ("distil recipe.yaml", "store verify", "run digits --sets a=1", "bench codecs a --rows none"):
        with pytest.raises(click.UsageError):
            understand(wrong.split())


# ---- recipes ---------------------------------------------------------------------------------------------------------


def read_piece(text: str, folder: Path) -> Recipe:
    """A recipe as a page writes it; a piece of one, as what changes the demo with all its labels."""
    content = yaml.safe_load(text) or {}
    whole = {"data", "student", "training", "objectives"} <= set(content)
    (folder / "demo.yaml").write_text("extends: digits\ndata: {labelled_fraction: 1.0}\n")
    (folder / "recipe.yaml").write_text(text if whole else f"extends: demo.yaml\n{text}")
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_pieces_of_recipes_are_read(block, tmp_path):
    try:
        read = read_piece(block.text, tmp_path)
    except RecipeError as error:
        pytest.fail(f"{block}: {error} If it is no piece of a recipe, say in NOT_RUN who reads it")
    named = set(yaml.safe_load(block.text) or {}) - {"extends"}
    assert named <= set(Recipe.model_fields)
    assert named <= read.model_fields_set


@pytest.mark.parametrize("wrong", ["training: {epoch: 3}", "trainig: {epochs: 3}", "views: {kind: none, count: many}"])
def test_a_piece_that_is_none_is_found(wrong, tmp_path):
    with pytest.raises(RecipeError):
        read_piece(wrong, tmp_path)


# ---- short pieces of Python ------------------------------------------------------------------------------------------

SHORT = [block for block in of_kind("python") if block.page in ("docs/teachers.md", "docs/extending/engine.md")]


@pytest.mark.parametrize("block", SHORT, ids=str)
def test_lines_of_python_mean_what_they_say(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"weight": torch.ones(2)}, "trained by": Path("me")}, "old.pth")
    names: dict[str, object] = {"torch": torch, "Sequence": Sequence, "Capture": local.Capture}
    exec(compile(block.text, str(block), "exec"), names)
    if "run" in names:
        assert names["run"].__annotations__ == local.run.__annotations__
    elif "make_teacher" in names:
        assert names["make_teacher"].__annotations__["return"] is torch.nn.Module
    else:
        assert torch.load("new.pth", weights_only=True)["weight"].tolist() == [1, 1]


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for file, anchor in links(page):
        assert os.path.exists(file), f"{page}: {file} does not exist"
        if anchor:
            name = str(file.resolve().relative_to(ROOT))
            assert anchor in anchors(name), f"{page}: {name} has no heading #{anchor}"


def test_every_page_is_reached_from_the_readme():
    reached, new = {"README.md"}, ["README.md"]
    while new:
        page = new.pop()
        found = {str(file.resolve().relative_to(ROOT)) for file, _ in links(page) if file.suffix == ".md"}
        new += sorted(found - reached)
        reached |= found
    missing = set(PAGES) - reached
    assert not missing, f"no link leads to {', '.join(sorted(missing))}"
    assert not list(itertools.filterfalse(PAGES.__contains__, reached))

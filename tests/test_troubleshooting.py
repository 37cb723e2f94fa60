"""docs/troubleshooting.md quotes messages that the code prints."""

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT
from documents import text_of

from offline_kd.support import errors


def texts_in(tree: ast.AST, constants: dict[str, str]) -> Iterator[str]:
    """Every text of a piece of code; what an f-string fills in is `...`, or the constant of that name."""
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(_filled(part, constants) for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def _filled(part: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    return constants.get(part.value.id, "...") if isinstance(part.value, ast.Name) else "..."


def messages() -> tuple[set[str], dict[str, set[str]]]:
    """All texts of the package, and those of every error by the name of its class."""
    everything: set[str] = set()
    by_class: dict[str, set[str]] = {}
    for file in sorted((ROOT / "offline_kd").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        }
        everything |= set(texts_in(tree, constants))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                by_class.setdefault(node.func.id, set()).update(*(texts_in(one, constants) for one in node.args))
    return everything, by_class


def kinds(base: type[errors.OfflineKDError]) -> set[str]:
    """The classes of expected failures that are printed: the base itself is for what has no better one."""
    return {name for one in base.__subclasses__() for name in {one.__name__, *kinds(one)}}


EVERYTHING, BY_CLASS = messages()
QUOTED = re.findall(r"^### (?:`` (.+) ``|`(.+)`)$", text_of("docs/troubleshooting.md"), re.MULTILINE)
QUOTES = [one or other for one, other in QUOTED]
TABLE = text_of("docs/for-teammates.md").split("| it says |")[1].split("\n\n")[0]
TOLD = [one or other for one, other in re.findall(r"^\| (?:``(.+?)``|`(.+?)`) \|", TABLE, re.MULTILINE)]


@pytest.mark.parametrize("quote", [*QUOTES, *TOLD])
def test_every_message_that_is_quoted_is_one_of_ours(quote):
    assert any(quote in text for text in EVERYTHING), f"no message of the code has: {quote}"


def test_every_heading_quotes_a_message_and_every_entry_says_more():
    page = text_of("docs/troubleshooting.md")
    assert len(QUOTES) == len(set(QUOTES)) == len(re.findall("^### ", page, re.MULTILINE)) >= 40
    assert len(TOLD) >= 5
    assert not re.search(r"^### .+\n\n*#", page, re.MULTILINE)


def test_every_kind_of_failure_has_an_entry():
    found = kinds(errors.OfflineKDError)
    assert {"StoreError", "StoreForbidden", "LeaseLost", "TeacherError"} <= found
    for name in found:
        assert any(quote in text for quote in QUOTES for text in BY_CLASS[name]), f"{name}: no entry quotes one"

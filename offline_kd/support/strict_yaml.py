"""YAML as this package reads it: every key once, no tags, and bounded, whoever wrote the text.

A second value under one key would replace the first without a word; libyaml ends the process on deep nesting; a few
lines of aliases can stand for more values than memory holds.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from offline_kd.support.errors import RecipeError, shorten

MAX_BYTES = 2**25
MAX_DEPTH = 50  # of mappings and lists in each other
MAX_VALUES = 2**20  # with aliases written out; a manifest has 7 for a tar

LONG_NUMBER = re.compile("[-+]?[0-9][0-9a-fA-Fxb_:.]{64,}")  # Python refuses to print the longest

# libyaml's parser, where it is: class names of large datasets take seconds otherwise.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> object:
    """The content of a YAML file; raises RecipeError for one that is not what `parse_yaml` reads."""
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read as YAML.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from error
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> object:
    """What `text` says, as lists, mappings and plain values.

    Raises RecipeError, beginning with `where`, for text that is no YAML, a key that stands twice in one mapping, an
    explicit tag, and more depth or values than a description has.
    """
    try:
        _check(text)
        return yaml.load(text, Loader=LOADER)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: of numbers and dates
        raise RecipeError(f"{where}: not readable as YAML: {shorten(' '.join(str(error).split()))}") from error


@dataclass
class _Open:
    """A mapping or list whose end has not come yet."""

    start: yaml.CollectionStartEvent
    values_before: int
    children: int = 0
    keys: set[str] = field(default_factory=set)


def _check(text: str) -> None:
    """Raises YAMLError for what `parse_yaml` refuses, one event at a time: before anything nested is built."""
    around: list[_Open] = []
    sizes: dict[str, int] = {}  # anchor -> values behind it, once it is closed
    values = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionEndEvent):
            closed = around.pop()
            if closed.start.anchor is not None:
                sizes[closed.start.anchor] = values - closed.values_before
        if not isinstance(event, yaml.NodeEvent):
            continue
        if around:
            _check_child(around[-1], event)
        before, values = values, values + _values_of(event, sizes)
        if values > MAX_VALUES:
            raise _refusal(event, f"more than {MAX_VALUES:,} values, aliases written out")
        if isinstance(event, yaml.CollectionStartEvent):
            around.append(_Open(event, before))
            if len(around) > MAX_DEPTH:
                raise _refusal(event, f"nested more than {MAX_DEPTH} deep")


def _check_child(parent: _Open, event: yaml.NodeEvent) -> None:
    parent.children += 1
    is_key = isinstance(parent.start, yaml.MappingStartEvent) and parent.children % 2 == 1
    if is_key and isinstance(event, yaml.ScalarEvent):
        if event.value in parent.keys:
            raise _refusal(
                event, f"key '{shorten(event.value, 80)}' stands twice in one mapping, remove one of the two"
            )
        parent.keys.add(event.value)


def _values_of(event: yaml.NodeEvent, sizes: dict[str, int]) -> int:
    """How many values an event stands for, without those inside a mapping or list that begins with it."""
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in sizes:
            raise _refusal(event, f"alias '*{event.anchor}' means nothing that was whole before it")
        return sizes[event.anchor]
    assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
    if event.tag is not None:
        raise _refusal(event, f"tag '{event.tag}' is not read, write the value plainly or in quotes")
    if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and LONG_NUMBER.fullmatch(event.value):
        raise _refusal(event, f"{shorten(event.value, 80)} would be a number of more than 64 digits")
    if event.anchor is not None:
        sizes.pop(event.anchor, None)  # from here on the name means this value
        if isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
    return 1


def _refusal(event: yaml.NodeEvent, problem: str) -> yaml.YAMLError:
    mark = event.start_mark
    return yaml.YAMLError((f"line {mark.line + 1}, column {mark.column + 1}: " if mark else "") + problem)

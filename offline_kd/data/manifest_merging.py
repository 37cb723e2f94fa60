"""What was just packed or indexed, put into a manifest whose other lines, comments too, stay as they are."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import yaml

from offline_kd.data.manifest import Dataset, Manifest, Tar, read_manifest
from offline_kd.support.errors import DataError, RecipeError
from offline_kd.support.files import write_atomically
from offline_kd.support.strict import parse
from offline_kd.support.strict_yaml import LOADER, parse_yaml


class Entry(TypedDict):
    """A dataset, as YAML has it."""

    folder: str
    location: NotRequired[str]
    classes: list[str]
    splits: dict[str, dict[str, object]]


def manifest_entry(
    folder: str, classes: Sequence[str], splits: Mapping[str, Sequence[Tar]], location: str | None = None
) -> Entry:
    """A dataset as a manifest describes it; `location`: a URL where its tars lie."""
    tars: dict[str, dict[str, object]] = {
        name: {"tars": [tar.model_dump() for tar in tars]} for name, tars in splits.items()
    }
    if location is None:
        return {"folder": folder, "classes": list(classes), "splits": tars}
    return {"folder": folder, "location": location, "classes": list(classes), "splits": tars}


def entry_yaml(content: Mapping[str, object]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=120, default_flow_style=None, allow_unicode=True)


def known_dataset(file: Path, name: str) -> Dataset | None:
    """What a manifest, if there is one, says of a dataset, if it has it."""
    return read_manifest(file).datasets.get(name) if os.path.lexists(file) else None


def check_same_place(file: Path, name: str, location: str | None) -> None:
    """Raises DataError when a manifest, if there is one, knows a dataset of that name with another location.

    Args:
        location: a URL, or the path of a folder.
    """
    known = known_dataset(file, name)
    if known is None:
        return
    there, here = (one and (one if "://" in one else os.path.abspath(one)) for one in (known.location, location))
    if there != here:
        raise DataError(
            f"{file}: dataset '{name}' lies in {there or 'folders below data roots'}, these tars in {here}: those "
            "of all its splits must lie below one folder or URL. Name them all, or give another --name."
        )


def check_same_dataset(file: Path, name: str, folder: str, classes: Sequence[str]) -> None:
    """Raises DataError when a manifest, if there is one, knows a dataset of that name with other classes or folder."""
    known = known_dataset(file, name)
    if known is None:
        return
    if known.folder != folder:
        raise DataError(f"{file}: dataset '{name}' is in folder '{known.folder}', not in '{folder}'. Correct one.")
    if known.classes != list(classes):
        changed = [f"'{old}' is now '{new}'" for old, new in zip(known.classes, classes, strict=False) if old != new]
        what = changed[0] if changed else f"it has {len(known.classes)}, not {len(classes)}"
        raise DataError(f"{file}: dataset '{name}' has other classes: {what}. All its splits must have the same.")


def merge_dataset(file: Path, name: str, entry: Entry) -> None:
    """Put the splits of `entry` into the manifest `file`; splits that it has under other names stay.

    Raises what `merged` does; the manifest is unchanged then.
    """
    write_atomically(file.resolve(), merged(file, name, entry))


def merged(file: Path, name: str, entry: Entry) -> str:
    """The text of the manifest `file` with the splits of `entry`.

    Raises DataError when the manifest has another dataset of that name, or is written in a way that no line can be put
    into.
    """
    check_same_dataset(file, name, entry["folder"], entry["classes"])
    text = file.read_text(encoding="utf-8") if os.path.lexists(file) else "manifest_version: 1\n"
    expected = parse_yaml(text, where=str(file)) or {}
    assert isinstance(expected, dict)
    datasets = expected["datasets"] = dict(expected.get("datasets") or {})
    if name in datasets:
        path, value = ["datasets", name, "splits"], {**datasets[name]["splits"], **entry["splits"]}
        datasets[name] = {**datasets[name], "splits": value}
    else:
        path, value = ["datasets", name], {**entry}
        datasets[name] = entry
    changed = "\n".join(_put(text.splitlines(), yaml.compose(text, Loader=LOADER), path, value)) + "\n"
    try:
        as_read = parse_yaml(changed, where=str(file))
    except RecipeError:
        as_read = None
    if as_read != expected:
        raise DataError(f"{file}: cannot be merged into as it is written. Put the printed entry there by hand.")
    parse(Manifest, as_read, where=str(file))
    return changed


def _put(lines: list[str], node: yaml.Node | None, path: list[str], value: Mapping[str, object]) -> list[str]:
    """YAML lines with `value` at `path` below `node`; all that do not say what stood there are kept."""
    begin, end, indent = len(lines), len(lines), 0
    if isinstance(node, yaml.MappingNode) and node.value:
        begin = end = _end(lines, node)
        indent = node.value[0][0].start_mark.column
        for key, below in node.value:
            if key.value == path[0]:
                if len(path) > 1 and isinstance(below, yaml.MappingNode) and below.value:
                    return _put(lines, below, path[1:], value)
                begin, end = key.start_mark.line, _end(lines, below)
    for name in reversed(path):
        value = {name: value}
    return [*lines[:begin], *(" " * indent + line for line in entry_yaml(value).splitlines()), *lines[end:]]


def _end(lines: list[str], node: yaml.Node) -> int:
    """Behind the last line of a node. A block ends where the next token begins, with comments between."""
    end = node.end_mark.line
    if end < len(lines) and lines[end][: node.end_mark.column].strip():
        end += 1
    while end > 0 and lines[end - 1].strip()[:1] in ("", "#"):
        end -= 1
    return end

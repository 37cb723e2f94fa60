"""What may stand in a recipe, out of the descriptions that read it: tables for people, JSON Schema for editors.

Both are made from `Recipe.model_json_schema()`. A section is a mapping of fields; where one of several kinds may stand
(optimizers, views, codecs, terms), each has a section, and a field of one value that says which it is.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from offline_kd.recipe import Recipe
from offline_kd.support.errors import RecipeError, did_you_mean, shorten

Node = dict[str, Any]  # a part of a JSON Schema
COLUMNS = ["field", "type", "default", "meaning"]
PAGE = """# Fields of recipes

Made by `offline-kd recipe fields --markdown > docs/recipe.md`, from the descriptions that read recipes: do not edit it.
`offline-kd recipe fields training.optimizer` shows one section. How recipes are named, extended, overridden and
checked by editors: [command line](command-line.md#recipes).
"""


@dataclass(frozen=True)
class Section:
    """The fields of one mapping of recipes, of one kind where there are several."""

    path: str  # where it stands: `training.optimizer`; `objectives` for what stands in their lists
    kind: str  # `name: sgd`; empty where there is only one
    about: str
    fields: list[list[str]]  # as COLUMNS


@cache
def _schema() -> Node:
    return Recipe.model_json_schema()


def _refs(node: Node) -> list[str]:
    """The definitions that may stand at a node: itself, in unions, in lists, behind names of one's own."""
    if "$ref" in node:
        ref = node["$ref"].rpartition("/")[2]
        return [ref] if "properties" in _schema()["$defs"][ref] else []  # any value at all is no section
    parts = [*node.get("anyOf", []), *node.get("oneOf", []), *node.get("patternProperties", {}).values()]
    parts += [node[name] for name in ("items", "additionalProperties") if isinstance(node.get(name), dict)]
    return [ref for part in parts for ref in _refs(part)]


@cache
def _homes() -> dict[str, str]:
    """Every definition, and the shortest path at which it stands; the recipe itself is '' at ''."""
    homes, queue = {"": ""}, [""]
    for ref in queue:
        for name, node in _definition(ref)["properties"].items():
            for below in _refs(node):
                if below not in homes:
                    homes[below] = f"{homes[ref]}.{name}".removeprefix(".")
                    queue.append(below)
    return homes


def _definition(ref: str) -> Node:
    node: Node = _schema()["$defs"][ref] if ref else _schema()
    return node


def sections(path: str = "") -> list[Section]:
    """The sections at a path, or the one field there; of all recipes, their first level, if it is empty.

    `training.optimizer` has two sections, `training.optimizer.sgd` is one of them, `training.optimizer.lr` a field of
    both. Positions in lists may be written and say nothing: `objectives.wttm.1.gamma`.

    Raises RecipeError for a path that does not exist, with the nearest names.
    """
    here, field = [""], ""  # the definitions that the path leads to, and the one field of them where it ends
    for step in filter(None, path.split(".")):
        if step.isdecimal():
            continue
        kinds = {_kind(ref).partition(": ")[2]: ref for ref in here}
        nodes = [node for ref in here if (node := _definition(ref)["properties"].get(step))]
        if field or not (step in kinds or nodes):
            known = set() if field else {*kinds, *(name for ref in here for name in _definition(ref)["properties"])}
            near = did_you_mean(step, known - {""})
            raise RecipeError(f"{shorten(path)}: recipes have no '{shorten(step, 100)}' there.{near}")
        below = list(dict.fromkeys(ref for node in nodes for ref in _refs(node)))
        if step in kinds:
            here = [kinds[step]]
        elif below:
            here = below
        else:
            field = step
    found = [_section(ref) for ref in here]
    if not field:
        return found
    return [replace(one, fields=rows) for one in found if (rows := [row for row in one.fields if row[0] == field])]


def all_sections() -> Iterator[Section]:
    """Every section once, each before those that stand in it."""
    homes = _homes()
    order = {path: number for number, path in enumerate(_paths(""))}
    for ref in sorted(homes, key=lambda ref: order[homes[ref]]):
        yield _section(ref)


def _paths(path: str) -> Iterator[str]:
    """`path`, and the paths of all sections below it, in the order of the fields."""
    yield path
    homes = _homes()
    below: dict[str, None] = {}
    for ref in [ref for ref, home in homes.items() if home == path]:
        for node in _definition(ref)["properties"].values():
            below |= {homes[one]: None for one in _refs(node) if homes[one].rpartition(".")[0] == path}
    for one in below:
        yield from _paths(one)


def _kind(ref: str) -> str:
    """`name: sgd`, where that says which of several kinds a section is."""
    tags = [f"{name}: {node['const']}" for name, node in _definition(ref)["properties"].items() if "const" in node]
    return tags[0] if tags else ""


def _section(ref: str) -> Section:
    definition = _definition(ref)
    about = " ".join(definition.get("description", "").split("\n\n")[0].split())
    required = definition.get("required", [])
    fields = [
        [name, _type(node), "required" if name in required else _default(node), node.get("description", "")]
        for name, node in definition["properties"].items()
        if "const" not in node
    ]
    return Section(_homes()[ref], _kind(ref), about, fields)


def _default(node: Node) -> str:
    value = node.get("default")
    if isinstance(value, dict) and len(value) > 1:
        return "as there"
    if value is None or value == "":
        return "none"
    shown = json.dumps(value).replace('"', "")
    return re.sub(r"\d+\.\d{6,}", lambda number: f"{float(number[0]):.6g}", shown)


def _type(node: Node) -> str:
    """What may be written for a field, in words."""
    refs = _refs(node)
    if "$ref" in node:
        return f"section {_homes()[refs[0]]}" if refs else "any value"
    if "enum" in node or "const" in node:
        return " | ".join(json.dumps(value).strip('"') for value in node.get("enum", [node.get("const")]))
    unions = [*node.get("anyOf", []), *node.get("oneOf", [])]
    if unions:
        parts = [_type(one) for one in unions if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if node.get("type") == "array":
        if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])}: {_type(node['prefixItems'][0])}"
        return f"list of {_type(node['items'])}"
    if node.get("type") == "object":
        values = [*node.get("patternProperties", {}).values()] or [node["additionalProperties"]]
        return f"{node.get('propertyNames', {}).get('title', 'NAME')}: {_type(values[0])}"
    return f"{node['type']}{_limits(node)}"


def _limits(node: Node) -> str:
    """` >= 1, < 2`; numbers of 31 bits and more are limits of computers, which nobody needs to know."""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {node[name]:g}" for name, sign in signs.items() if name in node and node[name] < 2**31 - 1]
    return f" {', '.join(limits)}" if limits else ""


def reference_page() -> str:
    """docs/recipe.md: every section, as Markdown."""
    lines, path = [PAGE], None
    for one in all_sections():
        if one.path != path:
            lines.append(f"## {one.path or 'The recipe'}\n")
            path = one.path
        if one.kind:
            lines.append(f"### `{one.kind}`\n")
        lines.append(f"{one.about}\n")
        if one.fields:
            rows = [
                COLUMNS,
                ["---"] * len(COLUMNS),
                *([f"`{row[0]}`", _linked(row[1]), *row[2:]] for row in one.fields),
            ]
            lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def _linked(kind: str) -> str:
    """`section a.b` as a link to its heading."""
    return re.sub(r"section ([\w.]+)", lambda found: f"[{found[1]}](#{found[1].replace('.', '')})", kind)


def recipe_schema() -> dict[str, object]:
    """JSON Schema (2020-12) of recipe files: whole ones, and those with `extends`, which leave out what others say."""
    whole = dict(_schema())
    definitions = whole.pop("$defs")
    part = _part(whole)
    assert isinstance(part, dict)
    part["properties"] |= {"extends": {"type": "string", "description": "the recipe that this one changes"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of offline-kd",
        "if": {"required": ["extends"]},
        "then": part,
        "else": whole,
        "$defs": definitions | {f"{name}-part": _part(node) for name, node in definitions.items()},
    }


def _part(node: object) -> object:
    """The same schema where nothing must be there, so that what is there may fit several kinds."""
    if isinstance(node, list):
        return [_part(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {"anyOf" if key == "oneOf" else key: _part(value) for key, value in node.items() if key != "discriminator"}
    if isinstance(kept.get("required"), list):
        del kept["required"]
    if "$ref" in kept:
        kept["$ref"] = f"{kept['$ref']}-part"
    return kept

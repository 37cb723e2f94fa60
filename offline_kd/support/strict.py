"""Descriptions read from files: strict, frozen, refused with one readable line; and what identifies their content."""

import hashlib
import json
import reprlib
from collections.abc import Iterator
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offline_kd.support.errors import RecipeError, did_you_mean, shorten

M = TypeVar("M", bound=BaseModel)
MAX_PROBLEMS = 1000
_SHORT = reprlib.Repr()  # what is wrong may be as long as the file
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxdict = _SHORT.maxlist = 20
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
MAX_SEED = 2**64 - 1  # what torch's generators and ours take
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Strict(BaseModel):
    """A description that refuses unknown fields and does not change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse(model: type[M], content: object, *, where: str) -> M:
    """Validate `content` as `model`; the error names the field, the value and, for a typo, the nearest right name."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first_problem(model, error)}") from error


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    if error.error_count() > MAX_PROBLEMS:  # to list millions would cost more memory than what they are about
        return f"{error.error_count():,} fields are missing, unknown or wrong"
    # A misspelt field leads to a missing one: name the misspelling first.
    problem = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    location = problem["loc"]
    field = shorten(".".join(str(part)[:100] for part in location) or "the file")
    if problem["type"] == "extra_forbidden":
        name = f"{location[-1]}"[:100]
        return f"unknown field '{field}'.{did_you_mean(name, _field_names(model.model_json_schema()) - {name})}"
    if problem["type"] == "union_tag_invalid":
        tag, expected = shorten(problem["ctx"]["tag"]), problem["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"'{field}': unknown name '{tag}'.{did_you_mean(tag, expected)}"
    more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    shown = "" if problem["type"] == "missing" else f", got {shorten(_SHORT.repr(problem['input']))}"
    return f"'{field}': {problem['msg']}{shown}{more}"


def _field_names(schema: object) -> set[str]:
    """Every field name anywhere in a JSON schema."""
    if isinstance(schema, list):
        return {name for item in schema for name in _field_names(item)}
    if not isinstance(schema, dict):
        return set()
    properties = schema.get("properties", {})
    own = set(properties) if isinstance(properties, dict) else set()
    return own | {name for value in schema.values() for name in _field_names(value)}


class Absent:
    """The value of a field that a description does not have."""

    def __repr__(self) -> str:
        return "not there"


def differences(one: object, other: object, where: str = "") -> Iterator[tuple[str, object, object]]:
    """The fields in which two descriptions differ, as `views.scale`, with both values; in the order of their names.

    Args:
        one, other: as JSON. Where mappings differ in `kind` or `name`, their other fields say nothing.
        where: the field that both are.
    """
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield where, one, other
        return
    tags = [tag for tag in ("kind", "name") if tag in one and tag in other and one[tag] != other[tag]]
    for name in tags or sorted({*one, *other}):
        field = f"{where}.{name}".lstrip(".")
        yield from differences(one.get(name, Absent()), other.get(name, Absent()), field)


def in_words(value: object) -> str:
    """A description, as JSON, for people: `randaugment, num ops 2, flip no`. What is null is left out."""
    if isinstance(value, dict):
        tags = [str(value[name]) for name in ("kind", "name") if name in value]
        fields = [
            f"{name.replace('_', ' ')} " + (f"({in_words(one)})" if isinstance(one, dict) else in_words(one))
            for name, one in value.items()
            if name not in ("kind", "name") and one is not None
        ]
        return ", ".join([*tags, *fields])
    if isinstance(value, list):
        return f"[{', '.join(f'({in_words(one)})' if isinstance(one, dict) else in_words(one) for one in value)}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def fingerprint(content: object) -> str:
    """sha256 of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

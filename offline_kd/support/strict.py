"""Descriptions read from files: strict, frozen, refused with one readable line; and what identifies their content."""

import hashlib
import json
import reprlib
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offline_kd.support.errors import RecipeError, did_you_mean

M = TypeVar("M", bound=BaseModel)
MAX_PROBLEMS = 1000
_SHORT = reprlib.Repr()  # what is wrong may be as long as the file
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxdict = _SHORT.maxlist = 20
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """A description that refuses unknown fields and does not change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_yaml(path: Path) -> object:
    try:
        # libyaml's parser, where it is: class names of large datasets take seconds otherwise.
        return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error


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
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = problem["loc"]
    field = ".".join(f"{part}"[:100] for part in location) or "the file"
    if problem["type"] == "extra_forbidden":
        name = f"{location[-1]}"[:100]
        return f"unknown field '{field}'.{did_you_mean(name, _field_names(model.model_json_schema()) - {name})}"
    if problem["type"] == "union_tag_invalid":
        tag, expected = problem["ctx"]["tag"], problem["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"'{field}': unknown name '{tag}'.{did_you_mean(tag, expected)}"
    more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    shown = "" if problem["type"] == "missing" else f", got {_SHORT.repr(problem['input'])}"
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


def fingerprint(content: object) -> str:
    """sha256 of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

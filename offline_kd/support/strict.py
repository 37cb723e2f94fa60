"""Descriptions read from files: strict, frozen, refused with one readable line; and what identifies their content."""

import hashlib
import json
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offline_kd.support.errors import RecipeError, did_you_mean, shorten

M = TypeVar("M", bound=BaseModel)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
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
    # A misspelt field leads to a missing one: name the misspelling first.
    problem = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    location = problem["loc"]
    field = shorten(".".join(str(part) for part in location) or "the file")
    if problem["type"] == "extra_forbidden":
        name = shorten(str(location[-1]))
        return f"unknown field '{field}'.{did_you_mean(name, _field_names(model.model_json_schema()) - {name})}"
    if problem["type"] == "union_tag_invalid":
        tag, expected = shorten(problem["ctx"]["tag"]), problem["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"'{field}': unknown name '{tag}'.{did_you_mean(tag, expected)}"
    more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    shown = "" if problem["type"] == "missing" else f", got {shorten(repr(problem['input']))}"
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

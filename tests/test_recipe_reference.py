"""What recipes may say: every field is described, the page is current, and editors are told the same."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from conftest import RECIPE, ROOT, invoke, merged, refused
from pydantic import BaseModel

from offline_kd.recipe import Recipe, load_recipe
from offline_kd.recipe_reference import all_sections, sections
from offline_kd.support.packaged import recipe_names

RUNNABLE = [name for name in recipe_names() if "base" not in name]


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def described_models() -> list[type[BaseModel]]:
    """Every description that a recipe is composed of."""
    found: list[type[BaseModel]] = [Recipe]
    for model in found:
        for field in model.model_fields.values():
            for part in (field.annotation, *field.metadata):
                found += [one for one in dict.fromkeys(models_in(part)) if one not in found]
    return found


# ---- descriptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", described_models(), ids=lambda model: model.__name__)
def test_every_field_says_what_it_means(model):
    assert model.__doc__, f"{model.__name__}: what is it?"
    for name, field in model.model_fields.items():
        says_which_kind = len(get_args(field.annotation)) == 1 and name in ("name", "kind", "term")
        assert says_which_kind or field.description, f"{model.__name__}.{name}: Field(description=...)"


def test_the_reference_has_every_description_and_every_field():
    written = [(one.path, one.kind, row[0]) for one in all_sections() for row in one.fields]
    assert len(written) == len(set(written))
    models = {model.__name__: model for model in described_models()}
    assert len(models) > 40
    assert len(list(all_sections())) == len(models)
    tags = {"name", "kind", "term"}
    expected = sorted(name for model in models.values() for name in model.model_fields if name not in tags)
    assert sorted(name for _, _, name in written if name not in tags) == expected


def test_the_page_is_what_the_command_prints():
    page = (ROOT / "docs/recipe.md").read_text()
    assert invoke("recipe", "fields", "--markdown").stdout == page, (
        "offline-kd recipe fields --markdown > docs/recipe.md"
    )
    headings = {line.removeprefix("## ").replace(".", "") for line in page.splitlines() if line.startswith("## ")}
    links = {part.split(")")[0] for part in page.split("](#")[1:]}
    assert links <= headings


# ---- recipe fields ---------------------------------------------------------------------------------------------------


def test_fields_of_a_section_are_a_table():
    shown = invoke("recipe", "fields", "training.optimizer").stdout
    assert "training.optimizer with name: sgd" in shown
    assert "training.optimizer with name: adamw" in shown
    shown = invoke("recipe", "fields", "training.optimizer.sgd").stdout
    assert "adamw" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("│ momentum"))
    assert [cell.strip() for cell in row.split("│")[1:4]] == ["momentum", "number >= 0, < 1", "0.9"]
    top = invoke("recipe", "fields").stdout
    assert all(f"│ {name} " in top for name in Recipe.model_fields)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("training.epochs", [("training", "", ["epochs"])]),
        ("training.optimizer.lr", [("training.optimizer", f"name: {name}", ["lr"]) for name in ("sgd", "adamw")]),
        ("teacher.training.schedule.step.gamma", [("training.schedule", "name: step", ["gamma"])]),
        ("objectives.wttm.1.gamma", [("objectives", "term: wttm", ["gamma"])]),  # as --set is written
        ("capture.decisions.templates.top", [("capture.decisions", "kind: templates", ["top"])]),
        ("capture.codec.auto.error_budget.change", [("capture.codec.error_budget", "", ["change"])]),
    ],
)
def test_a_path_may_lead_to_one_field(path, where):
    assert [(one.path, one.kind, [row[0] for row in one.fields]) for one in sections(path)] == where
    assert invoke("recipe", "fields", path).exit_code == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("training.optimiser", "recipes have no 'optimiser' there. Did you mean 'optimizer'?"),
        ("training.optimizer.sdg", "Did you mean 'sgd'?"),
        ("trainign", "Did you mean 'training'?"),
        ("training.epochs.more", "recipes have no 'more' there."),
        ("n" * 5000, "recipes have no 'nnn"),
    ],
)
def test_an_unknown_path_is_told_the_near_names(path, message):
    said = refused("recipe", "fields", path)
    assert message in said
    assert len(said) < 900


# ---- for editors -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor() -> jsonschema.Draft202012Validator:
    schema = json.loads(invoke("recipe", "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def problems(editor: jsonschema.Draft202012Validator, content: object) -> list[str]:
    return [f"{list(one.path)}: {one.message[:200]}" for one in editor.iter_errors(content)]


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_schema_accepts_every_packaged_recipe(name, editor):
    """As it stands in its file, and with all that it extends."""
    file = ROOT / f"pipelines/{name}.yaml"
    assert problems(editor, yaml.safe_load(file.read_text())) == []
    resolved = load_recipe(file).model_dump(mode="json", exclude_none=True)
    assert problems(editor, resolved) == []


def test_the_schema_accepts_budgets_and_lists_of_stores(editor):
    budget = {"objective": "kd", "temperature": 4, "change": 0.1}
    stores = [{"store": "s3://team/a", "weight": 2}, {"store": "b"}]
    recipe = merged(RECIPE, {"capture": {"codec": {"name": "auto", "error_budget": budget}}, "store": stores})
    Recipe.model_validate(recipe)
    assert problems(editor, recipe) == []


WRONG: dict[str, dict[str, Any]] = {
    "an unknown field": {"training": {"epoch": 3}},
    "another type": {"training": {"epochs": "many"}},
    "too little": {"training": {"epochs": 0}},
    "an unknown optimizer": {"training": {"optimizer": {"name": "lion", "lr": 1}}},
    "a field of another kind": {"training": {"optimizer": {"name": "sgd", "lr": 1, "betas": [0, 0]}}},
    "an unknown term": {"objectives": {"kd": [{"term": "kdd"}]}},
    "a budget of labels": {"capture": {"codec": {"name": "auto", "error_budget": {"objective": "ce", "change": 0.1}}}},
    "a second extends": {"extends": ["a", "b"]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_the_schema_refuses_what_recipes_refuse(change, editor):
    for base in ({"extends": "digits"}, RECIPE):
        assert problems(editor, merged(base, change))


def test_without_extends_everything_must_be_there(editor):
    part = {name: value for name, value in RECIPE.items() if name != "student"}
    assert any("'student' is a required property" in one for one in problems(editor, part))
    assert problems(editor, part | {"extends": "digits"}) == []


def test_docs_show_the_line_that_editors_read():
    page = (ROOT / "docs/command-line.md").read_text()
    assert "# yaml-language-server: $schema=recipe.schema.json" in page
    assert "offline-kd recipe schema > recipe.schema.json" in page


def test_positions_in_lists_are_overridden_as_the_page_says(tmp_path):
    page = (ROOT / "docs/command-line.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("offline-kd run digits --set")]
    assert len(lines) == 2

    sets = [word for line in lines for word in shlex.split(line)[3:] if word != "--set"]
    changed = load_recipe(Path("digits"), sets)
    assert changed.objectives["kd"][1].temperature == 2
    assert changed.seeds == [0, 1]
    assert changed.capture.decisions["last"].templates == 32

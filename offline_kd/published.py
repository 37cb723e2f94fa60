"""The numbers of papers that packaged recipes are for, as tables: one for each folder of recipes."""

from collections.abc import Sequence
from dataclasses import dataclass

from offline_kd.recipe import load_recipe
from offline_kd.report_recipe import Published
from offline_kd.support.packaged import packaged, recipe_names

PAGE = """# Published numbers that recipes are for

Made by `offline-kd recipe published --markdown > docs/published.md`, from the recipes: do not edit it. Top-1 in percent
as others report it, with the standard deviation where they state one; views, epochs, batch and learning rate are those
of our recipes. **None of these rows was run here.** How to run one, under which protocol, and where ours departs from
it: [for researchers](for-researchers.md).
"""


@dataclass(frozen=True)
class Row:
    """What others report of a recipe, and how it trains."""

    recipe: str  # its name in the folder
    how: list[str]
    published: Published


@dataclass(frozen=True)
class PublishedTable:
    """The recipes of one folder that name published numbers: a row each, as text."""

    folder: str
    columns: list[str]
    rows: list[list[str]]


def published_tables() -> list[PublishedTable]:
    """What packaged recipes name as published, in the order of their names."""
    folders: dict[str, list[Row]] = {}
    for name in recipe_names():
        folder, _, short = name.rpartition("/")
        if short == "base":  # what others extend is no recipe by itself
            continue
        recipe = load_recipe(packaged("pipelines") / f"{name}.yaml")
        training = recipe.training
        how = [f"{recipe.views.num_views}", f"{training.epochs} x {training.batch_size}", f"{training.optimizer.lr:g}"]
        if recipe.published is not None:
            folders.setdefault(folder, []).append(Row(short, how, recipe.published))
    return [_table(folder, rows) for folder, rows in folders.items()]


def _table(folder: str, rows: Sequence[Row]) -> PublishedTable:
    objectives = list(dict.fromkeys(name for row in rows for name in row.published.top1))
    cells = [
        [row.recipe, *row.how, *(_percent(row.published.of(name)) for name in objectives), row.published.source]
        for row in rows
    ]
    return PublishedTable(folder, ["recipe", "views", "epochs x batch", "rate", *objectives, "source"], cells)


def _percent(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ""
    mean, deviation = found
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def published_page() -> str:
    """docs/published.md: every table, as Markdown."""
    lines = [PAGE]
    for table in published_tables():
        rows = [table.columns, ["---"] * len(table.columns), *table.rows]
        lines += [f"## {table.folder}/RECIPE", "", *(f"| {' | '.join(cells)} |" for cells in rows), ""]
    return "\n".join(lines)

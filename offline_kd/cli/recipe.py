"""`offline-kd recipe ...`: the packaged recipes, and what may stand in one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from offline_kd.support.errors import RecipeError, shorten


@click.group("recipe")
def command() -> None:
    """Packaged recipes, and what every field of a recipe means.

    \b
    offline-kd recipe list
    """


@command.command("list")
def list_command() -> None:
    """The recipes that come with the package, by the names that all commands take for RECIPE.

    \b
    offline-kd recipe list
    """
    from offline_kd.support.console import show_table
    from offline_kd.support.packaged import packaged, recipe_names

    rows = [[name, _about(packaged("pipelines") / f"{name}.yaml")] for name in recipe_names() if "base" not in name]
    show_table("offline-kd run NAME, or offline-kd recipe show NAME", ["name", "what it is"], rows, words=True)


def _about(file: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = re.match("(?:# ?.+\n)+", file.read_text(encoding="utf-8"))
    text = " ".join(re.sub("^# ?", "", comment[0] if comment else "", flags=re.MULTILINE).split())
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


@command.command("show")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--resolved", is_flag=True, help="As it is read: with what it extends, and defaults.")
def show_command(recipe_path: Path, resolved: bool) -> None:
    """The text of RECIPE, a file or the name of a packaged recipe.

    \b
    offline-kd recipe show cifar10/resnet56_resnet20_cpu
    offline-kd recipe show cifar10/resnet56_resnet20_cpu --resolved
    """
    from offline_kd.support.packaged import recipe_file

    file = recipe_file(recipe_path)
    if resolved:
        from offline_kd.recipe import dump_recipe, load_recipe

        click.echo(dump_recipe(load_recipe(file)), nl=False)
    else:
        click.echo(file.read_text(encoding="utf-8", errors="replace"), nl=False)


@command.command("copy")
@click.argument("name")
@click.argument("to", required=False, type=click.Path(path_type=Path))
def copy_command(name: str, to: Path | None) -> None:
    """Write the packaged recipe NAME into a file of your own: TO, or a file of its name in this folder.

    What it extends stays packaged: `extends: base.yaml` becomes `extends: cifar10/base`. Nothing is overwritten.

    \b
    offline-kd recipe copy imagefolder photos.yaml
    """
    from offline_kd.support.console import say
    from offline_kd.support.packaged import packaged, packaged_recipe, recipes_like

    folder, source = packaged("pipelines"), packaged_recipe(name)
    if source is None:
        raise RecipeError(f"{shorten(name)}: no packaged recipe.{recipes_like(name)}")
    to = to or Path(source.name)
    target = to / source.name if to.is_dir() else to

    def absolute(extends: re.Match[str]) -> str:
        base = (source.parent / extends[1]).resolve().relative_to(folder.resolve())
        return f"extends: {base.with_suffix('').as_posix()}"

    text = re.sub(r"^extends: (\S+)$", absolute, source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target}: exists already. Give another TO, or remove it.") from None
    say(f"{target} written")


@command.command("fields")
@click.argument("path", default="")
@click.option("--markdown", is_flag=True, help="Every section, as docs/recipe.md.")
def fields_command(path: str, markdown: bool) -> None:
    """What the fields of recipes mean: those of the section at PATH, of one of its kinds, or one field.

    \b
    offline-kd recipe fields
    offline-kd recipe fields training.optimizer
    offline-kd recipe fields training.optimizer.sgd
    offline-kd recipe fields views.random_resized_crop.scale
    """
    from offline_kd.recipe_reference import COLUMNS, reference_page, sections
    from offline_kd.support.console import show_table

    if markdown:
        click.echo(reference_page(), nl=False)
        return
    for one in sections(path):
        where = " with ".join(filter(None, (one.path or "recipe", one.kind)))
        show_table(f"{where}: {one.about}", COLUMNS, one.fields, words=True)


@command.command("published")
@click.option("--markdown", is_flag=True, help="As docs/published.md.")
def published_command(markdown: bool) -> None:
    """What papers report for the packaged recipes: top-1 in percent by objective, and where it stands.

    \b
    offline-kd recipe published
    """
    from offline_kd.published import published_page, published_tables
    from offline_kd.support.console import show_table

    if markdown:
        click.echo(published_page(), nl=False)
        return
    for table in published_tables():
        show_table(f"{table.folder}/RECIPE: top-1 % as published", table.columns, table.rows)


@command.command("schema")
def schema_command() -> None:
    """JSON Schema of recipes, for editors that complete and check them.

    The first line of a recipe says where it lies: `# yaml-language-server: $schema=recipe.schema.json`.

    \b
    offline-kd recipe schema > recipe.schema.json
    """
    from offline_kd.recipe_reference import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))

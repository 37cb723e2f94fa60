"""`offline-kd report`: finished runs, compared."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page to write.")
def command(runs: tuple[str, ...], out: Path) -> None:
    """Compare finished run directories: a table, and a self-contained page with the curves.

    A run may lie in a folder or below a URL. Runs are averaged where they differ by their seed alone; fields of the
    recipe that set rows apart are columns.

    \b
    offline-kd report runs/digits/students/* --out comparison.html
    """
    from offline_kd.distill.report import group_runs, read_runs, summarise, table, write_report
    from offline_kd.support.console import show_table

    groups = group_runs(read_runs(runs))
    write_report(out, out.stem, groups)
    show_table(str(out), *table(summarise(groups)))

"""`offline-kd report`: finished runs, compared."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page to write.")
def command(runs: tuple[Path, ...], out: Path) -> None:
    """Compare finished run directories: a table, and a self-contained page with the curves.

    \b
    offline-kd report runs/digits/students/* --out comparison.html
    """
    from offline_kd.distill.report import COLUMNS, read_runs, summarise, table_rows, write_report
    from offline_kd.support.console import show_table

    records = read_runs(runs)
    write_report(out, out.stem, records)
    show_table(str(out), COLUMNS, table_rows(summarise(records)))

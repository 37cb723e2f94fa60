"""`offline-kd report`: finished runs, compared."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The page to write; .csv and .json beside it."
)
def command(runs: tuple[str, ...], out: Path) -> None:
    """Compare finished run directories: a table, a self-contained page, and the same as CSV and JSON.

    A run may lie in a folder or at a URL. Runs are averaged where they differ by their seed alone; fields of the recipe
    that set rows apart are columns. Students stand beside plain training (`ce`) where it is among the runs, and beside
    the teacher where that was trained here. The page has curves, calibration, classes helped and hurt, and digests.

    \b
    offline-kd report runs/digits/students/* --out comparison.html
    """
    from offline_kd.distill.conclusion import conclusion
    from offline_kd.distill.report import summarise, table
    from offline_kd.distill.report_page import write_report
    from offline_kd.distill.run_records import group_runs, read_runs
    from offline_kd.support.console import say, show_table

    summaries = summarise(group_runs(read_runs(runs)))
    found = conclusion(summaries)
    write_report(out, out.stem, summaries, found)
    show_table(str(out), *table(summaries))
    for sentence in found:
        say(sentence)

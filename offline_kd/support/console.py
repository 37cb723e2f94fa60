"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0

console = Console(stderr=True)


class Meter:
    """Counts work that is done; shows it while `progress` is open."""

    def __init__(self, title: str, total: int, unit: str, bar: Progress | None) -> None:
        self.title, self.total, self.unit, self.bar = title, total, unit, bar
        self.done, self.started, self.reported = 0, time.monotonic(), time.monotonic()
        self.task = bar.add_task(title, total=total, rate="") if bar else None

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        now = time.monotonic()
        rate = self.done / max(now - self.started, 1e-9)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, advance=amount, rate=rate_text(rate, self.unit))
        elif now - self.reported >= PLAIN_SECONDS:
            self.reported = now
            left = duration_text((self.total - self.done) / rate)
            say(f"{self.title}: {self.done:,} of {self.total:,}, {rate_text(rate, self.unit)}, {left} left")


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Meter]:
    """Show how `total` units of work advance: `with progress(...) as meter: meter.advance(n)`."""
    if not sys.stderr.isatty():
        yield Meter(title, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield Meter(title, total, unit, bar)


def rate_text(rate: float, unit: str) -> str:
    """A rate per second as a person reads it, of a unit in the plural: `1,234 images/s`; slow work as `8.1 s/step`."""
    if rate >= 10:
        return f"{rate:,.0f} {unit}/s"
    if rate >= 1:
        return f"{rate:.1f} {unit}/s"
    return f"{1 / rate:,.1f} s/{_singular(unit)}" if rate > 0 else f"0 {unit}/s"


def counted(number: int, unit: str) -> str:
    """`1 picture`, `1,234 pictures`: a number of a unit, which is given in the plural."""
    return f"{number:,} {_singular(unit) if number == 1 else unit}"


def _singular(unit: str) -> str:
    return unit.removesuffix("es") if unit.endswith("sses") else unit.removesuffix("s")


def duration_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def printable(text: str) -> str:
    """One line without control characters: names in a shared store may hold anything, escape sequences too."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def say(message: str) -> None:
    """One line about what is going on, on standard error."""
    console.print(printable(message), highlight=False, soft_wrap=True, markup=False)


def show_table(title: str, columns: list[str], rows: list[list[str]], *, words: bool = False) -> None:
    """A result, on standard output; `words`: the cells are no numbers."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if words or index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # not as markup
    width = None if sys.stdout.isatty() else 140
    out = Console(width=width)
    out.print(printable(title), highlight=False, markup=False)
    out.print(table)

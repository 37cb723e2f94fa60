"""Curves and dots as coordinates; the page of a report draws them as SVG, in the colours of light and dark."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offline_kd.models.evaluation import ECE_BINS

WIDTH, HEIGHT = 480, 250  # of a chart
LEFT, TOP, RIGHT, BOTTOM = 56, 10, 470, 212  # of the area where lines are
POINTS = 100  # of a line, at most
DASH = 5  # half of what is drawn for a single point
SQUARE = 120  # of a reliability diagram


@dataclass(frozen=True)
class Series:
    """The mean over runs, and how far they are apart."""

    label: str
    style: str  # class of the style sheet
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Line:
    label: str
    style: str
    points: str  # as SVG writes them
    band: str  # a polygon; empty for a single run


@dataclass(frozen=True)
class Chart:
    title: str
    x_label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def series_of(label: str, style: str, xs: Sequence[list[float]], ys: Sequence[list[float]]) -> Series:
    """Runs with a value for every pass each; as far as all of them go."""
    length = min(len(y) for y in ys)
    kept = sorted({round(at) for at in np.linspace(0, length - 1, min(length, POINTS))})
    columns = [[y[at] for y in ys] for at in kept]
    return Series(
        label,
        style,
        x=[statistics.mean(x[at] for x in xs) for at in kept],
        mean=[statistics.mean(column) for column in columns],
        low=[min(column) for column in columns],
        high=[max(column) for column in columns],
    )


def chart(title: str, x_label: str, series: Sequence[Series]) -> Chart:
    """Lines over the range of their values, or of those after the first quarter where what comes before would flatten
    them."""
    x_low, x_high = min(0.0, *(one.x[0] for one in series)), max(one.x[-1] for one in series)
    y_low, y_high = _range(series, 0)
    late_low, late_high = _range(series, 0.25)
    if y_high - y_low > 2.5 * (late_high - late_low) > 0:
        y_low, y_high = late_low, late_high
    margin = 0.05 * (y_high - y_low) or abs(y_high) * 0.05 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / ((x_high - x_low) or 1) * (RIGHT - LEFT)
        # Beyond the area: where the line goes on, not where it ends.
        up = min(max((y - y_low) / (y_high - y_low), -1), 2)
        return across, BOTTOM - up * (BOTTOM - TOP)

    lines = []
    for one in series:
        mean = [at(x, y) for x, y in zip(one.x, one.mean, strict=True)]
        if len(mean) == 1:  # a dash, where a line would be nothing
            ((x, y),) = mean
            mean = [(x - DASH, y), (x + DASH, y)]
        above = [at(x, y) for x, y in zip(one.x, one.high, strict=True)]
        below = [at(x, y) for x, y in zip(one.x, one.low, strict=True)]
        band = _points(above + below[::-1]) if one.low != one.high else ""
        lines.append(Line(one.label, one.style, _points(mean), band))
    return Chart(
        title,
        x_label,
        lines,
        x_ticks=[(at(tick, y_low)[0], f"{tick:g}") for tick in _ticks(x_low, x_high)],
        y_ticks=[(at(x_low, tick)[1], f"{tick:g}") for tick in _ticks(y_low, y_high)],
    )


def _range(series: Sequence[Series], after: float) -> tuple[float, float]:
    values = [value for one in series for line in (one.low, one.high) for value in line[int(after * len(line)) :]]
    return min(values), max(values)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [round(float(tick), 12) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


# ---- small pictures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A bin of confidence: how often the answer was right."""

    x: float
    y: float
    width: float
    height: float
    opacity: float  # more for a bin of more images


def reliability_bars(bins: NDArray[np.float64]) -> list[Bar]:
    """Of `[15, 3]` images, sums of confidence and right answers, in a square."""
    width, fullest = SQUARE / ECE_BINS, bins[:, 0].max()
    bars = []
    for at, (count, _, right) in enumerate(bins.tolist()):
        if count:
            height = SQUARE * right / count
            opacity = 0.25 + 0.75 * float(np.sqrt(count / fullest))
            bars.append(Bar(*(round(value, 2) for value in (at * width, SQUARE - height, width, height, opacity))))
    return bars


def share_of(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, in percent."""
    return round(100 * (value - low) / ((high - low) or 1), 1)

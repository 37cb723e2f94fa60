"""How far two groups of runs are apart, and within which interval that is known."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Of the means of two groups, with the interval that holds the true one in 95 % of such comparisons."""

    mean: float
    half_width: float | None  # None: there are not runs enough to tell
    test: Literal["paired t", "Welch t", "none"]
    seeds: int  # that both groups have


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """`one - other`, of values by seed.

    Over two or more seeds that both have, the mean of the differences by seed, with Student's t: a seed fixes the order
    and the views, so what they do to a student cancels. Otherwise the difference of the means, with Welch's t (Welch
    1947, degrees of freedom by Satterthwaite) where each has two runs.
    """
    shared = sorted(one.keys() & other.keys())
    if len(shared) > 1:
        differences = [one[seed] - other[seed] for seed in shared]
        error = statistics.stdev(differences) / math.sqrt(len(shared))
        return Difference(statistics.mean(differences), _t(len(shared) - 1) * error, "paired t", len(shared))
    mean = statistics.mean(one.values()) - statistics.mean(other.values())
    if len(one) < 2 or len(other) < 2:
        return Difference(mean, None, "none", len(shared))
    parts = [statistics.variance(values.values()) / len(values) for values in (one, other)]
    if not sum(parts):
        return Difference(mean, 0.0, "Welch t", len(shared))
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(one) - 1) + parts[1] ** 2 / (len(other) - 1))
    return Difference(mean, _t(freedom) * math.sqrt(sum(parts)), "Welch t", len(shared))


def _t(freedom: float) -> float:
    """Student's t, two-sided."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))

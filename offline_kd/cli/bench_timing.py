"""Parts that are timed in turn, and the ratios between them, with what they should be.

Parts take turns, round after round, so that a slow moment of the machine hits all of them; ratios are taken within a
round, and their median over rounds is what is reported.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch

from offline_kd.support.console import say

REPORT_SECONDS = 10.0
STORE_STEP = 1.02  # what a step from a store may take of a plain one
STAGE_1 = 1.05  # what stage 1 may take of a bare teacher where images are at hand
STAGE_1_TINY = 1.5  # the same for the digits: a teacher of 8x8 pixels takes as long as handling what it says


class Quartiles(TypedDict):
    """Seconds, over rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timed:
    """A part: what to do, and how many batches are done by it."""

    work: Callable[[], object]
    batches: float
    before: Callable[[], object] = lambda: None  # what is made ready while the clock stands


def time_in_turn(parts: Mapping[str, Timed], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per batch of every part in every round but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    reported = time.monotonic()
    for round_number in range(rounds + 1):
        for name, part in parts.items():
            part.before()
            started = time.perf_counter()
            made = part.work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - started
            del made  # ending what was begun, such as workers, is not measured
            if round_number:
                seconds[name].append(taken / part.batches)
        # A bar would be in the way of those that some parts show.
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            say(f"bench: {round_number} of {rounds} rounds")
    return seconds


def quartiles(times: list[float]) -> Quartiles:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle, "low": low, "high": high}


# ---- ratios --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """A number made of the seconds of some parts, and what it should be."""

    name: str
    parts: tuple[str, ...]
    of: Callable[..., float]  # the seconds of these parts in one round, in this order
    aim: float | None = None
    rising: bool = False  # the more, the better

    @property
    def aim_text(self) -> str:
        """`<= 1.02`; '' where nothing is aimed at."""
        return "" if self.aim is None else f"{'>=' if self.rising else '<='} {self.aim:g}"

    def misses(self, value: float) -> bool:
        """Whether a value is not what it should be."""
        return self.aim is not None and (value < self.aim if self.rising else value > self.aim)

    def median(self, seconds: Mapping[str, list[float]]) -> float:
        """Over rounds, of the ratio within each."""
        return statistics.median(self.of(*times) for times in zip(*(seconds[part] for part in self.parts), strict=True))


def quotient(above: str, below: str, aim: float | None = None, rising: bool = False) -> Ratio:
    """Of two parts."""
    return Ratio(f"{above} / {below}", (above, below), lambda a, b: a / b, aim, rising)


RATIOS = (
    quotient("store step", "ce step", STORE_STEP),
    quotient("online step", "store step", rising=True),
    # An online step does what both do, so it can take as long as both: what is missing is lost between them.
    Ratio(
        "(ce step + bare teacher) / online step",
        ("ce step", "bare teacher", "online step"),
        lambda plain, teacher, online: (plain + teacher) / online,
        aim=0.95,
        rising=True,
    ),
    quotient("stage 1", "bare teacher"),
    # Of photographs, which stage 1 decodes while the teacher works.
    Ratio(
        "stage 1 / slower of decoding and teacher",
        ("stage 1", "decoding alone", "bare teacher"),
        lambda whole, decoding, teacher: whole / max(decoding, teacher),
        aim=1.10,
    ),
    quotient("stage 1", "stage 1, logits only"),
    quotient("loader alone", "ce step"),
    quotient("loader, store read anew", "ce step"),
    Ratio(
        "torchvision's faster loader / loader alone",
        ("torchvision, Pillow", "torchvision, tensors", "loader alone"),
        lambda pillow, tensors, own: min(pillow, tensors) / own,
        aim=1.5,
        rising=True,
    ),
    quotient("decision losses alone", "store step"),
    Ratio(
        "(commit - bare zarr writes) / (stage 1 - bare teacher)",
        ("commit", "bare zarr writes", "stage 1", "bare teacher"),
        lambda durable, bare, whole, teacher: (durable - bare) / (whole - teacher),
    ),
)
RISING = frozenset(ratio.name for ratio in RATIOS if ratio.rising)


def ratios_of(parts: Collection[str], stage_1_aim: float) -> list[Ratio]:
    """The ratios of the parts that there are.

    Args:
        stage_1_aim: of stage 1 beside the bare teacher, where decoding is not measured apart.
    """
    others = [quotient(part, "ce step", STORE_STEP) for part in parts if part.startswith("store step, ")]
    known = [ratio for ratio in RATIOS if all(part in parts for part in ratio.parts)]
    if "decoding alone" not in parts:
        name = "stage 1 / bare teacher"
        known = [quotient("stage 1", "bare teacher", stage_1_aim) if one.name == name else one for one in known]
    return [*known[:1], *others, *known[1:]]

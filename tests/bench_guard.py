"""What `make bench` does: measure the ratios of docs/ratios.yaml again, and say which are worse by more than 10 %.

    python tests/bench_guard.py [--record]

Digits always, CIFAR-10 where OFFLINE_KD_DATA says where it is. Exit status 1 where a ratio is worse or gone. With
--record, what is measured is what is recorded from then on: do that on a quiet machine.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
import yaml

from offline_kd.cli.bench_timing import RISING
from offline_kd.distill.run import pack_digits
from offline_kd.support.console import say, show_table

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "ratios.yaml"
TOLERANCE = 0.10
ABOUT = """\
# The ratios of README.md and docs/measurements.md, as `make bench` measures them again: it says which are worse by more
# than 10 %. `python tests/bench_guard.py --record` writes what this machine has; null: not recorded yet.
"""


class Recorded(TypedDict):
    """One run of `bench`, and what it printed then."""

    command: str
    machine: str
    date: str
    ratios: dict[str, float | None]
    needs: NotRequired[str]  # an environment variable without which it is left out


def worse_by(recorded: Mapping[str, float | None], found: Mapping[str, float]) -> dict[str, float]:
    """By which share of what was recorded each ratio is worse; below 0, better; infinitely, where there is none now.

    Fewer seconds are better, except of ratios that are to rise. What was never recorded is no worse.
    """
    change = {}
    for name, before in recorded.items():
        now = found.get(name)
        if before is None:
            change[name] = 0.0
        elif now is None:
            change[name] = math.inf
        else:
            change[name] = 1 - now / before if name in RISING else now / before - 1
    return change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="what is measured becomes what is recorded")
    record = parser.parse_args().record
    runs: list[Recorded] = yaml.safe_load(FILE.read_text())
    too_much = []
    for run in runs:
        if (needs := run.get("needs")) and not os.environ.get(needs):
            say(f"left out, because {needs} is not set: {run['command']}")
            continue
        found = measure(run["command"])
        change = worse_by(run["ratios"], found)
        show(run, found, change)
        too_much += [f"{name} ({run['command']})" for name, share in change.items() if share > TOLERANCE]
        if record:
            run["ratios"] |= {name: float(f"{found[name]:.3g}") for name in run["ratios"] if name in found}
            run["machine"], run["date"] = this_machine(), datetime.date.today().isoformat()
    if record:
        FILE.write_text(ABOUT + yaml.safe_dump(runs, sort_keys=False, width=110))
    elif too_much:
        sys.exit(f"worse by more than {TOLERANCE:.0%}: " + "; ".join(too_much))


def measure(command: str) -> dict[str, float]:
    """The ratios that a `bench` command prints, run as it stands."""
    with tempfile.TemporaryDirectory() as folder:
        pack_digits(Path(folder) / "digits")
        arguments = [*shlex.split(command)[1:], "--json", "--data-root", folder]
        done = subprocess.run(
            [sys.executable, "-m", "offline_kd", *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
    if done.returncode:
        sys.exit(f"{command}: exit status {done.returncode}")
    return json.loads(done.stdout)["ratios"]


def show(run: Recorded, found: Mapping[str, float], change: Mapping[str, float]) -> None:
    rows = []
    for name, before in run["ratios"].items():
        values = ["-" if value is None else f"{value:.3f}" for value in (before, found.get(name))]
        verdict = "WORSE" if change[name] > TOLERANCE else ""
        rows.append([name, *values, f"{100 * change[name]:+.0f}", verdict])
    say(f"recorded {run['date']} on {run['machine']}")
    show_table(run["command"], ["ratio", "recorded", "now", "worse by %", ""], rows)


def this_machine() -> str:
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {cpu[1] if cpu else platform.machine()}{gpu}, torch {torch.__version__}"


if __name__ == "__main__":
    main()

"""How long the command line takes to answer: `python tests/bench_start_up.py`. Medians of 5 processes each.

Wall is what a person waits for. Imports is the sum that `python -X importtime` gives, which slows the process itself:
the two come from different processes.
"""

import re
import statistics
import subprocess
import sys
import time

ROUNDS = 5
CASES = {
    "python -c pass": ["-c", "pass"],
    "--help": ["-m", "offline_kd", "--help"],
    "--version": ["-m", "offline_kd", "--version"],
    "distill --help": ["-m", "offline_kd", "distill", "--help"],
    "distil (a typo)": ["-m", "offline_kd", "distil"],
}


def wall(arguments: list[str]) -> float:
    """Seconds from start to exit of one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def imports(arguments: list[str]) -> float:
    """Seconds spent in import statements, by one process that counts them."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False)
    return sum(int(own) for own in re.findall(r"^import time:\s+(\d+) \|", done.stderr, re.MULTILINE)) / 1e6


def main() -> None:
    for arguments in CASES.values():
        wall(arguments)  # bytecode is compiled, files are in memory
    walls: dict[str, list[float]] = {name: [] for name in CASES}
    sums: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):  # in turn, so that a slow moment of the machine hits all of them
        for name, arguments in CASES.items():
            walls[name].append(wall(arguments))
            sums[name].append(imports(arguments))
    print("| command | wall s | imports s |\n|---|---|---|")
    for name in CASES:
        print(f"| `{name}` | {statistics.median(walls[name]):.3f} | {statistics.median(sums[name]):.3f} |")


if __name__ == "__main__":
    main()

"""The diffs of `docs/extending/`, applied to a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def extended(page: str, folder: Path) -> Path:
    """A copy of the package in `folder`, with the diff of `docs/extending/PAGE.md` applied.

    The diff must be one new file and one line more in one other file: no more is asked of a person who extends.
    """
    text = (ROOT / "docs" / "extending" / f"{page}.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    files = re.split(r"^diff --git ", diff, flags=re.MULTILINE)[1:]
    new = [one for one in files if "\nnew file mode" in one]
    (changed,) = [one for one in files if one not in new]
    assert len(new) == 1, f"{page}: {len(new)} new files"
    body = changed.split("@@", 2)[2]
    assert len(re.findall(r"^\+", body, flags=re.MULTILINE)) == 1, f"{page}: more than one line elsewhere"
    assert not re.findall(r"^-", body, flags=re.MULTILINE), f"{page}: a line is taken away"
    shutil.copytree(ROOT / "offline_kd", folder / "offline_kd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "data_manifest.yaml", folder)
    subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], input=diff, text=True, cwd=folder, check=True)
    return folder


def run_extended(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """The command line of that copy."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "offline_kd", *(str(one) for one in arguments)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)

"""Which files this machine has hashed: sha256 by path, size, times and inode, so that not every run hashes all.

One text file in the user's cache folder, a line each, to which processes only append.
"""

import contextlib
import functools
import os
import re
from pathlib import Path

from offline_kd.support.files import cache_folder
from offline_kd.support.strict import fingerprint

MOST_BYTES = 2**24  # of the file; then it begins anew
LINE = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{64})")


def known_sha256(path: Path, about: os.stat_result) -> str | None:
    """What this machine found when it hashed the file, if that was the file that `about` describes."""
    return _read(cache_folder() / "proofs").get(_name(path, about))


def remember_sha256(path: Path, about: os.stat_result, sha256: str) -> None:
    """Keep what was found; where the cache folder cannot be written to, it is found again next time."""
    file, name = cache_folder() / "proofs", _name(path, about)
    _read(file)[name] = sha256
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file() and file.stat().st_size > MOST_BYTES:
            file.unlink(missing_ok=True)
        with file.open("ab", buffering=0) as appended:
            appended.write(f"{name} {sha256}\n".encode())  # in one call, so that lines of processes do not mix


@functools.cache
def _read(file: Path) -> dict[str, str]:
    """The lines that are whole."""
    try:
        lines = file.read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return {}
    return {found[1]: found[2] for line in lines if (found := LINE.fullmatch(line))}


def _name(path: Path, about: os.stat_result) -> str:
    """Changes with whatever replaces the file or is written into it: nobody can set the time of the last change."""
    times = [about.st_mtime_ns, about.st_ctime_ns]
    return fingerprint([str(path.absolute()), about.st_size, *times, about.st_ino, about.st_dev])

"""Durable files: what is there is whole, and what a process that was ended left under a temporary name goes away."""

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from pathlib import Path

from offline_kd.support.processes import is_gone, this_machine

# Temporary names say whose they are; those of earlier versions did not.
PARTIAL = re.compile(r".*\.(?:([0-9a-f]{16})-)?([0-9]+)-[0-9]+\.partial", re.DOTALL)
SCRATCH = re.compile(r"scratch-(?:([0-9a-f]{16})-([0-9]+)-)?\w+")
FORGOTTEN_SECONDS = 86400.0  # after so long nobody works on a temporary file any more, whatever the clocks


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write `file` under a temporary name, flush it to disk, then rename it into place."""
    partial = _write_partial(file, content)
    try:
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def create_exclusively(file: Path, content: str | bytes) -> bool:
    """Create `file` with its whole content at once, unless it exists; returns whether it was created here."""
    if file.exists():
        return False
    partial = _write_partial(file, content)
    try:
        os.link(partial, file)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    _flush(file.parent)
    return True


def flush_to_disk(path: Path) -> None:
    """fsync a file, and the folder that names it."""
    _flush(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_name(name: str) -> str:
    """What a file is called while this thread makes it."""
    return f"{name}.{this_machine()}-{os.getpid()}-{threading.get_ident()}.partial"


def _write_partial(file: Path, content: str | bytes) -> Path:
    partial = file.with_name(partial_name(file.name))
    try:
        partial.unlink(missing_ok=True)  # of a process with this number that died, or a link to somewhere else
        with partial.open("xb") as writing:
            writing.write(content.encode() if isinstance(content, str) else content)
        _flush(partial)
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk should not be filled further
        raise
    return partial


def cache_folder() -> Path:
    """OFFLINE_KD_CACHE, or `offline-kd` in the user's cache folder: nothing in it is lost if it is deleted."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offline-kd"
    return Path(os.environ.get("OFFLINE_KD_CACHE") or default)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- what was left lying ------------------------------------------------------------------------------------------


def scratch_prefix() -> str:
    """How the name of a scratch folder of this process begins."""
    return f"scratch-{this_machine()}-{os.getpid()}-"


def is_temporary(name: str) -> bool:
    """Whether a file of this name, with its folders, is what a process writes before, or besides, what it is about."""
    first, _, rest = name.partition("/")
    return bool(PARTIAL.fullmatch(name) or (rest and SCRATCH.fullmatch(first)))


def remove_abandoned(path: Path) -> None:
    """Remove a temporary file or scratch folder if the process that made it is gone, or nobody touched it for a day."""
    found = SCRATCH.fullmatch(path.name) or PARTIAL.fullmatch(path.name)
    if found is None:
        return
    with contextlib.suppress(FileNotFoundError):  # another process swept it first
        is_old = time.time() - path.lstat().st_mtime > FORGOTTEN_SECONDS
        if is_old or (found[1] and is_gone(found[1], int(found[2]))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

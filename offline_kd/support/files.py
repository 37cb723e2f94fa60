"""Durable files: what is there is whole."""

import hashlib
import os
import threading
from pathlib import Path


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write `file` under a temporary name, flush it to disk, then rename it into place."""
    partial = _write_partial(file, content)
    os.replace(partial, file)
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
        partial.unlink()
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


def _write_partial(file: Path, content: str | bytes) -> Path:
    partial = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a process with this number that died, or a link to somewhere else
        with partial.open("xb") as writing:
            writing.write(content.encode() if isinstance(content, str) else content)
        _flush(partial)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk should not be filled further
        raise
    return partial


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Durable files: what is there is whole."""

import os
from pathlib import Path


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write `file` under a temporary name, flush it to disk, then rename it into place."""
    partial = _write_partial(file, content)
    os.replace(partial, file)
    flush_to_disk(file)


def create_exclusively(file: Path, content: str) -> bool:
    """Create `file` with its whole content at once, unless it exists; returns whether it was created here."""
    partial = _write_partial(file, content)
    try:
        os.link(partial, file)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    flush_to_disk(file)
    return True


def flush_to_disk(path: Path) -> None:
    """fsync a file, and the folder that names it."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_partial(file: Path, content: str | bytes) -> Path:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    flush_to_disk(partial)
    return partial

"""The folder of a run: one process writes it, one at a time.

recipe.yaml                     resolved
last.ckpt, previous.ckpt        how far the run is, and was before (`checkpoint.py`)
metrics.jsonl                   one line per pass
student.safetensors             the student, and
result.json                     what it achieved, written last
run.lock                        who writes here, or did: the lock is the kernel's, not the file's existence
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offline_kd.support.errors import TrainingError

_held: set[int] = set()  # descriptors of the locks of this process


def _let_go_in_child() -> None:
    """A forked worker that outlives a killed run must not keep its lock."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


def refuse_ranks() -> None:
    """Raise TrainingError where torchrun has started several processes: each would train a whole student."""
    ranks = os.environ.get("WORLD_SIZE", "").strip()
    if ranks not in ("", "1"):
        raise TrainingError(
            f"WORLD_SIZE is {ranks}: students are trained by one process. Start it without torchrun; for several "
            "students at once, give each process its own --out and CUDA_VISIBLE_DEVICES, and unset WORLD_SIZE."
        )


@contextmanager
def run_directory(out: Path) -> Iterator[None]:
    """Make `out`, and keep every other process from writing it until the block is left or this process ends.

    Raises TrainingError when another process writes it, or when it is no folder that can be locked.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise TrainingError(f"{out}: is a file, or lies below one. Give another folder.") from error
    # Not through a link: the process id would be written to wherever that leads.
    descriptor = os.open(out / "run.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _lock(out, descriptor)
        _held.add(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _sweep(out)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(out: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise TrainingError(f"{out}: {who} is writing this run. Wait for it, end it, or give another folder.") from None
    except OSError as error:
        raise TrainingError(
            f"{out}: cannot be locked ({error.strerror}), so nothing would keep two processes apart. Give a folder on "
            "another file system."
        ) from error


def _sweep(out: Path) -> None:
    """Remove what a killed run was about to write: it alone has such names, and it no longer runs."""
    for name in ("recipe.yaml", "next.ckpt", "metrics.jsonl", "student.safetensors", "result.json"):
        for partial in out.glob(f"{name}.*-*.partial"):
            partial.unlink()

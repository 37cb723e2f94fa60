"""Where a run is written, a folder or a prefix in a bucket: by one process, one at a time.

recipe.yaml                     resolved
last.ckpt, previous.ckpt        how far the run is, and was before (`checkpoint.py`)
metrics.jsonl                   one line per pass
student.safetensors             the student, and of options: student_ema, best, epoch-010 and others of these names
evaluation.safetensors          what the student answered for every image of the evaluation split
teacher_evaluation.safetensors  what the teacher of its store did, where that is known
result.json                     what it achieved, written last
run.lock                        in a folder: who writes here, or did; the lock is the kernel's, not the file's existence
leases/                         in a bucket: who writes here, or did, and signs of life
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offline_kd.store.leases import POLL_SECONDS, leases_at, sweep_leases
from offline_kd.support.console import say
from offline_kd.support.errors import TrainingError
from offline_kd.support.places import Bucket, WritablePlace, place_at
from offline_kd.support.ranks import rank
from offline_kd.support.web import Web

_held: set[int] = set()  # descriptors of the locks of this process


def _let_go_in_child() -> None:
    """A forked worker that outlives a killed run must not keep its lock."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


def refuse_ranks() -> None:
    """Raise TrainingError where torchrun has started several processes: each would do every stage."""
    ranks = os.environ.get("WORLD_SIZE", "").strip()
    if ranks not in ("", "1"):
        raise TrainingError(
            f"WORLD_SIZE is {ranks}: `run` is one process. Start it without torchrun, which is for `cache-teacher`, "
            "`distill` and `train`, and unset WORLD_SIZE."
        )


def run_place(out: str | Path) -> WritablePlace:
    """The folder or bucket of a run; raises TrainingError for an address that cannot be written."""
    place = place_at(out)
    if isinstance(place, Web):
        raise TrainingError(f"{place}: web addresses can only be read. Give a folder, or s3://, gs:// or az://.")
    return place


@contextmanager
def run_directory(place: WritablePlace) -> Iterator[None]:
    """Keep every other process from writing a run until the block is left or this process ends.

    Of several ranks the first one does it for all.

    Raises TrainingError when another process writes it, or when it is no folder that can be locked.
    """
    if rank() > 0:
        yield
        return
    with _leased(place) if isinstance(place, Bucket) else _locked(place.path):
        yield


@contextmanager
def _leased(place: Bucket) -> Iterator[None]:
    """A process that is gone elsewhere, or was cut off, is told from a living one by its signs of life."""
    with leases_at(place) as leases:
        signs = None
        while not leases.claim("run"):
            if signs is None:
                say(f"{place}: another process writes this run, or did: waiting {leases.seconds:.0f} s for its signs")
            elif leases.seen != signs:
                raise TrainingError(
                    f"{place}: another process is writing this run. Wait for it, end it, or give another --out."
                )
            signs = dict(leases.seen)
            time.sleep(POLL_SECONDS)
        sweep_leases(place)
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
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
    tensors = ("student*.safetensors", "best*.safetensors", "epoch-*.safetensors", "*evaluation.safetensors")
    for name in ("recipe.yaml", "last.ckpt", "previous.ckpt", "metrics.jsonl", *tensors, "result.json"):
        for partial in out.glob(f"{name}.*-*.partial"):
            partial.unlink()

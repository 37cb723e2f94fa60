"""Which process of which machine, so that others can see whether it is gone."""

import contextlib
import functools
import hashlib
import os
import socket
from pathlib import Path


@functools.cache
def this_machine() -> str:
    """Where process numbers mean the same, as 16 hex digits: of host, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def is_gone(machine: str, pid: int) -> bool:
    """Whether it is certain that this process has ended: one of this machine that does not run."""
    if machine != this_machine():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    with contextlib.suppress(OSError):  # a zombie works no more
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return False

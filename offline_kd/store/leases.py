"""Who works on what: leases, so that several writers share a capture without talking to each other.

A lease only saves double work. What keeps a store right is that ledger entries are created exclusively.

The holder of `leases/NAME.K` is whoever created the highest K. A lease is taken over by creating the next one, which
only one process can do, when its holder has not renewed it for LEASE_SECONDS (clocks of machines must agree to
well within that), or is a process of this machine that is gone.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from offline_kd.store.places import Place
from offline_kd.support.console import say
from offline_kd.support.errors import StoreError

LEASE_SECONDS = 120.0
POLL_SECONDS = 0.5


def _machine() -> str:
    """Where process numbers mean the same: host, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


@dataclass
class Leases:
    """The leases of one writer; a thread renews what is held, until `close`."""

    place: Place
    seconds: float = LEASE_SECONDS
    held: dict[str, int] = field(default_factory=dict)  # generation by name

    def __post_init__(self) -> None:
        self.writer = uuid.uuid4().hex
        self.machine = _machine()
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._renew, name="leases", daemon=True)
        self.thread.start()

    def claim(self, name: str) -> bool:
        """Get the lease of that name, unless a living writer has it."""
        if name in self.held:
            return True
        newest, lease = self._newest(name)
        if lease is not None and not self._is_over(lease):
            return False
        content, file = self._content(), f"leases/{name}.{newest + 1}"
        if not self.place.create(file, content) and self.place.read(file) != content:
            return False
        with self.lock:
            self.held[name] = newest + 1
        return True

    def is_mine(self, name: str) -> bool:
        """Whether nobody took the lease over."""
        return name in self.held and self._newest(name)[0] == self.held[name]

    def release(self, name: str) -> None:
        with self.lock:
            newest = self.held.pop(name, 0)
        for generation in range(1, newest + 1):
            self.place.delete(f"leases/{name}.{generation}")

    def close(self) -> None:
        self.stopped.set()
        self.thread.join()
        for name in list(self.held):
            with contextlib.suppress(OSError, StoreError):
                self.release(name)

    def wait_for(self, name: str, is_done: Callable[[], bool]) -> bool:
        """Wait until the lease is ours (True), or somebody else did what it is for (False)."""
        said = False
        while not is_done():
            if self.claim(name):
                if not is_done():
                    return True
                self.release(name)
                return False
            if not said:
                say(f"{self.place}: waiting for another writer ({name})")
                said = True
            time.sleep(POLL_SECONDS)
        return False

    def _newest(self, name: str) -> tuple[int, dict[str, object] | None]:
        """The highest generation of a lease, and its content."""
        prefix = f"leases/{name}."
        numbers = [
            int(file.removeprefix(prefix))
            for file in self.place.sizes("leases")
            if file.startswith(prefix) and file.removeprefix(prefix).isdigit()
        ]
        if not numbers:
            return 0, None
        try:
            return max(numbers), json.loads(self.place.read(f"{prefix}{max(numbers)}"))
        except (FileNotFoundError, ValueError):
            return max(numbers), None  # released just now, or torn: free

    def _is_over(self, lease: dict[str, object]) -> bool:
        renewed = lease.get("renewed")
        if not isinstance(renewed, int | float) or time.time() - renewed > self.seconds:
            return True
        pid = lease.get("pid")
        return lease.get("machine") == self.machine and isinstance(pid, int) and not _is_alive(pid)

    def _content(self) -> bytes:
        about = {"writer": self.writer, "machine": self.machine, "pid": os.getpid(), "renewed": time.time()}
        return json.dumps(about).encode()

    def _renew(self) -> None:
        while not self.stopped.wait(self.seconds / 4):
            with self.lock:
                held = dict(self.held)
            for name, generation in held.items():
                # A failed renewal is no reason to stop: at worst somebody does the same block again.
                with contextlib.suppress(OSError, StoreError), self.lock:
                    if name in self.held:
                        self.place.put(f"leases/{name}.{generation}", self._content())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # a zombie works no more
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return True


@contextlib.contextmanager
def leases_at(place: Place, seconds: float = LEASE_SECONDS) -> Iterator[Leases]:
    leases = Leases(place, seconds)
    try:
        yield leases
    finally:
        leases.close()

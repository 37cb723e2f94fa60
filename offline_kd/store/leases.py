"""Who works on what: leases, so that several writers share a capture without talking to each other.

A lease only saves double work. What keeps a store right is that ledger entries are created exclusively.

`leases/NAME.K` is created once and never changed; the holder of NAME is whoever created the highest K, as long as it is
there. Its content has a random token, so a writer that slept knows that the lease is not its own any more, even if K
was used again. A writer shows that it lives by rewriting a file of its own, `leases/writer-ID`.

A lease is taken over by creating the next K, which only one process can do: at once when its holder is a process of
this machine that is gone, otherwise when the holder's sign of life was watched for LEASE_SECONDS and did not change. No
clock of another machine is believed.
"""

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from offline_kd.store.reader import parse_metadata
from offline_kd.support.console import say
from offline_kd.support.errors import StoreCorrupt, StoreError
from offline_kd.support.places import Place
from offline_kd.support.processes import is_gone, this_machine
from offline_kd.support.strict import Strict

LEASE_SECONDS = 120.0
POLL_SECONDS = 0.5
FORGOTTEN_SECONDS = 86400.0  # after so long a sign of life is rubbish, whatever the clocks
MAX_LEASE_BYTES = 4096
GENERATION = re.compile(r"[1-9][0-9]{0,17}")

Hex = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Lease(Strict):
    """What lies in `leases/`: who holds a lease, or is alive."""

    token: Hex = Field(description="of this claim or sign of life alone")
    writer: Hex
    machine: str = Field(max_length=100)
    pid: int = Field(gt=0, lt=2**31)
    written: float = Field(description="seconds since 1970, by the writer's clock")


@dataclass
class Leases:
    """The leases of one writer; a thread shows that it lives, from the first claim until `close`."""

    place: Place
    seconds: float = LEASE_SECONDS
    held: dict[str, tuple[int, bytes]] = field(default_factory=dict)  # generation and content by name
    seen: dict[str, tuple[bytes, float]] = field(default_factory=dict)  # other writers' signs of life, and since when

    def __post_init__(self) -> None:
        self.writer = uuid.uuid4().hex
        self.is_shown = False
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._keep_showing, name="leases", daemon=True)
        self.thread.start()

    def claim(self, name: str) -> bool:
        """Get the lease of that name, unless a living writer has it."""
        if self.is_mine(name):
            return True
        newest, lease = self._newest(name)
        if lease is not None and not self._is_over(lease):
            return False
        if not self.is_shown:
            self._show()
        content, file = self._content(), f"leases/{name}.{newest + 1}"
        if not self.place.create(file, content) and self._read(file) != content:
            return False
        self.held[name] = (newest + 1, content)
        return self.is_mine(name)  # it may have gone on while this process slept before creating the file

    def is_mine(self, name: str) -> bool:
        """Whether nobody took the lease over."""
        return name in self.held and self._newest(name) == self.held[name]

    def release(self, name: str) -> None:
        """Give a lease back. One that was taken over is left to its holder, who removes ours too."""
        if self.is_mine(name):
            for generation in self._generations(name):
                self.place.delete(f"leases/{name}.{generation}")
        self.held.pop(name, None)

    def close(self) -> None:
        self.stopped.set()
        self.thread.join()
        for name in list(self.held):
            with contextlib.suppress(OSError, StoreError):
                self.release(name)
        if self.is_shown:
            with contextlib.suppress(OSError, StoreError):
                self.place.delete(f"leases/writer-{self.writer}")

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

    def _generations(self, name: str) -> list[int]:
        """The numbers of a lease that exist, lowest first."""
        prefix = f"leases/{name}."
        found = (file.removeprefix(prefix) for file in self.place.sizes("leases") if file.startswith(prefix))
        return sorted(int(number) for number in found if GENERATION.fullmatch(number))

    def _newest(self, name: str) -> tuple[int, bytes | None]:
        """The highest generation of a lease, and its content; None if it was released just now."""
        newest = max(self._generations(name), default=0)
        return newest, self._read(f"leases/{name}.{newest}") if newest else None

    def _read(self, file: str) -> bytes | None:
        try:
            return self.place.read(file, MAX_LEASE_BYTES)
        except FileNotFoundError:
            return None

    def _is_over(self, content: bytes) -> bool:
        lease = parse_lease(content)
        if lease is None or is_gone(lease.machine, lease.pid):
            return True
        sign = self._read(f"leases/writer-{lease.writer}")
        if sign is None:
            return True
        now = time.monotonic()
        known, since = self.seen.get(lease.writer, (b"", now))
        if sign != known:
            self.seen[lease.writer] = (sign, now)
            return False
        return now - since > self.seconds

    def _content(self) -> bytes:
        lease = Lease(
            token=uuid.uuid4().hex, writer=self.writer, machine=this_machine(), pid=os.getpid(), written=time.time()
        )
        return lease.model_dump_json().encode()

    def _show(self) -> None:
        self.place.put(f"leases/writer-{self.writer}", self._content())
        self.is_shown = True

    def _keep_showing(self) -> None:
        while not self.stopped.wait(self.seconds / 4):
            if self.is_shown:
                # A failure is no reason to stop: at worst somebody does the same block again.
                with contextlib.suppress(OSError, StoreError):
                    self._show()


def parse_lease(content: bytes) -> Lease | None:
    """What a file in `leases/` says; None if no writer of ours wrote it."""
    try:
        return parse_metadata(Lease, content, "lease")
    except StoreCorrupt:
        return None


def sweep_leases(place: Place) -> None:
    """Remove what writers that are gone left in `leases/`, and what is no lease."""
    for name, size in place.sizes("leases").items():
        try:
            lease = parse_lease(place.read(name, MAX_LEASE_BYTES)) if size <= MAX_LEASE_BYTES else None
        except FileNotFoundError:
            continue
        if lease is None or is_gone(lease.machine, lease.pid) or time.time() - lease.written > FORGOTTEN_SECONDS:
            place.delete(name)


@contextlib.contextmanager
def leases_at(place: Place, seconds: float | None = None) -> Iterator[Leases]:
    """The leases of a writer, given back at the end.

    Args:
        seconds: how long another writer must show no sign of life; LEASE_SECONDS by default.
    """
    leases = Leases(place, LEASE_SECONDS if seconds is None else seconds)
    try:
        yield leases
    finally:
        leases.close()

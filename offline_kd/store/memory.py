"""What a process keeps of a store that it reads: all of it bounded, none of it taken along to another process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from offline_kd.store.schema import LedgerEntry, TablesEntry

KEEP_BYTES = 2**27  # of decoded arrays
ENTRIES_KEPT_BYTES = 2**24  # of ledger entries, as JSON
PAGES_KEPT = 2**9  # of hashes
AHEAD_BYTES = 2**27  # of objects on their way, as they are decoded

T = TypeVar("T")
Place = tuple[int, int, str]  # block, view group (-1: all of them), array


@dataclass
class Memory:
    """Pages, entries, arrays and objects on their way, of one store in one process."""

    pages: dict[str, bytes] = field(default_factory=dict)
    parsed: dict[str, LedgerEntry | TablesEntry] = field(default_factory=dict)
    kept: dict[Place, NDArray[np.generic]] = field(default_factory=dict)
    coming: dict[Place, tuple[Future[bytes], int]] = field(default_factory=dict)
    asked: dict[str, Future[Any]] = field(default_factory=dict)  # pages and entries that a thread is asking for
    lock: threading.Lock = field(default_factory=threading.Lock)
    parsed_bytes: int = 0
    kept_bytes: int = 0

    def __reduce__(self) -> tuple[type["Memory"], tuple[()]]:
        return Memory, ()

    def once(self, name: str, ask: Callable[[], T]) -> T:
        """What `ask` gives; of several threads that want the same at the same time, one asks."""
        with self.lock:
            coming = self.asked.get(name)
            mine = self.asked.setdefault(name, Future())
        if coming is not None:
            shared: T = coming.result()
            return shared
        try:
            found = ask()
            mine.set_result(found)
            return found
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            del self.asked[name]

    def remember_page(self, name: str, content: bytes) -> None:
        """Keep a page of hashes; they all go when there are too many."""
        if len(self.pages) >= PAGES_KEPT:
            self.pages.clear()
        self.pages[name] = content

    def remember(self, name: str, entry: LedgerEntry | TablesEntry, size: int) -> None:
        """Keep a ledger entry, of `size` bytes of JSON; they all go when there are too many."""
        if self.parsed_bytes + size > ENTRIES_KEPT_BYTES:
            self.parsed.clear()
            self.parsed_bytes = 0
        self.parsed[name] = entry
        self.parsed_bytes += size

    def keep(self, place: Place, array: NDArray[np.generic], size: int) -> None:
        """Keep an array, if it fits, that holds on to `size` bytes: small stores are read once."""
        if self.kept_bytes + size <= KEEP_BYTES:
            self.kept[place] = array
            self.kept_bytes += size

    def has_room_ahead(self, size: int) -> bool:
        return sum(one for _, one in list(self.coming.values())) + size <= AHEAD_BYTES

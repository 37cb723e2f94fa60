"""A bounded folder of what was read from afar, objects of stores and tars of images, named by their sha256.

Content has one name wherever it comes from, so nothing in here can be stale, and readers check the sha256 of what
they take from here as of anything else. Processes may share the folder; each counts anew after writing a twentieth of
the limit, so that together they may exceed it by that much each for a while.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from offline_kd.support.files import write_atomically

DEFAULT_BYTES = 10 * 2**30


class Downloads:
    """Keeps at most `limit` bytes; what was used longest ago goes first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.held: int | None = None  # bytes, as far as this process knows
        self.written = 0  # bytes, since they were counted
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable[[Path, int], "Downloads"], tuple[Path, int]]:
        return shared_downloads, (self.folder, self.limit)  # a lock does not travel to another process

    def get(self, sha256: str, limit: int) -> bytes | None:
        """The object of that name, unless it is not here or has more than `limit` bytes."""
        file = self.folder / sha256
        try:
            if file.stat().st_size > limit:
                return None
            content = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        return content

    def put(self, sha256: str, content: bytes) -> None:
        """Keep an object, if it fits; a full disk only means that it is not kept."""
        if len(content) > self.limit:
            return
        with self.lock, contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.held is None or self.held + len(content) > self.limit or self.written > self.limit // 20:
                self._make_room(len(content))
            write_atomically(self.folder / sha256, content)
            self.held = (self.held or 0) + len(content)
            self.written += len(content)

    def _make_room(self, wanted: int) -> None:
        """Count what is here, and remove the oldest until `wanted` bytes and a tenth of the limit are free."""
        files = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                about = entry.stat()
                files.append((about.st_mtime, about.st_size, entry.path))
        self.held, self.written = sum(size for _, size, _ in files), 0
        if self.held + wanted <= self.limit:
            return
        for _, size, path in sorted(files):
            if self.held + wanted <= self.limit - self.limit // 10:
                break
            Path(path).unlink(missing_ok=True)
            self.held -= size


@cache
def shared_downloads(folder: Path, limit: int) -> Downloads:
    """The same for all that a process reads, so that stores and images are counted together."""
    return Downloads(folder, limit)

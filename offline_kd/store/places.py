"""Where a store lies: a folder, or a prefix of an object store (`s3://`, `gs://`, `az://`, `http(s)://`).

Both hand out whole files by name and create files that must not exist yet in one atomic step, which is all that the
commit protocol needs. Credentials and endpoints of object stores come from the environment, as their own tools read
them (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL).
"""

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from offline_kd.support.errors import StoreError
from offline_kd.support.files import create_exclusively, write_atomically

T = TypeVar("T")
SCHEMES = ("s3", "gs", "az", "http", "https")
MAX_FILE_BYTES = 2**31  # no file of a store is larger; more is never read into memory
ATTEMPTS = 4  # at reading one file whose connection was cut
RETRIES: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}


@dataclass(frozen=True)
class Folder:
    """A store in a local folder. Files appear whole, and are flushed to disk before they appear."""

    path: Path
    parallel = 2  # requests worth making at once
    is_remote = False

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str, limit: int = MAX_FILE_BYTES) -> bytes:
        """A file's content; raises FileNotFoundError, or StoreError for what is no file or has more than `limit`."""
        descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise StoreError(f"{self}/{name}: is no regular file. Copy the store again.")
            if about.st_size > limit:
                raise StoreError(f"{self}/{name}: {about.st_size:,} bytes, no file of a store has more than {limit:,}.")
            return file.read()

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def create(self, name: str, content: bytes) -> bool:
        """Create a file unless there is one; returns whether it was created here."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return create_exclusively(file, content)

    def put(self, name: str, content: bytes) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name and size of every file below `prefix`."""
        found: dict[str, int] = {}
        folders = [prefix.rstrip("/")]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(self.path / folder))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                name = f"{folder}/{entry.name}".lstrip("/")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                    continue
                try:
                    found[name] = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # a temporary file of another writer
                    continue
        return found


@dataclass(frozen=True)
class Bucket:
    """A store below a URL, through obstore. Puts are atomic; `create` is the server's own put-if-absent."""

    url: str
    parallel = 16
    is_remote = True

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}  # a connection does not travel to another process

    @cached_property
    def _client(self) -> Any:
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise StoreError(f"{self.url}: needs obstore. Install it: pip install 'offline-kd[remote]'") from error
        options: Any = {"timeout": "60s", "connect_timeout": "10s"}
        # Given options replace those of the environment. Plain http is used where an address says so.
        if any(one.startswith("http://") for one in (self.url, os.environ.get("AWS_ENDPOINT_URL", ""))):
            options["allow_http"] = True
        with self._errors(""):
            return from_url(self.url, client_options=options, retry_config=RETRIES)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn what the server or the network said into one line; a missing file stays a FileNotFoundError."""
        import obstore.exceptions

        try:
            yield
        except obstore.exceptions.BaseError as error:
            said = " ".join(str(error).split("Debug source:")[0].split())
            raise StoreError(
                f"{self.url}/{name}: {said:.400} Check the address, the credentials and the network; "
                "what was stored is safe, and the same command goes on."
            ) from error

    def _again(self, name: str, ask: Callable[[], T]) -> T:
        """Ask until an answer arrives whole. Only those that were cut short: the client retries everything else."""
        import obstore.exceptions

        for attempt in range(ATTEMPTS):
            try:
                with self._errors(name):
                    return ask()
            except StoreError as error:
                if attempt == ATTEMPTS - 1 or not isinstance(error.__cause__, obstore.exceptions.GenericError):
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def read(self, name: str, limit: int = MAX_FILE_BYTES) -> bytes:
        import obstore

        def ask() -> bytes | None:
            answer = obstore.get(self._client, name)
            return bytes(answer.bytes()) if answer.meta["size"] <= limit else None

        content = self._again(name, ask)
        if content is None:
            raise StoreError(f"{self}/{name}: no file of a store has more than {limit:,} bytes, this has.")
        return content

    def size(self, name: str) -> int | None:
        import obstore

        try:
            return self._again(name, lambda: int(obstore.head(self._client, name)["size"]))
        except FileNotFoundError:
            return None

    def create(self, name: str, content: bytes) -> bool:
        import obstore
        import obstore.exceptions

        self._refuse_read_only()
        try:
            with self._errors(name):
                obstore.put(self._client, name, content, mode="create", use_multipart=False)
        except StoreError as error:
            if isinstance(error.__cause__, obstore.exceptions.AlreadyExistsError):
                return False  # perhaps by the first try of this very request: callers compare contents
            raise
        return True

    def put(self, name: str, content: bytes) -> None:
        import obstore

        self._refuse_read_only()
        with self._errors(name):
            obstore.put(self._client, name, content, use_multipart=False)

    def delete(self, name: str) -> None:
        import obstore

        with self._errors(name):
            obstore.delete(self._client, name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        import obstore

        def ask() -> dict[str, int]:
            pages = obstore.list(self._client, prefix or None)
            return {item["path"]: int(item["size"]) for page in pages for item in page}

        return self._again(prefix, ask)

    def _refuse_read_only(self) -> None:
        if not can_list(self):
            raise StoreError(f"{self}: web addresses can be read only. Write to a folder or a bucket.")


Place = Folder | Bucket


def place_at(location: str | Path) -> Place:
    """The folder or bucket of a path or URL."""
    text = str(location)
    scheme = re.match(r"([a-z0-9]+)://", text)
    if scheme is None:
        return Folder(Path(text))
    if scheme[1] not in SCHEMES:
        raise StoreError(f"{text}: '{scheme[1]}://' is not known. Use a folder, or one of {', '.join(SCHEMES)}.")
    return Bucket(text.rstrip("/"))


def can_list(place: Place) -> bool:
    """Whether files can be enumerated: plain web servers have no such request."""
    return not (isinstance(place, Bucket) and urlsplit(place.url).scheme in ("http", "https"))

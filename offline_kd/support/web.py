"""A store below a web address: read only, from any server that says how long its files are."""

import http.client
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from typing import IO, NoReturn
from urllib.parse import quote, urlsplit

from offline_kd.support.errors import StoreCorrupt, StoreError, StoreForbidden, StoreUnreachable
from offline_kd.support.version import __version__

SILENCE_SECONDS = 30  # without a byte: the server is gone
WHOLE_SECONDS = 600  # for one file
ATTEMPTS = 4  # at reading one file whose connection was cut
PIECE_BYTES = 2**20
READ_BYTES = 2**25  # of a file of which the caller does not know how long it may be
CHECK_NETWORK = (
    "Check the address, the credentials and the network; what was stored is safe, and the same command goes on."
)


def too_long(where: str, found: int, limit: int) -> StoreCorrupt:
    return StoreCorrupt(
        f"{where}: {found:,} bytes, no more than {limit:,} can be right: it was not read. Copy or make it again; for a "
        "file of a store, `offline-kd store repair` does."
    )


@dataclass(frozen=True)
class Web:
    """A store that any web server publishes. Redirects lead to the same server only."""

    url: str
    parallel = 16
    is_remote = True

    def __str__(self) -> str:
        return self.url

    def read(self, name: str, limit: int = READ_BYTES) -> bytes:
        """A file's content; raises FileNotFoundError, StoreCorrupt for one that has more than `limit` bytes, and
        StoreUnreachable when the server does not answer, or sends elsewhere."""
        for attempt in range(ATTEMPTS):
            try:
                return self._read(name, limit)
            except urllib.error.HTTPError as error:
                if error.code in (404, 410):
                    raise FileNotFoundError(f"{self}/{name}") from None
                said = f"HTTP {error.code} {error.reason}"
                if error.code == 403:
                    raise StoreForbidden(f"{self}/{name}: {said:.400}. {CHECK_NETWORK}") from None
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (http.client.HTTPException, OSError) as error:
                said = f"{type(error).__name__}: {error}"
            if attempt < ATTEMPTS - 1:
                time.sleep(0.1 * 4**attempt)
        raise StoreUnreachable(f"{self}/{name}: {said:.400}. {CHECK_NETWORK}")

    def _read(self, name: str, limit: int) -> bytes:
        request = urllib.request.Request(
            f"{self.url}/{quote(name)}", headers={"User-Agent": f"offline-kd/{__version__}"}
        )
        until = time.monotonic() + WHOLE_SECONDS
        with _opener().open(request, timeout=SILENCE_SECONDS) as answer:
            stated = answer.headers.get("Content-Length", "")
            if not (stated.isascii() and stated.isdigit()) or answer.headers.get("Content-Encoding"):
                raise StoreUnreachable(f"{self}/{name}: the server does not say how long it is. Serve plain files.")
            if int(stated) > limit:
                raise too_long(f"{self}/{name}", int(stated), limit)
            pieces: list[bytes] = []
            while piece := answer.read1(PIECE_BYTES):
                pieces.append(piece)
                if time.monotonic() > until:
                    raise TimeoutError(f"not whole after {WHOLE_SECONDS} s")
        content = b"".join(pieces)
        if len(content) != int(stated):
            raise http.client.IncompleteRead(content[:0], int(stated) - len(content))
        return content

    # A web address has files by name and nothing else.

    def size(self, name: str) -> NoReturn:
        self._refuse()

    def sizes(self, prefix: str = "") -> NoReturn:
        self._refuse()

    def files(self, prefix: str = "") -> NoReturn:
        self._refuse()

    def names(self, prefix: str = "") -> NoReturn:
        self._refuse()

    def create(self, name: str, content: bytes) -> NoReturn:
        self._refuse()

    def put(self, name: str, content: bytes) -> NoReturn:
        self._refuse()

    def delete(self, name: str) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreError(f"{self}: web addresses can be read only. Write to a folder or a bucket.")


class _SameServer(urllib.request.HTTPRedirectHandler):
    """What a stranger publishes must not make this machine ask another one, which may be inside its network."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if (before.scheme, before.netloc) != (after.scheme, after.netloc):
            raise StoreUnreachable(
                f"{req.full_url}: redirects to {after.scheme}://{after.netloc}, another server, which is not followed. "
                "If you trust it, give its address."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@cache
def _opener() -> urllib.request.OpenerDirector:
    """As `urlopen`, with the proxies of the environment, but for files and FTP, which an address never means."""
    return urllib.request.build_opener(_SameServer)

"""A proxy on loopback before a server of the tests, that does to bodies what bad networks do."""

import http.client
import http.server
import random
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

FATES = ("drop", "delay", "truncate", "corrupt answer", "corrupt request")


def flipped(content: bytes, moment: random.Random) -> bytes:
    """One bit of it, anywhere, is another."""
    if not content:
        return content
    changed, bit = bytearray(content), moment.randrange(8 * len(content))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class BadNetwork(http.server.ThreadingHTTPServer):
    """`fate(method, path)` says what happens to a request: one of FATES, or '' for nothing."""

    daemon_threads = True

    def __init__(self, upstream: str, fate: Callable[[str, str], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.fate, self.moment = urlsplit(upstream).netloc, fate, random.Random(5)
        self.suffered = dict.fromkeys(FATES, 0)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def at_random(share: float, fates: tuple[str, ...] = FATES) -> Callable[[str, str], str]:
    """Every fate befalls that share of the requests."""
    moment = random.Random(7)

    def fate(method: str, path: str) -> str:
        number = int(moment.random() / share)
        return fates[number] if number < len(fates) else ""

    return fate


def first_answer_is_corrupt() -> Callable[[str, str], str]:
    """Of every file."""
    seen: set[str] = set()

    def fate(method: str, path: str) -> str:
        first = method == "GET" and path not in seen
        seen.add(path)
        return "corrupt answer" if first else ""

    return fate


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadNetwork

    def _pass_on(self) -> None:
        network = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = network.fate(self.command, self.path)
        # A listing has no checksum that anybody could compare.
        if fate == "corrupt answer" and "list-type" in self.path:
            fate = ""
        if fate:
            network.suffered[fate] += 1
        if fate == "drop":
            self.close_connection = True
            return
        if fate == "delay":
            time.sleep(0.2)
        if fate == "corrupt request":
            body = flipped(body, network.moment)
        upstream = http.client.HTTPConnection(network.upstream)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "content-length"):
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        answer = upstream.getresponse()
        content = answer.read()
        if fate == "corrupt answer" and answer.status < 300:
            content = flipped(content, network.moment)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if fate == "truncate" and len(content) > 1:
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)
        upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def log_message(self, *arguments: object) -> None:
        pass

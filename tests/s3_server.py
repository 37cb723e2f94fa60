"""A real S3 server on loopback (moto's), in a process of its own, that can be told to be slow, to fail and to hang up.

    python s3_server.py PORT_FILE

`GET /_control?latency=0.005&fail_every=3&cut_every=0&lose_every=0` sets how it behaves from then on and answers with
the number of requests so far. latency: seconds before each answer. fail_every: every n-th request is answered with
503, undone. cut_every: every n-th answer to a GET ends in the middle. lose_every: every n-th PUT is done, but answered
with 500.
"""

import hashlib
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Moody:
    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application, self.lock = application, threading.Lock()
        self.mood = {"latency": 0.0, "fail_every": 0, "cut_every": 0, "lose_every": 0}
        self.counts = {"all": 0, "GET": 0, "PUT": 0}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_control":
            self.mood.update({name: float(value) for name, value in parse_qsl(environ["QUERY_STRING"])})
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.counts).encode()]
        method = environ["REQUEST_METHOD"]
        with self.lock:
            self.counts["all"] += 1
            self.counts[method] = self.counts.get(method, 0) + 1
            number, of_method = self.counts["all"], self.counts[method]
        time.sleep(self.mood["latency"])

        def every(name: str, count: int) -> bool:
            return bool(self.mood[name]) and count % int(self.mood[name]) == 0

        if every("fail_every", number):
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        # As real ones do, refuse a body that is not the one that was signed.
        sent = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(sent)
        signed = environ.get("HTTP_X_AMZ_CONTENT_SHA256", "")
        if len(signed) == 64 and hashlib.sha256(sent).hexdigest() != signed:
            start_response("400 XAmzContentSHA256Mismatch", [("Content-Length", "0")])
            return [b""]
        body = list(self.application(environ, start_response))
        if method == "GET" and every("cut_every", of_method) and sum(map(len, body)) > 1:
            whole = b"".join(body)
            return [whole[: len(whole) // 2]]  # Content-Length promised all of it; then the connection closes
        if method == "PUT" and every("lose_every", of_method):
            start_response("500 Lost", [("Content-Length", "0")], sys.exc_info())
            return [b""]
        return body


class Quiet(WSGIRequestHandler):
    def log(self, *arguments: object, **more: object) -> None:
        pass


if __name__ == "__main__":
    application = Moody(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    Path(sys.argv[1]).write_text(str(server.server_port))
    server.serve_forever()

"""A real headless Chromium for tests of pages, spoken to through a pipe in Chrome's DevTools protocol."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60.0  # to wait for an answer, or for what a page shows
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "ArrowDown": (40, "")}


class Browser:
    """One tab. `said` has what its console said and what went wrong in scripts, `requests` what it asked for."""

    def __init__(self, folder: Path) -> None:
        if CHROMIUM is None:
            pytest.skip("needs Chromium, to look at pages as a person does")
        inwards, self._into = os.pipe()
        self._from, outwards = os.pipe()
        # The child must find its ends of the pipes as 3 and 4, whatever numbers they have here.
        hears, says = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (inwards, outwards))
        start = f'exec {CHROMIUM} "$@" 3<&{hears} 4>&{says} {hears}<&- {says}>&-'
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder}",
        ]
        command = ["bash", "-c", start, "chromium", *options, "--remote-debugging-pipe", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(hears, says), stdout=quiet, stderr=quiet)
        for end in (inwards, outwards, hears, says):
            os.close(end)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.said: list[str] = []
        self.requests: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    def close(self) -> None:
        os.close(self._into)
        os.close(self._from)
        self._process.kill()
        self._process.wait()

    def open(self, file: Path, width: int = 1280, dark: bool = False) -> None:
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self.requests.clear()
        self._ask("Page.navigate", url=file.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def value(self, expression: str) -> Any:
        """Of JavaScript, as JSON; of a promise, what it is fulfilled with."""
        # To wait for what is no promise might never end, where the page is just being left for another.
        awaits = expression.startswith("new Promise")
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=awaits)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        until = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """With the mouse, on the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{box}.scrollIntoView({{block: 'center'}})")
        x, y = self.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys: str) -> None:
        """KEYS by name, or characters."""
        for key in keys:
            code, text = KEYS.get(key, (0, key))
            about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self._ask("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
            self._ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def settle(self) -> None:
        """Until the page's script has done what follows from what was pressed."""
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def screenshot(self, file: Path, whole: bool = False) -> None:
        shot = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, method: str, about: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.said.append(json.dumps(about["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.said.append(about["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.said.append(json.dumps(about["args"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._from], [], [], SECONDS)[0], "Chromium does not answer"
            read = os.read(self._from, 2**20)
            assert read, "Chromium has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

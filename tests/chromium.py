"""A real Chromium without a window, told what to do through its pipe: what a page asks for, says and shows."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """One page. `requests` are the addresses that it asked for, `complaints` what stood in its console."""

    def __init__(self, folder: Path) -> None:
        if PROGRAM is None:
            pytest.skip("needs Chromium, to look at pages as a person does")
        self.requests: list[str] = []
        self.complaints: list[str] = []
        (its_in, self._out), (self._in, its_out) = os.pipe(), os.pipe()
        # Chromium reads 3 and writes 4; the shell must not overwrite one with the other.
        far = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (its_in, its_out)]
        command = f'exec "$0" "$@" 3<&{far[0]} 4>&{far[1]}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={folder / 'profile'}", "--no-first-run", "--disable-background-networking"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, PROGRAM, *options],
            pass_fds=far,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for one in (its_in, its_out, *far):
            os.close(one)
        self._buffer, self._number, self._session = b"", 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._in)
        os.close(self._out)

    def _read(self) -> dict:
        while b"\0" not in self._buffer:
            some = os.read(self._in, 2**20)
            assert some, "Chromium ended"
            self._buffer += some
        message, self._buffer = self._buffer.split(b"\0", 1)
        content = json.loads(message)
        about, said = content.get("params", {}), content.get("method")
        if said == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif said == "Runtime.exceptionThrown":
            self.complaints.append(about["exceptionDetails"]["text"])
        elif said == "Runtime.consoleAPICalled":
            self.complaints.append(str(about["args"]))
        elif said == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
        return content

    def ask(self, method: str, **params: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            content = self._read()
            if content.get("id") == self._number:
                assert "error" not in content, content
                return content["result"]

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=address)
        while self._read().get("method") != "Page.loadEventFired":
            continue

    def run(self, script: str) -> object:
        """The value of an expression; of a promise, what it is fulfilled with."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Keys by name (`Tab`, `Enter`), or characters."""
        codes = {"Tab": 9, "Enter": 13, "ArrowDown": 40}
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            about = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0), "text": text}
            self.ask("Input.dispatchKeyEvent", type="keyDown", **about)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **about | {"text": ""})
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")

    def screenshot(self, file: Path, whole: bool = False) -> None:
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))

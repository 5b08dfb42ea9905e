"""A Chromium that a test drives, over a pair of pipes (the DevTools protocol)."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --remote-debugging-pipe --window-size=1200,900"


class Browser:
    """One page of a headless Chromium, as a context manager that ends it."""

    def __init__(self, profile: Path) -> None:
        reading, self.orders = os.pipe()
        self.reports, writing = os.pipe()
        command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(  # which reads its file 3 and writes to its file 4
            ["bash", "-c", f'exec "$@" 3<&{reading} 4>&{writing}', "bash", *command, "about:blank"],
            pass_fds=(reading, writing),
            stderr=subprocess.DEVNULL,
        )
        os.close(reading)
        os.close(writing)
        self.number, self.unread, self.session = 0, b"", ""
        self.requests, self.messages = list[str](), list[str]()
        """Addresses that the page asked for, and errors in its console."""

    def __enter__(self) -> Self:
        (page,) = (one for one in self.order("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = self.order("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Page", "Log"):
            self.order(f"{domain}.enable")
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.orders)
        os.close(self.reports)

    def order(self, method: str, **values: Any) -> dict[str, Any]:
        """Send an order and wait for its result."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": values}
        if self.session:
            order["sessionId"] = self.session
        os.write(self.orders, json.dumps(order).encode() + b"\0")
        while (report := self.read()).get("id") != self.number:
            self.note(report)
        assert "result" in report, report
        result: dict[str, Any] = report["result"]
        return result

    def read(self, seconds: float = 300) -> dict[str, Any]:
        while b"\0" not in self.unread:
            assert select.select([self.reports], [], [], seconds)[0], "the browser is silent"
            self.unread += os.read(self.reports, 65536)
        line, _, self.unread = self.unread.partition(b"\0")
        report: dict[str, Any] = json.loads(line)
        return report

    def note(self, report: dict[str, Any]) -> None:
        values = report.get("params", {})
        if report.get("method") == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        if report.get("method") == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(values["exceptionDetails"]))
        if report.get("method") == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.messages.append(values["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.order("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 300) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.order("Input.insertText", text=text)

    def enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "text": "\r", "windowsVirtualKeyCode": 13}
        for kind in ("keyDown", "keyUp"):
            self.order("Input.dispatchKeyEvent", type=kind, **key)

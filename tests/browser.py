"""Headless Chromium over its debugging pipe: loads a page as a screen or a phone, and tells what a user would see of it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ANSWER_S = 100.0
# The browser reads from its file descriptor 3 and writes to 4; these may be each other's now, or anything else.
LAUNCH = """
import os, sys
reads, writes = (os.dup(os.dup(os.dup(int(number)))) for number in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
# Elements that reach over the page's right edge, and are not inside of one that scrolls.
TOO_WIDE = """
[...document.querySelectorAll('main *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1)
  .map(one => one.tagName + '.' + one.getAttribute('class') + ' ' + one.textContent.slice(0, 40)).slice(0, 5)
"""
# Texts of less than 12 CSS pixels.
TOO_SMALL = """
[...document.querySelectorAll('main *')].filter(one => one.textContent.trim() && !one.children.length && one.offsetHeight
  && parseFloat(getComputedStyle(one).fontSize) < 12).map(one => one.tagName + ' ' + one.textContent.slice(0, 40))
"""
# Texts whose contrast to the page is below 4.5, which WCAG asks for.
FAINT = """
(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).map(part => part / 255)
      .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = light(getComputedStyle(document.querySelector('.card')).backgroundColor);
  return [...document.querySelectorAll('main *')].filter(one => one.textContent.trim() && !one.children.length
    && one.offsetHeight && !one.closest('.track')).filter(one => {
      const own = light(getComputedStyle(one).color);
      return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05) < 4.5;
    }).map(one => one.tagName + ' ' + one.textContent.slice(0, 40)).slice(0, 5);
})()
"""


class Browser:
    """Context manager: one Chromium with one page. Nothing listens anywhere: it is spoken to through two pipes."""

    def __enter__(self) -> Browser:
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        assert CHROMIUM is not None
        command = [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-extensions",
            "--disable-background-networking",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", LAUNCH, str(to_browser), str(from_browser), *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number = 0
        self._buffer = b""
        self._events: deque[dict[str, Any]] = deque()
        self._session: str | None = None
        self.errors: list[str] = []
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, page: Path, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """Load a file. What went wrong meanwhile is in `errors`, and every request that went anywhere but to the file."""
        self.errors = []
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        url = page.resolve().as_uri()
        self.call("Page.navigate", url=url)
        loaded = False
        while not loaded:
            event = self._events.popleft() if self._events else self._receive()
            loaded = event.get("method") == "Page.loadEventFired"
            self._judge(event, url)
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        for event in self._events:
            self._judge(event, url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16_000), "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "chromium does not answer"
            data = os.read(self._read, 1 << 16)
            assert data, "chromium ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def _judge(self, event: dict[str, Any], url: str) -> None:
        method, about = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.errors.append(str(about["args"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent" and about["request"]["url"] not in (url, "about:blank"):
            self.errors.append(f"asks for {about['request']['url']}")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, or a skipped test where there is none or where it does not start."""
    if CHROMIUM is None:
        pytest.skip("needs chromium (Debian package chromium)")
    browser = Browser()
    try:
        browser.__enter__()
    except (AssertionError, OSError) as error:
        pytest.skip(f"chromium does not start here: {error}")
    with contextlib.ExitStack() as stack:
        stack.push(browser.__exit__)
        yield browser


def check_page(browser: Browser, page: Path, pictures: Path) -> None:
    """As a user sees a report on a screen and on a phone, light and dark: nothing fails, nothing is cut off or too small.

    Leaves a picture of each.
    """
    for name, width, phone, dark in (
        ("screen", 1280, False, False),
        ("phone", 390, True, False),
        ("dark", 1280, False, True),
    ):
        browser.open(page, width, 844, phone=phone, dark=dark)
        assert browser.errors == [], name
        assert browser.evaluate("document.title") == "Nano-vLLM job report"
        assert browser.evaluate("document.querySelectorAll('svg polyline').length") > 0
        browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert browser.evaluate("innerWidth") == width
        wide = browser.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name}: {wide} pixels wide; {browser.evaluate(TOO_WIDE)}"
        small = browser.evaluate(TOO_SMALL)
        assert small == [], f"{name}: too small to read: {small[:5]}"
        dim = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dim == "rgb(255, 255, 255)") is not dark
        assert browser.evaluate(FAINT) == [], name
        browser.screenshot(pictures / f"{name}.png")

"""Chromium without a window, driven through a pipe: one page at a time, a throwaway profile, nothing left behind."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

CHROMIUM: Final = shutil.which("chromium")
_PATIENCE: Final = 60.0
_FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",  # which root may not have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-breakpad",
    "--disable-crash-reporter",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


@dataclass
class Browser:
    """A browser and the one page in it. events: what it reported of itself: console, log, requests."""

    profile: str
    to: int
    back: int
    events: list[dict[str, Any]] = field(default_factory=list)
    session: str = ""
    _number: int = 0
    _rest: bytes = b""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return dict(found["result"])
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.back], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "chromium does not answer"
            more = os.read(self.back, 1 << 20)
            assert more, "chromium has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def wait(self, method: str) -> dict[str, Any]:
        """Wait for an event that has come since the page was opened or comes now."""
        while True:
            for event in self.events:
                if event.get("method") == method:
                    return event
            self.events.append(self._next())

    def evaluate(self, script: str) -> Any:
        """Return what a JavaScript expression comes to."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def media(self, *, scheme: str = "light", kind: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def open(self, path: Path) -> None:
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def screenshot(self) -> bytes:
        """Return the whole page, also what is below the window, as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])


def of_profile(profile: str) -> list[int]:
    """Return the ids of the processes that name a profile."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            line = Path("/proc", pid, "cmdline").read_bytes()
            if profile.encode() in line and int(pid) != os.getpid():
                found.append(int(pid))
    return found


def _away(profile: str) -> None:
    """End whatever of the browser still runs."""
    deadline = time.monotonic() + 10
    while found := of_profile(profile):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"still there: {found}"
        time.sleep(0.05)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser with an empty page; it ends with the block, and so does its profile."""
    assert CHROMIUM is not None
    profile = tempfile.mkdtemp(prefix="compare-browser-")
    reads, to = os.pipe()
    back, writes = os.pipe()
    # Chromium takes the descriptors 3 and 4: ours must not lie there while they are moved.
    high = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (reads, writes)]
    os.close(reads)
    os.close(writes)
    command = ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "chromium", CHROMIUM, *_FLAGS]
    process = None
    try:
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HOME": profile, "TMPDIR": profile},
        )
        for each in high:
            os.close(each)
        high.clear()
        made = Browser(profile, to, back)
        target = made.call("Target.createTarget", url="about:blank")["targetId"]
        made.session = made.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            made.call(f"{domain}.enable")
        yield made
    finally:
        for each in (to, back, *high):
            os.close(each)
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_PATIENCE)
        _away(profile)
        shutil.rmtree(profile, ignore_errors=True)

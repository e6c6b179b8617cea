"""A real browser in a private network: Chromium without a window, told what to do over a pipe.

Source: Chrome DevTools Protocol (JSON messages, each ended with a zero byte, on descriptors 3 and 4).
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from private_bed import Bed

PATIENCE_SECONDS = 30.0
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # it runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    # Nothing of its own: each connection that is seen is a page's.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=HttpsUpgrades,HttpsFirstBalancedModeAutoEnable",
    "--remote-debugging-pipe",
)


class Page:
    """One tab."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser = browser
        self._session = session

    def open(self, url: str) -> None:
        """Navigates, and waits until all of it is there."""
        found = self.tell("Page.navigate", url=url)
        assert not found.get("errorText"), f"{url}: {found['errorText']}"
        self.wait_for_url(url)

    def wait_for_url(self, url: str) -> None:
        """Returns when the page at this address is there."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        place: object = None
        while place != [url, "complete"]:
            assert time.monotonic() < deadline, f"{url} does not come: {place}"
            # A page that is left in this moment answers nothing.
            with contextlib.suppress(BrowserError):
                place = self.run("[location.href, document.readyState]")
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of an expression, waited for if it is a promise."""
        found = self.tell(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in found:
            raise BrowserError(json.dumps(found["exceptionDetails"]))
        return found["result"].get("value")

    def tell(self, method: str, **parameters: object) -> dict[str, Any]:
        """One command of the protocol. Raises BrowserError."""
        return self._browser.tell(method, self._session, **parameters)


class BrowserError(Exception):
    """The browser does not do what it was told."""


class Browser:
    """Talks with a running Chromium."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._number = 0
        self._unread = b""

    def page(self) -> Page:
        """A new tab."""
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session)

    def tell(self, method: str, session: str = "", **parameters: object) -> dict[str, Any]:
        """One command and its result. Raises BrowserError."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (answer := self._next(deadline)).get("id") != self._number:
            pass  # an event
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._reader], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self._reader, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(line))


@contextlib.contextmanager
def browser_in(bed: Bed) -> Iterator[Browser]:
    """Chromium in the private network, with a profile of its own."""
    program = shutil.which("chromium")
    assert program is not None, "chromium is missing: scripts/setup --dev installs it"
    with contextlib.ExitStack() as closing:
        profile = closing.enter_context(
            tempfile.TemporaryDirectory(prefix="vnet-browser-", ignore_cleanup_errors=True)
        )
        ends = [*os.pipe(), *os.pipe()]
        for end in ends:
            closing.callback(os.close, end)
        theirs_in, ours_out, ours_in, theirs_out = ends
        # In bash, because descriptors may have two digits.
        start = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = closing.enter_context(
            subprocess.Popen(
                bed.command("bash", "-c", start, "bash", *command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=bed.environment | {"HOME": profile},
                pass_fds=(theirs_in, theirs_out),
            )
        )
        try:
            browser = Browser(ours_in, ours_out)
            browser.tell("Browser.getVersion")
            yield browser
            browser.tell("Browser.close")
            process.wait(20)
        finally:
            process.kill()

"""Shows a page in the user's browser, where there is a desktop."""

import os
import threading
import webbrowser
from collections.abc import Mapping
from contextlib import suppress


def open_page(url: str, environment: Mapping[str, str] = os.environ) -> None:
    """Returns at once; without a desktop, and as root, nothing happens.

    A browser must not run as root. One that runs in the terminal, which is in use, is not started.
    """
    has_desktop = bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))
    if has_desktop and os.geteuid() != 0:
        threading.Thread(target=_open, args=(url,), daemon=True).start()


def _open(url: str) -> None:
    with suppress(webbrowser.Error, OSError):
        browser = webbrowser.get()
        # Its subclasses start programs that have windows of their own.
        if type(browser) is not webbrowser.GenericBrowser:
            browser.open(url)

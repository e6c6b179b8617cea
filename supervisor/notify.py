"""The service manager's notify protocol: sd_notify(3), sd_watchdog_enabled(3).

    READY=1  STATUS=...  RELOADING=1  STOPPING=1  WATCHDOG=1

Without NOTIFY_SOCKET in the environment (a start by hand) all of it does nothing. Datagrams are sent
without waiting: a service manager that does not read must not stop the supervisor.
"""

import logging
import socket
import time
from collections.abc import Mapping, MutableMapping

log = logging.getLogger(__name__)

MAX_STATUS = 200


def watchdog_seconds(environment: Mapping[str, str], pid: int) -> float | None:
    """How long the service manager waits for a sign of life, or None: sd_watchdog_enabled(3)."""
    wanted_pid = environment.get("WATCHDOG_PID")
    if wanted_pid is not None and wanted_pid != str(pid):
        return None
    text = environment.get("WATCHDOG_USEC", "")
    if not (text.isascii() and text.isdecimal()) or not int(text):
        return None
    return int(text) / 1_000_000


class Notifier:
    """Speaks with the service manager, if there is one."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Takes NOTIFY_SOCKET out of `environment`, so that no child speaks in our name."""
        self._address = environment.pop("NOTIFY_SOCKET", "")
        self._status = ""
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "@")):
            self._socket = socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            )

    @property
    def is_heard(self) -> bool:
        """Whether a service manager has started us."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """The service is up, or has reloaded."""
        self._send(f"READY=1\n{self._status_line(status)}")

    def status(self, text: str) -> None:
        """What `systemctl status` shows; sent only when it has changed."""
        if text != self._status:
            self._send(self._status_line(text))

    def reloading(self) -> None:
        """The configuration is being read again; `ready` follows (sd_notify(3), Type=notify-reload)."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={microseconds}\n")

    def stopping(self) -> None:
        """The service ends."""
        self._send("STOPPING=1\n")

    def alive(self) -> None:
        """A sign of life for the watchdog."""
        self._send("WATCHDOG=1\n")

    def close(self) -> None:
        """Says nothing from now on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _status_line(self, text: str) -> str:
        self._status = text
        return f"STATUS={' '.join(text.split())[:MAX_STATUS]}\n"

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        # An abstract address begins with a zero byte (unix(7)).
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            self._socket.sendto(text.encode(), address)
        except OSError as error:
            log.warning("the service manager cannot be told: %s", error)

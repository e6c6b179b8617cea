"""The service manager's notify protocol: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

    READY=1  STATUS=...  RELOADING=1  STOPPING=1  WATCHDOG=1  FDSTORE=1  FDSTOREREMOVE=1

Without NOTIFY_SOCKET in the environment (a start by hand) all of it does nothing. A service manager that
does not read must not stop the supervisor: datagrams are sent without waiting, and those about
descriptors, of which several come at once, wait PATIENCE_SECONDS in all.
"""

import array
import logging
import os
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence

log = logging.getLogger(__name__)

FIRST_STORED = 3  # SD_LISTEN_FDS_START
# What is taken from the environment at most; more than is ever stored.
MAX_STORED = 250
# unix(7): SCM_MAX_FD is 253.
MAX_AT_ONCE = 250
MAX_STATUS = 200
PATIENCE_SECONDS = 2.0
_RETRY_SECONDS = 0.01


def watchdog_seconds(environment: Mapping[str, str], pid: int) -> float | None:
    """How long the service manager waits for a sign of life, or None: sd_watchdog_enabled(3)."""
    wanted_pid = environment.get("WATCHDOG_PID")
    if wanted_pid is not None and wanted_pid != str(pid):
        return None
    text = environment.get("WATCHDOG_USEC", "")
    if not (text.isascii() and text.isdecimal()) or not int(text):
        return None
    return int(text) / 1_000_000


def take_stored(environment: MutableMapping[str, str], pid: int) -> dict[str, list[int]]:
    """Descriptors that the service manager kept for us, by name (sd_listen_fds_with_names(3)).

    They are close-on-exec from now on and no longer in the environment, so that no child takes them for
    its own. Empty when there are none, or when they are meant for another process.
    """
    meant_for = environment.pop("LISTEN_PID", "")
    number = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if meant_for != str(pid) or not (number.isascii() and number.isdecimal()):
        return {}
    found: dict[str, list[int]] = {}
    for index in range(min(int(number), MAX_STORED)):
        descriptor = FIRST_STORED + index
        try:
            os.set_inheritable(descriptor, False)
        except OSError:
            continue  # counted, but not there
        name = names[index] if index < len(names) else ""
        found.setdefault(name, []).append(descriptor)
    return found


class Notifier:
    """Speaks with the service manager, if there is one."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Takes NOTIFY_SOCKET out of `environment`, so that no child speaks in our name."""
        self._address = environment.pop("NOTIFY_SOCKET", "")
        self._status = ""
        self._patience_seconds = PATIENCE_SECONDS
        self._socket: socket.socket | None = None
        if self._address.startswith(("/", "@")):
            self._socket = socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            )

    @property
    def is_heard(self) -> bool:
        """Whether a service manager has started us."""
        return self._socket is not None

    @property
    def environment(self) -> dict[str, str]:
        """What the constructor has taken, for a program that goes on as this process."""
        return {"NOTIFY_SOCKET": self._address} if self._address else {}

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

    def store(self, name: str, descriptors: Sequence[int]) -> None:
        """Has copies kept over our death; they come back by `take_stored`, in any order.

        FDPOLL=0: otherwise one that reports an error or a hang-up would be dropped.
        """
        for start in range(0, len(descriptors), MAX_AT_ONCE):
            part = descriptors[start : start + MAX_AT_ONCE]
            self._send_patiently(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}\n", part)

    def remove(self, name: str) -> None:
        """Has the kept descriptors of this name closed."""
        self._send_patiently(f"FDSTOREREMOVE=1\nFDNAME={name}\n")

    def close(self) -> None:
        """Says nothing from now on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _status_line(self, text: str) -> str:
        self._status = text
        return f"STATUS={' '.join(text.split())[:MAX_STATUS]}\n"

    def _send_patiently(self, text: str, descriptors: Sequence[int] = ()) -> None:
        while not self._send(text, descriptors, is_last=self._patience_seconds <= 0):
            time.sleep(_RETRY_SECONDS)
            self._patience_seconds -= _RETRY_SECONDS

    def _send(self, text: str, descriptors: Sequence[int] = (), *, is_last: bool = True) -> bool:
        """False if the service manager must read first; with `is_last` that is only logged."""
        if self._socket is None:
            return True
        # An abstract address begins with a zero byte (unix(7)).
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        rights = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        try:
            # Not socket.send_fds, which forgets the address in some versions of Python.
            self._socket.sendmsg([text.encode()], ancillary, 0, address)
        except OSError as error:
            if isinstance(error, BlockingIOError) and not is_last:
                return False
            log.warning("the service manager cannot be told: %s", error)
        return True

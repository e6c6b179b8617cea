"""What `supervisor.host_network` is on macOS: routes and addresses of the machine, and when they change."""

import socket
import struct
from typing import Final

from supervisor.macos import commands, output
from supervisor.macos.run import Run, run
from supervisor.osconfig.route_conflicts import HostRoutes
from supervisor.way import Way

_AF_ROUTE: Final = 17  # sys/socket.h
# net/route.h: RTM_ADD, _DELETE, _CHANGE, _NEWADDR, _DELADDR, _IFINFO. Of the first three an error counts for
# nothing; a question of `route get`, which everybody hears as well, is none of them.
_ROUTE_CHANGES: Final = frozenset({0x1, 0x2, 0x3})
_OTHER_CHANGES: Final = frozenset({0xC, 0xD, 0xE})
# struct rt_msghdr: length, version, type, ..., error number; the first three begin every message.
_HEAD: Final = struct.Struct("=HBB")
_ERROR: Final = struct.Struct("=24xi")
_RECEIVE_BYTES: Final = 1 << 16
_READS: Final = 200


def is_change(message: bytes) -> bool:
    """Whether a message of the routing socket says that something has changed. Pure."""
    if len(message) < _HEAD.size:
        return False
    _length, _version, kind = _HEAD.unpack_from(message)
    if kind in _ROUTE_CHANGES:
        return len(message) >= _ERROR.size and _ERROR.unpack_from(message)[0] == 0
    return kind in _OTHER_CHANGES


class Monitor:
    """Says that something of the machine's network has changed, not what (route(4))."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = socket.socket(_AF_ROUTE, socket.SOCK_RAW, 0)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_heard(self) -> bool:
        """Takes what has come; whether it was a change, or messages were lost."""
        has_heard = False
        for _ in range(_READS):
            try:
                has_heard |= is_change(self._socket.recv(_RECEIVE_BYTES))
            except BlockingIOError:
                break
            except OSError:
                return True
        return has_heard

    def close(self) -> None:
        self._socket.close()


class HostNetwork:
    """Asks the kernel through its programs. Everything raises OSError."""

    def __init__(self, execute: Run = run) -> None:
        self._execute = execute

    def close(self) -> None:
        """Nothing is open."""

    def read(self) -> HostRoutes:
        return output.host_routes(
            self._execute(commands.show_interfaces()), self._execute(commands.show_routes(4))
        )

    def way_to(self, address: bytes) -> Way:
        try:
            interface = output.interface_of(self._execute(commands.ask_route(address)))
        except ProcessLookupError:
            return Way("", "no route")
        except OSError as error:
            return Way("", error.strerror or str(error))
        return Way(interface, "" if interface else "no route")


def read_host() -> HostRoutes:
    """Routes and addresses, read once. Raises OSError."""
    return HostNetwork().read()

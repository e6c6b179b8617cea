"""The way to ask whose a socket is, on the system that this process runs on."""

import socket
import sys
from typing import Protocol

from ipc.macos_sockets import SocketTable
from ipc.socket_owner import ANY_STATE, Owner, SocketDiag


class SocketLookup(Protocol):
    """Addresses are packed. See `ipc.socket_owner.SocketDiag`."""

    interface: int

    def tcp_owner(
        self,
        source: bytes,
        source_port: int,
        destination: bytes,
        destination_port: int,
        *,
        states: int = ANY_STATE,
    ) -> Owner | None:
        """Whose the end of a TCP connection is. Raises OSError."""
        ...

    def udp_owner(
        self, source: bytes, source_port: int, destination: bytes, destination_port: int
    ) -> Owner | None:
        """Whose a UDP socket is. Raises OSError."""
        ...

    def close(self) -> None:
        """It cannot be asked any more."""
        ...


def lookup_of(kernel: socket.socket | None, interface: int) -> SocketLookup | None:
    """With the netlink socket that came beside the configuration, if one did; None: nobody can be asked."""
    if kernel is not None:
        return SocketDiag(kernel, interface)
    return SocketTable() if sys.platform == "darwin" else None

"""Who connects to a local port of `vnet proxy`, which every user of the machine can reach.

The user who has opened it and root may; the kernel says whose the other end is. An end that no process has any
more is nobody's: who connects, sends and is gone must not get through either.
"""

import os
import socket
import sys
from contextlib import suppress
from ipaddress import ip_address

from ipc.socket_lookup import SocketLookup, lookup_of
from ipc.socket_owner import SocketDiag


class LocalPeers:
    """Without a `kernel` to ask everybody may connect."""

    def __init__(self, kernel: SocketLookup | None) -> None:
        self._kernel = kernel
        self._uids = (0, os.getuid())

    @property
    def is_checked(self) -> bool:
        """Whether it can be told who connects."""
        return self._kernel is not None

    def problem(self, connection: socket.socket) -> str:
        """Why this connection, just accepted, is not carried; empty if it is."""
        if self._kernel is None:
            return ""
        try:
            ends = connection.getpeername(), connection.getsockname()
            (source, source_port), (destination, destination_port) = (
                (ip_address(end[0]).packed, end[1]) for end in ends
            )
            owner = self._kernel.tcp_owner(source, source_port, destination, destination_port)
        except OSError as error:
            return f"the system does not say which user connects ({error.strerror or error})"
        if owner is not None and owner.uid in self._uids:
            return ""
        if owner is None or owner.uid < 0:
            return "the program was gone before it could be seen whose it is"
        return f"it comes from uid {owner.uid}, and only you and root may connect"

    def close(self) -> None:
        """Ends asking."""
        if self._kernel is not None:
            self._kernel.close()


def make_local_peers() -> LocalPeers:
    """With a way to ask, if this system has one."""
    kernel = None
    if sys.platform == "linux":
        with suppress(OSError):
            kernel = SocketDiag.open()
    return LocalPeers(lookup_of(kernel, 0))

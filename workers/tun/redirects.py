"""Which port of VNet's own address stands for which virtual address and port. Pure.

    program's own c:cp --> virtual v:vp        a connection as the program sees it
    virtual v:cp       --> own c:L             the same as the listening socket sees it

L is the port of a socket of VNet's, made for exactly (v, vp), so both directions follow from this table
alone: there is nothing to remember for each connection. The supervisor owns the sockets and with them
the table; it tells every tun worker all of it before that one reads its first packet.
"""

from collections.abc import Iterable
from typing import Final, TypeAlias

from ipc.messages import Redirect
from workers.tun.packet import TCP, UDP

# More than the supervisor has sockets; a table that grows beyond it is a fault of its.
MAX_REDIRECTS: Final = 65536

# (transport protocol, packed virtual address, port)
_Place: TypeAlias = tuple[int, bytes, int]


class Redirects:
    """The table, in both directions."""

    def __init__(self) -> None:
        self._local_ports: Final[dict[_Place, int]] = {}
        self._ports: Final[dict[_Place, int]] = {}

    def __len__(self) -> int:
        return len(self._local_ports)

    def change(self, redirects: Iterable[Redirect]) -> int:
        """Adds, replaces, or with local port 0 removes; how many had no room (MAX_REDIRECTS)."""
        left_out = 0
        for redirect in redirects:
            protocol = UDP if redirect.is_udp else TCP
            place = (protocol, redirect.address, redirect.port)
            before = self._local_ports.pop(place, None)
            if before is not None:
                del self._ports[protocol, redirect.address, before]
            if not redirect.local_port:
                continue
            if len(self._local_ports) >= MAX_REDIRECTS:
                left_out += 1
                continue
            # The kernel gives a port anew only when its socket is gone.
            other = self._ports.pop((protocol, redirect.address, redirect.local_port), None)
            if other is not None:
                del self._local_ports[protocol, redirect.address, other]
            self._local_ports[place] = redirect.local_port
            self._ports[protocol, redirect.address, redirect.local_port] = redirect.port
        return left_out

    def local_port(self, protocol: int, address: bytes, port: int) -> int | None:
        """Where a packet to this virtual address and port goes."""
        return self._local_ports.get((protocol, address, port))

    def port(self, protocol: int, address: bytes, local_port: int) -> int | None:
        """What the program takes for the source of a packet to this virtual address from L."""
        return self._ports.get((protocol, address, local_port))

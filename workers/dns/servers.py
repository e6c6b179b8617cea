"""Which upstream servers may be asked. Pure.

A server that leads back to us would turn one question into an endless loop, so VNet's own
addresses, and whatever lies in a virtual range, are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from ipc.messages import Network, Upstream
from workers.dns.zones import Zones


@dataclass(frozen=True, slots=True)
class Server:
    """One upstream server. `scope` names the interface of a link-local IPv6 address."""

    address: IPv4Address | IPv6Address
    port: int
    scope: str

    def __str__(self) -> str:
        scope = f"%{self.scope}" if self.scope else ""
        return f"{self.address}{scope} port {self.port}"


def select_servers(
    upstream: Iterable[Upstream], network: Network, limit: int
) -> tuple[Server, ...]:
    """The first `limit` servers that can be asked, each once, in the given order."""
    zones = Zones(network)
    own = {network.tun_ipv4, network.dns_ipv4, network.tun_ipv6, network.dns_ipv6}
    servers: dict[Server, None] = {}
    for entry in upstream:
        server = _read(entry)
        if server is None or server.port == 0:
            continue
        address = server.address
        if address.is_unspecified or address.is_multicast:
            continue
        if address.packed in own or zones.covers(address.packed):
            continue
        servers[server] = None
    return tuple(servers)[:limit]


def _read(entry: Upstream) -> Server | None:
    try:
        address = ip_address(entry.address)
    except ValueError:
        return None
    # ::ffff:a.b.c.d reaches the same server as a.b.c.d.
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return Server(address.ipv4_mapped, entry.port, "")
    return Server(address, entry.port, entry.scope)

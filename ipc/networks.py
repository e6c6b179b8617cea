"""Whether an address lies in one of a few networks, fast enough to be asked for each packet. Pure."""

from collections.abc import Iterable
from ipaddress import ip_network

from ipc.addresses import as_text
from ipc.messages import Network


class Networks:
    """Networks of both families, given as CIDR text; `address in networks` takes packed addresses.

    Bits of the host are ignored. Raises ValueError for a text that is no network.
    """

    __slots__ = ("_blocks",)

    def __init__(self, texts: Iterable[str] = ()) -> None:
        # Length of an address in bytes, mask, masked address.
        self._blocks: list[tuple[int, int, int]] = []
        for text in texts:
            network = ip_network(text, strict=False)
            base, mask = int(network.network_address), int(network.netmask)
            self._blocks.append((network.max_prefixlen // 8, mask, base))

    def __contains__(self, address: bytes) -> bool:
        value, size = int.from_bytes(address), len(address)
        return any(size == s and value & mask == base for s, mask, base in self._blocks)


def virtual_networks(network: Network) -> Networks:
    """The ranges of virtual addresses, of both families."""
    ranges = list(network.ranges)
    if network.ipv6_prefix is not None:
        ranges.append(f"{as_text(network.ipv6_prefix)}/64")
    return Networks(ranges)

"""Which virtual addresses a name may get, best first. Pure.

The order starts at a hash of the name, so that a name tends to get the same address again even
when the book was lost, and goes on upward with wrap (linear probing).
"""

from collections.abc import Collection, Iterator
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network

# Teleport refuses smaller ranges too: the DNS and TUN addresses leave too little of them.
MAX_PREFIX_LENGTH = 27


def probe_order(
    name: str, network: IPv4Network, reserved: Collection[IPv4Address]
) -> Iterator[IPv4Address]:
    """Every address of `network` that a name may have, exactly once, in the order of preference.

    Left out are the network address, the broadcast address and the `reserved` ones.
    """
    size = network.num_addresses
    base = int(network.network_address)
    start = int.from_bytes(sha256(name.encode()).digest()[:8], "big") % size
    for step in range(size):
        offset = (start + step) % size
        address = IPv4Address(base + offset)
        if 0 < offset < size - 1 and address not in reserved:
            yield address


def capacity(network: IPv4Network, reserved: Collection[IPv4Address]) -> int:
    """How many addresses `probe_order` yields."""
    ends = {network.network_address, network.broadcast_address}
    inside = {address for address in reserved if address in network}
    return network.num_addresses - len(inside | ends)

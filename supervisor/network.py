"""The addresses of this VNet, decided from the configuration. Pure.

IPv4: first range        .1 TUN device    .2 DNS server
IPv6: a random ULA /64   ::1 TUN device   ::2 DNS server   (RFC 4193)
"""

from ipaddress import IPv4Network, IPv6Address, IPv6Network

import msgspec

from ipc.messages import Network
from supervisor.config import DEFAULT_RANGE, NetworkConfig

PREFIX_RANDOM_BYTES = 5
TUN_HOST, DNS_HOST = 1, 2


def ula_prefix(random_bytes: bytes) -> bytes:
    """A unique local /64 (16 bytes) from 5 random ones; the subnet is 0 (RFC 4193 section 3.1)."""
    if len(random_bytes) != PREFIX_RANDOM_BYTES:
        raise ValueError(f"a prefix needs {PREFIX_RANDOM_BYTES} bytes")
    return b"\xfd" + random_bytes + bytes(10)


def plan(
    config: NetworkConfig, prefix: bytes | None, own_range: IPv4Network | None = None
) -> Network:
    """VNet's own addresses.

    `prefix` is 16 bytes, or None while IPv6 is off; `own_range` what was chosen for "auto".
    """
    text = DEFAULT_RANGE if config.ipv4_cidr_range == "auto" else config.ipv4_cidr_range
    own_range = own_range or IPv4Network(text)
    return Network(
        interface=config.interface,
        mtu=config.mtu,
        ranges=[str(own_range)],
        tun_ipv4=own_range[TUN_HOST].packed,
        dns_ipv4=own_range[DNS_HOST].packed,
        ipv6_prefix=prefix,
        tun_ipv6=_in_prefix(prefix, TUN_HOST),
        dns_ipv6=_in_prefix(prefix, DNS_HOST),
    )


def _in_prefix(prefix: bytes | None, host: int) -> bytes | None:
    return None if prefix is None else prefix[:8] + host.to_bytes(8, "big")


def without_ipv6(network: Network) -> Network:
    """The same while IPv6 does not work on the interface."""
    return msgspec.structs.replace(network, ipv6_prefix=None, tun_ipv6=None, dns_ipv6=None)


def ipv6_range(network: Network) -> IPv6Network | None:
    """The /64 of this VNet."""
    if network.ipv6_prefix is None:
        return None
    return IPv6Network((IPv6Address(network.ipv6_prefix), 64))


def dns_addresses(network: Network) -> list[bytes]:
    """Packed addresses the DNS server listens on, IPv4 first."""
    return [address for address in (network.dns_ipv4, network.dns_ipv6) if address is not None]


def is_virtual(network: Network, address: bytes) -> bool:
    """Whether a listener may be opened on this packed address: virtual, and not VNet's own."""
    own = (network.tun_ipv4, network.dns_ipv4, network.tun_ipv6, network.dns_ipv6)
    if address in own:
        return False
    if len(address) == 4:
        value = int.from_bytes(address, "big")
        return any(
            int(block.network_address) < value < int(block.broadcast_address)
            for block in map(IPv4Network, network.ranges)
        )
    prefix = network.ipv6_prefix
    return prefix is not None and len(address) == 16 and address[:8] == prefix[:8]

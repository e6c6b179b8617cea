"""The network that the packet targets play in."""

from ipc.messages import Network
from workers.tun.policy import Perimeter

PREFIX = b"\xfd" + bytes(15)
NETWORK = Network(
    interface="vnet0",
    mtu=65535,
    ranges=["100.64.0.0/10"],
    tun_ipv4=b"\x64\x40\0\1",
    dns_ipv4=b"\x64\x40\0\2",
    ipv6_prefix=PREFIX,
    tun_ipv6=PREFIX[:15] + b"\1",
    dns_ipv6=PREFIX[:15] + b"\2",
)
PROXIES = 3
PERIMETER = Perimeter(NETWORK, PROXIES)
VNET_OWN = frozenset({b"\x64\x40\0\1", PREFIX[:15] + b"\1"})
# VNet's own, the DNS server's, two virtual ones, one of somebody else, one that is noise.
PLACES_IPV4 = [
    b"\x64\x40\0\1",
    b"\x64\x40\0\2",
    b"\x64\x40\0\x09",
    b"\x64\x7f\xff\xff",
    b"\xc0\0\2\1",
    b"\xe0\0\0\1",
]
PLACES_IPV6 = [
    PREFIX[:15] + b"\1",
    PREFIX[:15] + b"\2",
    PREFIX[:12] + b"\x64\x40\0\x09",
    PREFIX[:8] + b"\xff" * 8,
    b"\x20\x01\x0d\xb8" + bytes(11) + b"\1",
    b"\xff\2" + bytes(13) + b"\1",
]

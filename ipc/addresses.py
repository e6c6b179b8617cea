"""Arithmetic on VNet's addresses. Pure.

    IPv6 of a name:   | prefix, 64 bits | 32 zero bits | its IPv4, 32 bits |

The low 32 bits are the same for both families, so everything that is chosen by address (the
owning proxy, the name behind it) is chosen by them.
"""

from ipaddress import IPv4Address, IPv6Address
from zlib import crc32


def ipv6_twin(prefix: bytes, ipv4: bytes) -> bytes:
    """The IPv6 address (16 bytes) that goes with an IPv4 address (4 bytes) under a /64 prefix."""
    return prefix[:8] + b"\0\0\0\0" + ipv4


def ipv4_twin(address: bytes) -> bytes:
    """The IPv4 address (4 bytes) inside a virtual address of either family."""
    return address[-4:]


def owner_of_address(address: bytes, proxies: int) -> int:
    """Index of the proxy that owns connections to this virtual address (4 or 16 bytes)."""
    return crc32(ipv4_twin(address)) % proxies


def owner_of_name(name: str, proxies: int) -> int:
    """Index of the proxy that is asked first what a name (lower-case, no dot) stands for."""
    return crc32(name.encode()) % proxies


def as_text(address: bytes) -> str:
    """A packed address for people."""
    return str(IPv4Address(address) if len(address) == 4 else IPv6Address(address))

"""Where the supervisor asks whether the way through tun and each proxy works. Pure.

A SYN to one of these ports of the IPv4 DNS address is held like any other and put to one proxy, which
refuses it at once: the reset is the answer. So no virtual address is taken from the names.
"""

from typing import Final

FIRST_PROBE_PORT: Final = 47_000


def probe_port(index: int) -> int:
    """The port that is put to the proxy with this index."""
    return FIRST_PROBE_PORT + index


def probed_proxy(dns_ipv4: bytes, proxies: int, address: bytes, port: int) -> int | None:
    """Index of the proxy that is probed at this packed address and port, or None."""
    index = port - FIRST_PROBE_PORT
    return index if address == dns_ipv4 and 0 <= index < proxies else None

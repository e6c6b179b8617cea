"""Where the supervisor asks whether the way through tun and each proxy works. Pure.

A SYN to one of these ports of the IPv4 DNS address is held like any other and put to one proxy, which
refuses it at once: the reset is the answer. So no virtual address is taken from the names.
"""

from typing import Final

from ipc import slots

FIRST_PROBE_PORT: Final = 47_000
_SSH_PROBE_PORT: Final = FIRST_PROBE_PORT - 1


def probe_port(slot: str) -> int:
    """The port that is put to the proxy in this slot."""
    return _SSH_PROBE_PORT if slot == slots.SSH else FIRST_PROBE_PORT + slots.number_of(slot)


def probed_proxy(dns_ipv4: bytes, proxies: int, address: bytes, port: int) -> str | None:
    """Slot of the proxy that is probed at this packed address and port, or None."""
    if address != dns_ipv4:
        return None
    if port == _SSH_PROBE_PORT:
        return slots.SSH
    index = port - FIRST_PROBE_PORT
    return slots.numbered(index) if 0 <= index < proxies else None

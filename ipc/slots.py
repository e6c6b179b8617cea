"""The worker slots, and which proxy a connection belongs to. Pure.

    connection to port 22         ssh
    any other                     proxy-i, where i is a hash of the virtual address

`ssh` is a proxy like the others. It is a process of its own because SSH is decrypted and encrypted
again in Python: beside it connections to apps would have half of their speed.

`metrics` is there when metrics are served. No connection depends on it.
"""

from typing import Final

from ipc.addresses import owner_of_address

SSH: Final = "ssh"
METRICS: Final = "metrics"
SSH_PORT: Final = 22  # RFC 4250 section 5


def of_proxies(proxies: int) -> list[str]:
    """The slots of all proxies; `proxies` is the number of those that have one."""
    return [*of_numbered(proxies), SSH]


def of_numbered(proxies: int) -> list[str]:
    """The slots of the proxies that dns asks, and that share all connections but SSH."""
    return [numbered(index) for index in range(proxies)]


def owner_of_connection(address: bytes, port: int, proxies: int) -> str:
    """The slot that owns connections to a packed virtual address (4 or 16 bytes) and port."""
    return SSH if port == SSH_PORT else numbered(owner_of_address(address, proxies))


def numbered(index: int) -> str:
    """The slot of the proxy with this number."""
    return f"proxy-{index}"


def number_of(slot: str) -> int:
    """The number in the slot of a numbered proxy."""
    return int(slot.removeprefix("proxy-"))

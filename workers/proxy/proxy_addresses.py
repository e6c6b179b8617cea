"""The addresses of Teleport proxies, remembered for a moment.

Every connection of a program dials the same few hosts, and a look-up costs about as much as the
TCP and TLS handshakes together: a thread, the system's resolver, and often VNet's own DNS server.
"""

import asyncio
import socket
from collections import OrderedDict
from itertools import chain, zip_longest

AddressInfo = tuple[int, int, int, str, tuple[object, ...]]  # as getaddrinfo gives it

# A proxy that moves is found again after this time, or at once when its old address fails.
REMEMBERED_SECONDS = 5.0
MAX_HOSTS = 64
MAX_ADDRESSES = 8


class ProxyAddresses:
    """Look-ups with a memory of at most `max_hosts`; the oldest is forgotten first."""

    def __init__(
        self, remembered_seconds: float = REMEMBERED_SECONDS, max_hosts: int = MAX_HOSTS
    ) -> None:
        self._remembered_seconds = remembered_seconds
        self._max_hosts = max_hosts
        self._known: OrderedDict[tuple[str, int], tuple[float, list[AddressInfo]]] = OrderedDict()

    def is_known(self, host: str, port: int) -> bool:
        """Whether `find` would answer from memory."""
        known = self._known.get((host, port))
        return known is not None and asyncio.get_running_loop().time() < known[0]

    async def find(self, host: str, port: int) -> list[AddressInfo]:
        """Addresses to try, families alternating, the resolver's first choice first.

        Raises:
            OSError: the host has none, or the resolver does not answer.
        """
        if self.is_known(host, port):
            return self._known[host, port][1]
        loop = asyncio.get_running_loop()
        found: list[AddressInfo] = list(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        first = [info for info in found if info[0] == found[0][0]]
        second = [info for info in found if info[0] != found[0][0]]
        mixed = chain.from_iterable(zip_longest(first, second))
        addresses = [info for info in mixed if info is not None][:MAX_ADDRESSES]
        self.forget(host, port)
        self._known[host, port] = (loop.time() + self._remembered_seconds, addresses)
        while len(self._known) > self._max_hosts:
            self._known.popitem(last=False)
        return addresses

    def forget(self, host: str, port: int) -> None:
        """The addresses did not work."""
        self._known.pop((host, port), None)

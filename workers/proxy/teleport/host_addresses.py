"""Where a proxy's host name leads, looked up now and then: no range may cover these addresses."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from math import inf
from typing import TypeAlias

LookUp: TypeAlias = Callable[[str], Awaitable[list[bytes]]]

REFRESH_SECONDS = 300.0
RETRY_SECONDS = 30.0
LOOK_UP_SECONDS = 20.0
MAX_ADDRESSES = 32


async def look_up(host: str) -> list[bytes]:
    """The packed addresses of a host by the system's resolver, in a thread.

    Raises:
        OSError: it has none, or the resolver does not answer.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    # A scope, as in fe80::1%eth0, is no part of the address.
    return [ip_address(str(info[4][0]).partition("%")[0]).packed for info in found]


class HostAddresses:
    """The addresses of one host; empty while they are unknown. The last ones count on failure."""

    def __init__(
        self,
        host: str,
        look_up: LookUp,
        *,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.host = host
        self.known: tuple[bytes, ...] = ()
        self._look_up = look_up
        self._clock = clock
        self._on_change = on_change
        self._refresh_at = -inf
        self._is_running = False

    def is_due(self) -> bool:
        """Whether the host should be looked up, and nobody is about it."""
        return self._clock() >= self._refresh_at and not self._is_running

    async def refresh(self) -> None:
        """Looks the host up. Raises nothing."""
        self._is_running = True
        try:
            async with asyncio.timeout(LOOK_UP_SECONDS):
                found = await self._look_up(self.host)
        except (OSError, ValueError):  # a time-out is an OSError
            self._refresh_at = self._clock() + RETRY_SECONDS
            return
        finally:
            self._is_running = False
        self._refresh_at = self._clock() + REFRESH_SECONDS
        addresses = tuple(sorted(set(found)))[:MAX_ADDRESSES]
        if addresses != self.known:
            self.known = addresses
            self._on_change()

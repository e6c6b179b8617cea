"""TCP connections: resolve, connect, and go through a forward proxy where one is set.

Addresses are tried as RFC 8305 section 5 says: in the order the resolver gives with the families
alternating (section 4), the next one when an attempt fails or after 250 ms, and the first to
connect wins.
"""

import asyncio
import socket
from dataclasses import dataclass

from workers.proxy.http_proxy import ForwardProxy, ForwardProxyError, ProxyConnect
from workers.proxy.proxy_addresses import AddressInfo, ProxyAddresses

_PEEK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class DialSettings:
    """Figures of a dial; the defaults suit every real use."""

    attempt_delay_seconds: float = 0.25  # RFC 8305 section 5
    max_early_bytes: int = 64 * 1024  # kept of what the far end sends before the relay starts
    # RFC 1122 section 4.2.3.6 wants keep-alive off by default, but a relay that waits for the
    # app's answer would never learn that the proxy is gone.
    keepalive_idle_seconds: int = 60
    keepalive_interval_seconds: int = 15
    keepalive_probes: int = 4


_KEEPIDLE: int = getattr(socket, "TCP_KEEPIDLE", 0) or 0x10  # macOS: TCP_KEEPALIVE


async def connect(
    host: str, port: int, known: ProxyAddresses, settings: DialSettings
) -> socket.socket:
    """A connection to any address of the host; remembered addresses that fail are looked up.

    The socket is non-blocking, sends small pieces at once and keeps alive.

    Raises:
        OSError: there is no such host, or none of its addresses answers.
    """
    sock = await _connect_host(host, port, known, settings)
    try:
        _set_options(sock, settings)
    except OSError:
        sock.close()
        raise
    return sock


async def connect_through(
    proxy: ForwardProxy, host: str, port: int, known: ProxyAddresses, settings: DialSettings
) -> socket.socket:
    """As `connect`, by way of a forward proxy that is reached without TLS.

    Raises:
        ForwardProxyError: the forward proxy did not connect.
        OSError: it could not be reached, or the connection was lost.
    """
    talk = ProxyConnect(host, port, proxy.authorization)
    sock = await connect(proxy.host, proxy.port, known, settings)
    try:
        await asyncio.get_running_loop().sock_sendall(sock, talk.request)
        while not await _read_head(sock, talk):
            pass
    except BaseException:
        sock.close()
        raise
    return sock


async def _read_head(sock: socket.socket, talk: ProxyConnect) -> bool:
    """Reads up to the end of the head and not a byte further; True when it was there."""
    await _readable(sock)
    try:
        seen = sock.recv(_PEEK_BYTES, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    if not seen:
        raise ForwardProxyError("the forward proxy closed the connection without an answer")
    rest = talk.feed(seen)
    sock.recv(len(seen) - len(rest or b""))
    return rest is not None


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock.fileno())


async def _connect_host(
    host: str, port: int, known: ProxyAddresses, settings: DialSettings
) -> socket.socket:
    was_known = known.is_known(host, port)
    try:
        addresses = await known.find(host, port)
        return await _connect_first(addresses, settings.attempt_delay_seconds)
    except OSError:
        known.forget(host, port)
        if not was_known:
            raise
    addresses = await known.find(host, port)
    return await _connect_first(addresses, settings.attempt_delay_seconds)


async def _connect_first(addresses: list[AddressInfo], delay_seconds: float) -> socket.socket:
    """The first connection that comes about; all others are closed."""
    if len(addresses) == 1:
        return await _connect(addresses[0])
    waiting = iter(addresses)
    attempts: set[asyncio.Task[socket.socket]] = set()
    last_error: BaseException | None = None
    try:
        while True:
            if (info := next(waiting, None)) is not None:
                attempts.add(asyncio.create_task(_connect(info)))
            elif not attempts:
                raise last_error or OSError("no address")
            done, _ = await asyncio.wait(
                attempts,
                timeout=None if info is None else delay_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for attempt in done:
                attempts.discard(attempt)
                if (last_error := attempt.exception()) is None:
                    attempts |= done - {attempt}
                    return attempt.result()
    finally:
        for attempt in attempts:
            attempt.add_done_callback(_close_loser)
            attempt.cancel()


def _close_loser(attempt: "asyncio.Task[socket.socket]") -> None:
    """Closes a connection that came about in the same turn of the loop as the winner."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


async def _connect(info: AddressInfo) -> socket.socket:
    family, kind, protocol, _, address = info
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _set_options(sock: socket.socket, settings: DialSettings) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, _KEEPIDLE, settings.keepalive_idle_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, settings.keepalive_interval_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, settings.keepalive_probes)

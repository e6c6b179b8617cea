"""Opens a TLS connection to a Teleport proxy: resolve, connect, shake hands.

Addresses are tried as RFC 8305 section 5 says: in the order the resolver gives with the families
alternating (section 4), the next one when an attempt fails or after 250 ms, and the first to
connect wins.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from dataclasses import dataclass

from workers.proxy.proxy_addresses import AddressInfo, ProxyAddresses
from workers.proxy.reactor import Reactor
from workers.proxy.tls import (
    AlertReceivedError,
    PeerUntrustedError,
    TlsConnection,
    TlsError,
)
from workers.proxy.upstream import Upstream


class DialError(Exception):
    """Base: no connection was made. The text is one sentence, safe to log and show."""


class ProxyUnreachableError(DialError):
    """No such name, no route, nobody listens, or the connection was lost."""


class DialTimedOutError(DialError):
    """The whole dial took longer than allowed."""


class ProxyUntrustedError(DialError):
    """The proxy's certificate is not trusted or is for another name."""


class DialRefusedError(DialError):
    """The proxy answered with a TLS alert or closed during the handshake.

    Under TLS 1.3 a refused client certificate shows only later, see `Upstream.on_lost`.
    """


class HandshakeFailedError(DialError):
    """TLS failed in another way: no TLS at the other end, no common version or protocol."""


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
DEFAULT_SETTINGS = DialSettings()


async def dial(
    host: str,
    port: int,
    context: ssl.SSLContext,
    server_hostname: str,
    timeout_seconds: float,
    reactor: Reactor,
    settings: DialSettings = DEFAULT_SETTINGS,
    known: ProxyAddresses | None = None,
) -> Upstream:
    """Connects to `host` (name or address) and shakes hands.

    `context` has the client certificate, the trust, and the ALPN list, of which one must be
    chosen; `server_hostname` is the SNI and the name the certificate must be for. `known`
    remembers addresses between dials. Nothing is left open when this raises or is cancelled.

    Raises:
        DialError: one of its leaves.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            sock = await _connect_host(host, port, known or ProxyAddresses(), settings)
            return await _shake_hands(sock, context, server_hostname, reactor, settings)
    except TimeoutError as error:
        raise DialTimedOutError(f"{host}:{port}: no answer in {timeout_seconds:g} s") from error
    except PeerUntrustedError as error:
        raise ProxyUntrustedError(f"{host}:{port}: {error}") from error
    except (AlertReceivedError, _ClosedInHandshakeError) as error:
        raise DialRefusedError(f"{host}:{port}: {error}") from error
    except TlsError as error:
        raise HandshakeFailedError(f"{host}:{port}: {error}") from error
    except OSError as error:
        raise ProxyUnreachableError(f"{host}:{port}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or not error.errno:
        return error.strerror or "connection lost"
    return os.strerror(error.errno)  # asyncio puts words of its own into strerror


class _ClosedInHandshakeError(Exception):
    """The far end closed or reset the connection before the handshake was done."""


async def _connect_host(
    host: str, port: int, known: ProxyAddresses, settings: DialSettings
) -> socket.socket:
    """A connection to any address of the host; remembered addresses that fail are looked up."""
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
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _shake_hands(
    sock: socket.socket,
    context: ssl.SSLContext,
    server_hostname: str,
    reactor: Reactor,
    settings: DialSettings,
) -> Upstream:
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(sock.close)
        _set_options(sock, settings)
        tls = TlsConnection(context, server_hostname, reactor.memory)
        upstream = Upstream(reactor, sock, tls, settings.max_early_bytes)
        try:
            await upstream.handshake()
        except ConnectionError as error:
            raise _ClosedInHandshakeError("connection closed during the TLS handshake") from error
        if upstream.alpn is None:
            # Without a protocol a Teleport proxy takes the connection for HTTP.
            upstream.close()
            raise TlsError("no application protocol was chosen, as if TLS ended before the proxy")
        on_failure.pop_all()
        return upstream


def _set_options(sock: socket.socket, settings: DialSettings) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, _KEEPIDLE, settings.keepalive_idle_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, settings.keepalive_interval_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, settings.keepalive_probes)

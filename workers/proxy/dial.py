"""Connects to a Teleport proxy as a plan says: TCP, what is put around it, and their handshakes.

plan                    layers, from the wire inwards                       module
----------------------  --------------------------------------------------  -------------------
neither tls nor upgrade the bytes as they are                               layers.Plain
tls                     TLS                                                 tls.TlsConnection
tls and upgrade         TLS, connection upgrade, WebSocket, TLS             tunnel.Tunnel
http_proxy (http://)    CONNECT over TCP, then as above                     tcp
http_proxy (https://)   TLS to the forward proxy, CONNECT, then as above    tunnel.Tunnel
ssh                     as above, then a gRPC call that leads to the host   ssh_stream.SshStream
"""

import asyncio
import contextlib
import os
import socket
import ssl
from functools import cache

from workers.proxy import tcp
from workers.proxy.connection_upgrade import ALPN, ALPN_PING, ConnectionUpgrade, UpgradeError
from workers.proxy.dial_errors import (
    DialError,
    DialRefusedError,
    DialTimedOutError,
    HandshakeFailedError,
    LoginRefusedError,
    NodeDeniedError,
    NodeUnreachableError,
    ProxyUnreachableError,
    ProxyUntrustedError,
    SshUnsupportedError,
    UpgradeFailedError,
)
from workers.proxy.dial_plan import DialPlan
from workers.proxy.http_proxy import ForwardProxy, ForwardProxyError, ProxyConnect, parse_proxy
from workers.proxy.layers import Layer, LayerError, Plain
from workers.proxy.proxy_addresses import ProxyAddresses
from workers.proxy.reactor import Reactor
from workers.proxy.relay import Relay
from workers.proxy.ssh_stream import NodeRefusedError, SshStream, SshStreamLostError
from workers.proxy.tcp import DialSettings
from workers.proxy.tls import (
    AlertReceivedError,
    PeerUntrustedError,
    TlsConnection,
    TlsError,
    TlsMemory,
)
from workers.proxy.tunnel import Tunnel, TunnelClosedError, Unframed
from workers.proxy.upstream import Upstream
from workers.proxy.websocket import WebSocketClient

__all__ = [
    "DEFAULT_SETTINGS",
    "DialError",
    "DialRefusedError",
    "DialSettings",
    "DialTimedOutError",
    "HandshakeFailedError",
    "LoginRefusedError",
    "NodeDeniedError",
    "NodeUnreachableError",
    "ProxyUnreachableError",
    "ProxyUntrustedError",
    "SshUnsupportedError",
    "UpgradeFailedError",
    "connect_tcp",
    "dial",
]

DEFAULT_SETTINGS = DialSettings()

# By the status of gRPC; all others are a host that is not reached.
_NODE_ERRORS: dict[int, type[NodeUnreachableError]] = {
    7: NodeDeniedError,
    12: SshUnsupportedError,
    16: LoginRefusedError,
}
_LOCAL_SECONDS = 1.0  # for what the kernel does at once


class _ClosedInHandshakeError(Exception):
    """The proxy closed or reset the connection before the last handshake was done."""


class _LostOnTheWayError(Exception):
    """Somebody before the proxy closed or reset the connection."""


async def dial(
    plan: DialPlan,
    timeout_seconds: float,
    reactor: Reactor,
    settings: DialSettings = DEFAULT_SETTINGS,
    known: ProxyAddresses | None = None,
) -> Upstream:
    """Connects and does all handshakes.

    Of the ALPN list in `plan.tls` one must be chosen. `known` remembers addresses between dials.
    Nothing is left open when this raises or is cancelled.

    Raises:
        DialError: one of its leaves.
    """
    return await _dial_or_say_why(plan, timeout_seconds, reactor, settings, known)


async def connect_tcp(
    host: str,
    port: int,
    *,
    http_proxy: str = "",
    known: ProxyAddresses | None = None,
    settings: DialSettings = DEFAULT_SETTINGS,
    reactor: Reactor | None = None,
) -> socket.socket:
    """A connected non-blocking socket, by way of the forward proxy at `http_proxy` if set.

    With an https:// forward proxy it is one end of a local pair, and a relay, with which the
    connection ends, moves the bytes between the other and the forward proxy; `reactor` runs it,
    or one that is made for it.

    Raises:
        OSError: without forward proxy: no such host, or it does not answer; this machine is out
            of sockets.
        DialError: with one: it cannot be reached, is not trusted, or does not connect.
    """
    known = known or ProxyAddresses()
    if not http_proxy:
        return await tcp.connect(host, port, known, settings)
    plan = DialPlan(host, port, None, http_proxy=http_proxy)
    proxy = _forward_proxy(plan)
    assert proxy is not None
    if proxy.is_tls:
        return await _connect_by_relay(plan, reactor, settings, known)
    try:
        return await tcp.connect_through(proxy, host, port, known, settings)
    except ForwardProxyError as error:
        raise ProxyUnreachableError(f"{_describe(plan, proxy)}: {error}") from error
    except OSError as error:
        raise ProxyUnreachableError(f"{_describe(plan, proxy)}: {_reason(error)}") from error


async def _connect_by_relay(
    plan: DialPlan, reactor: Reactor | None, settings: DialSettings, known: ProxyAddresses
) -> socket.socket:
    with contextlib.ExitStack() as on_failure:
        on_end = contextlib.ExitStack()
        if reactor is None:
            reactor = Reactor(asyncio.get_running_loop())
            on_end.callback(reactor.close)
            on_failure.callback(reactor.close)
        ours, theirs = _local_pair()
        on_failure.callback(ours.close)
        on_failure.callback(theirs.close)
        upstream = await _dial_or_say_why(plan, None, reactor, settings, known)
        on_failure.pop_all()
        Relay(reactor, theirs, upstream, lambda _: on_end.close()).start()
    return ours


def _local_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection, which unlike other pairs can be reset."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        listener.settimeout(_LOCAL_SECONDS)
        ours = socket.create_connection(listener.getsockname(), _LOCAL_SECONDS)
        try:
            theirs, address = listener.accept()
            while address != ours.getsockname():  # somebody else found the port
                theirs.close()
                theirs, address = listener.accept()
        except OSError:
            ours.close()
            raise
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


async def _dial_or_say_why(
    plan: DialPlan,
    timeout_seconds: float | None,
    reactor: Reactor,
    settings: DialSettings,
    known: ProxyAddresses | None,
) -> Upstream:
    proxy = _forward_proxy(plan)
    where = _describe(plan, proxy)
    try:
        async with asyncio.timeout(timeout_seconds):
            return await _dial(plan, proxy, reactor, settings, known or ProxyAddresses())
    except TimeoutError as error:
        patience = "" if timeout_seconds is None else f" in {timeout_seconds:g} s"
        raise DialTimedOutError(f"{where}: no answer{patience}") from error
    except PeerUntrustedError as error:
        raise ProxyUntrustedError(f"{where}: {error}") from error
    except (AlertReceivedError, _ClosedInHandshakeError) as error:
        raise DialRefusedError(f"{where}: {error}") from error
    except (ForwardProxyError, SshStreamLostError, _LostOnTheWayError) as error:
        raise ProxyUnreachableError(f"{where}: {error}") from error
    except NodeRefusedError as error:
        kind = _NODE_ERRORS.get(error.status, NodeUnreachableError)
        raise kind(f"{where}: {error}") from error
    except UpgradeError as error:
        raise UpgradeFailedError(f"{where}: {error}") from error
    except LayerError as error:
        raise HandshakeFailedError(f"{where}: {error}") from error
    except OSError as error:
        raise ProxyUnreachableError(f"{where}: {_reason(error)}") from error


def _forward_proxy(plan: DialPlan) -> ForwardProxy | None:
    if not plan.http_proxy:
        return None
    try:
        return parse_proxy(plan.http_proxy)
    except ForwardProxyError as error:
        raise ProxyUnreachableError(f"{_describe(plan, None)}: {error}") from error


def _describe(plan: DialPlan, proxy: ForwardProxy | None) -> str:
    where = f"{plan.host}:{plan.port}"
    if plan.ssh is not None:
        host = plan.ssh.host_port.removesuffix(":0")
        where = f"SSH host {host} of cluster {plan.ssh.cluster} at {where}"
    return where if proxy is None else f"{where} through the forward proxy {proxy}"


async def _dial(
    plan: DialPlan,
    proxy: ForwardProxy | None,
    reactor: Reactor,
    settings: DialSettings,
    known: ProxyAddresses,
) -> Upstream:
    memory = reactor.memory
    layer: Layer = Plain()
    tunnels: list[Tunnel] = []
    if plan.tls is not None:
        layer = TlsConnection(plan.tls.context, plan.tls.server_hostname, memory)
    if plan.upgrade is not None:
        outer = TlsConnection(plan.upgrade.context, plan.upgrade.server_hostname, memory)
        # An SSH connection may be silent for longer than a balancer waits.
        protocol = ALPN if plan.ssh is None else ALPN_PING
        request = ConnectionUpgrade(plan.host, plan.port, protocol=protocol)
        layer = Tunnel("connection upgrade", outer, request, WebSocketClient(), layer)
        tunnels.append(layer)
    if proxy is None:
        sock = await tcp.connect(plan.host, plan.port, known, settings)
    elif not proxy.is_tls:
        sock = await tcp.connect_through(proxy, plan.host, plan.port, known, settings)
    else:
        layer = await _inside_proxy(plan, proxy, layer, memory)
        tunnels.append(layer)
        sock = await tcp.connect(proxy.host, proxy.port, known, settings)
    if plan.ssh is not None:
        layer = SshStream(layer, plan.ssh)
    upstream = await _shake_hands(sock, layer, tunnels, reactor, settings)
    if plan.tls is not None and upstream.alpn is None:
        # Without a protocol a Teleport proxy takes the connection for HTTP.
        upstream.close()
        raise TlsError("no application protocol was chosen, as if TLS ended before the proxy")
    return upstream


async def _inside_proxy(
    plan: DialPlan, proxy: ForwardProxy, layer: Layer, memory: TlsMemory
) -> Tunnel:
    context = await asyncio.to_thread(_system_context)
    outer = TlsConnection(context, proxy.host, memory)
    request = ProxyConnect(plan.host, plan.port, proxy.authorization)
    return Tunnel("forward proxy", outer, request, Unframed(), layer)


@cache
def _system_context() -> ssl.SSLContext:
    """Trusts the system's authorities; to read them takes about 30 ms."""
    return ssl.create_default_context()


async def _shake_hands(
    sock: socket.socket,
    layer: Layer,
    tunnels: list[Tunnel],
    reactor: Reactor,
    settings: DialSettings,
) -> Upstream:
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(sock.close)
        upstream = Upstream(reactor, sock, layer, settings.max_early_bytes)
        try:
            await upstream.handshake()
        except (ConnectionError, TunnelClosedError) as error:
            for tunnel in reversed(tunnels):
                if not tunnel.is_open:
                    raise _LostOnTheWayError(f"{tunnel.name}: connection closed") from error
            if isinstance(layer, SshStream) and layer.is_carried:
                raise _LostOnTheWayError("connection closed before the host was reached") from error
            raise _ClosedInHandshakeError("connection closed during the TLS handshake") from error
        on_failure.pop_all()
        return upstream


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or not error.errno:
        return error.strerror or "connection lost"
    return os.strerror(error.errno)  # asyncio puts words of its own into strerror

"""One app or database through one local port, without TUN, DNS and root: `vnet proxy`.

    program --TCP--> 127.0.0.1:PORT    accepted at once; then as in VNet: certificate, dial, relay

A connection cannot be held back here until the dial is done, so one that fails is reset, and `tell`
gets the reason. So is one of another user. HTTP requests have to name the app or this machine, as
`workers.proxy.http_guard` says.
"""

import asyncio
import logging
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ipc.messages import HttpRules
from workers.proxy import dial
from workers.proxy.dial_plan import DialPlan, TlsPlan
from workers.proxy.guarded_relay import GuardedRelay
from workers.proxy.http_guard.guard import Guard
from workers.proxy.http_guard.rules import Rules, rules_for
from workers.proxy.local_peers import LocalPeers
from workers.proxy.proxy_addresses import ProxyAddresses
from workers.proxy.reactor import Reactor
from workers.proxy.refusal_log import RefusalLog
from workers.proxy.relay import Relay, RelayEnd, RelayOutcome
from workers.proxy.teleport.apps import App, check_port, valid_ports
from workers.proxy.teleport.errors import TeleportError
from workers.proxy.teleport.targets import AppTarget, DatabaseTarget
from workers.proxy.upstream import Upstream

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_CONNECTIONS = 1000
# Connect and handshakes with the proxy, without the certificate's issue.
DIAL_SECONDS = 10.0
BACKLOG = 128
# While the process has no descriptor left, for example.
ACCEPT_RETRY_SECONDS = 0.2
# How often repeated refusals are told as a number.
TELL_SECONDS = 5.0
_RESET = struct.pack("ii", 1, 0)


class PortError(Exception):
    """The port is none of the app's. The text says which there are."""


def choose_port(
    target: AppTarget | DatabaseTarget, wanted: int | None, local: int | None
) -> tuple[int, str]:
    """The port of the target to dial, and a note for the user, which may be empty. Pure.

    `wanted` is what the user asked for. Else it is the local port if the app has that one, else the
    app's first. A target without a list of ports takes any: 1 then, which it never sees.

    Raises:
        PortError: the app has no port `wanted`.
    """
    app = target.app if isinstance(target, AppTarget) else None
    if app is None or app.ports is None:
        if wanted is not None:
            what = f"app {app.name}" if app is not None else "a database"
            raise PortError(f"{what} has no list of ports: leave --port out")
        return 1, ""
    if wanted is not None:
        if not _has_port(app, wanted):
            raise PortError(f"app {app.name} has no port {wanted}: it has {valid_ports(app)}")
        return wanted, ""
    if local is not None and _has_port(app, local):
        return local, ""
    if not app.ports:
        raise PortError(f"app {app.name} has only ports that are none: ask your administrator")
    first = app.ports[0].first
    is_only = len(app.ports) == 1 and app.ports[0].last == first
    note = "" if is_only else f"port {first} of {valid_ports(app)}: choose another with --port"
    return first, note


def _has_port(app: App, port: int) -> bool:
    return isinstance(check_port(app.ports, port), int)


def listen(port: int) -> socket.socket:
    """A listening socket on loopback; port 0: any free one.

    Raises:
        OSError: the port is taken, or needs rights.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def http_rules(address: str) -> Rules | None:
    """What HTTP requests to a local port have to name: the app's address, or this machine. Pure."""
    return rules_for(address, HttpRules(hosts={address: ["localhost", HOST]}))


class LocalProxy:
    """Serves one listening socket; owns it, and `peers`."""

    def __init__(
        self,
        listener: socket.socket,
        plan: Callable[[], Awaitable[DialPlan]],
        tell: Callable[[str], None],
        *,
        peers: LocalPeers,
        rules: Rules | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """`plan` is asked for each connection and raises TeleportError; `tell` takes a sentence.

        Without `rules` HTTP requests pass like everything else.
        """
        self._listener = listener
        self._plan = plan
        self._tell = tell
        self._peers = peers
        self._rules = rules
        self._max_connections = max_connections
        self._loop = asyncio.get_running_loop()
        self._reactor = Reactor(self._loop)
        self._addresses = ProxyAddresses()
        self._refusals = RefusalLog()
        self._dialling: set[asyncio.Task[None]] = set()
        self._relays: set[Relay] = set()

    def __len__(self) -> int:
        """Connections that are dialled or relayed now."""
        return len(self._dialling) + len(self._relays)

    async def check_way(self, plan: DialPlan, web_context: ssl.SSLContext) -> None:
        """Whether the proxy's web port can be reached and is trusted, without using the app.

        `web_context` is for the web port itself, without a client certificate.

        Raises:
            DialError: it is not.
        """
        assert plan.tls is not None
        outermost = TlsPlan(web_context, plan.tls.server_hostname)
        way = DialPlan(plan.host, plan.port, outermost, http_proxy=plan.http_proxy)
        try:
            upstream = await dial.dial(way, DIAL_SECONDS, self._reactor, known=self._addresses)
        except dial.HandshakeFailedError:
            return  # trusted, but a load balancer need not know the protocol of a web page
        upstream.close()

    async def serve(self) -> None:
        """Accepts connections until it is cancelled."""
        telling = self._loop.create_task(self._tell_repeated())
        try:
            while True:
                try:
                    connection, _ = await self._loop.sock_accept(self._listener)
                except OSError as error:
                    self._note(f"a connection cannot be accepted: {error.strerror or error}")
                    await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                    continue
                self._accepted(connection)
        finally:
            telling.cancel()

    async def close(self) -> None:
        """Ends everything: connections are reset."""
        tasks = list(self._dialling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.reset_all()
        self._listener.close()
        self._peers.close()
        self._reactor.close()

    def reset_all(self) -> None:
        """Resets the connections that are relayed."""
        for relay in list(self._relays):
            relay.abort()

    def _accepted(self, connection: socket.socket) -> None:
        if len(self) >= self._max_connections:
            self._refuse(connection, f"{self._max_connections} connections are open already")
            return
        if problem := self._peers.problem(connection):
            self._refuse(connection, problem)
            return
        task = self._loop.create_task(self._carry(connection))
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _carry(self, connection: socket.socket) -> None:
        try:
            plan = await self._plan()
            upstream = await dial.dial(plan, DIAL_SECONDS, self._reactor, known=self._addresses)
        except (TeleportError, dial.DialError) as error:
            self._refuse(connection, str(error))
        except asyncio.CancelledError:
            _reset(connection)
            raise
        except Exception as error:
            log.exception("a connection could not be dialled")
            self._refuse(connection, f"internal error: {type(error).__name__}: {error}")
        else:
            self._join(connection, upstream)

    def _join(self, connection: socket.socket, upstream: Upstream) -> None:
        def on_end(outcome: RelayOutcome) -> None:
            self._ended(relay, outcome)

        relay: Relay
        if self._rules is None:
            relay = Relay(self._reactor, connection, upstream, on_end)
        else:
            guard = Guard(self._rules)
            relay = GuardedRelay(self._reactor, connection, upstream, on_end, guard)
        self._relays.add(relay)
        relay.start()
        if relay.is_over:
            self._relays.discard(relay)

    def _ended(self, relay: Relay, outcome: RelayOutcome) -> None:
        self._relays.discard(relay)
        if outcome.end is RelayEnd.BROKEN:
            self._note(f"a connection broke: {outcome.error}")
        elif outcome.end is RelayEnd.HTTP_REFUSED:
            self._note(
                f"an HTTP request was refused: {outcome.error}; --any-host lets all requests pass"
            )
        elif outcome.end in {RelayEnd.APP_CLOSED, RelayEnd.APP_RESET} and not outcome.bytes_down:
            # A cluster cannot say why it does not carry a connection.
            self._note(
                "a connection was ended by the other side, which sent nothing: the app may not run,"
                " or the cluster does not let you use it"
            )

    def _refuse(self, connection: socket.socket, why: str) -> None:
        _reset(connection)
        self._note(f"a connection was refused: {why}")

    def _note(self, line: str) -> None:
        if self._refusals.note(line, time.monotonic()):
            self._tell(line)

    async def _tell_repeated(self) -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            for line in self._refusals.due(time.monotonic()):
                self._tell(line)


def _reset(connection: socket.socket) -> None:
    with suppress(OSError):  # gone already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()

"""Dial before accept: each held SYN gets a verdict, each accepted connection its upstream.

    DialRequest --> DIALLING --verdict--> WAITING --accept--> relay
                       |                     |
                       +-- refused           +-- the program never came: closed after a while

The program's end is known by its (address, port) on both sides, so a connection that finds no
upstream here was admitted by a predecessor of this process, or by nobody: it is reset, and the
program connects again.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ipc.addresses import ipv4_twin
from ipc.messages import DialRequest, DialVerdict, Refusal
from workers.proxy import dial
from workers.proxy.book import BookError
from workers.proxy.listeners import NoListenerError, ProxyListeners, describe, flow_key
from workers.proxy.naming import Naming
from workers.proxy.proxy_addresses import ProxyAddresses
from workers.proxy.reactor import Reactor
from workers.proxy.relay import Relay, RelayOutcome
from workers.proxy.teleport.client import Teleport
from workers.proxy.teleport.errors import TeleportError
from workers.proxy.upstream import Upstream

log = logging.getLogger(__name__)

FlowKey = tuple[bytes, int, bytes, int]

# Connect and TLS handshake with the proxy, without the certificate's issue.
DIAL_SECONDS = 10.0
# The program's kernel repeats its SYN within this time if the first SYN-ACK was lost.
ACCEPT_SECONDS = 10.0
_RESET = struct.pack("ii", 1, 0)

_REFUSALS: dict[type[dial.DialError], Refusal] = {
    dial.DialTimedOutError: Refusal.TIMED_OUT,
    dial.DialRefusedError: Refusal.CERTIFICATE_REFUSED,
}


@dataclass(slots=True)
class _Waiting:
    upstream: Upstream
    name: str
    expiry: asyncio.TimerHandle


class Admission:
    """All connections of this proxy. At most `max_connections` dial, wait or relay at once."""

    def __init__(
        self,
        *,
        naming: Naming,
        teleport: Teleport,
        reactor: Reactor,
        answer: Callable[[DialVerdict], None],
        counters: dict[str, int],
        max_connections: int,
    ) -> None:
        self.listeners: ProxyListeners
        self._loop = asyncio.get_running_loop()
        self._naming = naming
        self._teleport = teleport
        self._reactor = reactor
        self._answer = answer
        self._counters = counters
        self._max_connections = max_connections
        self._addresses = ProxyAddresses()
        self._dialling: dict[int, asyncio.Task[None]] = {}
        self._waiting: dict[FlowKey, _Waiting] = {}
        self._relays: set[Relay] = set()
        self._bytes_of_ended = [0, 0]
        for name in ("connections_total", "connections_failed", "connections_orphaned"):
            counters[name] = 0
        self.count()

    # -- before the accept --

    def request(self, request: DialRequest) -> None:
        """A SYN is held: finds out whether it may pass."""
        if request.flow_id in self._dialling:
            return
        in_use = len(self._dialling) + len(self._waiting) + len(self._relays)
        if in_use >= self._max_connections:
            self._refuse(request, Refusal.TOO_MANY, f"{in_use} connections are open")
            return
        task = self._loop.create_task(self._admit(request))
        self._dialling[request.flow_id] = task
        task.add_done_callback(lambda _task: self._dialling.pop(request.flow_id, None))

    def abandon(self, flow_id: int) -> None:
        """The SYN was given up; what was dialled for it is closed."""
        if (task := self._dialling.get(flow_id)) is not None:
            task.cancel()

    def is_expected(self, address: bytes, port: int) -> bool:
        """Whether an admitted connection to this virtual address and port has yet to come."""
        return any(key[2:] == (address, port) for key in self._waiting)

    async def _admit(self, request: DialRequest) -> None:
        where = describe(request.destination, request.destination_port)
        try:
            name, upstream = await self._dial(request)
        except TeleportError as error:
            self._refuse(request, error.refusal, str(error))
        except dial.DialError as error:
            refusal = _REFUSALS.get(type(error), Refusal.CLUSTER_UNREACHABLE)
            self._refuse(request, refusal, str(error))
        except (NoListenerError, BookError) as error:
            self._refuse(request, Refusal.INTERNAL, str(error))
        except Exception:  # the outermost frame of the task; the program is told something
            log.exception("the dial for %s failed", where)
            self._refuse(request, Refusal.INTERNAL, "internal error, see the log")
        else:
            self._expect(request, name, upstream)
            self._answer(DialVerdict(flow_id=request.flow_id))

    async def _dial(self, request: DialRequest) -> tuple[str, Upstream]:
        name, target = await self._naming.target_of(ipv4_twin(request.destination))
        port = request.destination_port
        parameters = await self._teleport.dial_parameters(target, port)
        if parameters.is_conn_upgrade_required:
            raise dial.ProxyUnreachableError(
                f"{parameters.host} is behind a load balancer that ends TLS; this version cannot"
                " pass it"
            )
        await self.listeners.ensure(request.destination, port)
        upstream = await dial.dial(
            parameters.host,
            parameters.port,
            parameters.ssl_context,
            parameters.server_hostname,
            DIAL_SECONDS,
            self._reactor,
            known=self._addresses,
        )
        return name, upstream

    def _expect(self, request: DialRequest, name: str, upstream: Upstream) -> None:
        key = (
            request.source,
            request.source_port,
            request.destination,
            request.destination_port,
        )
        self._give_up(key)
        expiry = self._loop.call_later(ACCEPT_SECONDS, self._give_up, key)
        self._waiting[key] = _Waiting(upstream, name, expiry)

    def _give_up(self, key: FlowKey) -> None:
        if (waiting := self._waiting.pop(key, None)) is not None:
            waiting.expiry.cancel()
            waiting.upstream.close()

    def _refuse(self, request: DialRequest, refusal: Refusal, why: str) -> None:
        self._counters["connections_failed"] += 1
        where = describe(request.destination, request.destination_port)
        log.info("connection %d to %s refused (%s): %s", request.flow_id, where, refusal, why)
        self._answer(DialVerdict(flow_id=request.flow_id, refusal=refusal))

    # -- from the accept on --

    def accepted(self, connection: socket.socket) -> None:
        """Joins an accepted connection to the upstream that was dialled for it."""
        try:
            waiting = self._waiting.pop(flow_key(connection), None)
        except OSError:
            waiting = None  # gone already; its upstream is closed in time
        if waiting is None:
            self._counters["connections_orphaned"] += 1
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.close()
            return
        waiting.expiry.cancel()
        self._counters["connections_total"] += 1
        relay = Relay(
            self._reactor,
            connection,
            waiting.upstream,
            lambda outcome: self._ended(relay, waiting.name, outcome),
        )
        self._relays.add(relay)
        relay.start()
        if relay.is_over:
            self._relays.discard(relay)

    def _ended(self, relay: Relay, name: str, outcome: RelayOutcome) -> None:
        self._relays.discard(relay)
        self._bytes_of_ended[0] += outcome.bytes_up
        self._bytes_of_ended[1] += outcome.bytes_down
        log.debug(
            "connection to %s ended (%s, %d bytes sent, %d received) %s",
            name,
            outcome.end,
            outcome.bytes_up,
            outcome.bytes_down,
            outcome.error,
        )

    def count(self) -> None:
        """Brings the counters up to date."""
        self._counters["connections_now"] = len(self._relays)
        self._counters["dialling_now"] = len(self._dialling)
        self._counters["waiting_now"] = len(self._waiting)
        sent, received = self._bytes_of_ended
        self._counters["bytes_sent"] = sent + sum(relay.bytes_up for relay in self._relays)
        self._counters["bytes_received"] = received + sum(
            relay.bytes_down for relay in self._relays
        )

    async def close(self) -> None:
        """Ends everything at once: dials are cancelled, connections reset."""
        tasks = list(self._dialling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for key in list(self._waiting):
            self._give_up(key)
        for relay in list(self._relays):
            relay.abort()

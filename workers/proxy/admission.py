"""Dial before accept: each held SYN gets a verdict, each accepted connection its upstream.

    DialRequest --> DIALLING --verdict--> WAITING --accept--> relay, or SSH session
         |             |                     |
         |             +-- refused           +-- the program never came: closed after a while
         +-- refused: the program's user may not connect

    DIALLING: what the name stands for --> certificate, perhaps with a second factor --> listener
              --> proxy, for SSH through it to the host

A certificate for SSH is for one user of the host, so it is got later, when the program has said who
that is and proved that it may ask (`workers.proxy.ssh`).

What a stranger sends sets nothing going: no cluster is asked, and nobody (`workers.proxy.who`).

The program's end is known by its (address, port) on both sides, so a connection that finds no
upstream here was admitted by a predecessor of this process, or by nobody: it is reset, and the
program connects again.

What was dialled with a login ends with it: a logout cuts. An expired certificate does not.

A proxy that is replaced hands over: it takes no new question, finishes its dials and accepts what it
has admitted, for nobody else has the upstreams. What it has not answered then its successor is asked.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ipc.addresses import ipv4_twin
from ipc.connection_id import about
from ipc.log_limit import UNLIMITED
from ipc.messages import DialRequest, DialVerdict, HttpRules, Refusal
from workers.proxy import connection_targets, dial
from workers.proxy.book import BookError
from workers.proxy.connections import Ledger, Record
from workers.proxy.dial_plan import DialPlan
from workers.proxy.guarded_relay import GuardedRelay
from workers.proxy.http_guard.guard import Guard
from workers.proxy.http_guard.refusal import Refused
from workers.proxy.http_guard.rules import rules_for
from workers.proxy.listeners import NoListenerError, Place, ProxyListeners, describe, flow_key
from workers.proxy.long_waits import LongWaits
from workers.proxy.naming import Naming
from workers.proxy.proxy_addresses import ProxyAddresses
from workers.proxy.reactor import Reactor
from workers.proxy.refusal_log import RefusalLog
from workers.proxy.relay import Relay, RelayEnd, RelayOutcome
from workers.proxy.teleport.client import Teleport
from workers.proxy.teleport.errors import TeleportError, safe_text
from workers.proxy.teleport.ssh_credentials import SshCredentials
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    DatabaseTarget,
    NoSuchName,
    NotOurs,
    Owner,
    Resolution,
    WebApp,
)
from workers.proxy.undecided import Meaning, WebNames, error_of, meaning_of
from workers.proxy.upstream import Upstream
from workers.proxy.who import Doorbell, Stranger

log = logging.getLogger(__name__)

FlowKey = tuple[bytes, int, bytes, int]

# Connect and TLS handshake with the proxy, without the certificate's issue.
DIAL_SECONDS = 10.0
# A proxy that restarts closes connections for a moment, and another one behind the same address
# takes them (a cluster's proxies also forward to each other, which fails as briefly).
RETRY_SECONDS = 0.25
# How often those who wait too long for a certificate are looked for.
THIN_SECONDS = 1.0
# The program's kernel repeats its SYN within this time if the first SYN-ACK was lost.
ACCEPT_SECONDS = 10.0
# SSH connections of programs that have not proved who they are, and at most half of all. Whoever may
# log in does so in well under a second; the one that takes longest makes room for the next.
MAX_STRANGERS = 1000
# Lines of the log about users that may not connect, in its window: they must not crowd out the others.
MAX_KINDS_OF_STRANGERS = 20
_RESET = struct.pack("ii", 1, 0)
# What is shown of attempts that count as neither.
_ABANDONED = (
    "given up before it was decided: the program or this worker went away, or it took too long"
)
_NEVER_CAME = "admitted, but the program never came"

_REFUSALS: dict[type[dial.DialError], Refusal] = {
    dial.DialTimedOutError: Refusal.TIMED_OUT,
    dial.DialRefusedError: Refusal.CERTIFICATE_REFUSED,
    dial.NodeUnreachableError: Refusal.NODE_UNREACHABLE,
    dial.NodeDeniedError: Refusal.ACCESS_DENIED,
    dial.LoginRefusedError: Refusal.NOT_LOGGED_IN,
}
# What tells of the proxy as a whole, and not of the app or host behind it.
_NOT_REACHED = (
    dial.ProxyUnreachableError,
    dial.DialTimedOutError,
    dial.ProxyUntrustedError,
    dial.HandshakeFailedError,
    dial.UpgradeFailedError,
)
_MAX_HOST = 100  # of a wrong one in a log line
_FAILED = (RelayEnd.BROKEN, RelayEnd.APP_RESET)


class Connection(Protocol):
    """A program's connection joined to its upstream: a relay, or an SSH session."""

    @property
    def bytes_up(self) -> int: ...

    @property
    def bytes_down(self) -> int: ...

    @property
    def is_over(self) -> bool: ...

    def start(self) -> None: ...

    def abort(self) -> None: ...


# What an SSH session asks for once it knows the user name: the credentials to log in with.
AskCredentials: TypeAlias = Callable[[str], Awaitable[SshCredentials]]


class OpenSsh(Protocol):
    """Makes an SSH session of an accepted connection, as `Relay` a relay.

    `name` is the host's, `about` is for log lines.
    """

    def __call__(
        self,
        reactor: Reactor,
        connection: socket.socket,
        upstream: Upstream,
        *,
        name: str,
        about: Mapping[str, str],
        credentials: AskCredentials,
        on_end: Callable[[RelayOutcome], None],
    ) -> Connection: ...


class _CrowdedError(TeleportError):
    """Too many connections wait for one certificate."""

    refusal = Refusal.TOO_MANY


class _LoginEndedError(TeleportError):
    """The login that a dial uses has ended."""

    refusal = Refusal.NOT_LOGGED_IN


class _Dial:
    """One held SYN. `owner` is None as long as no login is used."""

    __slots__ = (
        "host",
        "is_over",
        "may_be_http",
        "name",
        "owner",
        "profile",
        "record",
        "request",
        "task",
    )

    def __init__(self, request: DialRequest) -> None:
        self.request = request
        self.name = ""
        self.profile = ""  # whose proxy is dialled, as soon as that is known
        self.owner: Owner | None = None
        self.host: ClusterTarget | None = None  # set for SSH
        self.may_be_http = False
        self.task: asyncio.Task[None] | None = None
        self.is_over = False  # a verdict was given, or nobody wants one
        self.record: Record  # as soon as it is worked on

    @property
    def key(self) -> FlowKey:
        """Both ends, as the accepted connection has them."""
        request = self.request
        return (
            request.source,
            request.source_port,
            request.destination,
            request.destination_port,
        )

    @property
    def where(self) -> str:
        """For log lines: the name as soon as it is known."""
        address = describe(self.request.destination, self.request.destination_port)
        return f"{self.name} at {address}" if self.name else address

    @property
    def about(self) -> dict[str, str]:
        """For log lines: which connection they are about."""
        return about(self.request.flow_id)


@dataclass(slots=True)
class _Waiting:
    upstream: Upstream
    dial: _Dial
    expiry: asyncio.TimerHandle


class Admission:
    """All connections of this proxy. At most `max_connections` dial, wait or relay at once.

    `max_long_waits` of them may wait long for a certificate. `is_probe(address, port)` tells the
    supervisor's question whether this proxy works from a connection. Without `open_ssh` there is no
    SSH here.
    """

    def __init__(
        self,
        *,
        doorbell: Doorbell,
        naming: Naming,
        teleport: Teleport,
        reactor: Reactor,
        answer: Callable[[DialVerdict], None],
        is_probe: Callable[[bytes, int], bool],
        counters: dict[str, int],
        max_connections: int,
        max_long_waits: int,
        open_ssh: OpenSsh | None = None,
        http: HttpRules,
    ) -> None:
        self.listeners: ProxyListeners
        self.http = http  # for connections that are accepted from now on
        self.ledger = Ledger()
        self._loop = asyncio.get_running_loop()
        self._doorbell = doorbell
        self._naming = naming
        self._teleport = teleport
        self._reactor = reactor
        self._answer = answer
        self._is_probe = is_probe
        self._counters = counters
        self._max_connections = max_connections
        self._open_ssh = open_ssh
        self._addresses = ProxyAddresses()
        self._web_names = WebNames()
        self._long_waits: LongWaits[_Dial] = LongWaits(max_total=max_long_waits)
        self._thinning: asyncio.TimerHandle | None = None
        self._refusal_log = RefusalLog()
        self._stranger_log = RefusalLog(max_kinds=MAX_KINDS_OF_STRANGERS)
        # Of its own: web pages may choose the names in it.
        self._request_log = RefusalLog()
        self._dialling: dict[int, _Dial] = {}
        self._waiting: dict[FlowKey, _Waiting] = {}
        self._relays: dict[Connection, Owner | None] = {}
        # SSH sessions that have not asked for credentials, the oldest first.
        self._strangers: dict[Connection, None] = {}
        self._max_strangers = max(1, min(MAX_STRANGERS, max_connections // 2))
        self._is_leaving = False
        # Set whenever one of the three tables has become smaller.
        self._shrunk = asyncio.Event()
        self._bytes_of_ended = [0, 0]
        for name in ("connections_total", "connections_failed", "connections_orphaned", "probes"):
            counters[name] = 0
        counters["http_refused"] = counters["refused_users"] = 0
        self.count()

    # -- before the accept --

    def request(self, request: DialRequest) -> None:
        """A SYN is held: finds out whether it may pass. May be asked again before the answer."""
        if request.flow_id in self._dialling:
            return
        wanted = _Dial(request)
        waiting = self._waiting.get(wanted.key)
        if waiting is not None and waiting.dial.request.flow_id == request.flow_id:
            # The verdict was lost, or crossed the question.
            self._answer(DialVerdict(flow_id=request.flow_id))
            return
        if self._is_leaving:
            return  # the successor is asked
        if self._is_probe(request.destination, request.destination_port):
            self._counters["probes"] += 1
            self._answer(DialVerdict(flow_id=request.flow_id, refusal=Refusal.PROBE))
            return
        wanted.record = self.ledger.begins(request)
        if (stranger := self._doorbell.stranger(request)) is not None:
            with suppress(TeleportError, BookError):
                entry = self._naming.entry_of(ipv4_twin(request.destination))
                wanted.name = entry.name
                self.ledger.leads_to(wanted.record, connection_targets.booked(entry))
            self._turn_away(wanted, stranger)
            return
        in_use = len(self._dialling) + len(self._waiting) + len(self._relays)
        if in_use >= self._max_connections:
            why = f"{self._max_connections} connections are open, which is the limit"
            self._refuse(wanted, Refusal.TOO_MANY, why)
            return
        self._dialling[request.flow_id] = wanted
        wanted.task = self._loop.create_task(self._admit(wanted))
        wanted.task.add_done_callback(lambda _task: self._forget(wanted))

    def _turn_away(self, wanted: _Dial, stranger: Stranger) -> None:
        self._answer_no(wanted, Refusal.USER_NOT_ALLOWED, self._tell_stranger(wanted, stranger))

    def _tell_stranger(self, wanted: _Dial, stranger: Stranger) -> str:
        """Counts and logs it; the sentence for the list."""
        self._counters["refused_users"] += 1
        refusal, who = Refusal.USER_NOT_ALLOWED, f" from {stranger.who}" if stranger.who else ""
        # Without the program's port, so that repetitions are counted.
        line = f"connection{who} to {wanted.where} refused ({refusal}): {stranger.why}"
        self._tell_refusal(self._stranger_log, line, wanted)
        return f"connection{who} (port {wanted.request.source_port}): {stranger.why}"

    def abandon(self, flow_id: int) -> None:
        """The SYN was given up; what was dialled for it is closed."""
        if (wanted := self._dialling.get(flow_id)) is not None:
            self._stop(wanted)

    def is_expected(self, address: bytes, port: int) -> bool:
        """Whether an admitted connection to this virtual address and port has yet to come."""
        return any(key[2:] == (address, port) for key in self._waiting)

    def _forget(self, wanted: _Dial) -> None:
        if self._dialling.get(wanted.request.flow_id) is wanted:
            del self._dialling[wanted.request.flow_id]
            self._shrunk.set()

    async def _admit(self, wanted: _Dial) -> None:
        try:
            upstream = await self._dial(wanted)
        except TeleportError as error:
            self._refuse(wanted, error.refusal, str(error))
        except dial.DialError as error:
            self._refuse(wanted, _refusal_of(error), str(error))
            if isinstance(error, _NOT_REACHED):
                # A certificate that is kept lets nobody else notice for minutes.
                self._teleport.doubt(wanted.profile)
        except (NoListenerError, BookError) as error:
            self._refuse(wanted, Refusal.INTERNAL, str(error))
        except Exception:  # the outermost frame of the task; the program is told something
            log.exception("the dial for %s failed", wanted.where, extra=wanted.about)
            self._refuse(wanted, Refusal.INTERNAL, "internal error, see the log")
        else:
            self._expect(wanted, upstream)

    async def _dial(self, wanted: _Dial) -> Upstream:
        request = wanted.request
        entry = self._naming.entry_of(ipv4_twin(request.destination))
        wanted.name = entry.name
        self.ledger.leads_to(wanted.record, connection_targets.booked(entry))
        port = request.destination_port
        profile = self._web_names.profile_of(entry.name, port, self._loop.time())
        if profile is not None:
            wanted.profile = profile
            self.ledger.leads_to(wanted.record, connection_targets.web(entry.name, profile))
            wanted.may_be_http = True
            plan = self._teleport.web_plan(profile)
        else:
            plan = await self._decide(wanted, await self._naming.meaning_of(entry))
        await self.listeners.ensure(request.destination, port)
        return await self._connect(wanted, plan)

    async def _decide(self, wanted: _Dial, found: Resolution) -> DialPlan:
        port = wanted.request.destination_port
        web_port = None
        if not isinstance(found, NotOurs | NoSuchName):
            wanted.profile = found.profile
            web_port = self._teleport.web_port(found.profile)
        meaning = meaning_of(found, port, web_port)
        target = connection_targets.meant(wanted.name, meaning, found, port)
        if target is not None:
            self.ledger.leads_to(wanted.record, target)
        wanted.may_be_http = meaning is not Meaning.SSH and not isinstance(found, DatabaseTarget)
        match meaning, found:
            case Meaning.DIAL, AppTarget() | DatabaseTarget():
                return await self._certified(wanted, found)
            case Meaning.RELAY, WebApp():
                return self._teleport.web_plan(found.profile)
            case Meaning.RELAY_FOR_NOW, ClusterTarget():
                plan = self._teleport.web_plan(found.profile)
                self._web_names.remember(wanted.name, port, found.profile, self._loop.time())
                return plan
            case Meaning.SSH, ClusterTarget() if self._open_ssh is not None:
                wanted.owner = self._teleport.owner(found.profile)
                wanted.host = found
                return await self._teleport.ssh_plan(found)
            case _:
                raise error_of(meaning, web_port)

    async def _certified(self, wanted: _Dial, target: AppTarget | DatabaseTarget) -> DialPlan:
        """The plan with a certificate in it, which a person may have to be asked for."""
        wanted.owner = self._teleport.owner(target.profile)
        if not self._long_waits.enter(wanted.name, wanted, self._loop.time()):
            raise _crowded(wanted)
        if self._thinning is None:
            self._thinning = self._loop.call_later(THIN_SECONDS, self._thin_out)
        try:
            return await self._teleport.plan(target, wanted.request.destination_port)
        finally:
            self._long_waits.leave(wanted.name, wanted)

    def _thin_out(self) -> None:
        self._thinning = None
        for wanted in self._long_waits.surplus(self._loop.time()):
            self._refuse(wanted, *_told(_crowded(wanted)))
            self._stop(wanted)
        if len(self._long_waits):
            self._thinning = self._loop.call_later(THIN_SECONDS, self._thin_out)

    async def _connect(self, wanted: _Dial, plan: DialPlan) -> Upstream:
        """Dials; once more when the proxy was there and went away. DIAL_SECONDS for both."""
        deadline = self._loop.time() + DIAL_SECONDS
        try:
            return await dial.dial(plan, DIAL_SECONDS, self._reactor, known=self._addresses)
        except (dial.ProxyUnreachableError, dial.DialRefusedError) as error:
            left = deadline - self._loop.time() - RETRY_SECONDS
            if left <= 0:
                raise
            log.debug("dialled once more: %s", error, extra=wanted.about)
        await asyncio.sleep(RETRY_SECONDS)
        return await dial.dial(plan, left, self._reactor, known=self._addresses)

    def _expect(self, wanted: _Dial, upstream: Upstream) -> None:
        if wanted.is_over:  # stopped in the turn in which it succeeded
            upstream.close()
            return
        if (stranger := self._doorbell.stranger(wanted.request)) is not None:
            upstream.close()
            if stranger.is_gone:
                self._lose(wanted)
            else:
                self._turn_away(wanted, stranger)
            return
        wanted.is_over = True
        # Before the verdict: the program's next SYN may be here before the task has ended.
        self._forget(wanted)
        self._give_up(wanted.key)
        expiry = self._loop.call_later(ACCEPT_SECONDS, self._give_up, wanted.key)
        self._waiting[wanted.key] = _Waiting(upstream, wanted, expiry)
        log.debug("connection to %s admitted", wanted.where, extra=wanted.about)
        self._answer(DialVerdict(flow_id=wanted.request.flow_id))

    def _lose(self, wanted: _Dial) -> None:
        """The program has gone away while this was dialled."""
        wanted.is_over = True
        self.ledger.cancelled(wanted.record, _ABANDONED)
        # Should somebody else be there by now.
        self._answer(DialVerdict(flow_id=wanted.request.flow_id, refusal=Refusal.TIMED_OUT))

    def _give_up(self, key: FlowKey, why: str = _NEVER_CAME) -> None:
        if (waiting := self._waiting.pop(key, None)) is not None:
            self.ledger.cancelled(waiting.dial.record, why)
            waiting.expiry.cancel()
            waiting.upstream.close()
            self._shrunk.set()

    def _refuse(self, wanted: _Dial, refusal: Refusal, why: str) -> None:
        if wanted.is_over:
            return
        line = f"connection to {wanted.where} refused ({refusal}): {why}"
        self._tell_refusal(self._refusal_log, line, wanted)
        self._answer_no(wanted, refusal, why)

    def _answer_no(self, wanted: _Dial, refusal: Refusal, why: str) -> None:
        wanted.is_over = True
        self._counters["connections_failed"] += 1
        self.ledger.refused(wanted.record, refusal, why)
        self._answer(DialVerdict(flow_id=wanted.request.flow_id, refusal=refusal))

    def _tell_refused_request(self, refused: Refused, wanted: _Dial) -> None:
        host = f" for Host '{safe_text(refused.host, _MAX_HOST)}'" if refused.host else ""
        line = f"HTTP request{host} at {wanted.name} refused: {refused.reason}"
        self._tell_refusal(self._request_log, line, wanted)

    def _tell_refusal(self, told: RefusalLog, line: str, wanted: _Dial) -> None:
        if told.note(line, self._loop.time()):
            log.info("%s", line, extra={**UNLIMITED, **wanted.about})
        else:
            log.debug("%s", line, extra=wanted.about)

    def _stop(self, wanted: _Dial) -> None:
        wanted.is_over = True
        self.ledger.cancelled(wanted.record, _ABANDONED)
        self._long_waits.leave(wanted.name, wanted)
        if wanted.task is not None:
            wanted.task.cancel()

    # -- the end of a login --

    def cut(self, owner: Owner) -> None:
        """Ends at once whatever was made with a login that is gone."""
        self._web_names.forget(owner.profile)
        error = _LoginEndedError(f"the login of {owner.user} at {owner.profile} has ended")
        dials = [d for d in self._dialling.values() if d.owner == owner and not d.is_over]
        for wanted in dials:
            self._refuse(wanted, *_told(error))
            self._stop(wanted)
        keys = [key for key, waiting in self._waiting.items() if waiting.dial.owner == owner]
        for key in keys:
            self._give_up(key, str(error))
        relays = [relay for relay, used in self._relays.items() if used == owner]
        for relay in relays:
            relay.abort()
        if number := len(dials) + len(keys) + len(relays):
            log.info("%s, which cuts connections: %d", error, number)

    # -- from the accept on --

    def accepted(self, connection: socket.socket, place: Place) -> None:
        """Joins an accepted connection to the upstream that was dialled for it.

        `place` is the virtual address and port of the listener that took it.
        """
        try:
            key = flow_key(connection, place)
        except OSError:
            key = None  # gone already; its upstream is closed in time
        waiting = None if key is None else self._waiting.pop(key, None)
        if waiting is None:
            self._counters["connections_orphaned"] += 1
            _reset(connection)
            return
        waiting.expiry.cancel()
        self._shrunk.set()
        if (stranger := self._doorbell.taker(waiting.dial.request)) is not None:
            self._counters["connections_failed"] += 1
            why = self._tell_stranger(waiting.dial, stranger)
            self.ledger.refused(waiting.dial.record, Refusal.USER_NOT_ALLOWED, why)
            waiting.upstream.close()
            _reset(connection)
            return
        self._counters["connections_total"] += 1
        relay = self._join(connection, waiting)
        self._relays[relay] = waiting.dial.owner
        self.ledger.accepted(waiting.dial.record, relay)
        if waiting.dial.host is not None:
            self._take_in(relay)
        relay.start()
        if relay.is_over:
            self._relays.pop(relay, None)
            self._strangers.pop(relay, None)

    def _take_in(self, session: Connection) -> None:
        if len(self._strangers) >= self._max_strangers:
            log.warning(
                "%d SSH connections have not logged in, which is the limit: the oldest is cut",
                self._max_strangers,
            )
            next(iter(self._strangers)).abort()
        self._strangers[session] = None

    def _join(self, connection: socket.socket, waiting: _Waiting) -> Connection:
        wanted, host = waiting.dial, waiting.dial.host

        def on_end(outcome: RelayOutcome) -> None:
            self._ended(joined, wanted, outcome)

        joined: Connection
        if host is None:
            rules = rules_for(wanted.name, self.http) if wanted.may_be_http else None
            if rules is None:
                joined = Relay(self._reactor, connection, waiting.upstream, on_end)
            else:
                guard = Guard(rules)
                joined = GuardedRelay(self._reactor, connection, waiting.upstream, on_end, guard)
            return joined
        assert self._open_ssh is not None

        async def credentials(login: str) -> SshCredentials:
            self._strangers.pop(joined, None)
            return await self._teleport.ssh_credentials(host, login)

        joined = self._open_ssh(
            self._reactor,
            connection,
            waiting.upstream,
            name=wanted.name,
            about=wanted.about,
            credentials=credentials,
            on_end=on_end,
        )
        return joined

    def _ended(self, relay: Connection, wanted: _Dial, outcome: RelayOutcome) -> None:
        self._relays.pop(relay, None)
        self._strangers.pop(relay, None)
        self._shrunk.set()
        self._bytes_of_ended[0] += outcome.bytes_up
        self._bytes_of_ended[1] += outcome.bytes_down
        self.ledger.ended(wanted.record, outcome)
        if isinstance(relay, GuardedRelay) and relay.refused is not None:
            self._counters["http_refused"] += 1
            self._tell_refused_request(relay.refused, wanted)
        # Few SSH clients show why a session failed.
        is_shown = wanted.host is not None and outcome.end in _FAILED
        log.log(
            logging.INFO if is_shown else logging.DEBUG,
            "connection to %s ended (%s, %d bytes sent, %d received) %s",
            wanted.name,
            outcome.end,
            outcome.bytes_up,
            outcome.bytes_down,
            outcome.error,
            extra=wanted.about,
        )

    @property
    def connections(self) -> int:
        """How many are relayed now."""
        return len(self._relays)

    def count(self) -> None:
        """Brings the counters up to date, and tells of refusals that were only counted."""
        now = self._loop.time()
        for told in (self._refusal_log, self._stranger_log, self._request_log):
            for line in told.due(now):
                log.info("%s", line, extra=UNLIMITED)
        self._counters["connections_now"] = len(self._relays)
        self._counters["dialling_now"] = len(self._dialling)
        self._counters["waiting_now"] = len(self._waiting)
        sent, received = self._bytes_of_ended
        self._counters["bytes_sent"] = sent + sum(relay.bytes_up for relay in self._relays)
        self._counters["bytes_received"] = received + sum(
            relay.bytes_down for relay in self._relays
        )

    # -- the end of this process --

    async def hand_over(self, seconds: float) -> None:
        """Takes no new question; returns when nothing is dialled or has yet to be accepted.

        What takes longer than `seconds` is given up without a verdict.
        """
        self._is_leaving = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._dialling or self._waiting:
                    await self._shrink()
        await self._give_up_all()

    async def finished(self) -> None:
        """Returns when no connection is relayed; what was handed over cannot become another."""
        while self._relays:
            await self._shrink()

    async def _shrink(self) -> None:
        self._shrunk.clear()
        await self._shrunk.wait()

    async def _give_up_all(self) -> None:
        dials = list(self._dialling.values())
        for wanted in dials:
            self._stop(wanted)
        tasks = [wanted.task for wanted in dials if wanted.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        for key in list(self._waiting):
            self._give_up(key)

    async def close(self) -> None:
        """Ends everything at once: dials are cancelled, connections reset."""
        if self._thinning is not None:
            self._thinning.cancel()
        await self._give_up_all()
        for relay in list(self._relays):
            relay.abort()


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


def _crowded(wanted: _Dial) -> _CrowdedError:
    return _CrowdedError(
        f"others wait for a certificate for {wanted.name} already; if that takes a second factor,"
        " vnet mfa answers"
    )


def _refusal_of(error: dial.DialError) -> Refusal:
    """The refusal of the most special class that has one."""
    refusals = (_REFUSALS[kind] for kind in type(error).__mro__ if kind in _REFUSALS)
    return next(refusals, Refusal.CLUSTER_UNREACHABLE)


def _told(error: TeleportError) -> tuple[Refusal, str]:
    return error.refusal, str(error)

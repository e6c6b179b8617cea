"""Joins an SSH client of this machine to a node, as a server towards the one, a client to the other.

    program --SSH--> [local leg]  session  [upstream leg] --SSH in the upstream's layer--> node

What happens when:

    versions, key exchange      in both legs at once; nothing of it depends on who the program is
    the program logs in         only with the trusted key; a probe without a signature, and a
                                signature that is wrong, cause nothing on the other side
    its signature is right,     the credentials are asked for (which may take a second factor), the
    and the node is there       node's host certificate is checked, the user logs in at the node
    the node has answered       so is the program: it is in, or a banner says why not
    from then on                connection messages (80 to 100) pass in both directions

Connection messages pass as they are, channel numbers included: each end counts its own channels and
is told the other's numbers by the other end (RFC 4254 section 5.1), there is one connection on each
side, and VNet opens no channels and sends no requests of its own. So both ends see what they would
see without it, in the same order, and windows, request replies and everything that is yet to be
invented work between them. Held back is only what would name the node's host keys.

It all happens in callbacks on non-blocking sockets, in the event loop; an open session costs no task
and no thread. A leg is not read while too much waits to be sent on the other, and its connection
messages wait while the other exchanges keys (RFC 4253 section 7.1). Two such waits cannot block each
other: VNet begins a key exchange only when there is none on the other leg, and a peer that has begun
one itself sends nothing else until it is over.
"""

import asyncio
import base64
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from workers.proxy.endpoint import Endpoint, reason_of
from workers.proxy.layers import LayerError
from workers.proxy.reactor import Reactor
from workers.proxy.relay import RelayEnd, RelayOutcome
from workers.proxy.ssh import messages
from workers.proxy.ssh.codec import MAX_OVERHEAD_BYTES, MAX_PACKET_BYTES
from workers.proxy.ssh.host_certificate import HostCertificate
from workers.proxy.ssh.legs import Leg, SshMemory
from workers.proxy.ssh.signatures import CERTIFICATE_ENDING
from workers.proxy.ssh.transport import (
    ED25519,
    ClientTransport,
    ServerTransport,
    ShownKey,
)
from workers.proxy.teleport.errors import TeleportError, safe_text
from workers.proxy.teleport.ssh_credentials import SshCredentials
from workers.proxy.upstream import Upstream

log = logging.getLogger(__name__)

_MEMORY = SshMemory()
# A program that logs in and opens its first channel has sent less.
_QUICK_BYTES = 16 * 1024
_MAX_PACKETS = 2**31  # under the same keys; RFC 4344 section 3.1


class ShownHostKeys(Protocol):
    """The host keys of one connection: a certificate, one OpenSSH line, and a plain key."""

    @property
    def certificate_line(self) -> bytes: ...
    @property
    def certificate_key(self) -> Ed25519PrivateKey: ...
    @property
    def plain_key(self) -> Ed25519PrivateKey: ...


class Identity(Protocol):
    """Who VNet is for the program, and who the program may be."""

    def host_key_for(self, name: str) -> ShownHostKeys:
        """Host keys for the name that the program asked for."""

    def is_trusted(self, key_blob: bytes) -> bool:
        """Whether who holds this key may log in."""


@dataclass(frozen=True, slots=True)
class SshSettings:
    """Figures of a session; the defaults suit every real use."""

    login_seconds: float = 120.0  # until the program has proved its key, as sshd gives
    node_seconds: float = 30.0  # for the node's key exchange, and for its answer to the login
    offer_seconds: float = 0.1  # a program that says by then what it knows gets the best of that
    refused_seconds: float = 10.0  # for the program to go after it was refused
    linger_seconds: float = 5.0  # for a peer to go after it was told to
    patience_seconds: float = 600.0  # for a program to take what was sent to it at the end
    max_pending_bytes: int = 512 * 1024  # waiting to be sent on a leg before the other is paused
    max_unread_bytes: int = 1024 * 1024  # beyond that only answers of ours can be waiting
    max_waiting_bytes: int = 64 * 1024  # that a program may send while its login is decided
    max_early_packets: int = 200  # on each leg, before the login
    max_banners: int = 16  # of the node, for the program
    # RFC 4253 section 9.
    rekey_bytes: int = 1024**3
    rekey_seconds: float = 3600.0


class _Phase(Enum):
    LOGIN = auto()
    REFUSED = auto()  # the program has been told; it may go in its own time
    OPEN = auto()
    ENDING = auto()  # what was sent is delivered, then the connections are closed
    OVER = auto()


class SshSession:
    """One program's SSH connection and its node; owns both sockets from `start` on."""

    __slots__ = (
        "__weakref__",
        "_about",
        "_credentials",
        "_denial",
        "_end",
        "_error",
        "_identity",
        "_is_asked",
        "_local",
        "_loop",
        "_memory",
        "_name",
        "_node_answer",
        "_node_banners",
        "_node_problem",
        "_node_ready",
        "_on_end",
        "_phase",
        "_settings",
        "_task",
        "_timers",
        "_upstream",
        "_way",
        "bytes_up",
    )

    def __init__(
        self,
        reactor: Reactor,
        connection: socket.socket,
        upstream: Upstream,
        *,
        name: str,
        about: Mapping[str, str],
        identity: Identity,
        credentials: Callable[[str], Awaitable[SshCredentials]],
        on_end: Callable[[RelayOutcome], None],
        settings: SshSettings = SshSettings(),
    ) -> None:
        """`connection` is connected and non-blocking; `name` is what the program connected to.

        `about` is which connection log lines are about, see `ipc.connection_id`.

        `credentials(user)` is awaited at most once, when the program has proved its key; it raises
        TeleportError with what the user is told. `on_end` is called exactly once. Must be made in a
        running event loop.
        """
        self._loop = asyncio.get_running_loop()
        self._memory = reactor.memory
        self._name = name
        self._about = about
        self._identity = identity
        self._credentials = credentials
        self._on_end = on_end
        self._settings = settings
        self._way = upstream
        self._local = Leg(Endpoint(reactor, connection), None, is_server=False)
        self._upstream = Leg(upstream.endpoint, upstream.layer, is_server=True)
        self._phase = _Phase.LOGIN
        self._is_asked = False  # for the credentials
        # Each is done with "", or with what went wrong; both when the node is lost.
        self._node_ready: asyncio.Future[str] = self._loop.create_future()
        self._node_answer: asyncio.Future[str] = self._loop.create_future()
        self._node_banners = 0
        self._node_problem = ""  # it was lost before the program was let in
        self._task: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._end: RelayEnd | None = None
        self._error = ""
        self._denial = ""  # what the user is told when the node refuses
        self.bytes_up = 0

    @property
    def is_over(self) -> bool:
        """Whether `on_end` has been called."""
        return self._phase is _Phase.OVER

    @property
    def bytes_down(self) -> int:
        """Sent to the program, as SSH packets; `bytes_up` is what it sent."""
        return self._local.sent_bytes

    def start(self) -> None:
        """Takes the upstream and begins; `on_end` may be called before this returns."""
        early = self._way.take()
        local, upstream = self._local, self._upstream
        keys = self._identity.host_key_for(self._name)
        local.transport = ServerTransport(
            local, self, f"{self._name}, program", self._about, _shown(keys)
        )
        upstream.transport = ClientTransport(
            upstream, f"{self._name}, node", self._about, self._on_banner
        )
        local.make_quick()
        local.endpoint.reset_when_killed()
        local.endpoint.attach(
            self._on_local_readable,
            lambda: self._on_clear(local, upstream),
            lambda _: self._on_send_error(local),
        )
        upstream.endpoint.attach(
            self._on_upstream_readable,
            lambda: self._on_clear(upstream, local),
            lambda _: self._on_send_error(upstream),
        )
        self._later(self._settings.login_seconds, self._on_login_timeout)
        self._later(self._settings.node_seconds, self._on_node_timeout)
        local.greet()
        upstream.greet()
        # RFC 4253 section 4.2: there is nothing to wait for.
        upstream.transport.offer_keys()
        local.endpoint.resume()
        upstream.endpoint.resume()
        if early:
            self._take(upstream, local, memoryview(early))
        if self._way.error:
            self._on_lost(upstream, self._way.error)
        elif self._way.is_ended:
            self._on_end_of(upstream, local)

    def abort(self) -> None:
        """Resets both connections at once."""
        if self._phase is not _Phase.OVER:
            self._end = RelayEnd.ABORTED
            self._local.reset()
            self._upstream.reset()
            self._report()

    # What `ServerTransport` asks about logins.

    def is_trusted(self, key_blob: bytes) -> bool:
        """Whether this public key may log in at all."""
        return self._identity.is_trusted(key_blob)

    def on_verified(self, user: str) -> None:
        """The program has proved that it holds the trusted key."""
        if self._is_asked:  # and refused, or it would not ask again
            self._local.transport.answer_login(is_granted=False)
            return
        self._is_asked = True
        self._local.is_halted = True
        self._task = self._loop.create_task(self._log_in(user))

    # The login at the node.

    async def _log_in(self, user: str) -> None:
        try:
            problem = await self._node_login(user) or self._node_problem
        except Exception:  # a mistake of ours: the program must still be answered
            log.exception("logging in at %s failed", self._name, extra=self._about)
            problem = "the login could not be done; `vnet logs` may say why"
        self._task = None
        if self._phase is not _Phase.LOGIN:
            return
        if problem:
            self._refuse(problem)
        else:
            self._open()

    async def _node_login(self, user: str) -> str:
        """Logs in at the node; what the user is told if that fails."""
        # First, so that nobody is asked for a second factor in vain; it has its own limit of time.
        if problem := await self._node_ready or self._node_problem:
            return problem
        asking = asyncio.ensure_future(self._credentials(user))
        # Taken note of, also when nobody waits any more.
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        waited: tuple[asyncio.Future[Any], ...] = (asking, self._node_answer)
        try:
            # When the node goes meanwhile, a second factor would be given in vain.
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return await self._node_answer
            credentials = asking.result()
        except TeleportError as error:
            return str(error)
        finally:
            asking.cancel()
        try:
            async with asyncio.timeout(self._settings.node_seconds):
                self._ask_node(credentials)
                return await self._node_answer
        except TimeoutError:
            return "the node does not answer the login"
        except LayerError as error:
            return str(error)

    def _ask_node(self, credentials: SshCredentials) -> None:
        def trust(shown: HostCertificate) -> None:
            shown.check(credentials.host, credentials.host_authorities, time.time())

        self._denial = f"access denied to {credentials.user} connecting to {credentials.host}"
        self._upstream.transport.log_in(
            credentials.user,
            credentials.private_key,
            base64.b64decode(credentials.certificate.split()[1]),
            trust,
        )

    def _open(self) -> None:
        """Both are logged in."""
        self._phase = _Phase.OPEN
        self._stop_timers()
        now = self._loop.time()
        for leg in (self._local, self._upstream):
            leg.reader.max_packet_bytes = MAX_PACKET_BYTES
            leg.rekey_at = now + self._settings.rekey_seconds
            leg.is_halted = False
        self._local.transport.answer_login(is_granted=True)
        # What the node sent first comes first, the program's may be an answer to it.
        self._decode(self._upstream, self._local)
        self._decode(self._local, self._upstream)

    def _refuse(self, problem: str) -> None:
        """Tells the program why its login failed, and lets it go."""
        problem = safe_text(problem)
        self._phase = _Phase.REFUSED
        self._error = problem
        self._end = RelayEnd.BROKEN
        self._stop_timers()
        self._later(self._settings.refused_seconds, self._on_refused_timeout)
        self._upstream.say_goodbye(messages.BY_APPLICATION, "the login is given up")
        self._advance(self._upstream)
        self._local.send_message(messages.banner(f"VNet: {problem}"))
        self._local.transport.answer_login(is_granted=False)
        self._local.is_halted = False
        self._decode(self._local, self._upstream)

    def _on_banner(self, text: bytes) -> None:
        """The node has something to say to the user (RFC 4252 section 5.4)."""
        if self._phase is not _Phase.LOGIN or not self._is_asked:
            return  # to nobody in particular
        self._node_banners += 1
        if self._node_banners <= self._settings.max_banners:
            self._local.send_message(messages.banner_of(text))

    def _node_failed(self, problem: str) -> None:
        """There will be no login at the node; the program is told when it asks."""
        # Also after it has let the user in: the program does not know that yet.
        self._node_problem = self._node_problem or problem
        for future in (self._node_ready, self._node_answer):
            if not future.done():
                future.set_result(problem)
        self._upstream.is_halted = True
        self._upstream.reset()

    def _on_login_timeout(self) -> None:
        if self._phase is _Phase.LOGIN and not self._is_asked:
            self._part("the program did not log in in time", RelayEnd.BROKEN)

    def _on_node_timeout(self) -> None:
        if not self._node_ready.done():
            self._node_failed("the node does not answer the key exchange")

    def _on_refused_timeout(self) -> None:
        if self._phase is _Phase.REFUSED:
            reason = messages.NO_MORE_AUTH_METHODS
            self._part("there is no other way to log in", RelayEnd.BROKEN, self._error, reason)

    # Bytes in.

    def _on_local_readable(self) -> None:
        local, buffer = self._local, self._memory.read_buffer
        try:
            count = local.endpoint.socket.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._on_lost(local, reason_of(error))
            return
        if count:
            if self.bytes_up < _QUICK_BYTES:
                local.acknowledge()
            self.bytes_up += count
            self._take(local, self._upstream, buffer[:count])
        else:
            self._on_end_of(local, self._upstream)

    def _on_upstream_readable(self) -> None:
        upstream, buffer = self._upstream, self._memory.read_buffer
        try:
            count = upstream.endpoint.socket.recv_into(buffer)
            data = upstream.decrypt(buffer[:count]) if count else buffer[:0]
        except BlockingIOError:
            return
        except LayerError as error:
            self._on_lost(upstream, str(error))
            return
        except OSError as error:
            self._on_lost(upstream, reason_of(error))
            return
        settings = self._settings
        if upstream.pending_bytes > settings.max_pending_bytes + settings.max_unread_bytes:
            self._on_fault(upstream, "the far end wants answers and does not read them")
            return
        if data:
            self._take(upstream, self._local, data)
        if (not count or upstream.is_ended) and not upstream.is_closed:
            self._on_end_of(upstream, self._local)
        else:
            # The far end may have allowed more.
            self._on_clear(upstream, self._local)

    def _take(self, source: Leg, target: Leg, data: memoryview) -> None:
        """Received bytes of SSH."""
        if source.is_shut or source.is_closed or self._phase is _Phase.ENDING:
            self._advance(source)
            return
        if source.version is not None:
            try:
                found = source.version.feed(bytes(data))
            except LayerError as error:
                self._on_fault(source, str(error))
                return
            if found is None:
                return
            version, rest = found
            source.version = None
            log.debug("%s: the peer's version is %s", self._name, version, extra=self._about)
            source.transport.begin(version)
            if source is self._local:
                self._later(self._settings.offer_seconds, self._offer_late)
            data = memoryview(rest)
        source.reader.feed(data)
        self._decode(source, target)

    def _offer_late(self) -> None:
        """The program waits for what we offer."""
        transport = self._local.transport
        if self._phase is _Phase.LOGIN and not transport.initial_kex_done:
            transport.offer_keys()

    def _decode(self, source: Leg, target: Leg) -> None:
        """Handles all complete packets that were received, as far as they may be now."""
        if source.is_closed:
            return
        try:
            self._decode_packets(source, target)
        except LayerError as error:
            source.reader.keep()
            self._on_fault(source, str(error))
            return
        source.reader.keep()
        for leg in (source, target):
            if leg.error and not leg.is_closed:
                self._on_lost(leg, leg.error)
        if self._phase is _Phase.OPEN:
            self._keep_keys_fresh(source, target)
            self._keep_keys_fresh(target, source)
            if target.is_halted and not source.transport.is_holding:
                # It waited for the key exchange that has just ended.
                target.is_halted = False
                self._decode(target, source)
        if source.is_ended and not source.is_halted and not source.is_closed:
            self._on_end_of(source, target)
        elif self._phase is not _Phase.OVER:
            self._watch(source, target)
            self._watch(target, source)

    def _decode_packets(self, source: Leg, target: Leg) -> None:
        reader, writer = source.reader, target.writer
        plain, outgoing = _MEMORY.plain, _MEMORY.outgoing
        room = len(outgoing) - MAX_PACKET_BYTES - MAX_OVERHEAD_BYTES
        used = 0
        try:
            if source.stash is not None and not source.is_halted:
                message, source.stash = source.stash, None
                target.send_message(message)
            while not source.is_halted and (payload_bytes := reader.next(plain)) >= 0:
                number = plain[1]
                if messages.FIRST_CONNECTION <= number <= messages.LAST_CONNECTION:
                    self._check_connection_message(source, payload_bytes)
                    if number == messages.GLOBAL_REQUEST and source is self._upstream:
                        payload_bytes = _hide_host_keys(payload_bytes)
                        if not payload_bytes:
                            continue
                    if target.transport.is_holding:
                        source.stash = bytes(plain[1 : 1 + payload_bytes])
                        source.is_halted = True
                        break
                    used += writer.seal(plain, payload_bytes, outgoing[used:])
                    if used > room:
                        target.put(outgoing[:used])
                        used = 0
                    continue
                if used:
                    target.put(outgoing[:used])
                    used = 0
                self._on_message(source, target, bytes(plain[1 : 1 + payload_bytes]))
        finally:
            # What is sealed has its number: it goes first also when the next message is a fault.
            if used:
                target.put(outgoing[:used])

    def _check_connection_message(self, source: Leg, payload_bytes: int) -> None:
        plain = _MEMORY.plain
        if self._phase is not _Phase.OPEN:
            raise _FaultError(f"the peer sent message {plain[1]} before the login")
        if source.transport.is_bound:
            raise _FaultError(f"the peer sent message {plain[1]} during the key exchange")
        if not messages.is_well_formed(plain, payload_bytes):
            raise _FaultError(f"the peer sent a malformed message {plain[1]}")

    def _on_message(self, source: Leg, target: Leg, payload: bytes) -> None:
        """A message that is not passed on."""
        settings, transport = self._settings, source.transport
        if self._phase is not _Phase.OPEN:
            source.early_packets += 1
            if source.early_packets > settings.max_early_packets:
                raise _FaultError("the peer sent too many messages before the login")
        if payload[0] == messages.DISCONNECT:
            self._on_disconnect(source, target, payload)
            return
        was_exchanging = transport.is_exchanging
        transport.receive(payload, (source.reader.sequence - 1) % 2**32)
        if was_exchanging and not transport.is_exchanging:
            source.rekey_at = self._loop.time() + settings.rekey_seconds
        if not transport.active:
            raise _FaultError("the peer tried too many keys, or wants what VNet does not have")
        if source.pending_bytes > settings.max_pending_bytes + settings.max_unread_bytes:
            raise _FaultError("the peer wants answers and does not read them")
        if source is self._upstream and self._phase is _Phase.LOGIN:
            self._after_node_message()

    def _after_node_message(self) -> None:
        transport = self._upstream.transport
        if transport.initial_kex_done and not self._node_ready.done():
            self._node_ready.set_result("")
        if transport.is_login_over and not self._node_answer.done():
            is_granted = transport.is_granted
            # What follows waits until the program knows.
            self._upstream.is_halted = is_granted
            self._node_answer.set_result("" if is_granted else self._denial)

    def _keep_keys_fresh(self, leg: Leg, other: Leg) -> None:
        """RFC 4253 section 9. Only when something passes: an idle session has nothing to protect."""
        reader, writer, settings = leg.reader, leg.writer, self._settings
        passed = max(reader.opened_bytes, writer.sealed_bytes)
        packets = max(reader.opened_packets, writer.sealed_packets)
        transport = leg.transport
        if transport.is_exchanging:
            if passed > 2 * settings.rekey_bytes or packets > 3 * (_MAX_PACKETS // 2):
                self._on_fault(leg, "the peer does not answer the new key exchange")
        elif not other.transport.is_exchanging and (
            passed > settings.rekey_bytes
            or packets > _MAX_PACKETS
            or self._loop.time() > leg.rekey_at
        ):
            transport.offer_keys()

    # How it ends.

    def _on_disconnect(self, source: Leg, target: Leg, payload: bytes) -> None:
        said = safe_text(messages.disconnect_description(payload))
        who = self._who(source)
        log.debug("%s: %s disconnects: %s", self._name, who, said, extra=self._about)
        if source is self._upstream and self._phase is _Phase.LOGIN:
            self._node_failed(self._login_problem(f"the node ended the connection: {said}"))
            return
        if self._phase is _Phase.OPEN:
            target.send_message(payload)
        self._finish(self._closed_by(source), "")

    def _on_end_of(self, source: Leg, target: Leg) -> None:
        """Nothing more comes from there."""
        source.is_ended = True
        source.endpoint.pause()
        if self._phase is _Phase.ENDING or source.is_shut:
            self._advance(source)
        elif source is self._upstream and self._phase is not _Phase.OPEN:
            reason = source.end_reason or "the node closed the connection"
            self._node_failed(self._login_problem(reason))
        elif not source.is_halted or self._phase is not _Phase.OPEN:
            # Else what it sent before is still to be passed on.
            if source.end_reason:
                self._part(source.end_reason, self._closed_by(source))
            else:
                self._finish(self._closed_by(source), "")
        else:
            self._watch(target, source)

    def _on_lost(self, source: Leg, problem: str) -> None:
        """The connection broke."""
        source.close()
        if self._phase in {_Phase.ENDING, _Phase.OVER}:
            self._advance(source)
        elif source is self._local:
            self._upstream.say_goodbye(messages.BY_APPLICATION, "the program is gone")
            self._finish(RelayEnd.PROGRAM_RESET, problem)
        elif self._phase is _Phase.OPEN:
            self._part(f"the connection to the node broke: {problem}", RelayEnd.APP_RESET, problem)
        else:
            self._node_failed(self._login_problem(f"the connection to the node broke: {problem}"))

    def _on_fault(self, source: Leg, problem: str) -> None:
        """The peer does not keep to the protocol."""
        if self._phase in {_Phase.ENDING, _Phase.OVER}:
            return
        problem = problem.replace("the peer", self._who(source))
        if source is self._upstream and self._phase is not _Phase.OPEN:
            self._node_failed(self._login_problem(problem))
        else:
            reason = messages.PROTOCOL_ERROR
            self._part(problem, RelayEnd.BROKEN, problem, reason)

    def _on_send_error(self, leg: Leg) -> None:
        # What it sent before is still read, and then its end.
        leg.mute()
        if self._phase is _Phase.ENDING or leg.is_shut:
            self._advance(leg)

    def _part(
        self,
        text: str,
        end: RelayEnd,
        error: str | None = None,
        reason: int = messages.BY_APPLICATION,
    ) -> None:
        """Says goodbye to both sides, and why. `error` is for the outcome; None: the same."""
        text = safe_text(text)
        for leg in (self._local, self._upstream):
            leg.say_goodbye(reason, f"VNet: {text}" if leg is self._local else text)
        self._finish(end, text if error is None else error)

    def _finish(self, end: RelayEnd, error: str) -> None:
        """Delivers what was received, then ends both connections in order."""
        self._end = self._end or end
        self._error = self._error or safe_text(error)
        self._phase = _Phase.ENDING
        self._stop_timers()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._later(self._settings.linger_seconds, self._on_lingering)
        self._later(self._settings.patience_seconds, self._on_patience_lost)
        for leg in (self._local, self._upstream):
            leg.is_halted = True
        self._advance(self._local)
        self._advance(self._upstream)

    def _advance(self, leg: Leg) -> None:
        """Ends a leg as far as it can be ended now."""
        if not leg.is_closed:
            if leg.pending_bytes and not leg.is_mute:
                if not leg.is_ended:
                    leg.endpoint.resume()  # its end, or leave to send more
                return
            leg.shut()
            if leg.is_ended or leg.is_mute:
                leg.close()
            else:
                leg.endpoint.resume()  # what still comes is dropped, its end is awaited
        if self._local.is_closed and self._upstream.is_closed:
            self._report()

    def _on_lingering(self) -> None:
        """Peers that have got everything and do not close are closed."""
        self._upstream.reset()
        if not self._local.pending_bytes:
            self._local.close()
        self._advance(self._local)

    def _on_patience_lost(self) -> None:
        """The program has not taken what was sent to it."""
        self._local.reset()
        self._advance(self._local)

    def _report(self) -> None:
        if self._phase is _Phase.OVER:
            return
        self._phase = _Phase.OVER
        self._stop_timers()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        outcome = RelayOutcome(
            self._end or RelayEnd.BROKEN, self.bytes_up, self.bytes_down, self._error
        )
        self._on_end(outcome)

    # Reading.

    def _on_clear(self, leg: Leg, other: Leg) -> None:
        if self._phase is _Phase.ENDING or leg.is_shut:
            self._advance(leg)
        else:
            self._watch(other, leg)

    def _watch(self, leg: Leg, other: Leg) -> None:
        """Reads from a leg, or does not."""
        if leg.is_ended or leg.is_closed:
            return
        if self._phase in {_Phase.ENDING, _Phase.OVER} or leg.is_shut:
            return
        if leg.is_halted:
            # The end of a program whose login is being decided must be noticed.
            is_wanted = (
                self._phase is _Phase.LOGIN
                and leg is self._local
                and leg.reader.kept_bytes <= self._settings.max_waiting_bytes
            )
        else:
            is_wanted = other.pending_bytes <= self._settings.max_pending_bytes
        if is_wanted:
            leg.endpoint.resume()
        else:
            leg.endpoint.pause()

    # Small things.

    def _who(self, leg: Leg) -> str:
        return "the program" if leg is self._local else "the node"

    def _closed_by(self, leg: Leg) -> RelayEnd:
        return RelayEnd.PROGRAM_CLOSED if leg is self._local else RelayEnd.APP_CLOSED

    def _login_problem(self, problem: str) -> str:
        """What the user is told: once the node has been asked, its silence is a refusal too."""
        return f"{self._denial}: {problem}" if self._denial else problem

    def _later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._timers.append(self._loop.call_later(seconds, callback))

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()


class _FaultError(LayerError):
    """The peer does not keep to the protocol."""


def _hide_host_keys(payload_bytes: int) -> int:
    """Puts in place what the program gets instead of a global request; how long that is."""
    plain = _MEMORY.plain
    substitute = messages.host_keys_substitute(plain[1 : 1 + payload_bytes])
    if substitute is None:
        return payload_bytes
    plain[1 : 1 + len(substitute)] = substitute
    return len(substitute)


def _shown(keys: ShownHostKeys) -> list[ShownKey]:
    """The certificate first."""
    certificate = base64.b64decode(keys.certificate_line.split()[1])
    plain = base64.b64decode(
        keys.plain_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    )
    return [
        ShownKey(ED25519 + CERTIFICATE_ENDING, certificate, keys.certificate_key),
        ShownKey(ED25519, plain, keys.plain_key),
    ]

"""The bus between workers: ZeroMQ over unix sockets, the only module that touches ZeroMQ.

tun and each proxy bind one ROUTER socket at `<bus dir>/<slot>`; the others join with a DEALER.
Every connection is encrypted and authenticated with CURVE (RFC 26/CURVEZMQ); a ZAP handler (RFC
27/ZAP) with an allow-list maps the key of a client to its worker slot, so the receiver knows who
speaks whatever the peer says of itself, and `ipc.permits` decides what it may say.

Contexts and sockets must be made after the fork. Nothing here blocks: sockets are driven by the
event loop through their edge-triggered descriptor, so after each send the socket is looked at
again.
"""

import asyncio
import logging
import socket as sockets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from ipc import bus_socket, codec
from ipc.errors import BusyError, ConversationError, ForbiddenMessageError, PeerGoneError
from ipc.messages import AnyMessage, BusKeys, Message
from ipc.permits import Role, role_of

log = logging.getLogger(__name__)

ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by RFC 27
ZAP_DOMAIN = b"vnet"
# Messages queued per peer before a sender is told it is busy; a held SYN or a question is a few
# hundred bytes, so this bounds a peer's queue to a few hundred kilobytes.
HIGH_WATER_MARK = 4096
# A peer answers within milliseconds; one that begins a handshake and no more holds a descriptor.
HANDSHAKE_MILLISECONDS = 5000
# One wake-up handles so many messages before other descriptors get their turn.
BATCH = 64


@dataclass(frozen=True, slots=True)
class Sender:
    """Who said something on the bus: a worker slot, and one connection of it.

    While a worker is replaced, two processes of its slot may be connected; only the route tells them
    apart.
    """

    slot: str
    route: bytes


class _Driven:
    """A ZeroMQ socket driven by the event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: "zmq.Socket[bytes]",
        on_frames: Callable[[list[zmq.Frame]], None],
    ) -> None:
        self._loop = loop
        self._on_frames = on_frames
        self._drain_is_due = False
        self.socket = socket
        self._descriptor = int(socket.getsockopt(zmq.FD))
        loop.add_reader(self._descriptor, self._drain)
        self._look_again()

    def send(self, frames: list[bytes]) -> None:
        """Sends without blocking; raises zmq.Again when the queue is full."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        finally:
            self._look_again()

    def close(self) -> None:
        if not self.socket.closed:
            self._loop.remove_reader(self._descriptor)
            self.socket.close(linger=0)

    def _look_again(self) -> None:
        if not self._drain_is_due:
            self._drain_is_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_is_due = False
        for _ in range(BATCH):
            if self.socket.closed:
                return
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._on_frames(frames)
            except BaseException:
                # What else waits is announced by no further edge.
                self._look_again()
                raise
        self._look_again()


class BusContext:
    """The ZeroMQ context of one worker, with the allow-list for those who join its socket."""

    def __init__(
        self,
        bus_dir: Path,
        slot: str,
        keys: BusKeys,
        listening: sockets.socket | None = None,
    ) -> None:
        """`listening` is this worker's own socket; without one `serve` makes it."""
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._dir = bus_dir
        self._slot = slot
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._slot_of_key = {z85.decode(key): peer for peer, key in keys.peers.items()}
        self._driven: set[_Driven] = set()
        handler = self._context.socket(zmq.REP)
        handler.bind(ZAP_ENDPOINT)
        self._zap = self._drive(handler, self._authenticate)

    def serve(
        self,
        on_message: Callable[[Sender, AnyMessage], None],
        on_breach: Callable[[str, ConversationError], None],
    ) -> "BusServer":
        """Binds this worker's own socket; see BusServer."""
        return BusServer(self, on_message, on_breach)

    def join(
        self,
        server_slot: str,
        on_message: Callable[[AnyMessage], None],
        on_breach: Callable[[str, ConversationError], None],
        on_connect: Callable[[], None],
        on_disconnect: Callable[[], None] = lambda: None,
    ) -> "BusClient":
        """Connects to another worker's socket; see BusClient."""
        return BusClient(self, server_slot, on_message, on_breach, on_connect, on_disconnect)

    def close(self) -> None:
        """Closes every socket; what is still queued is dropped."""
        for driven in list(self._driven):
            self.release(driven)
        self._context.term()

    def release(self, driven: _Driven) -> None:
        """Closes one socket; what is still queued in it is dropped."""
        driven.close()
        self._driven.discard(driven)

    def make_server_socket(self, on_frames: Callable[[list[zmq.Frame]], None]) -> _Driven:
        """A bound ROUTER socket at `<bus dir>/<slot>`."""
        socket = self._make_socket(zmq.ROUTER)
        socket.curve_server = True
        socket.zap_domain = ZAP_DOMAIN
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        listening, self._listening = self._listening, None
        try:
            if listening is None:
                listening = bus_socket.listen(self._dir, self._slot)
            # libzmq takes the descriptor over, and looks at the path no more.
            socket.setsockopt(zmq.USE_FD, listening.detach())
            socket.bind(f"ipc://{self._dir / self._slot}")
        except (OSError, zmq.ZMQError):
            # An open socket would let the end of the context wait for ever.
            socket.close()
            raise
        return self._drive(socket, on_frames)

    def make_client_socket(
        self,
        server_slot: str,
        on_frames: Callable[[list[zmq.Frame]], None],
        on_event: Callable[[list[zmq.Frame]], None],
    ) -> tuple[_Driven, _Driven]:
        """A DEALER socket connected to `<bus dir>/<server_slot>`, and its monitor."""
        socket = self._make_socket(zmq.DEALER)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        watching = self._drive(monitor, on_event)
        socket.curve_serverkey = self._keys.peers[server_slot].encode()
        # A restarted server is found again at once: the wait is on the way of a user's connect.
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.connect(f"ipc://{self._dir / server_slot}")
        return self._drive(socket, on_frames), watching

    @property
    def role(self) -> Role:
        return role_of(self._slot)

    def _make_socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MILLISECONDS)
        socket.curve_publickey = self._keys.public.encode()
        socket.curve_secretkey = self._keys.secret.encode()
        return socket

    def _drive(
        self, socket: "zmq.Socket[bytes]", on_frames: Callable[[list[zmq.Frame]], None]
    ) -> _Driven:
        driven = _Driven(self._loop, socket, on_frames)
        self._driven.add(driven)
        return driven

    def _authenticate(self, frames: list[zmq.Frame]) -> None:
        # RFC 27: version, request id, domain, address, identity, mechanism, credentials.
        slot = None
        if len(frames) == 7 and frames[5].bytes == b"CURVE":
            slot = self._slot_of_key.get(frames[6].bytes)
        request_id = frames[1].bytes if len(frames) > 1 else b""
        if slot is None:
            log.warning("a client with an unknown key was refused on the bus")
            reply = [b"1.0", request_id, b"400", b"unknown key", b"", b""]
        else:
            reply = [b"1.0", request_id, b"200", b"OK", slot.encode(), b""]
        self._zap.send(reply)


class BusServer:
    """The bound end: many peers, each known by the slot its key belongs to."""

    def __init__(
        self,
        context: BusContext,
        on_message: Callable[[Sender, AnyMessage], None],
        on_breach: Callable[[str, ConversationError], None],
    ) -> None:
        self._context = context
        self._role = context.role
        self._on_message = on_message
        self._on_breach = on_breach
        self._driven = context.make_server_socket(self._receive)

    def send(self, to: Sender, message: Message) -> None:
        """Sends to one peer that has spoken, without blocking.

        Raises:
            PeerGoneError: that connection of it has ended.
            BusyError: its queue is full.
        """
        if self._driven.socket.closed:
            raise PeerGoneError(f"{to.slot} is gone: this end is closed")
        try:
            self._driven.send([to.route, codec.encode(message)])
        except zmq.Again as error:
            raise BusyError(f"{to.slot} does not read") from error
        except zmq.ZMQError as error:
            raise PeerGoneError(f"{to.slot} is gone: {error}") from error

    def close(self) -> None:
        """Ends every connection; nothing is heard any more, and what is still queued is dropped."""
        self._context.release(self._driven)

    def _receive(self, frames: list[zmq.Frame]) -> None:
        slot = str(frames[-1].get("User-Id"))
        try:
            if len(frames) != 2:
                raise ForbiddenMessageError(f"a message of {len(frames) - 1} parts")
            message = codec.decode(frames[1].bytes, role_of(slot), self._role)
        except ConversationError as error:
            self._on_breach(slot, error)
            return
        # The routing id is drawn by ROUTER itself, so no peer can take over another's.
        self._on_message(Sender(slot, frames[0].bytes), message)


class BusClient:
    """The connecting end. Reconnects by itself; what was sent to a dead server may be lost.

    `on_connect` is called after each handshake, so that a restarted server can be told who is
    there, and `on_disconnect` when the connection of the latest handshake is lost; not by `close`.
    """

    def __init__(
        self,
        context: BusContext,
        server_slot: str,
        on_message: Callable[[AnyMessage], None],
        on_breach: Callable[[str, ConversationError], None],
        on_connect: Callable[[], None],
        on_disconnect: Callable[[], None],
    ) -> None:
        self._context = context
        self._role = context.role
        self._server = server_slot
        self._on_message = on_message
        self._on_breach = on_breach
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._is_connected = False
        self._driven, self._monitor = context.make_client_socket(
            server_slot, self._receive, self._note_event
        )

    def send(self, message: Message) -> None:
        """Sends without blocking.

        Raises:
            BusyError: the queue is full, the server is gone or does not read; or this end is closed.
        """
        if self._driven.socket.closed:
            raise BusyError(f"{self._server} is not heard any more: this end is closed")
        try:
            self._driven.send([codec.encode(message)])
        except zmq.Again as error:
            raise BusyError(f"{self._server} does not read") from error

    def close(self) -> None:
        """Leaves; nothing is heard any more, and what is still queued is dropped."""
        self._context.release(self._monitor)
        self._context.release(self._driven)

    def _note_event(self, frames: list[zmq.Frame]) -> None:
        event = parse_monitor_message([frame.bytes for frame in frames])["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_connected = True
            self._on_connect()
        elif self._is_connected:  # a connection may also end before its handshake
            self._is_connected = False
            self._on_disconnect()

    def _receive(self, frames: list[zmq.Frame]) -> None:
        try:
            if len(frames) != 1:
                raise ForbiddenMessageError(f"a message of {len(frames)} parts")
            message = codec.decode(frames[0].bytes, role_of(self._server), self._role)
        except ConversationError as error:
            self._on_breach(self._server, error)
            return
        self._on_message(message)

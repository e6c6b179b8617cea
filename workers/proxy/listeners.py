"""This proxy's listening sockets on virtual addresses, and what is accepted on them.

The supervisor opens each on request and keeps a copy, so that the backlog outlives this process.

    data plane    getsockname    getpeername    what the program sees
    namespace     v:vp           c:cp           c:cp -> v:vp
    rewriting     c:L            v:cp           c:cp -> v:vp, L being the port of this listener alone
"""

import asyncio
import logging
import socket
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

from ipc.addresses import as_text
from ipc.errors import BusyError
from ipc.messages import CloseListener, ListenerOpened, ListenerRefused, Message, OpenListener

log = logging.getLogger(__name__)

# The supervisor answers within milliseconds; without it nothing works anyway.
OPEN_SECONDS = 5.0
# Connections accepted in one wake-up before other sockets get their turn.
ACCEPT_BATCH = 64


# A virtual address (packed) and a port.
Place: TypeAlias = tuple[bytes, int]


class NoListenerError(Exception):
    """The supervisor does not open this listener; the text says why."""


class ProxyListeners:
    """At most `limit` listeners; the one used least recently makes room for another.

    `on_accept(connection, place)` gets the virtual address and port that the listener is for.
    `is_needed(address, port)` says whether a connection is still expected there.
    """

    def __init__(
        self,
        send: Callable[[Message], None],
        on_accept: Callable[[socket.socket, Place], None],
        is_needed: Callable[[bytes, int], bool],
        limit: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._on_accept = on_accept
        self._is_needed = is_needed
        self._limit = limit
        self._open: OrderedDict[tuple[bytes, int], socket.socket] = OrderedDict()
        self._asked: dict[tuple[bytes, int], asyncio.Future[None]] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._open)

    async def ensure(self, address: bytes, port: int) -> None:
        """Returns when connections to this address and port are accepted.

        Raises:
            NoListenerError: the supervisor refuses, or does not answer.
        """
        key = (address, port)
        if key in self._open:
            self._open.move_to_end(key)
            return
        future = self._asked.get(key)
        if future is None:
            self._ask(address, port)
            future = self._asked[key] = self._loop.create_future()
        try:
            # Shielded: others may wait for the same listener.
            await asyncio.wait_for(asyncio.shield(future), OPEN_SECONDS)
        except TimeoutError as error:
            # Another may have asked again meanwhile.
            if self._asked.get(key) is future:
                del self._asked[key]
            raise NoListenerError("the supervisor did not answer") from error

    def _ask(self, address: bytes, port: int) -> None:
        try:
            # First, because the supervisor opens no more than the limit.
            self._make_room()
            self._send(OpenListener(address=address, port=port))
        except BusyError as error:
            raise NoListenerError(str(error)) from error

    def opened(self, message: ListenerOpened, descriptor: int) -> None:
        """The supervisor sent a listener, asked for or left by a predecessor."""
        key = (message.address, message.port)
        listener = socket.socket(fileno=descriptor)
        if self._is_closed:
            # It was on its way: what comes there is for a successor.
            listener.close()
            return
        listener.setblocking(False)
        if (before := self._open.pop(key, None)) is not None:
            self._drop(before)
        future = self._asked.pop(key, None)
        self._make_room()
        self._open[key] = listener
        self._loop.add_reader(listener.fileno(), self._accept, listener, key)
        if future is not None and not future.done():
            future.set_result(None)

    def refused(self, message: ListenerRefused) -> None:
        """The supervisor does not open this listener."""
        future = self._asked.pop((message.address, message.port), None)
        if future is not None and not future.done():
            future.set_exception(NoListenerError(message.reason))
            # Whoever asked may have been cancelled meanwhile.
            future.exception()

    def close(self) -> None:
        """Closes this process's copies, also of what comes later; what waits in the backlogs waits on."""
        self._is_closed = True
        for listener in self._open.values():
            self._drop(listener)
        self._open.clear()

    def _make_room(self) -> None:
        if len(self._open) + len(self._asked) < self._limit:
            return
        for key, listener in self._open.items():
            if not self._is_needed(*key):
                del self._open[key]
                self._drop(listener)
                self._send(CloseListener(address=key[0], port=key[1]))
                return

    def _drop(self, listener: socket.socket) -> None:
        self._loop.remove_reader(listener.fileno())
        listener.close()

    def _accept(self, listener: socket.socket, place: Place) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # No descriptor is left, or the program went away in between.
                log.warning("a connection could not be accepted: %s", error)
                return
            connection.setblocking(False)
            self._on_accept(connection, place)


def flow_key(connection: socket.socket, place: Place) -> tuple[bytes, int, bytes, int] | None:
    """(source, source port, destination, destination port) as the program sees its connection, packed.

    `place` is what the listener is for. None for a connection that no program has made to it: somebody
    has found the port at the interface's own address. Raises OSError when it is gone already.
    """
    own = _packed(connection.family, connection.getsockname())
    address, port = _packed(connection.family, connection.getpeername())
    if own == place:
        return address, port, *place
    return (own[0], port, *place) if address == place[0] else None


def _packed(family: int, name: tuple[str, int]) -> Place:
    return socket.inet_pton(family, name[0].partition("%")[0]), name[1]


def describe(address: bytes, port: int) -> str:
    """`100.64.3.4:80` or `[fd00::1]:80`, for log lines."""
    text = as_text(address)
    return f"{text}:{port}" if len(address) == 4 else f"[{text}]:{port}"

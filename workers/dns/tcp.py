"""The TCP side (RFC 7766): several questions per connection, answered as they become ready.

    | length, 2 bytes | message |   in both directions

Bounds: connections (the one idle for longest makes room, RFC 7766 section 6.2.3), questions under
way per connection (the next is not read before one is answered), idle time, and how long a client
may take to read its answers.
"""

import asyncio
import logging
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from weakref import WeakSet

from workers.dns.askers import Askers, End, MayKnow
from workers.dns.service import DnsService
from workers.dns.tally import Tally

log = logging.getLogger(__name__)

# Answers a client may leave unread before its questions are no longer read.
WRITE_BUFFER_BYTES: Final = 128 * 1024
# From the accept to the begin of the connection's task; it takes a few turns of the loop.
ARRIVAL_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class TcpLimits:
    """Of one TCP server. `idle_seconds` must exceed the longest time an answer can take."""

    connections: int = 256
    questions: int = 32
    idle_seconds: float = 15.0
    write_seconds: float = 5.0


class TcpServer:
    """Serves one listening socket, which it owns."""

    def __init__(
        self,
        sock: socket.socket,
        service: DnsService,
        askers: Askers,
        tally: Tally,
        limits: TcpLimits | None = None,
    ) -> None:
        self._socket = sock
        self._own: End = sock.getsockname()
        self._service = service
        self._askers = askers
        self._tally = tally
        self._limits = limits or TcpLimits()
        self._server: asyncio.Server | None = None
        # In the order of their last question: the first has been idle for longest.
        self._connections: dict[_Connection, None] = {}
        # Accepted, and without a task yet. Weak: the loop drops one that is gone before it began.
        self._arriving: WeakSet[asyncio.BaseProtocol] = WeakSet()
        self._arrived = asyncio.Event()
        self._is_draining = False

    async def start(self) -> None:
        """Begins to accept."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._arrive, sock=self._socket)

    def stop_accepting(self) -> None:
        """Leaves further connections to whoever else has the socket.

        Idle connections are closed; the others get the answers to what they have asked, and a new one
        may ask its first question.
        """
        self._is_draining = True
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.finish()

    async def finished(self) -> None:
        """Returns when every connection has ended, if no others are accepted."""
        await asyncio.sleep(0)  # asyncio's own loop makes the protocol one turn after the accept
        with suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL_SECONDS):
                while self._arriving:
                    self._arrived.clear()
                    await self._arrived.wait()
        while self._connections:
            await asyncio.wait([connection.task for connection in self._connections])

    async def close(self) -> None:
        """Stops accepting and ends every connection."""
        if self._server is not None:
            self._server.close()
        tasks = [connection.task for connection in self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _arrive(self) -> asyncio.StreamReaderProtocol:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, self._serve, loop=loop)
        self._arriving.add(protocol)
        return protocol

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._arriving.discard(writer.transport.get_protocol())
        self._arrived.set()
        peer = writer.get_extra_info("peername")
        if peer is None:
            writer.transport.abort()  # it is gone already
            return
        may_know = self._askers.of_connection(peer, self._own)
        connection = _Connection(reader, writer, self, may_know, task)
        if not self._make_room():
            self._tally.count("overloads")
            writer.transport.abort()
            return
        self._connections[connection] = None
        if self._is_draining:
            connection.finish()  # it came in the turn in which nothing more was accepted
        self._tally.count("tcp_connections_now")
        try:
            await connection.run()
        except asyncio.CancelledError:
            # From `close` or `_make_room`: this connection's end, and nobody waits for the task.
            log.debug("a TCP connection was ended")
        except Exception:
            log.exception("a TCP connection failed")
        finally:
            writer.transport.abort()
            self._connections.pop(connection, None)
            self._tally.count("tcp_connections_now", -1)

    def _make_room(self) -> bool:
        if len(self._connections) < self._limits.connections:
            return True
        for connection in self._connections:
            if connection.is_idle:
                del self._connections[connection]
                connection.task.cancel()
                return True
        return False

    def touch(self, connection: "_Connection") -> None:
        """The connection asked something: it is now the last to be given up."""
        if connection in self._connections:
            del self._connections[connection]
            self._connections[connection] = None

    @property
    def limits(self) -> TcpLimits:
        return self._limits

    @property
    def service(self) -> DnsService:
        return self._service

    @property
    def tally(self) -> Tally:
        return self._tally


class _Connection:
    """One client."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: TcpServer,
        may_know: MayKnow,
        task: asyncio.Task[object],
    ) -> None:
        self.task = task
        self._reader = reader
        self._writer = writer
        self._server = server
        self._may_know = may_know
        self._pending = 0
        self._answered = asyncio.Event()
        self._has_asked = False
        self._is_last = False  # nothing is read after the message that is being read
        # The limit of waiting for the next message; None as soon as a part of one is here.
        self._idling: asyncio.Timeout | None = None

    @property
    def is_idle(self) -> bool:
        return self._pending == 0

    def finish(self) -> None:
        """Reads no further message, except the first; ends with the last answer."""
        self._is_last = True
        if self._idling is not None and self._has_asked:
            self._idling.reschedule(0.0)

    async def run(self) -> None:
        """Until the client closes, is idle for too long, or does not read."""
        limits = self._server.limits
        self._writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        # Timeouts, resets and an end in mid-message are how connections end.
        with suppress(OSError, asyncio.IncompleteReadError):
            while not (self._is_last and self._has_asked):
                async with asyncio.timeout(limits.idle_seconds) as idling:
                    data = await self._read_message(idling)
                self._has_asked = True
                self._server.touch(self)
                self._take(data)
                async with asyncio.timeout(limits.write_seconds):
                    await self._writer.drain()
                await self._wait_until(limits.questions - 1)
        await self._finish()

    async def _finish(self) -> None:
        """A client may send its questions and half-close: it still gets its answers."""
        await self._wait_until(0)
        with suppress(OSError):
            async with asyncio.timeout(self._server.limits.write_seconds):
                self._writer.close()
                await self._writer.wait_closed()

    async def _read_message(self, idling: asyncio.Timeout) -> bytes:
        self._idling = idling
        try:
            length = int.from_bytes(await self._reader.readexactly(2))
        finally:
            self._idling = None
        return await self._reader.readexactly(length)

    def _take(self, data: bytes) -> None:
        start = time.monotonic()
        reply = self._server.service.at_once(data, start, self._may_know)
        if isinstance(reply, bytes):
            self._write(reply)
            self._server.tally.observe(time.monotonic() - start)
        elif reply is not None:
            self._pending += 1
            self._server.service.begin(reply, self._may_know, self._deliver, over_tcp=True)

    def _deliver(self, data: bytes) -> None:
        self._pending -= 1
        self._answered.set()
        self._write(data)

    def _write(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(len(data).to_bytes(2) + data)

    async def _wait_until(self, pending: int) -> None:
        """Until at most `pending` questions are under way."""
        while self._pending > pending:
            self._answered.clear()
            await self._answered.wait()

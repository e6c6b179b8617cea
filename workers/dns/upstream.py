"""Forwards questions to the upstream servers and brings their answers back unchanged.

Each try has a fresh socket connected to its server, so the kernel draws a random source port and
lets only that server's datagrams in, and an id of its own (RFC 5452 section 9). Of the answer only
the id is put back; of the question only the id is replaced. What to do when is decided by `race`.
"""

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from workers.dns.message import Query, is_answer_to, is_truncated
from workers.dns.race import Outcome, Patience, Race
from workers.dns.servers import Server
from workers.dns.tally import Tally

log = logging.getLogger(__name__)

# As `socket.connect` takes it: IPv6 adds flow label and interface index.
SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int]

MAX_DATAGRAM_BYTES: Final = 65535
# A forger has to guess id and port; so many wrong guesses on one try are an attack, not noise.
MAX_MISMATCHES: Final = 32
WARNING_PAUSE_SECONDS: Final = 30.0


class Forwarder:
    """Asks the present list of servers; `max_sockets` bounds the descriptors in use."""

    def __init__(
        self, tally: Tally, *, patience: Patience | None = None, max_sockets: int = 2048
    ) -> None:
        self.servers: tuple[Server, ...] = ()
        self._tally = tally
        self._patience = patience or Patience()
        self._max_sockets = max_sockets
        self._open_sockets = 0
        self._next_warning = 0.0

    async def forward(self, query: Query, *, over_tcp: bool) -> bytes | None:
        """The answer with the client's id, or None when no server gave one in time."""
        start = time.monotonic()
        servers = self.servers
        outcome = await self._ask_all(query, servers, start)
        answer = outcome.answer
        if answer is not None and over_tcp and is_truncated(answer):
            answer = await self._ask_over_tcp(query, servers, outcome.server or 0, start)
        if answer is None:
            self._report_silence(servers, start)
            return None
        return query.data[:2] + answer[2:]

    def open_socket(
        self, kind: socket.SocketKind, server: Server
    ) -> tuple[socket.socket, SocketAddress]:
        """A fresh non-blocking socket and the address to connect it to.

        Raises:
            OSError: no descriptor is left, or the server's interface is gone.
        """
        if self._open_sockets >= self._max_sockets:
            raise OSError("too many sockets towards upstream servers")
        address: SocketAddress = (str(server.address), server.port)
        family = socket.AF_INET
        if server.address.version == 6:
            family = socket.AF_INET6
            scope = socket.if_nametoindex(server.scope) if server.scope else 0
            address = (*address[:2], 0, scope)
        sock = socket.socket(family, kind)
        sock.setblocking(False)
        self._open_sockets += 1
        return sock, address

    def close_socket(self, sock: socket.socket) -> None:
        """Gives one back that `open_socket` made."""
        self._open_sockets -= 1
        sock.close()

    async def _ask_all(self, query: Query, servers: tuple[Server, ...], start: float) -> Outcome:
        if not servers:
            return Outcome(None, None)
        exchange = _Exchange(
            self, self._tally, query, servers, Race(len(servers), self._patience, start)
        )
        try:
            return await exchange.run()
        finally:
            exchange.close()

    async def _ask_over_tcp(
        self, query: Query, servers: tuple[Server, ...], first: int, start: float
    ) -> bytes | None:
        """RFC 7766 section 5. The server that sent TC is asked first, then the others in turn."""
        end = start + self._patience.total_seconds
        for server in (*servers[first:], *servers[:first]):
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    return await self._ask_one_over_tcp(query, server)
            except (OSError, EOFError, _MismatchError) as error:  # TimeoutError is an OSError
                log.debug("%s did not answer %s over TCP: %s", server, query.text, error)
        return None

    async def _ask_one_over_tcp(self, query: Query, server: Server) -> bytes:
        sent = secrets.token_bytes(2) + query.data[2:]
        sock, address = self.open_socket(socket.SOCK_STREAM, server)
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                writer.write(len(sent).to_bytes(2) + sent)
                answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            finally:
                writer.transport.abort()
        finally:
            self.close_socket(sock)
        if not is_answer_to(answer, sent, query.question_end):
            raise _MismatchError("the answer belongs to another question")
        return answer

    def _report_silence(self, servers: tuple[Server, ...], start: float) -> None:
        self._tally.count("upstream_failures")
        if start >= self._next_warning:
            self._next_warning = start + WARNING_PAUSE_SECONDS
            whom = ", ".join(map(str, servers)) or "there is none"
            log.warning("no upstream DNS server answers (%s)", whom)


class _MismatchError(Exception):
    """What came back over TCP belongs to another question."""


class _Exchange:
    """One question on its way: carries out what its race decides."""

    def __init__(
        self,
        forwarder: Forwarder,
        tally: Tally,
        query: Query,
        servers: tuple[Server, ...],
        race: Race,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._forwarder = forwarder
        self._tally = tally
        self._query = query
        self._servers = servers
        self._race = race
        self._done: asyncio.Future[Outcome] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._tries: set[socket.socket] = set()

    async def run(self) -> Outcome:
        self._step()
        return await self._done

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for sock in list(self._tries):
            self._end_try(sock)

    def _step(self) -> None:
        """Asks who is due, ends when the race is decided, else looks again in time."""
        if self._done.done():
            return
        now = time.monotonic()
        for server in self._race.servers_due(now):
            self._start_try(server)
        if self._timer is not None:
            self._timer.cancel()
        outcome = self._race.outcome(now)
        if outcome is None:
            pause = max(0.0, self._race.next_look() - now)
            self._timer = self._loop.call_later(pause, self._step)
        else:
            self._done.set_result(outcome)

    def _start_try(self, server: int) -> None:
        sent = secrets.token_bytes(2) + self._query.data[2:]
        try:
            sock, address = self._forwarder.open_socket(socket.SOCK_DGRAM, self._servers[server])
        except OSError as error:
            self._note_failure(server, error)
            return
        try:
            sock.connect(address)
            sock.send(sent)
        except OSError as error:
            self._forwarder.close_socket(sock)
            self._note_failure(server, error)
            return
        self._tries.add(sock)
        self._loop.add_reader(sock.fileno(), self._make_receiver(sock, server, sent))

    def _make_receiver(self, sock: socket.socket, server: int, sent: bytes) -> Callable[[], None]:
        mismatches = 0

        def receive() -> None:
            nonlocal mismatches
            try:
                answer = sock.recv(MAX_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._end_try(sock)
                self._note_failure(server, error)
            else:
                if is_answer_to(answer, sent, self._query.question_end):
                    self._end_try(sock)
                    self._race.answered(server, answer, time.monotonic())
                else:
                    self._tally.count("upstream_mismatches")
                    mismatches += 1
                    if mismatches < MAX_MISMATCHES:
                        return
                    self._end_try(sock)
                    self._note_failure(server, "too many datagrams that answer nothing")
            self._step()

        return receive

    def _end_try(self, sock: socket.socket) -> None:
        self._tries.discard(sock)
        self._loop.remove_reader(sock.fileno())
        self._forwarder.close_socket(sock)

    def _note_failure(self, server: int, error: object) -> None:
        log.debug("%s cannot be asked for %s: %s", self._servers[server], self._query.text, error)
        self._race.failed(server)

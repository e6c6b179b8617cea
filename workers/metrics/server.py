"""Takes connections at the inherited socket; one request each, within narrow bounds.

Whoever reaches the socket may connect. So a connection has few seconds, a request few kilobytes, and when
there are too many the oldest is sent away: who means to ask has asked by then.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from workers.metrics.http_answer import Answer, plain

log = logging.getLogger(__name__)

MAX_CLIENTS: Final = 32
MAX_HEAD_BYTES: Final = 8 * 1024
# For the request to come, and the answer to go.
CLIENT_SECONDS: Final = 5.0
# What a client still sends after the answer is read for so long and thrown away: otherwise the kernel
# would reset the connection, and the answer be lost with it (RFC 9112 section 9.6).
LINGER_SECONDS: Final = 1.0
LINGER_BYTES: Final = 64 * 1024
# Connections that wait while this worker is busy.
BACKLOG: Final = 64
# Turns of the loop until a connection that was accepted is a client: it is given its streams, then a task.
_TURNS: Final = 3


class MetricsServer:
    """See the module. `answer` gets the head of a request."""

    def __init__(
        self,
        listening: socket.socket,
        answer: Callable[[bytes], Answer],
        counters: dict[str, int],
    ) -> None:
        self._listening = listening
        self._answer = answer
        self._counters = counters
        # In the order in which they came.
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None
        counters.update(dict.fromkeys(("answered", "refused", "given_up", "clients_now"), 0))

    async def start(self) -> None:
        """Begins to accept."""
        self._server = await asyncio.start_server(
            self._accepted, sock=self._listening, limit=MAX_HEAD_BYTES, backlog=BACKLOG
        )

    def stop_accepting(self) -> None:
        """Closes this process's copy of the socket; those who wait are a successor's."""
        if self._server is None:
            self._listening.close()
        else:
            self._server.close()

    async def finish(self, seconds: float) -> None:
        """Returns when all that were accepted have their answer; the rest is cut after so long."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if self._clients:
            await asyncio.wait(self._clients, timeout=seconds)
        for client in list(self._clients):
            self._send_away(client)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = writer
        if len(self._clients) > MAX_CLIENTS:
            self._counters["given_up"] += 1
            self._send_away(next(iter(self._clients)))
        self._counters["clients_now"] = len(self._clients)
        try:
            async with asyncio.timeout(CLIENT_SECONDS):
                await self._talk(reader, writer)
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            self._counters["given_up"] += 1
        except asyncio.CancelledError:
            # Only `_send_away` and the end of the loop do that. It ends here, because the streams of
            # Python 3.11 log a cancelled task as a failed one.
            log.debug("a connection was cut")
        finally:
            self._clients.pop(task, None)
            self._counters["clients_now"] = len(self._clients)
            writer.transport.abort()

    def _send_away(self, client: asyncio.Task[None]) -> None:
        self._clients.pop(client).transport.abort()
        client.cancel()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # So that `drain` returns when the kernel has all of it.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            answer = self._answer(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.LimitOverrunError:
            text = f"A request may have {MAX_HEAD_BYTES} bytes."
            answer = plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)
        self._counters["answered" if answer.status is HTTPStatus.OK else "refused"] += 1
        writer.write(answer.response)
        await writer.drain()
        writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await _read_away(reader)


async def _read_away(reader: asyncio.StreamReader) -> None:
    left = LINGER_BYTES
    while left > 0 and (piece := await reader.read(left)):
        left -= len(piece)

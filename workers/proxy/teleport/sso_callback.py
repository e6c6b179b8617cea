"""Listens for browsers that come back from single sign-on, on loopback and only while one may.

Anybody on this machine, and any page in the user's browser, can connect. Only who knows the key of a
question is heard, so that nobody else can answer it or end it; that is stricter than tsh, which
gives up with the first answer it cannot read. Who keeps connections open loses the oldest.

Source: `lib/client/sso/redirector.go`.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from typing import TypeAlias

from workers.proxy.teleport import sso
from workers.proxy.teleport.errors import SignInFailedError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
# For one request and its answer. Browsers on this machine need milliseconds.
REQUEST_SECONDS = 10.0

# What a browser has brought: the token, or why there is none.
Outcome: TypeAlias = str | SignInFailedError


class Callback:
    """Where the browser comes back to for one question; `close` it when that has an answer.

    `url` holds the key; it is empty if nobody can listen. `deliver` is called once at most, and not
    before it is set.
    """

    def __init__(self, origin: str, closed: Callable[["Callback"], None]) -> None:
        self.origin = origin
        self.key = sso.SecretKey()
        self.url = ""
        self.deliver: Callable[[Outcome], None] | None = None
        self._closed = closed

    def close(self) -> None:
        """The browser is not waited for any more. Safe to call again."""
        self._closed(self)


class Callbacks:
    """All callbacks of a process share one listener, which is closed when there is none."""

    def __init__(self, *, request_seconds: float = REQUEST_SECONDS) -> None:
        self._request_seconds = request_seconds
        self._open: list[Callback] = []
        self._server: asyncio.Server | None = None
        self._port = 0
        self._was_told = False
        self._opening = asyncio.Lock()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def open(self, origin: str) -> Callback:
        """A callback with a key of its own; without an address, as the log tells, at worst.

        `origin` is the web address of the proxy, whose pages tell the browser the outcome.
        """
        callback = Callback(origin, self._close)
        async with self._opening:
            if self._server is None:
                try:
                    await self._listen()
                except OSError as error:
                    log.warning("no browser can come back from single sign-on: %s", error)
                    return callback
        callback.url = callback.key.callback_url(self._port)
        self._open.append(callback)
        return callback

    async def _listen(self) -> None:
        end = socket.create_server((sso.HOST, 0), backlog=MAX_CONNECTIONS)
        try:
            self._port = end.getsockname()[1]
            self._server = await asyncio.start_server(
                self._accepted, sock=end, limit=sso.MAX_HEAD_BYTES
            )
        except BaseException:
            end.close()
            raise

    def _close(self, callback: Callback) -> None:
        if callback not in self._open:
            return
        self._open.remove(callback)
        if not self._open and self._server is not None:
            # A browser that is being told the outcome still hears it.
            self._server.close()
            self._server = None

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            self._connections.pop(oldest).transport.abort()
            oldest.cancel()
        task = asyncio.get_running_loop().create_task(self._converse(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(lambda task: self._connections.pop(task, None))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._request_seconds):
                writer.write(await self._answer(reader))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()  # too slow, too much, or gone
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            request = sso.read_head(await reader.readuntil(b"\r\n\r\n"))
            if request.method == "OPTIONS":
                return sso.answer_options()
            fields = sso.form_fields(request, await reader.readexactly(request.length))
        except sso.HttpError as error:
            return sso.refuse(error.status)
        return self._hear(fields)

    def _hear(self, fields: dict[str, str]) -> bytes:
        for callback, outcome in self._outcomes(fields):
            deliver, callback.deliver = callback.deliver, None
            if deliver is not None:
                deliver(outcome)
            return sso.redirect(callback.origin, is_success=isinstance(outcome, str))
        if not self._open:
            return sso.refuse(404)
        if not self._was_told:
            # Once: whoever can connect could fill the log.
            self._was_told = True
            log.warning("somebody came back from single sign-on with what nobody waits for")
        return sso.redirect(self._open[-1].origin, is_success=False)

    def _outcomes(self, fields: dict[str, str]) -> Iterator[tuple[Callback, Outcome]]:
        """The callback whose key this is. The key is in the address only if there is no token."""
        for callback in self._open:
            if "err" in fields:
                if callback.key.matches(fields.get("secret_key", "")):
                    yield callback, sso.failure(fields)
                continue
            try:
                yield callback, callback.key.token(fields.get("response", ""))
            except sso.CallbackError:
                continue
            except SignInFailedError as error:
                yield callback, error

"""gRPC calls over one HTTP/2 connection, as the proxy's transport service takes them.

(gRPC over HTTP/2, github.com/grpc/grpc doc/PROTOCOL-HTTP2.md.) grpclib serves where speed does not
matter; through this service goes all of SSH.

    bytes --> Http2Connection --> GrpcCall.receive  handler  GrpcCall.send --> queue --> one writer
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from urllib.parse import quote

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from demo.cluster.errors import Http2Error
from demo.cluster.http2 import (
    Code,
    Credited,
    Ended,
    Headers,
    Http2Connection,
    Opened,
    Received,
    Reset,
)
from demo.cluster.streams import ByteStream

logger = logging.getLogger(__name__)

# The limit of Go's servers (google.golang.org/grpc).
MAX_MESSAGE_BYTES = 4 << 20
# What may wait for the writer before calls have to wait.
_MAX_UNSENT_BYTES = 256 * 1024
_PREFIX_BYTES = 5
# Percent-encoding of messages leaves printable ASCII as it is, but for the percent sign.
_UNQUOTED = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
_RESPONSE = ((":status", "200"), ("content-type", "application/grpc+proto"))


class GrpcCall:
    """One call: whole messages both ways. One task may receive while others send."""

    def __init__(self, connection: "GrpcConnection", number: int, headers: Headers) -> None:
        self.metadata: Mapping[str, str] = dict(headers)
        self.path = self.metadata.get(":path", "")
        self.has_answered = False
        self._connection = connection
        self._number = number
        self._received = bytearray()
        # With how many bytes of each the client has to be credited when it is taken.
        self._messages: list[tuple[bytes, int]] = []
        self._next = 0
        self._has_ended = False
        self._error: GRPCError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sending = asyncio.Lock()

    async def receive(self) -> bytes | None:
        """The next message; None when the client sends no more.

        Raises:
            GRPCError: a message is too large, compressed or cut.
        """
        while self._next >= len(self._messages):
            if self._error is not None:
                raise self._error
            if self._has_ended:
                if self._received:
                    raise GRPCError(Status.INVALID_ARGUMENT, "the last message is cut")
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message, owed = self._messages[self._next]
        self._next += 1
        if self._next == len(self._messages):
            self._messages.clear()
            self._next = 0
        self._connection.credit(self._number, owed)
        return message

    async def send(self, message: bytes) -> None:
        """Sends a message; waits while the client takes none.

        Raises:
            ConnectionError: the call is over.
        """
        self.answer()
        data = memoryview(b"".join((b"\0", len(message).to_bytes(4, "big"), message)))
        async with self._sending:
            while data:
                room = await self._connection.room(self._number)
                self._connection.send_data(self._number, data[:room])
                data = data[room:]

    def answer(self) -> None:
        """Sends the headers of the response, once."""
        if not self.has_answered and self._connection.is_open(self._number):
            self.has_answered = True
            self._connection.send_headers(self._number, _RESPONSE, ends=False)

    # -- for the connection --

    def feed(self, data: bytes, size: int) -> None:
        """Takes data of the stream, which had `size` bytes with its padding.

        What belongs to no whole message yet is credited at once: large ones must be able to come.
        """
        early = max(0, len(self._received) - _PREFIX_BYTES)
        self._received += data
        at = 0
        with memoryview(self._received) as view:
            while len(view) - at >= _PREFIX_BYTES and self._error is None:
                length = int.from_bytes(view[at + 1 : at + _PREFIX_BYTES], "big")
                if view[at] or length > MAX_MESSAGE_BYTES:
                    text = f"a message of {length} bytes, or a compressed one"
                    self._error = GRPCError(Status.RESOURCE_EXHAUSTED, text)
                start = at + _PREFIX_BYTES
                if len(view) - start < length:
                    break
                at = start + length
                self._messages.append((bytes(view[start:at]), length - early))
                size -= length - early
                early = 0
        del self._received[:at]
        self._connection.credit(self._number, size)
        self._wake()

    def end(self) -> None:
        """Notes that the client sends no more."""
        self._has_ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None


Handler = Callable[[GrpcCall], Awaitable[None]]


async def _refuse(call: GrpcCall) -> None:
    raise GRPCError(Status.UNIMPLEMENTED, f"there is no method {call.path}")


class GrpcConnection:
    """Serves the calls of one connection until the client ends it.

    `handlers` are found by path; what they raise as GRPCError becomes the status of the call.
    """

    def __init__(self, stream: ByteStream, handlers: Mapping[str, Handler]) -> None:
        self._stream = stream
        self._handlers = handlers
        self._http2 = Http2Connection()
        self._calls: dict[int, GrpcCall] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._unsent = 0
        self._has_more = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []

    async def serve(self) -> None:
        """Serves until the end.

        Raises:
            OSError, EmbeddedClusterError: the connection broke, or the client broke HTTP/2.
        """
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = (*self._tasks.values(), reader, writer)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for failure in results[-2:]:
            if isinstance(failure, Exception):
                raise failure

    async def _read(self) -> None:
        self._has_more.set()  # our SETTINGS
        while data := await self._stream.read():
            try:
                events = self._http2.receive(data)
            except Http2Error as error:
                self._http2.give_up(Code(error.code))
                await self._stream.write(self._http2.take())
                raise
            for event in events:
                self._take_event(event)
            self._has_more.set()

    def _take_event(self, event: Opened | Received | Ended | Reset | Credited) -> None:
        match event:
            case Received(number, data, size):
                if (call := self._calls.get(number)) is not None:
                    call.feed(data, size)
            case Opened(number, headers):
                call = self._calls[number] = GrpcCall(self, number, headers)
                task = asyncio.create_task(self._run(number, call), name=call.path)
                task.add_done_callback(lambda _task: self._forget(number))
                self._tasks[number] = task
            case Ended(number):
                if (call := self._calls.get(number)) is not None:
                    call.end()
            case Reset(number):
                if (found := self._tasks.get(number)) is not None:
                    found.cancel()
            case Credited():
                self._wake()

    async def _write(self) -> None:
        while True:
            await self._has_more.wait()
            self._has_more.clear()
            while data := self._http2.take():
                self._unsent = 0
                await self._stream.write(data)
                self._wake()

    async def _run(self, number: int, call: GrpcCall) -> None:
        status, text = Status.OK, ""
        try:
            await self._handlers.get(call.path, _refuse)(call)
            call.answer()
        except GRPCError as error:
            status, text = error.status, error.message or ""
        except ConnectionError as error:
            logger.info("%s ended: %s", call.path, error)
            status, text = Status.UNAVAILABLE, str(error)
        except Exception:
            logger.exception("%s failed", call.path)
            status, text = Status.INTERNAL, "internal error"
        self._end(number, call, status, text)

    def _forget(self, number: int) -> None:
        # Not in the task itself: one that is cancelled before it has begun never runs.
        del self._calls[number], self._tasks[number]

    def _end(self, number: int, call: GrpcCall, status: Status, text: str) -> None:
        if not self._http2.is_open(number):
            return
        trailers = [] if call.has_answered else [*_RESPONSE]
        trailers.append(("grpc-status", str(status.value)))
        if text:
            trailers.append(("grpc-message", quote(text, safe=_UNQUOTED)))
        self.send_headers(number, trailers, ends=True)

    # -- for calls --

    async def room(self, number: int) -> int:
        """Waits until a stream may send, and says how many bytes."""
        while self._http2.is_open(number):
            room = self._http2.sendable(number)
            if room and self._unsent < _MAX_UNSENT_BYTES:
                return room
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        raise ConnectionResetError("the client has given the call up")

    def is_open(self, number: int) -> bool:
        """Whether a stream can still be answered."""
        return self._http2.is_open(number)

    def send_headers(self, number: int, headers: Iterable[tuple[str, str]], *, ends: bool) -> None:
        """Sends headers or trailers of a stream that is open."""
        self._http2.send_headers(number, headers, ends=ends)
        self._has_more.set()

    def send_data(self, number: int, data: memoryview) -> None:
        """Sends data, no more than there is room for."""
        self._http2.send_data(number, data)
        self._unsent += len(data)
        self._has_more.set()

    def credit(self, number: int, size: int) -> None:
        """Lets the client send so many bytes more."""
        if size:
            self._http2.credit(number, size)
            self._has_more.set()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

"""An established connection to the proxy, from its handshake until a relay takes it.

While it waits for the program, what the far end sends first is kept (up to a limit, then the
kernel holds it back), and its end is noticed: under TLS 1.3 the client's handshake is over before
the server has looked at the client's certificate (RFC 8446 section 2), so a cluster that refuses
it lets the handshake succeed and closes, or sends an alert, only then.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from workers.proxy.endpoint import Endpoint, reason_of
from workers.proxy.layers import Layer, LayerError
from workers.proxy.reactor import Reactor

PING_SUFFIX = "-ping"


class Upstream:
    """The far end of a relay. Owns its socket."""

    __slots__ = (
        "_early",
        "_max_early_bytes",
        "_on_lost",
        "endpoint",
        "error",
        "is_ended",
        "layer",
        "memory",
    )

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        layer: Layer,
        max_early_bytes: int,
    ) -> None:
        """`sock` is connected and non-blocking. Call `handshake` next."""
        self._early = b""
        self._max_early_bytes = max_early_bytes
        self._on_lost = _nothing
        self.endpoint = Endpoint(reactor, sock)
        self.layer = layer
        self.memory = reactor.memory
        self.is_ended = False  # the far end ended its direction; early data may be left
        self.error = ""  # why the connection broke while it waited

    @property
    def alpn(self) -> str | None:
        """The application protocol that was negotiated."""
        return self.layer.alpn

    @property
    def is_ping(self) -> bool:
        """Whether both directions are in ping frames (`workers.proxy.ping`)."""
        return (self.alpn or "").endswith(PING_SUFFIX)

    @property
    def is_lost(self) -> bool:
        """Whether the far end ended or broke the connection while it waited."""
        return self.is_ended or bool(self.error)

    async def handshake(self) -> None:
        """Does the handshakes of the layer and goes on watching the far end.

        Raises:
            LayerError: one failed.
            OSError: the connection was lost; ConnectionResetError also when it was closed.
        """
        done = asyncio.get_running_loop().create_future()
        self.endpoint.attach(
            lambda: self._on_handshake_readable(done),
            _nothing,
            lambda error: _fail(done, error),
        )
        self.endpoint.resume()
        try:
            self._step(b"", done)
            await done
        except BaseException:
            self.endpoint.close()
            raise

    def watch(self, on_lost: Callable[[], None]) -> None:
        """`on_lost` is called once if the far end ends or breaks the connection before `take`.

        The upstream may still be taken then: the relay hands on the early data and the end.
        """
        self._on_lost = on_lost
        if self.is_lost:
            asyncio.get_running_loop().call_soon(self._tell_lost)

    def take(self) -> bytes:
        """Stops watching, for a relay that owns it from now on; returns the early data."""
        self._on_lost = _nothing
        self.endpoint.pause()
        early, self._early = self._early, b""
        return early

    def close(self) -> None:
        """Ends an upstream that nobody took, as politely as can be done at once."""
        self._on_lost = _nothing
        if not self.error:
            with suppress(OSError, LayerError):
                if ending := self.layer.close_notify():
                    self.endpoint.send(ending)
        self.endpoint.close()

    def _on_handshake_readable(self, done: "asyncio.Future[None]") -> None:
        try:
            count = self.endpoint.socket.recv_into(self.memory.read_buffer)
        except BlockingIOError:
            return
        except OSError as error:
            _fail(done, error)
            return
        if count:
            self._step(self.memory.read_buffer[:count], done)
        else:
            _fail(done, ConnectionResetError("closed during the handshake"))

    def _step(self, records: bytes | memoryview, done: "asyncio.Future[None]") -> None:
        try:
            try:
                is_done = self.layer.handshake(records)
            finally:
                if reply := self.layer.take_records():
                    self.endpoint.send(reply)
        except (LayerError, OSError) as error:
            _fail(done, error)
            return
        if is_done and not done.done():
            done.set_result(None)
            # More may come before the waiting task runs.
            self.endpoint.attach(self._on_readable, _nothing, _leave_to_reading)
            self.endpoint.resume()
            self._receive(b"")

    def _on_readable(self) -> None:
        try:
            count = self.endpoint.socket.recv_into(self.memory.read_buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(reason_of(error))
            return
        if count:
            self._receive(self.memory.read_buffer[:count])
        else:
            self.is_ended = True
            self._lose("")

    def _receive(self, records: bytes | memoryview) -> None:
        error = ""
        try:
            self._early += bytes(self.layer.decrypt(records))
            if reply := self.layer.take_records():
                self.endpoint.send(reply)
        except LayerError as layer_error:
            error = str(layer_error)
        except OSError as os_error:
            error = reason_of(os_error)
        self.is_ended = self.layer.is_receive_ended
        if error or self.is_ended:
            self._lose(error)
        elif len(self._early) >= self._max_early_bytes:
            self.endpoint.pause()

    def _lose(self, error: str) -> None:
        self.error = error
        self.endpoint.pause()
        self._tell_lost()

    def _tell_lost(self) -> None:
        on_lost, self._on_lost = self._on_lost, _nothing
        on_lost()


def _fail(done: "asyncio.Future[None]", error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


def _nothing() -> None:
    """Nobody wants to know."""


def _leave_to_reading(_: OSError) -> None:
    """The next read, by the upstream or by the relay that takes it, finds the same."""

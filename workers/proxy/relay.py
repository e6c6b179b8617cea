"""Joins a program's connection to an upstream: bytes both ways, and each end by itself.

    program --FIN--> [up] --close_notify--> app         each direction: OPEN -> ENDING -> DONE
    program <--FIN-- [down] <--close_notify-- app       (its source ended; all delivered)

What stands between here and the app is the upstream's layer (`workers.proxy.layers`): mostly TLS;
without it FIN takes the place of close_notify.

The relay is done when both directions are. A reset on one side becomes a reset on the other; a
TCP end without close_notify counts as the end (Go programs close so now and then), unless it cuts
a ping frame in two, which the program must not mistake for a complete stream.

Callbacks on plain non-blocking sockets, no task and no buffer of its own while a relay is idle;
`docs/performance.md` has what the alternatives measured.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from workers.proxy import ping
from workers.proxy.endpoint import Endpoint, reason_of
from workers.proxy.layers import LayerError
from workers.proxy.reactor import Reactor
from workers.proxy.upstream import Upstream

# Kept per direction when the receiver is slower than the sender, beside the kernel's buffers.
MAX_PENDING_BYTES = 256 * 1024
# Beyond that only answers of the layer's own (to pings, for example) can be waiting.
MAX_UNREAD_BYTES = 1024 * 1024


class RelayEnd(StrEnum):
    """How a relay ended."""

    PROGRAM_CLOSED = "program_closed"  # in order, the program first
    APP_CLOSED = "app_closed"  # in order, the app first
    PROGRAM_RESET = "program_reset"  # the program is gone
    APP_RESET = "app_reset"  # the far end is gone
    BROKEN = "broken"  # a layer or framing failed, a refused certificate for example
    HTTP_REFUSED = "http_refused"  # by `workers.proxy.http_guard`
    ABORTED = "aborted"  # `Relay.abort`


@dataclass(frozen=True, slots=True)
class RelayOutcome:
    """What became of one relay. Bytes are the program's, without framing; `error` is safe text."""

    end: RelayEnd
    bytes_up: int
    bytes_down: int
    error: str


class Flow(Enum):
    """State of one direction."""

    OPEN = auto()
    ENDING = auto()  # the source has ended, something is still to be delivered
    DONE = auto()


class Relay:
    """One program's connection and its upstream; owns both sockets from `start` on."""

    __slots__ = (
        "_decoder",
        "_down",
        "_end",
        "_hears_app",
        "_is_remote_reset",
        "_layer",
        "_local",
        "_max_pending_bytes",
        "_memory",
        "_on_end",
        "_remote",
        "_up",
        "_upstream",
        "bytes_down",
        "bytes_up",
    )

    def __init__(
        self,
        reactor: Reactor,
        local: socket.socket,
        upstream: Upstream,
        on_end: Callable[[RelayOutcome], None],
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        """`local` is connected and non-blocking. `on_end` is called exactly once.

        A direction is not read while more than `max_pending_bytes` of it wait to be sent; one
        read (the size of `TlsMemory.read_buffer`) may come on top.
        """
        self._upstream = upstream
        self._layer = upstream.layer
        self._memory = reactor.memory
        self._local = Endpoint(reactor, local)
        self._remote = upstream.endpoint
        self._on_end = on_end
        self._max_pending_bytes = max_pending_bytes
        self._decoder = ping.PingDecoder() if upstream.is_ping else None
        self._up = Flow.OPEN
        self._down = Flow.OPEN
        self._end: RelayEnd | None = None  # set by whoever ended first
        self._is_remote_reset = False  # a write found out; the kernel tells only once
        # For a relay that looks into what it carries (`workers.proxy.guarded_relay`).
        self._hears_app: Callable[[bytes | memoryview], None] | None = None
        self.bytes_up = 0
        self.bytes_down = 0

    @property
    def is_over(self) -> bool:
        """Whether `on_end` has been called."""
        return self._up is Flow.DONE and self._down is Flow.DONE

    def start(self) -> None:
        """Takes the upstream and relays; `on_end` may be called before this returns."""
        early = self._upstream.take()
        with suppress(OSError):  # gone already: reading tells
            self._local.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._local.reset_when_killed()
        self._local.attach(self._on_local_readable, self._on_local_clear, self._on_local_error)
        self._remote.attach(self._on_remote_readable, self._on_remote_clear, self._on_remote_error)
        self._local.resume()
        self._remote.resume()
        if early:
            self._deliver(memoryview(early))
        if self._upstream.error:
            self._break(RelayEnd.BROKEN, self._upstream.error)
        elif self._upstream.is_ended and self._down is Flow.OPEN:
            self._end_down(RelayEnd.APP_CLOSED)

    def abort(self) -> None:
        """Resets both connections at once."""
        if not self.is_over:
            self._break(RelayEnd.ABORTED, "")

    # Up: program to app.

    def _on_local_readable(self) -> None:
        buffer = self._memory.read_buffer
        header_bytes = 0 if self._decoder is None else ping.HEADER_BYTES
        try:
            count = self._local.socket.recv_into(buffer[header_bytes:])
        except BlockingIOError:
            return
        except OSError as error:
            self._break(RelayEnd.PROGRAM_RESET, reason_of(error))
            return
        if not count:
            self._end_up(RelayEnd.PROGRAM_CLOSED)
            return
        self.bytes_up += count
        if header_bytes:
            ping.put_header(buffer, count)
        try:
            self._remote.send(self._layer.encrypt(buffer[: header_bytes + count]))
        except LayerError as error:
            self._break(RelayEnd.BROKEN, str(error))
        except OSError as error:
            self._on_remote_error(error)
        else:
            if self._unsent_bytes > self._max_pending_bytes:
                self._local.pause()

    @property
    def _unsent_bytes(self) -> int:
        """What the program has sent and the kernel does not have, because of either other end."""
        return self._remote.pending_bytes + self._layer.pending_bytes

    def _end_up(self, end: RelayEnd) -> None:
        self._local.pause()
        self._end = self._end or end
        self._up = Flow.ENDING
        try:
            if ending := self._layer.close_notify():
                self._remote.send(ending)
        except LayerError as error:
            self._break(RelayEnd.BROKEN, str(error))
        except OSError as error:
            self._on_remote_error(error)
        else:
            self._finish_up()

    def _on_remote_clear(self) -> None:
        if self._layer.pending_bytes:
            return
        if self._up is Flow.OPEN:
            self._local.resume()
        else:
            self._finish_up()

    def _finish_up(self) -> None:
        if self._up is not Flow.ENDING or self._unsent_bytes:
            return
        if self._layer.ends_with_fin:
            try:
                self._remote.socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._on_remote_error(error)
                return
        self._up = Flow.DONE
        self._finish_both()

    def _on_remote_error(self, error: OSError) -> None:
        self._is_remote_reset |= isinstance(error, ConnectionResetError)
        # The app has closed or is gone. What it sent before may still wait in the kernel, so the
        # reading side goes on and finds the end or the reset.
        self._local.pause()
        self._remote.discard()
        self._up = Flow.DONE
        self._finish_both()

    # Down: app to program.

    def _on_remote_readable(self) -> None:
        buffer = self._memory.read_buffer
        try:
            count = self._remote.socket.recv_into(buffer)
            if not count:
                self._on_remote_end()
                return
            had_to_wait = self._layer.pending_bytes
            data = self._layer.decrypt(buffer[:count])
            if reply := self._layer.take_records():
                self._reply(reply)
            if had_to_wait and not self._unsent_bytes:
                self._on_remote_clear()
        except BlockingIOError:
            return
        except LayerError as error:
            self._break(RelayEnd.BROKEN, str(error))
            return
        except OSError as error:
            self._break(RelayEnd.APP_RESET, reason_of(error))
            return
        if data:
            self._deliver(data)
        if self._layer.is_receive_ended and self._down is Flow.OPEN:
            self._end_down(RelayEnd.APP_CLOSED)

    def _on_remote_end(self) -> None:
        if self._is_remote_reset:
            self._break(RelayEnd.APP_RESET, "connection reset by peer")
        else:
            self._end_down(RelayEnd.APP_CLOSED)

    def _reply(self, records: bytes) -> None:
        """Sends what the layer answers of itself, unless nobody reads the answers."""
        try:
            self._remote.send(records)
        except OSError as error:
            self._on_remote_error(error)
        if self._remote.pending_bytes > self._max_pending_bytes + MAX_UNREAD_BYTES:
            raise LayerError("the far end wants answers and does not read them")

    def _deliver(self, plaintext: memoryview) -> None:
        data: bytes | memoryview = plaintext
        if self._decoder is not None:
            payload = self._decoder.feed(plaintext)
            if not payload:
                return
            data = payload[0] if len(payload) == 1 else b"".join(payload)
        self.bytes_down += len(data)
        try:
            self._local.send(data)
        except OSError as error:
            self._on_local_error(error)
            return
        if self._local.pending_bytes > self._max_pending_bytes:
            self._remote.pause()
        if self._hears_app is not None:
            self._hears_app(data)

    def _end_down(self, end: RelayEnd) -> None:
        self._remote.pause()
        if self._decoder is not None and not self._decoder.is_between_frames:
            self._break(RelayEnd.BROKEN, "the app's data ended inside a ping frame")
            return
        self._end = self._end or end
        self._down = Flow.ENDING
        self._finish_down()

    def _on_local_clear(self) -> None:
        if self._down is Flow.OPEN:
            self._remote.resume()
        else:
            self._finish_down()

    def _finish_down(self) -> None:
        if self._down is not Flow.ENDING or self._local.pending_bytes:
            return
        try:
            self._local.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._on_local_error(error)
            return
        self._down = Flow.DONE
        self._finish_both()

    def _on_local_error(self, _: OSError) -> None:
        # The program has closed; what it sent before is still read and delivered.
        self._remote.pause()
        self._local.discard()
        self._down = Flow.DONE
        self._finish_both()

    # The end.

    def _finish_both(self) -> None:
        if self.is_over:
            self._local.close()
            self._remote.close()
            self._report(self._end or RelayEnd.APP_CLOSED, "")

    def _break(self, end: RelayEnd, error: str) -> None:
        self._up = self._down = Flow.DONE
        self._local.reset()
        self._remote.reset()
        self._report(end, error)

    def _report(self, end: RelayEnd, error: str) -> None:
        self._on_end(RelayOutcome(end, self.bytes_up, self.bytes_down, error))

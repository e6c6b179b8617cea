"""A relay that has what the program sends looked at (`workers.proxy.http_guard`), for as long as that takes.

    program --bytes--> guard --> app        what was read is passed on, held, or refused
                         |
                         +-- done: it goes on as any other relay
                         +-- refused: the guard's answer and FIN to the program, the end to the app

What the program still sends after a refusal is read and thrown away for a while: a connection that is
closed with something unread is reset, and a reset takes the answer with it (RFC 9112, section 9.6).
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from workers.proxy import ping
from workers.proxy.endpoint import reason_of
from workers.proxy.http_guard.guard import Guard, Step
from workers.proxy.http_guard.refusal import Refused
from workers.proxy.layers import LayerError
from workers.proxy.reactor import Reactor
from workers.proxy.relay import MAX_PENDING_BYTES, Flow, Relay, RelayEnd, RelayOutcome
from workers.proxy.upstream import Upstream

# What is thrown away of a program that was refused; afterwards it is reset.
PARTING_SECONDS = 2.0
# In so many steps: time in which this process did not run, and read nothing, is one of them.
PARTING_STEPS = 4
MAX_PARTING_BYTES = 16 * 1024 * 1024
_NOTHING = memoryview(b"")


class GuardedRelay(Relay):
    """`bytes_up` counts what was passed on, not what is held or was refused.

    `refused` says why `RelayEnd.HTTP_REFUSED`.
    """

    __slots__ = (
        "_guard",
        "_held_bytes",
        "_is_program_ended",
        "_parting_bytes",
        "_timer",
        "refused",
    )

    def __init__(
        self,
        reactor: Reactor,
        local: socket.socket,
        upstream: Upstream,
        on_end: Callable[[RelayOutcome], None],
        guard: Guard,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        """As `Relay`; at most `max_pending_bytes` and one read are held besides."""
        super().__init__(reactor, local, upstream, on_end, max_pending_bytes)
        self._guard: Guard | None = guard  # None: all is said
        self._held_bytes = 0  # by the guard
        self._is_program_ended = False
        self._timer: asyncio.TimerHandle | None = None
        self.refused: Refused | None = None
        self._parting_bytes = 0

    # Up.

    def _on_local_readable(self) -> None:
        self._read()

    def _read(self) -> bool:
        """Whether there was anything: bytes, the end or an error."""
        guard = self._guard
        assert guard is not None
        header_bytes = 0 if self._decoder is None else ping.HEADER_BYTES
        room = self._memory.read_buffer[header_bytes:]
        try:
            count = self._local.socket.recv_into(room)
        except BlockingIOError:
            return False
        except OSError as error:
            self._break(RelayEnd.PROGRAM_RESET, reason_of(error))
            return True
        if count:
            read = room[:count]
            self._take(guard, guard.from_program(read), read)
        else:
            self._on_program_end(guard)
        return True

    def _take(self, guard: Guard, step: Step, read: memoryview = _NOTHING) -> None:
        """Does what the guard says of the last read, or of the time, or of what the app answers."""
        self._disarm()
        self._held_bytes += len(read) - len(step.send)
        if len(step.send):
            self._pass_on(step.send, read)
            if self._up is not Flow.OPEN:
                return
        if step.refusal is not None:
            self._refuse(step.refusal)
        elif step.is_done:
            self._guard = self._hears_app = None
            self._local.read_by(super()._on_local_readable)
            self._settle()
        else:
            self._hears_app = self._from_app if guard.wants_answers else None
            if self._held_bytes > self._max_pending_bytes:
                self._local.pause()
            if step.deadline_seconds is not None:
                self._arm(step.deadline_seconds)
            self._settle()

    def _pass_on(self, data: bytes | memoryview, read: memoryview) -> None:
        self.bytes_up += len(data)
        if self._decoder is None:
            data = memoryview(data)
        elif data is read:  # there is room for the header before it
            data = self._memory.read_buffer[: ping.HEADER_BYTES + len(read)]
            ping.put_header(data, len(read))
        else:
            data = _framed(data)
        try:
            self._remote.send(self._layer.encrypt(data))
        except LayerError as error:
            self._break(RelayEnd.BROKEN, str(error))
        except OSError as error:
            self._on_remote_error(error)
        else:
            if self._unsent_bytes > self._max_pending_bytes:
                self._local.pause()

    def _on_remote_clear(self) -> None:
        is_full = self._held_bytes > self._max_pending_bytes
        if self._up is not Flow.OPEN or not (is_full or self._is_program_ended):
            super()._on_remote_clear()

    def _arm(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._on_deadline, seconds)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_deadline(self, seconds: float) -> None:
        self._timer = None
        guard = self._guard
        if guard is None or self._up is not Flow.OPEN:
            return
        if self._unsent_bytes:
            # The program may be waiting for us, because the app takes nothing.
            self._arm(seconds)
        elif not self._read():  # this loop may be what is late
            self._take(guard, guard.timed_out())

    def _on_program_end(self, guard: Guard) -> None:
        self._local.pause()
        self._is_program_ended = True
        if self._held_bytes and not guard.wants_answers:
            self._take(guard, guard.ended())
        self._settle()

    def _settle(self) -> None:
        """Ends the direction if the program has, or if what is held can never be judged."""
        if self._up is not Flow.OPEN:
            return
        wants_answers = self._guard is not None and self._guard.wants_answers
        if self._is_program_ended and not (wants_answers and self._held_bytes):
            self._end_up(RelayEnd.PROGRAM_CLOSED)
        elif wants_answers and self._down is not Flow.OPEN:
            self._end_up(RelayEnd.APP_CLOSED)

    # Down.

    def _from_app(self, data: bytes | memoryview) -> None:
        guard = self._guard
        if guard is None or self._up is not Flow.OPEN:
            return
        self._take(guard, guard.from_app(data))
        if not self._unsent_bytes:
            self._on_remote_clear()  # in case that it was paused

    def _end_down(self, end: RelayEnd) -> None:
        super()._end_down(end)
        self._settle()

    def _on_local_error(self, error: OSError) -> None:
        super()._on_local_error(error)
        self._settle()

    # A refusal.

    def _refuse(self, refused: Refused) -> None:
        self._guard = self._hears_app = None
        self.refused = refused
        if not refused.response or self.bytes_down or self._down is not Flow.OPEN:
            self._break(RelayEnd.HTTP_REFUSED, "")
            return
        self._up = Flow.DONE
        with suppress(OSError, LayerError):
            if ending := self._layer.close_notify():
                self._remote.send(ending)
        self._remote.close()
        self._local.attach(self._on_parting_readable, self._on_answered, self._on_parting_error)
        self._wait_for_parting(PARTING_STEPS)
        try:
            self._local.send(refused.response)
        except OSError:
            self._part()
            return
        if not self._is_program_ended:
            self._local.resume()
        if not self._local.pending_bytes:
            self._on_answered()

    def _wait_for_parting(self, steps: int) -> None:
        if not steps:
            self._part()
            return
        loop = asyncio.get_running_loop()
        seconds = PARTING_SECONDS / PARTING_STEPS
        self._timer = loop.call_later(seconds, self._wait_for_parting, steps - 1)

    def _on_answered(self) -> None:
        """The kernel has the whole answer."""
        try:
            self._local.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._part()
        else:
            if self._is_program_ended:
                self._part()

    def _on_parting_readable(self) -> None:
        try:
            count = self._local.socket.recv_into(self._memory.read_buffer)
        except BlockingIOError:
            return
        except OSError:
            self._part()
            return
        self._parting_bytes += count
        if self._parting_bytes > MAX_PARTING_BYTES:
            self._part()
        elif not count:
            self._is_program_ended = True
            self._local.pause()
            if not self._local.pending_bytes:
                self._part()

    def _on_parting_error(self, _: OSError) -> None:
        self._part()

    def _part(self) -> None:
        self._down = Flow.DONE
        if self._local.pending_bytes:
            self._local.reset()
        else:
            self._local.close()
        self._report(RelayEnd.HTTP_REFUSED, "")

    def _report(self, end: RelayEnd, error: str) -> None:
        self._disarm()
        if self.refused is not None:
            end, error = RelayEnd.HTTP_REFUSED, _described(self.refused)
        super()._report(end, error)


def _described(refused: Refused) -> str:
    host = f"Host '{refused.host}': " if refused.host else ""
    return f"{host}{refused.reason}"


def _framed(data: bytes | memoryview) -> memoryview:
    frame = memoryview(bytearray(ping.HEADER_BYTES + len(data)))
    ping.put_header(frame, len(data))
    frame[ping.HEADER_BYTES :] = data
    return frame

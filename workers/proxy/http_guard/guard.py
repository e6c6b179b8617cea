"""Looks at what a program sends to an app, and lets HTTP pass only when it is meant for this app.

    LOOK --other--> DONE                   LOOK   whether it is HTTP (`classifier`)
     |  ^--------------------------.       HEAD   held until it is whole, and checked
     v                             |       BODY   followed to its end (`body`)
    HEAD --right--> BODY --over----+       WAIT   for the answer to Upgrade or CONNECT
     |                |            |              (`answer`)
     v                v            |       HTTP2  frames, and the heads in them (`http2`)
    HTTP2            WAIT --answered

The first bytes that are no beginning of a request end the work of the guard. Once a request has
passed, everything behind it must be HTTP too, until the app has agreed to another protocol.

A program that sends the beginning of a word and no more may speak any protocol: after
UNDECIDED_SECONDS that passes ahead, and only that. The rest of a request that it turns out to be is
held as usual.
"""

import re
from collections.abc import Callable
from enum import Enum, auto
from time import monotonic
from typing import Final, NamedTuple

from workers.proxy.http_guard.answer import AnswerReader
from workers.proxy.http_guard.body import FRAMING_FIELDS, ChunkedBody, length_of_body
from workers.proxy.http_guard.classifier import Classifier, Look
from workers.proxy.http_guard.head import MAX_HEAD_BYTES, HeadEnd, parse
from workers.proxy.http_guard.http2 import PREFACE, Http2
from workers.proxy.http_guard.refusal import Refused, RequestRefusedError, refused
from workers.proxy.http_guard.rules import CHECKED_FIELDS, Rules, check_request

UNDECIDED_SECONDS: Final = 0.2
HEAD_SECONDS: Final = 10.0
MAX_WAITING_BYTES: Final = 64 * 1024

_UPGRADE: Final = b"upgrade"
_WANTED_FIELDS: Final = CHECKED_FIELDS | FRAMING_FIELDS | {_UPGRADE}
_PREFACE_HEAD: Final = PREFACE[: PREFACE.index(b"SM")]
_EMPTY_LINES = re.compile(rb"[\r\n]++")


class Step(NamedTuple):
    """What is to be done after some bytes.

    `send` goes to the app, also beside a refusal (it is what came before the wrong request); it may
    be a view of the data that was given, so it has to be sent or copied before that changes. After
    a `refusal` the guard is of no more use. With `is_done` nothing that follows needs to be looked
    at, in either direction. `deadline_seconds`: call `Guard.timed_out` so long after this step
    unless another step came first; it replaces the deadline of the step before, None takes it away.
    """

    send: bytes | memoryview = b""
    refusal: Refused | None = None
    is_done: bool = False
    deadline_seconds: float | None = None


class _Stage(Enum):
    LOOK = auto()
    HEAD = auto()
    BODY = auto()
    WAIT = auto()
    HTTP2 = auto()
    DONE = auto()
    REFUSED = auto()


class Guard:
    """One connection. Holds at most a head (64 KB) or what belongs to one block of header fields."""

    __slots__ = (
        "_ahead",
        "_answer",
        "_began",
        "_chunks",
        "_classifier",
        "_clock",
        "_has_passed",
        "_head_end",
        "_held",
        "_http2",
        "_is_impatient",
        "_is_lost",
        "_is_open",
        "_rules",
        "_stage",
        "_unseen",
        "wants_answers",
    )

    def __init__(self, rules: Rules, clock: Callable[[], float] = monotonic) -> None:
        """`clock` is monotonic, in seconds."""
        self._rules = rules
        self._clock = clock
        self._stage = _Stage.LOOK
        self._held = bytearray()  # what cannot be told yet
        self._ahead = 0  # bytes of it, from the first, that have passed all the same
        self._began: float | None = None  # when the first of it came
        self._unseen = 0  # bytes to come that pass, whatever they are
        self._is_open = True  # what follows may be another protocol
        self._is_impatient = False  # UNDECIDED_SECONDS have passed
        self._is_lost = False  # more has passed ahead than is remembered
        self._has_passed = False  # a request
        self._classifier = Classifier()
        self._head_end = HeadEnd()
        self._chunks: ChunkedBody | None = None
        self._answer: AnswerReader | None = None
        self._http2: Http2 | None = None
        # After a request to change the protocol (Upgrade, CONNECT): the app's bytes are wanted.
        self.wants_answers = False

    def from_program(self, data: bytes | memoryview) -> Step:
        """The next bytes of the program."""
        if self._unseen >= len(data) > 0:
            self._unseen -= len(data)
            return Step(data)
        if not self._held:
            return self._step(bytes(data), data)
        self._held += data
        return self._step(self._held, None)

    def from_app(self, data: bytes | memoryview) -> Step:
        """The next bytes of the app, only while `wants_answers`; they go to the program as they are.

        A step, because what was held until the answer may pass now (or be refused).
        """
        if self._answer is not None and (is_changed := self._answer.feed(data)) is not None:
            self._answer = None
            self.wants_answers = False
            self._is_open = is_changed
            if self._stage is _Stage.WAIT:
                self._begin()
                return self._step(self._held, None)
        return Step(deadline_seconds=self._deadline())

    def timed_out(self) -> Step:
        """The deadline of the last step has passed."""
        return self._wait_no_more(408, f"its head did not come within {HEAD_SECONDS:.0f} seconds")

    def ended(self) -> Step:
        """No more bytes of the program will come."""
        return self._wait_no_more(400, "the program ended before its head was whole")

    def _wait_no_more(self, status: int, reason: str) -> Step:
        if self._deadline() is None:
            return Step()
        if self._stage is _Stage.LOOK and self._is_open and not self._classifier.is_sure:
            self._is_impatient = True
            return self._step(self._held, None)
        return Step(refusal=self._refuse(RequestRefusedError(status, reason)))

    # One step.

    def _step(self, buffer: bytes | bytearray, data: bytes | memoryview | None) -> Step:
        """`data` is given if `buffer` is a copy of it, and nothing was held."""
        ahead = self._ahead
        position, error = self._walk(buffer)
        passed = max(position, self._ahead)
        if data is None:
            send: bytes | memoryview = bytes(buffer[ahead:passed])
        else:
            send = data if passed == len(data) else memoryview(data)[:passed]
        if error is not None:
            return Step(send, self._refuse(error))
        if data is None:
            del self._held[:position]
        else:
            self._held += buffer[position:]
        self._ahead = passed - position
        if len(self._held) == self._ahead:
            self._began = None
        elif self._began is None or passed > ahead:
            self._began = self._clock()
        return Step(send, None, self._stage is _Stage.DONE, self._deadline())

    def _walk(self, buffer: bytes | bytearray) -> tuple[int, RequestRefusedError | None]:
        """How many bytes of `buffer` are decided and right, and what is wrong behind them."""
        position, end = 0, len(buffer)
        try:
            while position < end:
                if self._unseen:
                    taken = min(self._unseen, end - position)
                    self._unseen -= taken
                else:
                    taken = self._take(buffer, position)
                if not taken:
                    break
                position += taken
        except RequestRefusedError as error:
            return position, error
        return position, None

    def _take(self, buffer: bytes | bytearray, position: int) -> int:
        """How many bytes from `position` are right; 0 when that cannot be told yet."""
        match self._stage:
            case _Stage.LOOK:
                return self._look(buffer, position)
            case _Stage.HEAD:
                return self._head(buffer, position)
            case _Stage.BODY:
                return self._body(buffer, position)
            case _Stage.HTTP2:
                assert self._http2 is not None
                taken, self._unseen = self._http2.take(buffer, position)
                self._has_passed |= self._http2.has_request
                return taken
            case _Stage.WAIT:
                if len(buffer) - position > MAX_WAITING_BYTES:
                    raise RequestRefusedError(400, "too much follows it before it is answered")
                return 0
            case _Stage.DONE:
                return len(buffer) - position
            case _Stage.REFUSED:
                raise RequestRefusedError(400, "it follows a request that was refused")

    def _look(self, buffer: bytes | bytearray, position: int) -> int:
        classifier = self._classifier
        if classifier.is_fresh:
            # Before a request they mean nothing (RFC 9112 section 2.2); alone they are a question
            # of finger or gopher, which must not wait.
            blank = _EMPTY_LINES.match(buffer, position)
            if blank is not None:
                return blank.end() - position
        last = min(len(buffer), position + MAX_HEAD_BYTES)
        look = classifier.look(buffer, position, last)
        if look is Look.OTHER:
            if not self._is_open:
                raise RequestRefusedError(400, "what follows its first request is no HTTP")
            self._stage = _Stage.DONE
            return len(buffer) - position
        if self._is_impatient:
            self._ahead = max(self._ahead, position + classifier.free)
        is_http = look is Look.REQUEST or classifier.is_sure
        is_full = last - position == MAX_HEAD_BYTES
        if is_http and (self._is_lost or (is_full and look is not Look.REQUEST)):
            raise RequestRefusedError(431, f"its head is larger than {MAX_HEAD_BYTES} bytes")
        if look is Look.REQUEST:
            self._stage = _Stage.HEAD
            return self._head(buffer, position)
        if is_full and not self._is_open:
            raise RequestRefusedError(431, f"its head is larger than {MAX_HEAD_BYTES} bytes")
        if is_full or self._is_lost:
            # A word of this length is hardly HTTP. It passes, and is not remembered; if it is a
            # method after all, the request is refused.
            self._is_impatient = self._is_lost = True
            classifier.forget()
            return last - position
        return 0

    def _head(self, buffer: bytes | bytearray, position: int) -> int:
        end = self._head_end.find(buffer, position, MAX_HEAD_BYTES)
        if not end:
            return 0
        head = bytes(buffer[position:end])
        if head == _PREFACE_HEAD and self._is_open:
            return self._preface(buffer, position)
        request = parse(head, _WANTED_FIELDS)
        check_request(self._rules, request.method, request.authority, request.fields)
        length = length_of_body(request)
        self._has_passed = True
        self._is_open = False
        is_tunnel = request.method == b"CONNECT"
        if is_tunnel or _UPGRADE in request.fields:
            self._answer = AnswerReader(is_tunnel=is_tunnel)
            self.wants_answers = True
        if length is None:
            self._chunks = ChunkedBody()
            self._stage = _Stage.BODY
        else:
            self._unseen = length
            self._end_request()
        return end - position

    def _preface(self, buffer: bytes | bytearray, position: int) -> int:
        present = buffer[position : position + len(PREFACE)]
        if not PREFACE.startswith(present):
            raise RequestRefusedError(400, "its preface of HTTP/2 is not complete")
        if len(present) < len(PREFACE):
            return 0
        self._http2 = Http2(self._rules)
        self._stage = _Stage.HTTP2
        return len(PREFACE)

    def _body(self, buffer: bytes | bytearray, position: int) -> int:
        assert self._chunks is not None
        taken, self._unseen = self._chunks.take(buffer, position)
        if self._chunks.is_over:
            self._chunks = None
            self._end_request()
        return taken

    def _end_request(self) -> None:
        """What comes next is known; the rest of the body may still be to come."""
        if self._answer is not None:
            self._stage = _Stage.WAIT
        else:
            self._begin()

    def _begin(self) -> None:
        self._stage = _Stage.LOOK
        self._classifier = Classifier()
        self._head_end = HeadEnd()
        self._is_impatient = self._is_lost = False

    def _deadline(self) -> float | None:
        """In seconds from now."""
        if self._began is None:
            return None
        seconds = HEAD_SECONDS
        if self._stage is _Stage.LOOK:
            if self._is_open and not self._classifier.is_sure:
                seconds = UNDECIDED_SECONDS
        elif self._stage not in (_Stage.HEAD, _Stage.HTTP2):
            return None
        return max(0.0, self._began + seconds - self._clock())

    def _refuse(self, error: RequestRefusedError) -> Refused:
        has_place = not (self._has_passed or self._is_impatient or self._stage is _Stage.REFUSED)
        is_http2 = self._stage is _Stage.HTTP2
        self._stage = _Stage.REFUSED
        self._held.clear()
        self._ahead = 0
        self._began = None
        return refused(error, has_place=has_place, is_http2=is_http2)

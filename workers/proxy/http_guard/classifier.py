"""Whether what a program sends first is the beginning of an HTTP request. Pure.

    token SP target SP "HTTP/"        any token, since a page may choose the method

Any other byte decides that it is something else: a control character, CR and LF too, before the
version, a first byte or word that is no token, another third word. That holds for "GET key" CR LF
as well, which is HTTP/0.9 and Redis and memcached; no browser has sent HTTP/0.9 for decades. What
only lenient servers take for HTTP (a tab for a space, a line that begins with a space, spaces in a
target) is something else too: browsers write none of it, whatever a page wants. Several spaces and
other versions are HTTP here, so that they are refused.

Sources: RFC 9112 sections 2.2 and 3, RFC 9110 section 5.6.2 (token).
"""

import re
from enum import Enum, auto
from typing import Final

TCHAR: Final = rb"!#$%&'*+\-.^_`|~0-9A-Za-z"

_SPACE: Final = 0x20
_TOKEN_RUN = re.compile(rb"[" + TCHAR + rb"]*+")
_SPACE_RUN = re.compile(rb" *+")
_TARGET_RUN = re.compile(rb"[^\x00-\x20\x7f]*+")
_VERSION: Final = b"HTTP/"
# As nearly every request comes, in one piece: what the parts below find in several steps.
_WHOLE = re.compile(rb"[" + TCHAR + rb"]++ [^\x00-\x20\x7f]++ [Hh][Tt][Tt][Pp]/")
# A browser's request begins so; nothing else is known to begin with a token and one of these and
# to wait for an answer before its line ends.
_SURE_TARGETS: Final = b"/*"


class Look(Enum):
    """What the bytes seen so far are."""

    UNDECIDED = auto()
    REQUEST = auto()
    OTHER = auto()


class _Part(Enum):
    START = auto()
    TOKEN = auto()
    GAP = auto()
    TARGET = auto()
    SECOND_GAP = auto()
    VERSION = auto()


class Classifier:
    """Looks at the bytes of one connection, each of them once."""

    __slots__ = ("_part", "_version_bytes", "free", "is_sure", "scanned")

    def __init__(self) -> None:
        self._part = _Part.START
        self._version_bytes = 0
        self.scanned = 0  # bytes seen
        # How many of them, from the first, could pass ahead of the decision: all, or those before
        # the target once that is one as browsers send it.
        self.free = 0
        self.is_sure = False

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was seen yet."""
        return self._part is _Part.START

    def forget(self) -> None:
        """What was seen so far begins no buffer any more."""
        self.scanned = self.free = 0

    def look(self, buffer: bytes | bytearray, start: int, end: int) -> Look:
        """Goes on in `buffer`, whose first `scanned` bytes from `start` were seen before.

        After REQUEST and OTHER there is nothing more to be looked at.
        """
        first = start + self.scanned
        if self._part is _Part.START and (matched := _WHOLE.match(buffer, first, end)):
            self.scanned = self.free = matched.end() - start
            return Look.REQUEST
        position, look = self._walk(buffer, first, end)
        self.scanned = position - start
        if not self.is_sure:
            self.free = self.scanned
        return look

    def _walk(self, buffer: bytes | bytearray, position: int, end: int) -> tuple[int, Look]:
        begin = position - self.scanned
        while position < end:
            match self._part:
                case _Part.START:
                    if _stop(_TOKEN_RUN, buffer, position, end) == position:
                        return position, Look.OTHER
                    self._part = _Part.TOKEN
                case _Part.TOKEN:
                    position = _stop(_TOKEN_RUN, buffer, position, end)
                    if position == end:
                        break
                    if buffer[position] != _SPACE:
                        return position, Look.OTHER
                    self._part = _Part.GAP
                case _Part.GAP:
                    position = _stop(_SPACE_RUN, buffer, position, end)
                    if position == end:
                        break
                    if buffer[position] in _SURE_TARGETS:
                        self.is_sure = True
                        self.free = position - begin
                    self._part = _Part.TARGET
                case _Part.TARGET:
                    position = _stop(_TARGET_RUN, buffer, position, end)
                    if position == end:
                        break
                    if buffer[position] != _SPACE:
                        return position, Look.OTHER
                    self._part = _Part.SECOND_GAP
                case _Part.SECOND_GAP:
                    position = _stop(_SPACE_RUN, buffer, position, end)
                    self._part = _Part.VERSION if position < end else self._part
                case _Part.VERSION:
                    wanted = _VERSION[self._version_bytes]
                    if buffer[position] not in (wanted, wanted | _SPACE):
                        return position, Look.OTHER
                    self._version_bytes += 1
                    if self._version_bytes == len(_VERSION):
                        return position, Look.REQUEST
                    position += 1
        return position, Look.UNDECIDED


def _stop(run: re.Pattern[bytes], buffer: bytes | bytearray, position: int, end: int) -> int:
    matched = run.match(buffer, position, end)
    assert matched is not None
    return matched.end()

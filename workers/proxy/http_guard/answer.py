"""Whether an app agrees to another protocol: the status of its answer to Upgrade or CONNECT. Pure.

Asked for right behind such a request, when no other answer should be on its way; browsers send
none of these while one is. Whatever is no answer of HTTP/1 is taken for a refusal, so that the
program's next bytes are looked at as HTTP.

Sources: RFC 9110 sections 7.8, 9.3.6 and 15.2.
"""

import re
from typing import Final

MAX_INTERIM_BYTES: Final = 16 * 1024  # of answers like 100 and 103 that come first

_STATUS = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})[ \r]")
_STATUS_BYTES: Final = 13
_BEGIN: Final = b"HTTP/1."
_END: Final = b"\r\n\r\n"
_SWITCHING: Final = 101


class AnswerReader:
    """Reads what the app sends, up to the first status that decides."""

    __slots__ = ("_collected", "_is_tunnel")

    def __init__(self, *, is_tunnel: bool) -> None:
        """`is_tunnel`: the request was CONNECT."""
        self._collected = bytearray()
        self._is_tunnel = is_tunnel

    def feed(self, data: bytes | memoryview) -> bool | None:
        """Whether another protocol follows; None while that cannot be told yet."""
        self._collected += data[:MAX_INTERIM_BYTES]
        while True:
            matched = _STATUS.match(self._collected)
            if matched is None:
                is_short = len(self._collected) < _STATUS_BYTES
                begins = _BEGIN.startswith(self._collected[: len(_BEGIN)])
                return None if is_short and begins else False
            status = int(matched[1])
            if status >= 200 or status == _SWITCHING:
                return 200 <= status < 300 if self._is_tunnel else status == _SWITCHING
            end = self._collected.find(_END)
            if end < 0:
                return None if len(self._collected) < MAX_INTERIM_BYTES else False
            del self._collected[: end + len(_END)]

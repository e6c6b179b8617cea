"""Teleport's ping wrapper: frames inside the TLS stream of an ALPN protocol `*-ping`. Pure.

     0       4          4 + length
    +--------+----------+
    | length | payload  |      length: unsigned, big-endian; 0 is a ping
    +--------+----------+

A ping has no payload, wants no answer and keeps idle connections alive; the far end sends one
every 30 seconds or so. Any length up to 2**32 - 1 is valid, and a frame may be far larger than
any buffer, so payload is passed on as it comes and never collected.

Source: Teleport, api/utils/pingconn/pingconn.go.
"""

import struct

HEADER_BYTES = 4
MAX_PAYLOAD_BYTES = 2**32 - 1

_LENGTH = struct.Struct(">I")


def put_header(frame: memoryview, payload_bytes: int) -> None:
    """Writes the header of one data frame into the first four bytes of `frame`.

    The caller has put the payload behind it; nothing is copied. `payload_bytes` is 1 to
    MAX_PAYLOAD_BYTES: an empty data frame cannot be expressed, it would be a ping.
    """
    _LENGTH.pack_into(frame, 0, payload_bytes)


class PingDecoder:
    """Takes the frames of one direction apart. Accepts every input."""

    __slots__ = ("_header", "_missing_bytes")

    def __init__(self) -> None:
        self._header = b""  # an incomplete header, at most three bytes
        self._missing_bytes = 0  # payload of the present frame that has not come yet

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here without having lost anything."""
        return not self._missing_bytes and not self._header

    def feed(self, data: memoryview) -> list[memoryview]:
        """The payload in the next bytes of the stream, as views of `data` in their order.

        The views are never empty and live as long as the content of `data`.
        """
        payload: list[memoryview] = []
        end = len(data)
        position = self._finish_header(data) if self._header else 0
        missing = self._missing_bytes
        while position < end:
            if missing:
                piece = data[position : position + missing]
                payload.append(piece)
                position += len(piece)
                missing -= len(piece)
            elif end - position < HEADER_BYTES:
                self._header = bytes(data[position:])
                break
            else:
                (missing,) = _LENGTH.unpack_from(data, position)
                position += HEADER_BYTES
        self._missing_bytes = missing
        return payload

    def _finish_header(self, data: memoryview) -> int:
        """Completes the header begun earlier, if it can; returns how many bytes it took."""
        taken = min(HEADER_BYTES - len(self._header), len(data))
        header = self._header + bytes(data[:taken])
        if len(header) < HEADER_BYTES:
            self._header = header
        else:
            self._header = b""
            (self._missing_bytes,) = _LENGTH.unpack(header)
        return taken

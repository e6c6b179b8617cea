"""The ping wrapper around a TLS stream, as in Teleport's api/utils/pingconn. Pure.

| length, 4 bytes big-endian | that many bytes |     length 0 is a ping: no payload, no reply
"""

from demo.cluster.errors import FramingError

# The protocol knows no limit below 2^32; this bounds what a hostile length makes us hold.
MAX_FRAME_BYTES = 16 * 1024 * 1024

PING = b"\0\0\0\0"


def encode_frame(data: bytes) -> bytes:
    """One data frame; `data` must not be empty, for an empty frame is a ping."""
    if not data:
        raise ValueError("an empty frame would be a ping")
    return len(data).to_bytes(4, "big") + data


class FrameDecoder:
    """Strips frames from a byte stream.

    Payload is handed on as it arrives, so nothing but a cut header is ever held.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._header = b""
        self._missing = 0

    @property
    def is_inside_frame(self) -> bool:
        """Whether the stream would be cut in the middle of a frame if it ended now."""
        return bool(self._header or self._missing)

    def feed(self, data: bytes) -> bytes:
        """The payload bytes in `data`; may be empty.

        Raises:
            FramingError: a frame announces more than `max_frame_bytes`.
        """
        payload = bytearray()
        at = 0
        while at < len(data):
            if self._missing:
                piece = data[at : at + self._missing]
                payload += piece
                self._missing -= len(piece)
                at += len(piece)
                continue
            piece = data[at : at + 4 - len(self._header)]
            self._header += piece
            at += len(piece)
            if len(self._header) == 4:
                self._open_frame(int.from_bytes(self._header, "big"))
        return bytes(payload)

    def _open_frame(self, length: int) -> None:
        self._header = b""
        if length > self._max_frame_bytes:
            raise FramingError(f"a frame of {length} bytes, {self._max_frame_bytes} are allowed")
        self._missing = length

"""The ping variant of a TLS stream: both directions are framed, and the proxy pings.

    client --close_notify--> end of reading        end of writing --close_notify--> client

Pings are sent only while the proxy may still write (api/utils/pingconn).
"""

from demo.cluster.errors import TruncatedStreamError
from demo.cluster.framing import PING, FrameDecoder, encode_frame
from demo.cluster.tls import TlsStream


class PingStream:
    """A `ByteStream` in frames over TLS."""

    def __init__(self, below: TlsStream) -> None:
        self._below = below
        self._decoder = FrameDecoder()

    async def read(self) -> bytes:
        """Some payload; empty at the end.

        Raises:
            FramingError, TruncatedStreamError: a frame is too large, or cut.
        """
        while data := await self._below.read():
            if payload := self._decoder.feed(data):
                return payload
        if self._decoder.is_inside_frame:
            raise TruncatedStreamError("the stream ended inside a ping frame")
        return b""

    async def write(self, data: bytes) -> None:
        await self._below.write(encode_frame(data))

    async def write_eof(self) -> None:
        await self._below.write_eof()

    async def ping(self) -> None:
        """Sends a ping, unless the own direction has ended."""
        if not self._below.is_write_closed:
            await self._below.write(PING)

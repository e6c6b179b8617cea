"""Moves bytes between a TLS client and a backend, each direction with its own end.

    client --close_notify--> backend FIN        backend --FIN--> client close_notify

In the ping variant both directions are framed and the proxy pings while it may still write.
"""

import asyncio

from demo.cluster.errors import TruncatedStreamError
from demo.cluster.framing import PING, FrameDecoder, encode_frame
from demo.cluster.streams import READ_BYTES, Streams, closing
from demo.cluster.tls import TlsStream


async def relay(client: TlsStream, backend: Streams, ping_seconds: float) -> None:
    """Returns when both directions have ended; closes the backend.

    `ping_seconds` 0 means the plain protocol, else frames and a ping at that interval.

    Raises:
        ExceptionGroup: of OSErrors (SSLErrors among them) and EmbeddedClusterErrors; one of the
            connections broke.
    """
    reader, writer = backend
    async with closing(writer), asyncio.TaskGroup() as group:
        group.create_task(_upload(client, writer, is_framed=ping_seconds > 0))
        group.create_task(_download(client, reader, ping_seconds))


async def _upload(client: TlsStream, writer: asyncio.StreamWriter, *, is_framed: bool) -> None:
    decoder = FrameDecoder()
    while data := await client.read():
        payload = decoder.feed(data) if is_framed else data
        if payload:
            writer.write(payload)
            await writer.drain()
    if decoder.is_inside_frame:
        raise TruncatedStreamError("the stream ended inside a ping frame")
    writer.write_eof()


async def _download(client: TlsStream, reader: asyncio.StreamReader, ping_seconds: float) -> None:
    pings = asyncio.create_task(_ping(client, ping_seconds)) if ping_seconds else None
    try:
        while data := await reader.read(READ_BYTES):
            await client.write(encode_frame(data) if pings else data)
    finally:
        if pings is not None:
            pings.cancel()
            # Its failure is the connection's, and the next read or write tells.
            await asyncio.gather(pings, return_exceptions=True)
    await client.write_eof()


async def _ping(client: TlsStream, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await client.write(PING)

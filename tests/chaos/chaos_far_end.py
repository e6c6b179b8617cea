"""Where all transfers lead: a server that sends and takes checked bytes at an even pace."""

import asyncio
import contextlib
import hashlib

from chaos_pattern import HEADER, PROGRESS, SHORT_BYTES, SUMMARY, Pattern, Request

HOST, PORT = "127.0.0.1", 9000
# 1.6 MB/s: a gap of a tenth of a second can be told from the pace.
PIECE_BYTES, PIECE_SECONDS = 32_768, 0.02


async def serve() -> None:
    """Serves for ever."""
    server = await asyncio.start_server(_talk, HOST, PORT, backlog=1024)
    async with server:
        await server.serve_forever()


async def _talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # Clients are cut off on purpose.
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        request = Request.decode(await reader.readexactly(HEADER.size))
        if request.way == "down":
            await _send(reader, writer, request.pattern)
        elif request.way == "up":
            await _take(reader, writer, request.pattern)
        else:
            writer.write(request.pattern.piece(0, SHORT_BYTES))
            await reader.read()
    with contextlib.suppress(OSError):
        writer.close()
        await writer.wait_closed()


async def _send(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pattern: Pattern
) -> None:
    """Sends until the other side has ended its direction."""
    digest, sent = hashlib.sha256(), 0
    end = asyncio.ensure_future(reader.read())
    try:
        while not end.done():
            piece = pattern.piece(sent, PIECE_BYTES)
            digest.update(piece)
            sent += len(piece)
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(PIECE_SECONDS)
        await end
    finally:
        end.cancel()
    writer.write(SUMMARY.pack(sent, 0, digest.digest()))
    await writer.drain()


async def _take(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pattern: Pattern
) -> None:
    """Takes until the end, and says after each piece how far it is."""
    digest, taken, wrong = hashlib.sha256(), 0, 0
    while piece := await reader.read(1 << 16):
        digest.update(piece)
        wrong += pattern.wrong_bytes(taken, piece)
        taken += len(piece)
        writer.write(PROGRESS.pack(taken, wrong))
        await writer.drain()
    writer.write(SUMMARY.pack(taken, wrong, digest.digest()))
    await writer.drain()

"""What the tests of the embedded proxy share: a cluster that leaves nothing, and a WebSocket."""

import asyncio
import base64
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from embedded_cluster_client import Home, TlsClient

from demo.cluster.config import parse_cluster_file
from demo.cluster.server import EmbeddedCluster
from demo.cluster.streams import abort

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

Pump = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def run(tmp_path: Path, file: str, scenario: Callable[[Home], Awaitable[None]]) -> None:
    """Runs a scenario against a fresh cluster and checks that nothing is left afterwards.

    The cluster itself is `home.embedded`, for the few who look inside.
    """

    async def main() -> None:
        before = open_descriptors()
        async with EmbeddedCluster(parse_cluster_file(file), tmp_path / "tsh") as embedded:
            home = Home(tmp_path / "tsh")
            home.embedded = embedded
            await asyncio.wait_for(scenario(home), 90)
        await until(lambda: open_descriptors() <= before)
        await until(lambda: len(asyncio.all_tasks()) == 1)

    asyncio.run(main())


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition, seconds=10.0):
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "condition never became true"
        await asyncio.sleep(0.01)


def set_faults(home: Home, text: str) -> None:
    (home.path / "faults").write_text(text)


def web(home: Home, request: str, *, alpn=("http/1.1",)) -> tuple[str, dict[str, str], bytes]:
    """Status line, headers and body of a request; each of its lines is given without CRLF."""
    with TlsClient(home.address, home.context(list(alpn)), home.proxy_host) as tls:
        tls.send("".join(f"{line}\r\n" for line in (*request.splitlines(), "")).encode())
        head, _, body = tls.recv_all().partition(b"\r\n\r\n")
    return *parse_head(head), body


def parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    status, *lines = head.decode().split("\r\n")
    headers = (line.partition(":") for line in lines)
    return status, {name.lower(): value.strip() for name, _, value in headers}


def upgrade_request(
    protocol: str = "alpn", *, key: str | None = None, without=(), **changes: str
) -> str:
    headers = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key or base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Protocol": protocol,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in headers.items() if name not in without]
    return "\n".join(["GET /webapi/connectionupgrade HTTP/1.1", *lines])


@asynccontextmanager
async def upgraded(
    home: Home, protocol: str = "alpn", *, alpn=("http/1.1",)
) -> AsyncIterator[Pump]:
    """The streams of a WebSocket behind its opening handshake."""
    reader, writer = await asyncio.open_connection(
        *home.address, ssl=home.context(list(alpn)), server_hostname=home.proxy_host
    )
    try:
        request = upgrade_request(protocol)
        writer.write("".join(f"{line}\r\n" for line in (*request.splitlines(), "")).encode())
        status, headers = parse_head((await reader.readuntil(b"\r\n\r\n")).rstrip())
        assert status.startswith("HTTP/1.1 101 ")
        assert headers["sec-websocket-protocol"] == protocol
        yield reader, writer
    finally:
        abort(writer)


def client_frame(opcode: int, payload: bytes, *, key: bytes | None = bytes(4), fin=0x80) -> bytes:
    """One frame; `key` None leaves it unmasked."""
    size = len(payload)
    if size < 126:
        length = bytes([size])
    elif size < 1 << 16:
        length = b"\x7e" + size.to_bytes(2, "big")
    else:
        length = b"\x7f" + size.to_bytes(8, "big")
    if key is None:
        return bytes([fin | opcode]) + length + payload
    masked = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload)) if any(key) else payload
    return bytes([fin | opcode, length[0] | 0x80]) + length[1:] + key + masked


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    first, second = await reader.readexactly(2)
    assert first & 0xF0 == 0x80, "a fragment, or a reserved bit"
    assert not second & 0x80, "a server masks nothing"
    extended = {126: 2, 127: 8}.get(second, 0)
    size = int.from_bytes(await reader.readexactly(extended), "big") if extended else second
    return first & 0x0F, await reader.readexactly(size)


@asynccontextmanager
async def tunnel(
    home: Home, protocol: str = "alpn", *, key=bytes(4)
) -> AsyncIterator[socket.socket]:
    """A socket whose bytes go through an upgraded connection; it ends when the server closes."""
    ours, theirs = socket.socketpair()
    local = await asyncio.open_connection(sock=theirs)
    async with upgraded(home, protocol) as remote:
        up = asyncio.create_task(_pump_up(local[0], remote[1], key))
        down = asyncio.create_task(_pump_down(remote, local[1]))
        try:
            ours.settimeout(30)
            yield ours
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            abort(local[1])
            ours.close()


async def _pump_up(reader, writer, key) -> None:
    while data := await reader.read(40_000):
        writer.write(client_frame(BINARY, data, key=key))
        await writer.drain()


async def _pump_down(remote: Pump, local: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            opcode, payload = await read_frame(remote[0])
            if opcode == BINARY:
                local.write(payload)
                await local.drain()
            elif opcode == PING:
                remote[1].write(client_frame(PONG, payload))
            else:
                break
    local.close()

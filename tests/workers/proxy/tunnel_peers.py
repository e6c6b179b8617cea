"""Far ends that are no plain TLS: a bare TCP one, and one behind a connection upgrade.

The frames are put together and taken apart here; nothing is shared with the code under test.
"""

import base64
import contextlib
import hashlib
import random
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from functools import cache, partial

from tls_peers import SERVER_NAME, FarConnection, Peer, authority, client_context, server_context

from workers.proxy.dial_plan import DialPlan, TlsPlan

CLOSE_NORMAL = b"\x88\x02\x03\xe8"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class PlainFar:
    """A far end without TLS, with the methods of a `FarConnection`."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def recv(self) -> bytes:
        return self.socket.recv(65536)

    def recv_all(self) -> bytes:
        return b"".join(iter(self.recv, b""))

    def close_notify(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        reset(self.socket)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class WebSocketServer:
    """The bytes inside a WebSocket inside TLS, as a blocking socket."""

    def __init__(self, outer: FarConnection, *, seed: int, pings: bool) -> None:
        self.outer = outer
        self.pongs: list[bytes] = []
        self.is_closed_by_client = False
        self._random = random.Random(seed)
        self._unread = b""
        self._payload = b""
        self._ping_share = 0.2 if pings else 0.0
        self._pings = 0

    # What FarConnection uses.

    def recv(self, size: int) -> bytes:
        while not self._payload:
            opcode, payload = self.read_frame()
            if opcode == 0x2:
                self._payload = payload
            elif opcode == 0xA:
                self.pongs.append(payload)
            elif opcode == 0x8:
                self.is_closed_by_client = True
                return b""
            elif opcode is None:
                return b""
            else:
                raise AssertionError(f"a client sent a frame of kind {opcode}")
        taken, self._payload = self._payload[:size], self._payload[size:]
        return taken

    def sendall(self, data: bytes) -> None:
        """Frames of all sizes, some empty, some messages in parts, some pings between."""
        stream = []
        while data:
            size = self._random.choice([0, 1, 125, 126, 1000, 16_000, 70_000, 300_000])
            piece, data = data[:size], data[size:]
            is_split = self._random.random() < 0.2
            stream.append(frame(0x2, piece, is_final=not is_split))
            if self._random.random() < self._ping_share:
                stream.append(self.ping_frame())
            if is_split:
                stream.append(frame(0x0, b""))
        self.outer.send_raw(b"".join(stream))

    def setsockopt(self, *arguments: object) -> None:
        self.outer.socket.setsockopt(*arguments)

    def close(self) -> None:
        self.outer.socket.close()

    # More.

    def ping_frame(self) -> bytes:
        self._pings += 1
        return frame(0x9, b"ping %d" % self._pings)

    def end(self, close: bytes = CLOSE_NORMAL) -> None:
        """A close frame, and nothing more."""
        self.outer.send_raw(close)

    def read_frame(self) -> tuple[int | None, bytes]:
        head = self._read(2)
        if not head:
            return None, b""
        assert head[0] & 0xF0 == 0x80
        assert head[1] & 0x80, "a client masks"
        length = head[1] & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", self._read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._read(8))
        assert self._read(4) == bytes(4), "Teleport's older servers do not unmask"
        return head[0] & 0x0F, self._read(length)

    def _read(self, size: int) -> bytes:
        """So many bytes; none at the end of the stream."""
        while len(self._unread) < size:
            piece = self.outer.recv()
            if not piece:
                assert not self._unread
                return b""
            self._unread += piece
        data, self._unread = self._unread[:size], self._unread[size:]
        return data


def frame(opcode: int, payload: bytes, *, is_final: bool = True) -> bytes:
    start = (0x80 if is_final else 0) | opcode
    if len(payload) < 126:
        return bytes([start, len(payload)]) + payload
    if len(payload) < 65536:
        return struct.pack(">BBH", start, 126, len(payload)) + payload
    return struct.pack(">BBQ", start, 127, len(payload)) + payload


class TunnelPeer(Peer):
    """A proxy behind a balancer that ends TLS. `greet` replaces its answer to the upgrade.

    `pings`: some come between the frames; who closes before the pongs were read resets.

    The handler's FarConnection has the WebSocket as its `socket`.
    """

    def __init__(
        self,
        handler: Callable[[FarConnection], None],
        *,
        is_ping: bool = False,
        version: str = "TLSv1_3",
        greet: Callable[[FarConnection, str], bool] | None = None,
        inner: ssl.SSLContext | None = None,
        outer: ssl.SSLContext | None = None,
        seed: int = 0,
        pings: bool = True,
        **options,
    ) -> None:
        alpn = "teleport-tcp-ping" if is_ping else "teleport-tcp"
        context = inner or server_context(alpn, version)
        super().__init__(handler, context, is_ping=is_ping, is_tls=False, **options)
        self._handle_far = handler
        self._handler = self._handle_raw
        self._outer = outer or balancer_context(version)
        self._greet = greet or accept_upgrade
        self._web_socket = partial(WebSocketServer, seed=seed, pings=pings)
        self.requests: list[str] = []

    def _handle_raw(self, sock: socket.socket) -> None:
        outer = FarConnection(sock, self._outer, is_ping=False)
        request = read_head(outer.recv)
        self.requests.append(request)
        if self._greet(outer, request):
            web_socket = self._web_socket(outer)
            self._handle_far(FarConnection(web_socket, self._context, self._is_ping))
            close_in_order(sock)


def close_in_order(sock: socket.socket) -> None:
    """Waits for the client's end: closing with pongs unread would reset the connection."""
    with contextlib.suppress(OSError):  # reset by one of the two
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


@cache
def balancer_context(version: str = "TLSv1_3") -> ssl.SSLContext:
    """Knows nothing of Teleport's protocols and wants no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    authority().load(context, SERVER_NAME)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def read_head(recv: Callable[[], bytes]) -> str:
    """A client waits for the answer, so nothing comes behind."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = recv()
        assert piece, "the head is cut"
        head += piece
    return head.decode("ascii")


def accept_upgrade(outer: FarConnection, request: str, behind: bytes = b"") -> bool:
    assert request.startswith("GET /webapi/connectionupgrade HTTP/1.1\r\n")
    fields = dict(line.split(": ", 1) for line in request.split("\r\n")[1:-2])
    assert fields["Upgrade"] == "websocket"
    assert fields["Connection"] == "Upgrade"
    assert fields["Sec-WebSocket-Version"] == "13"
    key = fields["Sec-WebSocket-Key"].encode()
    assert len(base64.b64decode(key)) == 16
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest()).decode()
    outer.send_raw(
        (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n"
            f"Sec-WebSocket-Protocol: {fields['Sec-WebSocket-Protocol']}\r\n\r\n"
        ).encode()
        + behind
    )
    return True


@cache
def web_context() -> ssl.SSLContext:
    """What a client uses towards the balancer."""
    context = ssl.create_default_context(cadata=authority().pem)
    context.set_alpn_protocols(["http/1.1"])
    return context


def plain_plan(port: int, http_proxy: str = "") -> DialPlan:
    return DialPlan("127.0.0.1", port, None, http_proxy=http_proxy)


def tunnel_plan(
    port: int,
    alpn: str = "teleport-tcp",
    *,
    context: ssl.SSLContext | None = None,
    http_proxy: str = "",
) -> DialPlan:
    return DialPlan(
        "127.0.0.1",
        port,
        TlsPlan(context or client_context(alpn), SERVER_NAME),
        TlsPlan(web_context(), SERVER_NAME),
        http_proxy,
    )


def chunks(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """Cuts `data` into pieces of these sizes; the rest is the last piece."""
    for size in sizes:
        if not data:
            return
        yield data[:size]
        data = data[size:]
    if data:
        yield data

"""A far end that speaks what nginx does not: the ping variant, and inside an upgraded connection.

One stream at a time, in large blocks through OpenSSL; what it takes is not looked at, and so
neither unframed nor, in an upgraded connection, decrypted a second time. That keeps its part of
the machine small, as if it ran on another.

    plain, database    TLS                                         bytes
    ping               TLS                                         frames of 32 KiB
    upgrade            TLS, WebSocket with a frame for each record, TLS    bytes
"""

import contextlib
import multiprocessing
import socket
import ssl
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from demo.cluster.upgrade import answer_upgrade
from demo.cluster.web import parse_request

BLOCK_BYTES = 1024 * 1024
# As Go's io.Copy writes into the wrapper.
_PING_FRAME_BYTES = 32 * 1024
_RECORD_BYTES = 16 * 1024 + 22  # RFC 8446 section 5.2, with an AEAD tag of 16 bytes
_MAX_HEAD_BYTES = 64 * 1024


class Way(Enum):
    """How bytes come to the far end; the value is the protocol that it offers."""

    PLAIN = "teleport-tcp"
    PING = "teleport-tcp-ping"
    UPGRADE = "upgrade"
    DATABASE = "teleport-postgres"


@dataclass(frozen=True, slots=True)
class Place:
    """Where to listen and what to show: the web certificate, and the one for upgraded connections.

    Paths to PEM files; `users` has the authority of client certificates.
    """

    address: str
    web: str
    host: str
    users: str


@contextlib.contextmanager
def running_far_end(places: Mapping[Way, Place]) -> Iterator[int]:
    """Serves these ways in a process of its own, whose id it gives."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=serve, args=(places, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(20) or process.pid is None:
            raise RuntimeError("the far end does not start")
        yield process.pid
    finally:
        process.terminate()
        process.join()


def serve(places: Mapping[Way, Place], ready: "threading.Event") -> None:
    """Serves all ways for ever. A certificate for "source" gets bytes, others give them."""
    listeners = {way: socket.create_server((place.address, 443)) for way, place in places.items()}
    for way, listener in listeners.items():
        threading.Thread(target=_accept, args=(listener, way, places[way]), daemon=True).start()
    ready.set()
    threading.Event().wait()


def _accept(listener: socket.socket, way: Way, place: Place) -> None:
    outer = _context(place.web, None if way is Way.UPGRADE else place.users)
    inner = _context(place.host, place.users)
    if way is Way.UPGRADE:
        outer.set_alpn_protocols(["http/1.1"])
        inner.set_alpn_protocols([Way.PLAIN.value])
    else:
        outer.set_alpn_protocols([way.value])
    while True:
        connection, _ = listener.accept()
        arguments = (connection, way, outer, inner)
        threading.Thread(target=_serve, args=arguments, daemon=True).start()


def _context(certificate: str, users: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    if users is not None:
        context.load_verify_locations(users)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _serve(
    connection: socket.socket, way: Way, outer: ssl.SSLContext, inner: ssl.SSLContext
) -> None:
    with contextlib.suppress(OSError), connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with outer.wrap_socket(connection, server_side=True) as tls:
            tunnel = _Upgraded(tls, inner) if way is Way.UPGRADE else None
            if b"source" in ((tunnel or tls).getpeercert(binary_form=True) or b""):
                for block in tunnel.blocks() if tunnel else _blocks(way):
                    tls.sendall(block)
            buffer = bytearray(BLOCK_BYTES)
            while tls.recv_into(buffer):
                pass


def _blocks(way: Way) -> Iterator[bytes]:
    block = bytes(BLOCK_BYTES)
    if way is Way.PING:
        frame = struct.pack(">I", _PING_FRAME_BYTES) + bytes(_PING_FRAME_BYTES)
        block = frame * (BLOCK_BYTES // _PING_FRAME_BYTES)
    while True:
        yield block


class _Upgraded:
    """The TLS inside an upgraded connection."""

    def __init__(self, outer: ssl.SSLSocket, context: ssl.SSLContext) -> None:
        self._outer = outer
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._agree()
        self._shake_hands()

    def getpeercert(self, *, binary_form: bool) -> bytes | None:
        """As an `SSLSocket` has it."""
        assert binary_form
        return self._tls.getpeercert(binary_form=True)

    def blocks(self) -> Iterator[bytes]:
        """Zeros in TLS records in frames."""
        block = bytes(BLOCK_BYTES)
        while True:
            self._tls.write(block)
            yield self._frames()

    def _agree(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = self._outer.recv(_MAX_HEAD_BYTES)
            if not piece or len(head) > _MAX_HEAD_BYTES:
                raise ConnectionError("no request for an upgrade")
            head += piece
        request = parse_request(head)
        assert request is not None
        self._outer.sendall(answer_upgrade(request).response)

    def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._outer.sendall(self._frames())
                self._in.write(self._receive())
            else:
                self._outer.sendall(self._frames())
                return

    def _frames(self) -> bytes:
        """What waits to be sent, one frame (RFC 6455 section 5.2) for each full record."""
        records = memoryview(self._out.read())
        pieces: list[bytes | memoryview] = []
        for start in range(0, len(records), _RECORD_BYTES):
            record = records[start : start + _RECORD_BYTES]
            pieces += [struct.pack(">BBH", 0x82, 126, len(record)), record]
        return b"".join(pieces)

    def _receive(self) -> bytes:
        """The payload of one frame; VNet masks with zeros."""
        _, short = self._exactly(2)
        size = short & 0x7F
        if size == 126:
            (size,) = struct.unpack(">H", self._exactly(2))
        if size > 0xFFFF or self._exactly(4) != bytes(4):
            raise ConnectionError("no frame of a handshake")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._outer.recv(size - len(data))
            if not piece:
                raise ConnectionError("closed")
            data += piece
        return data

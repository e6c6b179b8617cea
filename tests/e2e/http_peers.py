"""The two sides of HTTP in private networks: an app that counts what reaches it, and a DNS server for others."""

import base64
import contextlib
import hashlib
import json
import socket
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dnslib
import h2.config
import h2.connection
import h2.events
from demo_bed import VNET
from private_bed import Bed

from demo.session import DNS_ADDRESS, toml

_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_IDLE_SECONDS = 20.0


class CountingServer:
    """An HTTP/1.1 server: pages by path, "hello" for each WebSocket. Keeps whatever it receives.

    A page that is an address sends whoever asks for it there, with the same request.
    """

    def __init__(self, pages: Mapping[str, str], idle_seconds: float = _IDLE_SECONDS) -> None:
        self._pages = pages
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self.received = b""
        self.requests: list[str] = []  # method and path
        self.connections = 0

    def forget(self) -> None:
        """Begins to count anew."""
        with self._lock:
            self.received = b""
            self.requests.clear()
            self.connections = 0

    def serve(self, connection: socket.socket) -> None:
        """One connection, request by request."""
        connection.settimeout(self._idle_seconds)
        with self._lock:
            self.connections += 1
        unread = b""
        with contextlib.suppress(TimeoutError, EOFError):
            while True:
                unread = self._serve_one(connection, unread)

    def _serve_one(self, connection: socket.socket, unread: bytes) -> bytes:
        while b"\r\n\r\n" not in unread:
            unread += self._receive(connection)
        head, _, unread = unread.partition(b"\r\n\r\n")
        first, *fields = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        named = {
            name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)
        }
        with self._lock:
            self.requests.append(f"{method} {path}")
        length = int(named.get("content-length", 0))
        while len(unread) < length:
            unread += self._receive(connection)
        body, unread = unread[:length], unread[length:]
        if named.get("upgrade", "").lower() == "websocket":
            key = named["sec-websocket-key"].encode() + _WEBSOCKET_GUID
            accept = base64.b64encode(hashlib.sha1(key, usedforsecurity=False).digest())
            connection.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n\x81\x05hello"
            )
            while True:
                self._receive(connection)
        page = self._pages.get(path)
        if page is not None and page.startswith("http://"):
            connection.sendall(
                f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {page}\r\n"
                "Access-Control-Allow-Origin: *\r\nContent-Length: 0\r\n\r\n".encode()
            )
            return unread
        content = body if method == "POST" else (page or "").encode()
        status = "200 OK" if method == "POST" or page is not None else "404 Not Found"
        connection.sendall(
            f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\nContent-Length: {len(content)}\r\n"
            "Cache-Control: no-store\r\n\r\n".encode()
            + (b"" if method == "HEAD" else content)
        )
        return unread

    def _receive(self, connection: socket.socket) -> bytes:
        data = connection.recv(65536)
        if not data:
            raise EOFError
        with self._lock:
            self.received += data
        return data


@contextlib.contextmanager
def own_dns(bed: Bed, address: str, names: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """A DNS server (UDP) that knows these names and asks the demo's for all others."""
    stopping = threading.Event()

    def answer(query: bytes) -> bytes:
        request = dnslib.DNSRecord.parse(query)
        addresses = names.get(str(request.q.qname).rstrip(".").lower())
        if addresses is None:
            with bed.open_socket(kind=socket.SOCK_DGRAM, timeout=5) as upstream:
                upstream.connect((DNS_ADDRESS, 53))
                upstream.send(query)
                return upstream.recv(65535)
        reply = request.reply()
        if request.q.qtype == dnslib.QTYPE.A:
            for one in addresses:
                reply.add_answer(dnslib.RR(request.q.qname, rdata=dnslib.A(one), ttl=1))
        packed: bytes = reply.pack()
        return packed

    def serve() -> None:
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                query, sender = end.recvfrom(65535)
                end.sendto(answer(query), sender)

    with bed.open_socket(kind=socket.SOCK_DGRAM, timeout=0.1) as end:
        end.bind((address, 53))
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()


def reload(bed: Bed, **sections: Mapping[str, Any]) -> None:
    """Changes sections of the demo's configuration, by key, and has VNet read it again."""
    path = bed.run_dir.parent / "vnet.toml"
    config = tomllib.loads(path.read_text())
    for name, keys in sections.items():
        config[name] = config.get(name, {}) | dict(keys)
    path.write_text(toml(config))
    bed.reload()


def refused_requests(bed: Bed) -> int:
    """How many HTTP requests the proxies have refused."""
    return int(bed.status()["security"]["http_refused"])


def lines_about(bed: Bed, words: str) -> list[str]:
    """Lines of VNet's log with these words in them."""
    lines = (
        json.loads(line)["message"] for line in bed.output(VNET, "logs", "--json").splitlines()
    )
    return [line for line in lines if words in line]


class H2cServer:
    """An HTTP/2 server without TLS, by prior knowledge and by upgrade. Keeps whatever it receives."""

    def __init__(self) -> None:
        self.received = b""
        self.requests: list[str] = []  # authority and path

    def serve(self, connection: socket.socket) -> None:
        """One connection."""
        connection.settimeout(_IDLE_SECONDS)
        http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        first = b""
        with contextlib.suppress(TimeoutError, EOFError):
            while b"\r\n\r\n" not in first:
                first += self._receive(connection)
            if not first.startswith(b"PRI "):
                connection.sendall(
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
                )
                http2.initiate_upgrade_connection(_field(first, b"http2-settings"))
                self._answer(http2, 1, _field(first, b"host").decode())
                first = b""
            else:
                http2.initiate_connection()
            while True:
                for event in http2.receive_data(first):
                    if isinstance(event, h2.events.RequestReceived):
                        found = dict(event.headers)
                        where = found[b":authority"] + found[b":path"]
                        self._answer(http2, event.stream_id, where.decode())
                connection.sendall(http2.data_to_send())
                first = self._receive(connection)

    def _answer(self, http2: h2.connection.H2Connection, stream: int, where: str) -> None:
        self.requests.append(where)
        http2.send_headers(stream, [(":status", "200"), ("content-length", "5")])
        http2.send_data(stream, b"hello", end_stream=True)

    def _receive(self, connection: socket.socket) -> bytes:
        data = connection.recv(65536)
        if not data:
            raise EOFError
        self.received += data
        return data


def _field(head: bytes, name: bytes) -> bytes:
    """The value of a field as it was sent."""
    for line in head.split(b"\r\n"):
        found, _, value = line.partition(b": ")
        if found.lower() == name:
            return value
    raise AssertionError(f"no {name!r} in {head!r}")

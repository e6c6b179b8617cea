"""Readers of requests that share nothing with VNet: the standard library's for HTTP/1, h2 for HTTP/2."""

from contextlib import suppress
from email.errors import MessageError
from http.server import BaseHTTPRequestHandler
from io import BytesIO

import h2.config
import h2.connection
import h2.events
import h2.exceptions


class _Handler(BaseHTTPRequestHandler):
    """Reads every request of a connection, and answers none."""

    protocol_version = "HTTP/1.1"

    def __init__(self, sent: bytes) -> None:
        self.rfile, self.wfile = BytesIO(sent), BytesIO()
        self.close_connection = True
        self.client_address = ("127.0.0.1", 1)
        self.hosts: list[str | None] = []

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if self.raw_requestline in (b"\r\n", b"\n", b"\r"):
            self.close_connection = False
            return
        is_whole = self.raw_requestline.endswith(b"\n")
        if not self.raw_requestline or not self.parse_request() or not is_whole:
            self.close_connection = True
            return
        self.hosts.extend(self.headers.get_all("Host") or [None])
        self._skip_body()

    def _skip_body(self) -> None:
        if self.headers.get("Transfer-Encoding"):
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, format, *args) -> None:  # noqa: A002 - its name there
        pass


def hosts_in_http1(sent: bytes) -> list[str | None]:
    """The Host of each request that a server would find."""
    handler = _Handler(sent)
    with suppress(ValueError, MessageError):
        handler.handle()
    return handler.hosts


def hosts_in_http2(sent: bytes) -> list[str | None]:
    """The authority of each request that a server would find, as far as it reads."""
    # What is malformed counts as well: not every server minds.
    config = h2.config.H2Configuration(
        client_side=False,
        header_encoding=None,
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
    )
    server = h2.connection.H2Connection(config)
    server.initiate_connection()
    hosts: list[str | None] = []
    position = 0
    while position < len(sent):
        # Byte by byte, so that what comes before an error is seen.
        try:
            events = server.receive_data(sent[position : position + 1])
        except h2.exceptions.H2Error:
            break
        position += 1
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                named = [v for n, v in event.headers if n.lower() in (b":authority", b"host")]
                hosts.extend(value.decode("latin-1") for value in named)
    return hosts

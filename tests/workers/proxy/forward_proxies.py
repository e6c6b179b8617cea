"""A forward proxy in threads: CONNECT over TCP or TLS, with all its ways to refuse."""

import base64
import contextlib
import socket
import threading
from collections.abc import Callable

from tls_peers import DEADLINE_SECONDS, FarConnection, Peer
from tunnel_peers import PlainFar, balancer_context, read_head

OK = b"HTTP/1.1 200 Connection established\r\n\r\n"


class ForwardProxyPeer(Peer):
    """Connects to 127.0.0.1 whatever the name. `answer` stands in for doing that.

    What the target sends at once goes into the same segment as the answer.
    """

    def __init__(
        self,
        *,
        is_tls: bool = False,
        credentials: str = "",
        answer: Callable[[FarConnection | PlainFar], None] | None = None,
        **options,
    ) -> None:
        super().__init__(self._serve_raw, is_tls=False, **options)
        self._is_encrypted = is_tls
        self._answer = answer
        self._credentials = credentials
        self.heads: list[str] = []

    def url(self, credentials: str = "") -> str:
        scheme = "https" if self._is_encrypted else "http"
        user = f"{credentials}@" if credentials else ""
        return f"{scheme}://{user}proxy.example.test:{self.port}"

    def _serve_raw(self, sock: socket.socket) -> None:
        client: FarConnection | PlainFar = PlainFar(sock)
        if self._is_encrypted:
            client = FarConnection(sock, balancer_context(), is_ping=False)
        head = read_head(client.recv)
        self.heads.append(head)
        if self._answer is not None:
            self._answer(client)
            return
        if self._credentials:
            expected = base64.b64encode(self._credentials.encode()).decode()
            if f"Proxy-Authorization: Basic {expected}\r\n" not in head:
                client.send(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return
        port = int(head.split()[1].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as target:
            join(client, target)


def join(client: FarConnection | PlainFar, target: socket.socket) -> None:
    """Bytes both ways until both ends; one lock, as a TLS object serves one thread at a time."""
    target.settimeout(0.05)
    try:
        first = target.recv(65536)
    except TimeoutError:
        first = b""
    target.settimeout(DEADLINE_SECONDS)
    client.send(OK + first)
    down = threading.Thread(target=_pump_down, args=(client, target))
    if isinstance(client, PlainFar):
        down.start()
        _pump_up(client, target)
        down.join(DEADLINE_SECONDS)
    else:
        _take_turns(client, target)


def _pump_up(client: PlainFar, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := client.recv():
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _pump_down(client: PlainFar, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := target.recv(65536):
            client.send(data)
        client.close_notify()


def _take_turns(client: FarConnection, target: socket.socket) -> None:
    """One thread for a TLS client; who is silent is left after a moment."""
    is_up_open = is_down_open = True
    client.socket.settimeout(0.005)
    target.settimeout(0.005)
    with contextlib.suppress(OSError):
        while is_up_open or is_down_open:
            if is_up_open:
                with contextlib.suppress(TimeoutError):
                    data = client.recv()
                    target.settimeout(DEADLINE_SECONDS)
                    if data:
                        target.sendall(data)
                    else:
                        is_up_open = False
                        target.shutdown(socket.SHUT_WR)
                    target.settimeout(0.005)
            # `close_notify` wants everything read that has come.
            if is_down_open and not (is_up_open and client.has_unread):
                with contextlib.suppress(TimeoutError):
                    data = target.recv(65536)
                    client.socket.settimeout(DEADLINE_SECONDS)
                    if data:
                        client.send(data)
                    else:
                        is_down_open = False
                        client.close_notify()
                    client.socket.settimeout(0.005)

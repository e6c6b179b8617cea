"""The control socket: one request, one answer, then the connection ends. Never blocks."""

import os
import selectors
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.control_messages import MAX_REQUEST_BYTES

# Commands that are asked at the same time. One more sends the oldest away: whoever means to ask
# does so at once, whoever only holds connections must not keep others out.
MAX_CLIENTS = 32
# A client that neither asks nor reads is sent away.
CLIENT_SECONDS = 5.0
_UCRED = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)


@dataclass(slots=True)
class _Client:
    end: socket.socket
    uid: int
    deadline: float
    request: bytearray = field(default_factory=bytearray)
    answer: bytes = b""


class ControlSocket:
    """Listens at `path`; `answer(uid, line)` makes the reply (with its line feed)."""

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        answer: Callable[[int, bytes], bytes],
    ) -> None:
        self._path = path
        self._selector = selector
        self._answer = answer
        self._clients: dict[int, _Client] = {}
        # What a dead run left; that no other run lives is ensured by the lock.
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        mask = os.umask(0)
        try:
            # Anyone may ask; SO_PEERCRED decides what is answered.
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(MAX_CLIENTS)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def drop_silent(self, now: float) -> None:
        """Ends connections past their deadline (monotonic seconds)."""
        for client in list(self._clients.values()):
            if not client.deadline:
                client.deadline = now + CLIENT_SECONDS
            elif now > client.deadline:
                self._drop(client)

    def _accept(self, _events: int) -> None:
        try:
            end, _ = self._listener.accept()
        except OSError:
            return
        end.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        client = _Client(end, uid=_peer_uid(end), deadline=0.0)
        self._clients[end.fileno()] = client
        self._selector.register(
            end, selectors.EVENT_READ, lambda events: self._serve(client, events)
        )

    def _serve(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._write(client)
            else:
                self._read(client)
        except OSError:
            self._drop(client)

    def _read(self, client: _Client) -> None:
        data = client.end.recv(MAX_REQUEST_BYTES)
        client.request += data
        if b"\n" in client.request:
            line = bytes(client.request).split(b"\n", 1)[0]
            client.answer = self._answer(client.uid, line)
            self._write(client)
        elif not data or len(client.request) >= MAX_REQUEST_BYTES:
            self._drop(client)

    def _write(self, client: _Client) -> None:
        try:
            sent = client.end.send(client.answer)
        except BlockingIOError:
            sent = 0
        client.answer = client.answer[sent:]
        if client.answer:
            self._selector.modify(
                client.end,
                selectors.EVENT_WRITE,
                lambda events: self._serve(client, events),
            )
        else:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.end.fileno(), None) is not None:
            self._selector.unregister(client.end)
            client.end.close()


def _peer_uid(end: socket.socket) -> int:
    if hasattr(socket, "SO_PEERCRED"):
        raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(raw)
        return int(uid)
    # macOS: LOCAL_PEERCRED gives struct xucred, whose second word is the uid.
    raw = end.getsockopt(0, 1, 76)
    return int(struct.unpack_from("I", raw, 4)[0])

"""The control socket: one request, one answer, then the connection ends. Never blocks.

An answer that takes longer is promised: the connection waits for it while the loop goes on.
"""

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ipc.peer import peer_uid
from supervisor.control_messages import MAX_REQUEST_BYTES

# Commands that are asked at the same time. One more sends the oldest away: whoever means to ask
# does so at once, whoever only holds connections must not keep others out.
MAX_CLIENTS = 32
# A client that neither asks nor reads is sent away.
CLIENT_SECONDS = 5.0
# Where nobody can be let in, for want of descriptors, who waits stays ready: nobody looks for so long.
PAUSE_SECONDS = 0.5
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


@dataclass(slots=True)
class _Client:
    end: socket.socket
    uid: int
    deadline: float
    promise: "Promise | None" = None
    request: bytearray = field(default_factory=bytearray)
    answer: bytes = b""


class Promise:
    """An answer that is given later, within `seconds`; then the client is sent away without one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._give: Callable[[bytes], None] | None = None

    def give(self, answer: bytes) -> None:
        """Answers, with a line feed at the end. Nobody minds if the client has gone."""
        if self._give is not None:
            self._give(answer)


class ControlSocket:
    """Listens at `path`; `answer(uid, line)` makes the reply (with its line feed), or promises it.

    `listener` is a socket of an earlier program of this process that listens there already.
    """

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        answer: Callable[[int, bytes], bytes | Promise],
        listener: socket.socket | None = None,
    ) -> None:
        self._path = path
        self._selector = selector
        self._answer = answer
        self._clients: dict[int, _Client] = {}
        self._listener = _listen(path) if listener is None else listener
        # Monotonic seconds; 0 while the selector looks whether somebody connects.
        self._listens_at = 0.0
        self._listen_again()

    def fileno(self) -> int:
        """The descriptor that listens."""
        return self._listener.fileno()

    def close(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        if not self._listens_at:
            self._selector.unregister(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def drop_silent(self, now: float) -> None:
        """Ends connections past their deadline (monotonic seconds), and ends a pause of listening."""
        if self._listens_at and now >= self._listens_at:
            self._listen_again()
        for client in list(self._clients.values()):
            if not client.deadline:
                client.deadline = now + CLIENT_SECONDS
            elif now > client.deadline:
                self._drop(client)

    def _listen_again(self) -> None:
        self._listens_at = 0.0
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        try:
            end, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._selector.unregister(self._listener)
                self._listens_at = time.monotonic() + PAUSE_SECONDS
            return
        try:
            uid = peer_uid(end)
        except OSError:
            # macOS does not tell of who has gone.
            end.close()
            return
        end.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        client = _Client(end, uid=uid, deadline=0.0)
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
        if client.promise is not None:
            # It has asked; all that can come now is its end.
            if not data:
                self._drop(client)
            return
        client.request += data
        if b"\n" in client.request:
            self._serve_request(client, bytes(client.request).split(b"\n", 1)[0])
        elif not data or len(client.request) >= MAX_REQUEST_BYTES:
            self._drop(client)

    def _serve_request(self, client: _Client, line: bytes) -> None:
        answer = self._answer(client.uid, line)
        if isinstance(answer, bytes):
            client.answer = answer
            self._write(client)
            return
        client.promise = answer
        client.deadline = time.monotonic() + answer.seconds
        answer._give = lambda late: self._keep_promise(client, late)  # noqa: SLF001  # its maker

    def _keep_promise(self, client: _Client, answer: bytes) -> None:
        if self._clients.get(client.end.fileno()) is not client:
            return
        client.promise = None
        client.answer = answer
        try:
            self._write(client)
        except OSError:
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


def _listen(path: Path) -> socket.socket:
    # What a dead run left; that no other run lives is ensured by the lock.
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    mask = os.umask(0)
    try:
        # Anyone may ask; SO_PEERCRED decides what is answered.
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(MAX_CLIENTS)
    return listener

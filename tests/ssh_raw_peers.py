"""SSH peers that say what a test tells them to, for sessions of `ssh_bed`.

`RawClient` and `RawNode` are paramiko up to the login; connection messages are sent and taken raw.
"""

import base64
import contextlib
import queue
import socket
import threading
from collections.abc import Callable

import paramiko
from paramiko.message import Message
from paramiko.packet import Packetizer
from ssh_bed import DEADLINE_SECONDS, NODE, Cluster
from sshd_server import new_key, own_user

from workers.proxy.ssh.transport import ED25519, ShownKey


class _Tap(Packetizer):
    """Keeps connection messages for the test; paramiko sees the others."""

    def __init__(self, sock):
        super().__init__(sock)
        self.taken: queue.Queue[bytes] = queue.Queue()
        self.may_read = threading.Event()
        self.may_read.set()

    def read_message(self):
        while True:
            self.may_read.wait()
            number, message = super().read_message()
            if number < 80:
                return number, message
            self.taken.put(bytes([number]) + message.asbytes())


class _Raw:
    transport: paramiko.Transport

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.transport._send_message(Message(payload))

    def take(self) -> bytes:
        """The next connection message."""
        return self.transport.packetizer.taken.get(timeout=DEADLINE_SECONDS)

    def is_quiet(self) -> bool:
        return self.transport.packetizer.taken.empty()

    def unimplemented(self) -> queue.Queue[Message]:
        """What the other side says that it does not know, from now on."""
        heard: queue.Queue[Message] = queue.Queue()
        self.transport._handler_table = {**self.transport._handler_table, 3: heard.put}
        return heard

    def stop_reading(self) -> None:
        """For good; one more message may be read."""
        self.transport.packetizer.may_read.clear()

    def gone(self) -> None:
        """Waits until the connection is over."""
        self.transport.join(DEADLINE_SECONDS)
        assert not self.transport.is_alive()

    def _close(self) -> None:
        self.transport.packetizer.may_read.set()
        self.transport.close()


class RawClient(_Raw):
    """A program; `key` is a paramiko key, or None: do not log in."""

    def __init__(self, port: int, key: object, user: str = "") -> None:
        connection = socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS)
        self.transport = paramiko.Transport(connection, packetizer_class=_Tap)
        self.transport.start_client(timeout=DEADLINE_SECONDS)
        if key is not None:
            self.transport.auth_publickey(user or own_user(), key)

    def try_to_log_in(self, user: str, key: object) -> None:
        with contextlib.suppress(paramiko.SSHException, EOFError):
            self.transport.auth_publickey(user, key)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._close()


class RawNode(_Raw):
    """A node for one connection, which answers every login with `result`."""

    def __init__(self, cluster: Cluster, result: int = paramiko.AUTH_SUCCESSFUL) -> None:
        self._result = result
        key = new_key()
        line = cluster.hosts.host_certificate(key, [NODE])
        blob = base64.b64decode(line.split()[1])
        self._key = ShownKey(f"{ED25519}-cert-v01@openssh.com", blob, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._close()
        self._listener.close()
        self._thread.join(DEADLINE_SECONDS)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self.transport = paramiko.Transport(connection, packetizer_class=_Tap)
        self.transport.add_server_key(self._key)
        # Whoever waits for the key exchange may find the test over.
        with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
            self.transport.start_server(server=_Answers(self._result))


class _Answers(paramiko.ServerInterface):
    def __init__(self, result: int) -> None:
        self._result = result

    def get_allowed_auths(self, _):
        return "publickey"

    def check_auth_publickey(self, *_):
        return self._result


class ScriptedPeer:
    """A server for one connection: `act(connection)` in a thread, then it is closed."""

    def __init__(self, act: Callable[[socket.socket], object]) -> None:
        self._act = act
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.close()
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.settimeout(DEADLINE_SECONDS)
            with connection:
                self._act(connection)


def until_closed(connection: socket.socket) -> bytes:
    """Everything that still comes."""
    seen = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            seen += data
    return seen

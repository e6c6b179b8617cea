"""What a proxy does with `session_recording = "proxy"`: it ends the client's SSH itself.

    client == ServerTransport -- the proxy -- client of SSH == node
                                    |
                          agent of the client: signs the login to the node

It shows a host certificate with the node's name, of the cluster's host authority, and logs in to
the node as the client's user, with the key the client offers in agent frames (lib/srv/forward).
What comes after both logins is passed on unread, message by message, with the channel numbers of
the two ends; as there are two of them, these need no translation.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

import paramiko
from paramiko.agent import (
    ALGORITHM_FLAG_MAP,
    SSH2_AGENT_IDENTITIES_ANSWER,
    SSH2_AGENT_SIGN_RESPONSE,
    cSSH2_AGENTC_REQUEST_IDENTITIES,
    cSSH2_AGENTC_SIGN_REQUEST,
)

from demo.cluster.errors import AccessError
from demo.cluster.ssh_server import JOIN_SECONDS, LoginServer, Place, ServerTransport

logger = logging.getLogger(__name__)

_MAX_AGENT_BYTES = 256 * 1024
LOGIN_SECONDS = 60.0
# The messages of the connection protocol (RFC 4250 section 4.1.1).
_CONNECTION_MESSAGES = range(80, 101)


class _Agent:
    """The client's agent, asked over a socket (draft-ietf-sshm-ssh-agent)."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def first_key(self) -> "_AgentKey":
        """The key that is listed first. Raises AccessError."""
        kind, answer = self._ask(paramiko.Message(cSSH2_AGENTC_REQUEST_IDENTITIES))
        if kind != SSH2_AGENT_IDENTITIES_ANSWER or answer.get_int() == 0:
            raise AccessError("the client's agent has no key")
        return _AgentKey(self, answer.get_binary())

    def sign(self, blob: bytes, data: bytes, flags: int) -> bytes:
        """A signature with this key. Raises AccessError."""
        message = paramiko.Message()
        message.add_byte(cSSH2_AGENTC_SIGN_REQUEST)
        message.add_string(blob)
        message.add_string(data)
        message.add_int(flags)
        kind, answer = self._ask(message)
        if kind != SSH2_AGENT_SIGN_RESPONSE:
            raise AccessError("the client's agent does not sign")
        return bytes(answer.get_binary())

    def _ask(self, message: paramiko.Message) -> tuple[int, paramiko.Message]:
        content = message.asbytes()
        self._end.sendall(len(content).to_bytes(4, "big") + content)
        length = int.from_bytes(self._read(4), "big")
        if not 0 < length <= _MAX_AGENT_BYTES:
            raise AccessError(f"the client's agent answers with {length} bytes")
        answer = self._read(length)
        return answer[0], paramiko.Message(answer[1:])

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._end.recv(size - len(data))
            if not piece:
                raise AccessError("the client's agent has gone")
            data += piece
        return data


class _AgentKey(paramiko.PKey):  # type: ignore[misc]  # paramiko has no types
    """A key with its certificate in the client's agent; paramiko's own asks without certificate."""

    def __init__(self, agent: _Agent, blob: bytes) -> None:
        self._agent = agent
        kind = paramiko.Message(blob).get_text()
        self.public_blob = paramiko.pkey.PublicBlob(kind, blob)

    def get_name(self) -> str:
        return str(self.public_blob.key_type)

    def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> bytes:
        flags = ALGORITHM_FLAG_MAP.get(algorithm, 0)
        return self._agent.sign(self.public_blob.key_blob, data, flags)


class RecordingTransport(ServerTransport):
    """The proxy, as one client meets it. `dial` connects to the node; `agent` is the client's."""

    def __init__(
        self,
        end: socket.socket,
        place: Place,
        agent: socket.socket,
        dial: Callable[[], socket.socket],
    ) -> None:
        super().__init__(end, place)
        self.recorded_bytes = 0
        self._agent = agent
        self._dial = dial
        self._server = LoginServer(place)
        self._upstream: paramiko.Transport | None = None

    def begin(self) -> None:
        """Begins to serve, in a thread of its own."""
        self.start_server(event=threading.Event(), server=self._server)

    def end(self) -> None:
        """Hangs up on both sides and waits until the threads have ended."""
        with contextlib.suppress(OSError):
            self._agent.shutdown(socket.SHUT_RDWR)  # wakes who waits for an answer
        self.close()
        self.join(JOIN_SECONDS)
        if self._upstream is not None:
            self._upstream.close()
            self._upstream.join(JOIN_SECONDS)

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._agent.close()
            if self._upstream is not None:
                self._upstream.close()
            logger.info("recorded %d bytes of %s", self.recorded_bytes, self._server.login)

    def _auth_trigger(self) -> None:
        """The client is logged in: now the proxy does the same at the node."""
        super()._auth_trigger()
        try:
            self._upstream = upstream = self._log_in()
        except (AccessError, OSError, EOFError, paramiko.SSHException) as error:
            logger.info("no login to %s: %s", self._server.place.node.hostname, error)
            self.close()
            return
        for number in _CONNECTION_MESSAGES:
            self._handler_table[number] = _passing(number, upstream, self._count)
            upstream._handler_table[number] = _passing(number, self, self._count)  # noqa: SLF001

    def _log_in(self) -> paramiko.Transport:
        upstream = _Upstream(self._dial(), self)
        try:
            upstream.start_client(timeout=LOGIN_SECONDS)
            upstream.auth_publickey(self._server.login, _Agent(self._agent).first_key())
        except BaseException:
            upstream.close()
            raise
        return upstream

    def _count(self, size: int) -> None:
        self.recorded_bytes += size


class _Upstream(paramiko.Transport):  # type: ignore[misc]
    """The proxy's connection to the node; when it ends, so does the client's."""

    def __init__(self, end: socket.socket, client: RecordingTransport) -> None:
        super().__init__(end)
        self.set_log_channel(client.get_log_channel())
        self.daemon = True
        self._client = client

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._client.close()


def _passing(
    number: int, other: paramiko.Transport, count: Callable[[int], None]
) -> Callable[[paramiko.Message], None]:
    """A handler that sends messages of one type on to the other connection."""

    def handle(message: paramiko.Message) -> None:
        content = bytes([number]) + message.asbytes()
        count(len(content))
        other._send_user_message(paramiko.Message(content))  # noqa: SLF001

    return handle

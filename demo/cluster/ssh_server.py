"""The small SSH server of nodes without an address: paramiko, in threads of its own.

    client == bytes of a socket == NodeTransport (one thread) -- a few threads for each channel

It runs programs as the cluster's own user, whatever the login. There is no forwarding of ports from
the node (-R), of agents or of X11; a real sshd, named by `addr`, has all of them.
"""

import base64
import contextlib
import io
import logging
import socket
import threading
from dataclasses import dataclass

import paramiko
from cryptography.hazmat.primitives.asymmetric import ed25519
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    MSG_CHANNEL_REQUEST,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_SUCCEEDED,
)

from demo.cluster.config import Node
from demo.cluster.errors import AccessError
from demo.cluster.ssh_access import check_login, issue_host_certificate
from demo.cluster.ssh_files import FilesServer, LocalFiles
from demo.cluster.ssh_sessions import Session, carry_socket
from demo.cluster.sshcert import private_key_openssh
from demo.cluster.state import ClusterState

logger = logging.getLogger(__name__)
# What paramiko says of clients that break off, with tracebacks, is no fault of the cluster.
_PARAMIKO_LOG = f"{__name__}.paramiko"
logging.getLogger(_PARAMIKO_LOG).setLevel(logging.CRITICAL)

VERSION = "SSH-2.0-Teleport"
JOIN_SECONDS = 10.0
_FORWARD_SECONDS = 5.0
_CERTIFICATE_TYPE = "ssh-ed25519-cert-v01@openssh.com"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client has come: a node of a cluster, with its host key."""

    state: ClusterState
    node: Node
    key: ed25519.Ed25519PrivateKey
    client_address: str

    def is_allowed(self, login: str, key: paramiko.PKey) -> bool:
        """Whether the owner of this key may log in; the log says why not."""
        blob = key.public_blob
        text = f"{key.get_name()} {key.get_base64()}"
        if blob is not None:
            text = f"{blob.key_type} {base64.b64encode(blob.key_blob).decode()}"
        try:
            check_login(self.state, self.node, login, text.encode(), self.client_address)
        except AccessError as error:
            logger.info("%s", error)
            return False
        return True


class _CertifiedKey(paramiko.Ed25519Key):  # type: ignore[misc]  # paramiko has no types
    """A host key that is shown as its certificate; signatures are those of the plain key."""

    def get_name(self) -> str:
        return _CERTIFICATE_TYPE if self.public_blob is not None else str(self.name)

    def asbytes(self) -> bytes:
        blob = self.public_blob
        return bytes(blob.key_blob if blob is not None else super().asbytes())


def _host_key(place: Place) -> _CertifiedKey:
    pem = io.StringIO(private_key_openssh(place.key).decode())
    key = _CertifiedKey(file_obj=pem)
    if place.state.faults.host_certificate != "plain_key":
        line = issue_host_certificate(place.state, place.node, place.key.public_key())
        key.public_blob = paramiko.pkey.PublicBlob.from_string(line.decode())
    return key


class LoginServer(paramiko.ServerInterface):  # type: ignore[misc]
    """Lets in whom the cluster lets in, and allows nothing else."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.login = ""

    def get_allowed_auths(self, _username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.login = username
        return int(AUTH_SUCCESSFUL if self.place.is_allowed(username, key) else AUTH_FAILED)


class ServerTransport(paramiko.Transport):  # type: ignore[misc]
    """An SSH server on one connection, which it closes; its thread is `self`."""

    def __init__(self, end: socket.socket, place: Place) -> None:
        super().__init__(end)
        self.set_log_channel(_PARAMIKO_LOG)
        self.local_version = VERSION
        self.daemon = True
        self.add_server_key(_host_key(place))


class _NodeServer(LoginServer):
    """What a node allows; the transport's thread calls all of it."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.sessions: dict[int, Session] = {}
        self.forwarded: dict[int, socket.socket] = {}

    def check_channel_request(self, kind: str, _chanid: int) -> int:
        return int(OPEN_SUCCEEDED if kind == "session" else OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED)

    def check_channel_direct_tcpip_request(
        self, chanid: int, _origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        try:
            end = socket.create_connection(destination, _FORWARD_SECONDS)
        except OSError as error:
            logger.info("no connection to %s port %d: %s", *destination, error)
            return int(OPEN_FAILED_CONNECT_FAILED)
        end.settimeout(None)
        self.forwarded[chanid] = end
        return int(OPEN_SUCCEEDED)

    def open_session(self, channel: paramiko.Channel) -> None:
        """Keeps a new session, and forgets those that are over."""
        for number, session in tuple(self.sessions.items()):
            if session.is_over:
                session.close()
                del self.sessions[number]
        place = self.place
        # As Teleport's agents set them.
        variables = {
            "SSH_TELEPORT_LOGIN": self.login,
            "SSH_TELEPORT_CLUSTER_NAME": place.state.name,
            "SSH_TELEPORT_HOST_UUID": place.node.uuid,
        }
        self.sessions[channel.get_id()] = Session(channel, self.login, variables)

    def session(self, channel: paramiko.Channel) -> Session:
        """The session of a channel."""
        return self.sessions[channel.get_id()]

    def check_channel_env_request(
        self, channel: paramiko.Channel, name: bytes, value: bytes
    ) -> bool:
        decoded = (data.decode(errors="replace") for data in (name, value))
        return self.session(channel).set_variable(*decoded)

    def check_channel_pty_request(
        self,
        channel: paramiko.Channel,
        term: bytes,
        width: int,
        height: int,
        _pixelwidth: int,
        _pixelheight: int,
        _modes: bytes,
    ) -> bool:
        kind = term.decode(errors="replace")
        return self.session(channel).open_terminal(kind, width, height)

    def check_channel_window_change_request(
        self,
        channel: paramiko.Channel,
        width: int,
        height: int,
        _pixelwidth: int,
        _pixelheight: int,
    ) -> bool:
        return self.session(channel).resize(width, height)

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        return self.session(channel).choose(None)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        return self.session(channel).choose(command.decode(errors="surrogateescape"))


class NodeTransport(ServerTransport):
    """A node, as one client meets it."""

    def __init__(self, end: socket.socket, place: Place) -> None:
        super().__init__(end, place)
        self._node = _NodeServer(place)
        self._channel_handler_table = paramiko.Transport._channel_handler_table | {  # noqa: SLF001
            MSG_CHANNEL_REQUEST: self._on_channel_request
        }
        self.set_subsystem_handler("sftp", FilesServer, LocalFiles)

    def begin(self) -> None:
        """Begins to serve, in a thread of its own."""
        self.start_server(event=threading.Event(), server=self._node)

    def run(self) -> None:
        try:
            super().run()
        finally:
            for session in self._node.sessions.values():
                session.close()
            for end in tuple(self._node.forwarded.values()):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # wakes who reads from it, and closes it

    def end(self) -> None:
        """Hangs up and waits until every thread and program has ended."""
        self.close()
        self.join(JOIN_SECONDS)
        for session in self._node.sessions.values():
            session.join()

    def _on_channel_request(self, channel: paramiko.Channel, message: paramiko.Message) -> None:
        if channel.get_id() not in self._node.sessions:
            return  # a forwarded port's: there is nothing to ask for
        kind = message.get_text()
        if kind == "signal":  # unknown to paramiko
            message.get_boolean()
            self._node.session(channel).send_signal(message.get_text())
            return
        message.rewind()
        message.get_int()  # the channel
        channel._handle_request(message)  # noqa: SLF001
        self._node.session(channel).start()

    def _queue_incoming_channel(self, channel: paramiko.Channel) -> None:
        """Called when a channel has been opened; paramiko itself keeps no reference to it."""
        number, forwarded = channel.get_id(), self._node.forwarded
        if number in forwarded:
            carry_socket(channel, forwarded[number], lambda: forwarded.pop(number, None))
        else:
            self._node.open_session(channel)

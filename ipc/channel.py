"""The conversation between the supervisor and one worker: a SOCK_SEQPACKET pair.

One datagram is one message of `ipc.codec`; descriptors travel beside it (SCM_RIGHTS). Nothing
here blocks. End of file means that the other process is gone; on macOS, which has SOCK_DGRAM only, an
error does.
"""

import array
import os
import socket
import sys
from collections.abc import Sequence

from ipc import codec
from ipc.errors import (
    BusyError,
    ConversationError,
    ForbiddenMessageError,
    MalformedMessageError,
    PeerGoneError,
)
from ipc.messages import AnyMessage, Message
from ipc.permits import Role

# dns gets two sockets per address family and one to ask the kernel with; nobody gets more at once.
MAX_DESCRIPTORS = 8
# Room for one message of the largest size with the kernel's bookkeeping.
_BUFFER_BYTES = codec.MAX_MESSAGE_BYTES + 16 * 1024
_CLOSE_ON_EXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # 0 on macOS


def make_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected, non-blocking, close-on-exec sockets."""
    kind = socket.SOCK_DGRAM if sys.platform == "darwin" else socket.SOCK_SEQPACKET
    pair = socket.socketpair(socket.AF_UNIX, kind)
    for end in pair:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return pair


class Channel:
    """One end of the pair, with the roles that the permit table is asked with."""

    def __init__(
        self, end: socket.socket, me: Role, peer: Role, *, takes_descriptors: bool
    ) -> None:
        self._socket = end
        self._me = me
        self._peer = peer
        # Of all datagrams so far; the supervisor has a limit for it.
        self.received_bytes = 0
        # An end that takes none gives the kernel no room for them, so they are closed unseen.
        self._ancillary_bytes = (
            socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
            if takes_descriptors
            else 0
        )

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Sends one message.

        Raises:
            BusyError: the other end does not read.
            PeerGoneError: the other end is closed.
            MalformedMessageError: the message is too large.
        """
        data = codec.encode(message)
        try:
            if descriptors:
                socket.send_fds(self._socket, [data], list(descriptors))
            else:
                self._socket.send(data)
        except BlockingIOError as error:
            raise BusyError(f"{self._peer} does not read") from error
        except OSError as error:
            raise PeerGoneError(f"{self._peer} is gone: {error}") from error

    def receive(self) -> tuple[AnyMessage, list[int]] | None:
        """The next message and its descriptors, or None when none waits.

        Raises:
            PeerGoneError: end of file, or the connection is broken.
            MalformedMessageError, ForbiddenMessageError: see `ipc.codec.decode`; descriptors that
                nobody wants are forbidden as well.
        """
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                codec.MAX_MESSAGE_BYTES, self._ancillary_bytes, _CLOSE_ON_EXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerGoneError(f"{self._peer} is gone: {error}") from error
        self.received_bytes += len(data)
        descriptors = _descriptors_in(ancillary)
        if not _CLOSE_ON_EXEC:
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
        try:
            return self._decode(data, flags), descriptors
        except ConversationError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def _decode(self, data: bytes, flags: int) -> AnyMessage:
        if not data:
            raise PeerGoneError(f"{self._peer} closed the channel")
        if flags & socket.MSG_TRUNC:
            raise MalformedMessageError(f"{self._peer} sent more than a message may have")
        if flags & socket.MSG_CTRUNC and not self._ancillary_bytes:
            raise ForbiddenMessageError(f"{self._peer} may not send descriptors")
        return codec.decode(data, self._peer, self._me)


def _descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()

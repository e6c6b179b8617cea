"""Which user a socket of this machine belongs to: asks the kernel (sock_diag(7)), one exact question at a time.

Everybody may ask. The kernel answers while it takes the question, so that nothing waits: some 5 microseconds.
Sockets of other network namespaces, such as a container's, are not found.
"""

import errno
import os
import socket
import struct
from typing import Final, NamedTuple

# The uid of a socket that says nothing about a user. Nobody has it.
UNKNOWN: Final = -1

# States as bits, for `states` (net/tcp_states.h).
SYN_SENT: Final = 1 << 2
ANY_STATE: Final = 0xFFFFFFFF

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h. (Absent from `socket` on other systems.)
_AF_NETLINK: Final = 16
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_NO_COOKIE: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ERROR: Final = struct.Struct("=i")
_ENDS: Final = struct.Struct("!HH16s16s")  # inet_diag_sockid: ports, addresses of both ends;
# Each as a whole, and without what is not read, because that takes longer.
# nlmsghdr, inet_diag_req_v2: family, protocol, -, -, states; ends, interface, cookie.
_QUESTION: Final = struct.Struct("=IHHII BBBBI 36s III")
# nlmsghdr: kind, sequence; inet_diag_msg: state, ends, user, inode.
_ANSWER: Final = struct.Struct("=4xH2xI4x xB2x 36s12x 12xII")
# Larger than what is read of an answer; what else it says is cut off.
_MAX_ANSWER: Final = 256
# Answers to earlier questions that are thrown away before one gives up.
_MAX_STALE: Final = 64
_FAMILIES: Final = {4: socket.AF_INET.value, 16: socket.AF_INET6.value}  # by bytes of an address
# RFC 4291 section 2.5.5.2: an IPv4 address as an IPv6 socket has it.
_MAPPED: Final = bytes(10) + b"\xff\xff"


class Owner(NamedTuple):
    """Of a socket; `state` is a number of net/tcp_states.h.

    `uid` is UNKNOWN where no process has the socket any more (the kernel says 0 then, which would be
    root), or its state is not among those that were asked for.
    """

    uid: int
    inode: int
    state: int


class SocketDiag:
    """A netlink socket with which to ask. Not for two processes at once: each would take the other's answers."""

    __slots__ = ("_kernel", "_sequence", "interface")

    def __init__(self, kernel: socket.socket, interface: int = 0) -> None:
        """`interface` is the index of the one that the connections pass through.

        Sockets that are bound to it (SO_BINDTODEVICE) are then found as well; those bound to others never are.
        """
        kernel.setblocking(False)
        self._kernel = kernel
        self.interface = interface
        self._sequence = 0

    @staticmethod
    def open() -> socket.socket:
        """A socket to ask with, about the network namespace of the caller. Raises OSError."""
        return socket.socket(_AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)

    def close(self) -> None:
        """Closes the socket."""
        self._kernel.close()

    def tcp_owner(
        self,
        source: bytes,
        source_port: int,
        destination: bytes,
        destination_port: int,
        *,
        states: int = ANY_STATE,
    ) -> Owner | None:
        """Whose the end of a TCP connection is that has `source` as its own address; packed addresses.

        None: there is no such socket. Raises OSError when the kernel does not say.
        """
        ends = _ends(source, source_port, destination, destination_port)
        owner, found = self._ask(socket.IPPROTO_TCP, len(source), ends)
        if owner is None:
            return None
        mapped = (_mapped(source), source_port, _mapped(destination), destination_port)
        if found not in (ends, _ends(*mapped)):
            return None  # a listener on the port answers where the connection is gone
        if owner.inode and 1 << owner.state & states:
            return owner
        return owner._replace(uid=UNKNOWN)

    def udp_owner(
        self, source: bytes, source_port: int, destination: bytes, destination_port: int
    ) -> Owner | None:
        """Whose a UDP socket is, connected or not, that sends from `source` to `destination`.

        None: there is no such socket. Raises OSError when the kernel does not say.
        """
        # The kernel looks for who would receive: the far end first (net/ipv4/udp_diag.c).
        ends = _ends(destination, destination_port, source, source_port)
        owner, found = self._ask(socket.IPPROTO_UDP, len(source), ends)
        if owner is None:
            return None
        if not _may_send(found, source, source_port, destination, destination_port):
            return None
        return owner if owner.inode else owner._replace(uid=UNKNOWN)

    def _ask(self, protocol: int, length: int, ends: bytes) -> tuple[Owner | None, bytes]:
        self._sequence = sequence = self._sequence % 0xFFFFFFFF + 1
        kernel = self._kernel
        kernel.send(question(protocol, _FAMILIES[length], ends, self.interface, sequence))
        for _ in range(_MAX_STALE):
            found = answer_in(kernel.recv(_MAX_ANSWER), sequence)
            if found is not None:
                return found
        raise OSError(errno.EPROTO, "the kernel gives no answer about a socket")


def question(protocol: int, family: int, ends: bytes, interface: int, sequence: int) -> bytes:
    """The netlink message that asks for one socket. Pure."""
    head = (_QUESTION.size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, sequence, 0)
    what = (family, protocol, 0, 0, ANY_STATE)
    return _QUESTION.pack(*head, *what, ends, interface, _NO_COOKIE, _NO_COOKIE)


_NOTHING: Final = (None, bytes(_ENDS.size))


def answer_in(answer: bytes, sequence: int) -> tuple[Owner | None, bytes] | None:
    """Owner and both ends of what was found, or (None, -) where nothing is; None: this answers something else.

    Pure. Raises OSError with what the kernel says instead of an answer.
    """
    if len(answer) < _ANSWER.size:
        return _absence_in(answer, sequence)
    kind, answered, state, ends, uid, inode = _ANSWER.unpack_from(answer)
    if answered != sequence:
        return None
    if kind == _SOCK_DIAG_BY_FAMILY:
        return Owner(uid, inode, state), ends
    return _absence_in(answer, sequence)


def _absence_in(answer: bytes, sequence: int) -> tuple[None, bytes] | None:
    if len(answer) < _HEADER.size + _ERROR.size:
        return None
    _, kind, _, answered, _ = _HEADER.unpack_from(answer)
    if answered != sequence or kind != _NLMSG_ERROR:
        return None
    code = -_ERROR.unpack_from(answer, _HEADER.size)[0]
    if code == errno.ENOENT:
        return _NOTHING
    raise OSError(code, os.strerror(code))


def _ends(source: bytes, source_port: int, destination: bytes, destination_port: int) -> bytes:
    """Raises ValueError: not two addresses of one family."""
    if len(source) != len(destination) or len(source) not in (4, 16):
        raise ValueError("not two addresses of one family")
    return _ENDS.pack(source_port, destination_port, source, destination)


def _mapped(address: bytes) -> bytes:
    return _MAPPED + address if len(address) == 4 else address


def _may_send(
    found: bytes, source: bytes, source_port: int, destination: bytes, destination_port: int
) -> bool:
    """Whether the UDP socket with these ends may have sent from and to there."""
    port, peer_port, address, peer = _ENDS.unpack(found)
    any_address = bytes(16)
    is_its_own = port == source_port and address in (
        any_address,
        source.ljust(16, b"\0"),
        _mapped(source),
    )
    is_connected = peer_port == destination_port and peer in (
        destination.ljust(16, b"\0"),
        _mapped(destination),
    )
    return is_its_own and (is_connected or (peer_port == 0 and peer == any_address))

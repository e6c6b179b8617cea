"""Whose a TCP connection of this machine is: asks the kernel (sock_diag(7)), then /proc.

    both ends of a connection --sock_diag--> user and inode --/proc/<pid>/fd--> process --exe--> program

The kernel tells everybody the user; the process only root, or who runs it. Connections of other network
namespaces, such as a container's, are not found. On other systems nothing is.
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

# One question takes some 10 microseconds.
MAX_QUESTIONS = 2000
# Looking through /proc ends after so long, with whatever was found.
PROC_SECONDS = 0.3

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h. (Absent from `socket` on other systems.)
_AF_NETLINK: Final = 16
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_ANY_STATE: Final = 0xFFFFFFFF
_NO_COOKIE: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_QUESTION: Final = struct.Struct("=BBBBI")  # inet_diag_req_v2: family, protocol, -, -, states
_ENDS: Final = struct.Struct("!HH16s16s")  # inet_diag_sockid: ports, addresses of both ends;
_REST: Final = struct.Struct("=III")  # interface, cookie
_ANSWER: Final = struct.Struct("=BBBB")  # inet_diag_msg: family, state, timer, retransmissions;
_OWNER: Final = struct.Struct("=IIIII")  # after the ends: -, -, -, user, inode
_ENDS_AT: Final = _HEADER.size + _ANSWER.size
_OWNER_AT: Final = _ENDS_AT + _ENDS.size + _REST.size
_TIMEOUT_SECONDS: Final = 0.5


class Ends(NamedTuple):
    """A connection as its program sees it; addresses as text."""

    address: str
    port: int
    peer_address: str
    peer_port: int


@dataclass(frozen=True, slots=True)
class SocketOwner:
    """`pid` and `program` (a path, or a name) are None where they may not be seen."""

    uid: int
    pid: int | None
    program: str | None


def owners(connections: Iterable[Ends]) -> dict[Ends, SocketOwner]:
    """Those that could be found out, of the first MAX_QUESTIONS."""
    if sys.platform != "linux":
        return {}
    found = _sockets(list(connections)[:MAX_QUESTIONS])
    processes = _processes({inode for _, inode in found.values()})
    return {
        ends: SocketOwner(uid, *processes.get(inode, (None, None)))
        for ends, (uid, inode) in found.items()
    }


def _sockets(connections: list[Ends]) -> dict[Ends, tuple[int, int]]:
    """User and inode of each. None at all where there is no sock_diag."""
    found: dict[Ends, tuple[int, int]] = {}
    if not connections:
        return found
    with (
        suppress(OSError),
        socket.socket(_AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel,
    ):
        kernel.settimeout(_TIMEOUT_SECONDS)
        for sequence, ends in enumerate(connections, 1):
            try:
                question = question_about(ends, sequence)
            except ValueError:
                continue  # a proxy has told nonsense
            kernel.send(question)
            answer = owner_in(kernel.recv(8192), ends, sequence)
            if answer is not None:
                found[ends] = answer
    return found


def question_about(ends: Ends, sequence: int) -> bytes:
    """The netlink message that asks for one TCP socket. Pure. ValueError: these are no two addresses."""
    versions = [ip_address(address).version for address in (ends.address, ends.peer_address)]
    if versions[0] != versions[1]:
        raise ValueError("addresses of two families")
    family = socket.AF_INET6 if versions[0] == 6 else socket.AF_INET
    body = (
        _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, _ANY_STATE)
        + _packed(ends)
        + _REST.pack(0, _NO_COOKIE, _NO_COOKIE)
    )
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, sequence, 0) + body


def owner_in(answer: bytes, ends: Ends, sequence: int) -> tuple[int, int] | None:
    """User and inode; None: there is no such socket, or no process has it any more. Pure."""
    if len(answer) < _OWNER_AT + _OWNER.size:
        return None
    _, kind, _, answered, _ = _HEADER.unpack_from(answer)
    # A listener on the port answers where the connection is gone.
    is_meant = answer[_ENDS_AT : _ENDS_AT + _ENDS.size] in (_packed(ends), _packed(_mapped(ends)))
    if kind != _SOCK_DIAG_BY_FAMILY or answered != sequence or not is_meant:
        return None
    *_, uid, inode = _OWNER.unpack_from(answer, _OWNER_AT)
    return (uid, inode) if inode else None


def _mapped(ends: Ends) -> Ends:
    """As an IPv6 socket has an IPv4 connection: RFC 4291 section 2.5.5.2."""
    if ":" in ends.address:
        return ends
    return ends._replace(
        address=f"::ffff:{ends.address}", peer_address=f"::ffff:{ends.peer_address}"
    )


def _packed(ends: Ends) -> bytes:
    source, destination = ip_address(ends.address).packed, ip_address(ends.peer_address).packed
    return _ENDS.pack(ends.port, ends.peer_port, source, destination)


def _processes(inodes: set[int]) -> dict[int, tuple[int, str | None]]:
    """Process and program of each socket that is open in a process that may be looked at.

    Of several the one with the lowest number, mostly the parent.
    """
    # Without paths as objects: there may be a hundred thousand descriptors.
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, tuple[int, str | None]] = {}
    deadline = time.monotonic() + PROC_SECONDS
    try:
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    except OSError:
        return found
    for pid in pids:
        if not wanted or time.monotonic() > deadline:
            break
        with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                with suppress(OSError):
                    inode = wanted.pop(os.readlink(descriptor.path), None)  # noqa: PTH115
                    if inode is not None:
                        found[inode] = (pid, _program(pid))
    return found


def _program(pid: int) -> str | None:
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/exe").readlink())
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return None

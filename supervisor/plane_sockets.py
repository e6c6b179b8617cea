"""The sockets of a data plane: those of the DNS server, and what all listening sockets share."""

import errno
import os
import socket
import sys
from collections.abc import Iterable
from typing import Final

from ipc.addresses import as_text

DNS_PORT: Final = 53
# Connections whose SYN was admitted and that a proxy has not accepted yet; also what waits while a
# proxy is restarted.
LISTEN_BACKLOG: Final = 1024
IPV6_FREEBIND: Final = 78  # linux/in6.h; Python has no name for it
IP_FREEBIND: Final = 15  # linux/in.h
# A local path has no bottleneck to probe for: BBR, a common default, costs a third of the speed.
CONGESTION_CONTROL: Final = b"reno"
# Bursts of queries wait here while the dns worker is restarted.
DNS_RECEIVE_BYTES: Final = 1 << 20


def bound_socket(
    kind: socket.SocketKind, address: bytes, port: int, *, is_shared: bool
) -> socket.socket:
    """A socket on a packed address, which need not be there yet (Linux). Raises OSError.

    `is_shared`: the port may be taken again while old connections of it end.
    """
    version6 = len(address) == 16
    end = socket.socket(socket.AF_INET6 if version6 else socket.AF_INET, kind)
    try:
        end.setblocking(False)
        if version6:
            end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if sys.platform == "linux":
            if version6:
                end.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            else:
                end.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        if is_shared:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind((as_text(address), port))
    except OSError:
        end.close()
        raise
    return end


def listen(end: socket.socket) -> None:
    """Has a bound socket take connections of programs. Raises OSError; the socket is closed then."""
    try:
        if sys.platform == "linux":
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_CONTROL)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.listen(LISTEN_BACKLOG)
    except OSError:
        end.close()
        raise


def make_ready_for_dns(end: socket.socket) -> None:
    """Has a bound socket take questions. Raises OSError; the socket is closed then."""
    try:
        if end.type == socket.SOCK_STREAM:
            end.listen(LISTEN_BACKLOG)
        else:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DNS_RECEIVE_BYTES)
    except OSError:
        end.close()
        raise


def as_socket(descriptor: int) -> socket.socket | None:
    """A socket that owns the descriptor, which is closed if it is none."""
    try:
        end = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        return None
    end.setblocking(False)
    return end


def find(
    kind: socket.SocketKind, address: bytes, port: int | None, ends: Iterable[socket.socket]
) -> socket.socket:
    """The DNS socket on this address and port (None: any), listening if it is a stream.

    Raises:
        OSError: there is none.
    """
    for end in ends:
        if end.type != kind or end.family not in (socket.AF_INET, socket.AF_INET6):
            continue
        host, bound_port = end.getsockname()[:2]
        accepts = end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        is_there = host == as_text(address) and port in (None, bound_port)
        if is_there and bool(accepts) == (kind == socket.SOCK_STREAM):
            return end
    raise OSError(errno.ENOTSOCK, f"the socket of the DNS address {as_text(address)} is missing")

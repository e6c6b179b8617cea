"""Who is at the other end of a unix socket: unix(7) on Linux, unix(4) on macOS."""

import socket
import struct
import sys
from typing import Final

_UCRED: Final = struct.Struct("3i")  # pid, uid, gid: struct ucred
# macOS, sys/un.h and sys/ucred.h: struct xucred begins with its version and the user's number.
_SOL_LOCAL: Final = 0
_LOCAL_PEERCRED: Final = 1
_XUCRED_BYTES: Final = 76
_XUCRED: Final = struct.Struct("II")


def peer_uid(end: socket.socket) -> int:
    """The user id of the process that connected. Raises OSError."""
    if sys.platform == "darwin":
        raw = end.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_BYTES)
        return uid_of_xucred(raw)
    raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(raw)
    return int(uid)


def uid_of_xucred(raw: bytes) -> int:
    """The user id in macOS's answer. Pure."""
    if len(raw) < _XUCRED.size:
        raise OSError(0, "the kernel does not say who has connected")
    _version, uid = _XUCRED.unpack_from(raw)
    return int(uid)

"""Unix sockets of a proxy for the commands of its user."""

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path

from ipc.peer import peer_uid


def listen(path: Path, backlog: int) -> socket.socket:
    """A listening socket at `path`, which only the user may open. Raises OSError."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        end.setblocking(False)
        mask = os.umask(0o177)
        try:
            end.bind(str(path))
        finally:
            os.umask(mask)
        end.listen(backlog)
    except BaseException:
        end.close()
        raise
    return end


def is_users(writer: asyncio.StreamWriter) -> tuple[bool, str]:
    """Whether the user or root is at the other end, and for log lines who is."""
    uid = None
    with suppress(OSError):  # the kernel does not say
        uid = peer_uid(writer.get_extra_info("socket"))
    return uid in (0, os.getuid()), "unknown" if uid is None else str(uid)

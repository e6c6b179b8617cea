"""The socket that metrics are served at. The supervisor makes it, because workers may take no port."""

import errno
import socket

from supervisor.config import split_listen
from supervisor.exits import ConflictError, MisconfiguredError, NotPermittedError, StartupError

# Connections that wait while the worker is restarted.
BACKLOG = 64


def listen(text: str) -> socket.socket:
    """Listens at `metrics.listen`; `[::]` takes IPv4 as well.

    Raises:
        StartupError: one of its kinds; the text is a clause that says what to do.
    """
    address, port = split_listen(text)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        end = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Connections of a predecessor that are still in TIME_WAIT are in nobody's way.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
            end.bind((address, port))
            # Two may be bound to one address as long as neither listens.
            end.listen(BACKLOG)
            end.setblocking(False)
        except BaseException:
            end.close()
            raise
    except OSError as error:
        raise _explained(text, error) from error
    return end


def _explained(text: str, error: OSError) -> StartupError:
    match error.errno:
        case errno.EADDRINUSE:
            return ConflictError(
                f"{text} is used by another program: end that one, or set metrics.listen to another port"
            )
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            return MisconfiguredError(
                [f"this machine has no such address as {text}: set metrics.listen to one it has"]
            )
        case errno.EACCES | errno.EPERM:
            return NotPermittedError(
                f"VNet may not listen at {text}: set metrics.listen to a port above 1023"
            )
        case _:
            return StartupError(
                f"VNet cannot listen at {text} ({error.strerror or error}): set metrics.listen to another"
                " address"
            )

"""A worker's listening socket of the bus, at `<bus dir>/<slot>`.

It is made before the worker gives up its rights, so that it needs none to make sockets or files.
"""

import os
import socket
from pathlib import Path

# Each peer joins with one connection; a restarted one comes back before its old one is noticed.
BACKLOG = 100


def listen(bus_dir: Path, slot: str) -> socket.socket:
    """Binds and listens; what a predecessor left is replaced. Raises OSError.

    That nobody else uses the path is what the supervisor's lock and its reaping of the predecessor
    ensure.
    """
    path = bus_dir / slot
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Workers of other users connect through the group of the directory.
    mask = os.umask(0o007)
    try:
        listening.bind(str(path))
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(mask)
    return listening

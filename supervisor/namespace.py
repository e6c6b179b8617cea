"""Linux network namespaces, entered by the calling thread only."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def make_network_namespace() -> int:
    """A descriptor of a new, empty network namespace; it lives as long as somebody holds it.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    here = _current()
    try:
        _check(_libc.unshare(CLONE_NEWNET))
        try:
            return _current()
        finally:
            _check(_libc.setns(here, CLONE_NEWNET))
    finally:
        os.close(here)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Runs a block in another network namespace. Sockets made there stay there."""
    here = _current()
    try:
        _check(_libc.setns(namespace, CLONE_NEWNET))
        try:
            yield
        finally:
            _check(_libc.setns(here, CLONE_NEWNET))
    finally:
        os.close(here)


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

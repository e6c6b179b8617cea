"""Bytes in memory that nobody can change any more, behind a descriptor: memfd_create(2)."""

import errno
import fcntl
import os
import sys

# linux/fcntl.h: F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE
_ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8


def seal(name: str, data: bytes) -> int:
    """A close-on-exec descriptor of a sealed copy of `data`. Raises OSError."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "this system has no memory that can be sealed")
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _ALL_SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unseal(descriptor: int, max_bytes: int) -> bytes:
    """The bytes behind a descriptor of `seal`, which stays open.

    Raises:
        OSError: it is no memory of this kind.
        ValueError: it is not sealed, or has more than `max_bytes`.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "this system has no memory that can be sealed")
    # The kernel may have added one of its own (F_SEAL_EXEC).
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _ALL_SEALS != _ALL_SEALS:
        raise ValueError("it is not sealed")
    size = os.fstat(descriptor).st_size
    if size > max_bytes:
        raise ValueError(f"it has {size} bytes, more than {max_bytes}")
    data = bytearray()
    while len(data) < size:
        piece = os.pread(descriptor, size - len(data), len(data))
        if not piece:
            raise ValueError("it ends early")
        data += piece
    return bytes(data)

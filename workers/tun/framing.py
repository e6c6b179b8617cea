"""How one packet is read from a TUN descriptor and written to it: one system call each.

    Linux (IFF_NO_PI)   | packet |
    macOS (utun)        | address family, 4 bytes, network byte order | packet |

Families as macOS numbers them: sys/socket.h. A reader returns the length of the packet alone.
"""

import functools
import os
from collections.abc import Callable
from typing import Final, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
Read: TypeAlias = Callable[[tuple[bytearray]], int]
Write: TypeAlias = Callable[[Buffer], int]

FAMILY_BYTES: Final = 4
_FAMILIES: Final = {4: (2).to_bytes(FAMILY_BYTES), 6: (30).to_bytes(FAMILY_BYTES)}


def plain(descriptor: int) -> tuple[Read, Write]:
    """Reader and writer of a device that carries packets alone."""
    # These run once per packet, and a function of Python's around the call would be noticed.
    return functools.partial(os.readv, descriptor), functools.partial(os.write, descriptor)


def with_family(descriptor: int) -> tuple[Read, Write]:
    """Reader and writer of a device that has the address family before each packet."""
    ignored = bytearray(FAMILY_BYTES)  # the packet's own version says the same

    def read(buffers: tuple[bytearray]) -> int:
        return max(0, os.readv(descriptor, (ignored, *buffers)) - FAMILY_BYTES)

    def write(packet: Buffer) -> int:
        return os.writev(descriptor, (_FAMILIES[packet[0] >> 4], packet)) - FAMILY_BYTES

    return read, write

"""The utun device of macOS: a socket of the kernel control of that name (net/if_utun.h, sys/kern_control.h of XNU).

    struct ctl_info | ctl_id, 4 bytes | ctl_name, 96 bytes |     both ways of the ioctl CTLIOCGINFO

Unit N+1 is the interface utunN, unit 0 whichever is free. The interface goes with the last descriptor. Each
packet has its address family before it: `workers.tun.framing`.
"""

import errno
import fcntl
import os
import re
import socket
import struct
from typing import Final

from supervisor.exits import ConflictError, NotPermittedError, StartupError

CONTROL_NAME: Final = b"com.apple.net.utun_control"
# sys/ioccom.h: _IOWR('N', 3, struct ctl_info)
_CTL_INFO: Final = struct.Struct("=I96s")
CTLIOCGINFO: Final = 0xC0000000 | _CTL_INFO.size << 16 | ord("N") << 8 | 3
UTUN_OPT_IFNAME: Final = 2
# sys/socket.h, sys/sys_domain.h; Python has names for them on macOS only.
PF_SYSTEM: Final = 32
SYSPROTO_CONTROL: Final = 2
_NAME_BYTES: Final = 16  # net/if.h: IFNAMSIZ
_UTUN: Final = re.compile(r"utun(0|[1-9][0-9]{0,3})")


def control_query() -> bytes:
    """What the ioctl is given. Pure."""
    return _CTL_INFO.pack(0, CONTROL_NAME)


def control_id(answer: bytes) -> int:
    """The number of the kernel control in the ioctl's answer. Pure."""
    number, _name = _CTL_INFO.unpack(answer)
    return int(number)


def unit_of(name: str) -> int:
    """The unit for an interface of this name; 0, which is any, for names that utun has not. Pure."""
    match = _UTUN.fullmatch(name)
    return int(match[1]) + 1 if match else 0


def name_of(option: bytes) -> str:
    """The interface in the value of UTUN_OPT_IFNAME. Pure."""
    return option.split(b"\0", 1)[0].decode(errors="replace")


class UtunDevice:
    """As `supervisor.host_link.Device`."""

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor over."""
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def name(self) -> str:
        if self._descriptor < 0:
            raise OSError(errno.EBADF, "the device is closed")
        # Only asked an option of; the descriptor stays ours.
        end = socket.socket(PF_SYSTEM, socket.SOCK_DGRAM, SYSPROTO_CONTROL, self._descriptor)
        try:
            return name_of(end.getsockopt(SYSPROTO_CONTROL, UTUN_OPT_IFNAME, _NAME_BYTES))
        finally:
            end.detach()


def make_utun(name: str) -> UtunDevice:
    """A device called `name` if that is one of utun's, else by the next number that is free; non-blocking.

    Raises:
        NotPermittedError: not root.
        ConflictError: the name is taken.
    """
    end = socket.socket(PF_SYSTEM, socket.SOCK_DGRAM, SYSPROTO_CONTROL)
    try:
        number = control_id(fcntl.ioctl(end, CTLIOCGINFO, control_query()))
        end.connect((number, unit_of(name)))
        end.setblocking(False)
    except OSError as error:
        end.close()
        raise explain(name, error) from error
    return UtunDevice(end.detach())


def explain(name: str, error: OSError) -> StartupError:
    """What the failure of making a device means. Pure."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermittedError("a utun device cannot be made: run as root (sudo vnet-supervisor)")
    if error.errno == errno.EBUSY:
        return ConflictError(
            f"the interface {name} exists already: stop what uses it, or set network.interface"
        )
    return StartupError(f"a utun device cannot be made: {error.strerror or error}")

"""Which user a socket belongs to on macOS: reads the kernel's whole table with each question.

    | xinpgen | xinpcb_n, xsocket_n, xsockbuf_n twice, xsockstat_n, xtcpcb_n | ... | xinpgen |

Each part begins with its length and kind (4 bytes each) and is followed by the next multiple of 8 bytes; the
kinds tell the parts apart, so that versions may add some (bsd/netinet/in_pcb.h, tcp_var.h and
bsd/sys/socketvar.h of XNU). Everybody may read it. Written from the headers; it has never run on a Mac.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ipc.socket_owner import ANY_STATE, UNKNOWN, Owner

# sys/socketvar.h
_XSO_SOCKET: Final = 0x001
_XSO_INPCB: Final = 0x010
_XSO_TCPCB: Final = 0x020
_PART: Final = struct.Struct("=II")
_FIRST: Final = 24  # sizeof(struct xinpgen)
_PORTS: Final = struct.Struct("!HH")  # foreign, local
_PORTS_AT: Final = 16
_VERSION_AT: Final = 44  # inp_vflag: 1 is IPv4, 2 is IPv6
_FOREIGN_AT: Final = 48  # 16 bytes; IPv4 is in the last four
_LOCAL_AT: Final = 64
_INPCB_BYTES: Final = 80
_UID_AT: Final = 64  # so_uid
_STATE_AT: Final = 36  # t_state
_NUMBER: Final = struct.Struct("=I")
# netinet/tcp_fsm.h, by the numbers that Linux has for the same states.
_LINUX_STATES: Final = {
    0: 7,  # closed
    1: 10,  # listen
    2: 2,  # SYN sent
    3: 3,  # SYN received
    4: 1,  # established
    5: 8,  # close wait
    6: 4,  # FIN wait 1
    7: 11,  # closing
    8: 9,  # last ACK
    9: 5,  # FIN wait 2
    10: 6,  # TIME wait
}
# A table that grows between the question for its size and that for itself is asked for again.
_TRIES: Final = 4
_ROOM: Final = 16 * 1024
_MAX_TABLE: Final = 256 << 20


class Entry(NamedTuple):
    """A socket: addresses packed (4 or 16 bytes), `state` as on Linux; 7 for UDP."""

    address: bytes
    port: int
    peer_address: bytes
    peer_port: int
    uid: int
    state: int


class SocketTable:
    """As `ipc.socket_owner.SocketDiag`, which needs nothing from the supervisor."""

    def __init__(self) -> None:
        self.interface = 0  # nothing follows from it here

    def close(self) -> None:
        """Nothing is open."""

    def tcp_owner(
        self,
        source: bytes,
        source_port: int,
        destination: bytes,
        destination_port: int,
        *,
        states: int = ANY_STATE,
    ) -> Owner | None:
        """See `SocketDiag.tcp_owner`."""
        meant = (source, source_port, destination, destination_port)
        for entry in entries(_table("net.inet.tcp.pcblist_n")):
            if entry[:4] == meant:
                is_asked_for = 1 << entry.state & states
                return Owner(entry.uid if is_asked_for else UNKNOWN, 0, entry.state)
        return None

    def udp_owner(
        self, source: bytes, source_port: int, destination: bytes, destination_port: int
    ) -> Owner | None:
        """See `SocketDiag.udp_owner`. UNKNOWN where sockets of several users may have sent it."""
        found = {
            entry.uid
            for entry in entries(_table("net.inet.udp.pcblist_n"))
            if entry.port == source_port
            and entry.address in (source, bytes(len(source)), bytes(16))
            and (
                (entry.peer_port, entry.peer_address) == (destination_port, destination)
                or entry.peer_port == 0
            )
        }
        if not found:
            return None
        return Owner(found.pop() if len(found) == 1 else UNKNOWN, 0, _LINUX_STATES[0])


def entries(table: bytes) -> Iterator[Entry]:
    """The sockets in a table; what is cut off or unknown is left out. Pure."""
    ends: tuple[bytes, int, bytes, int] | None = None
    uid: int | None = None
    state = _LINUX_STATES[0]
    for kind, part in _parts(table):
        if kind == _XSO_INPCB:
            if ends is not None and uid is not None:
                yield Entry(*ends, uid, state)
            ends, uid, state = _ends(part), None, _LINUX_STATES[0]
        elif kind == _XSO_SOCKET and len(part) >= _UID_AT + _NUMBER.size:
            (uid,) = _NUMBER.unpack_from(part, _UID_AT)
        elif kind == _XSO_TCPCB and len(part) >= _STATE_AT + _NUMBER.size:
            state = _LINUX_STATES.get(_NUMBER.unpack_from(part, _STATE_AT)[0], _LINUX_STATES[0])
    if ends is not None and uid is not None:
        yield Entry(*ends, uid, state)


def _parts(table: bytes) -> Iterator[tuple[int, bytes]]:
    at = _FIRST
    while at + _PART.size <= len(table):
        length, kind = _PART.unpack_from(table, at)
        # What ends the table is as long as what begins it, and has no kind.
        if length <= _FIRST or at + length > len(table):
            return
        yield kind, table[at : at + length]
        at += -(-length // 8) * 8


def _ends(part: bytes) -> tuple[bytes, int, bytes, int] | None:
    if len(part) < _INPCB_BYTES:
        return None
    peer_port, port = _PORTS.unpack_from(part, _PORTS_AT)
    first = 0 if part[_VERSION_AT] & 2 else 12
    address = part[_LOCAL_AT + first : _LOCAL_AT + 16]
    return address, port, part[_FOREIGN_AT + first : _FOREIGN_AT + 16], peer_port


def _table(name: str) -> bytes:
    """Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t(0)
    for _ in range(_TRIES):
        if libc.sysctlbyname(name.encode(), None, ctypes.byref(size), None, 0) != 0:
            break
        room = min(size.value + _ROOM, _MAX_TABLE)
        buffer = ctypes.create_string_buffer(room)
        size.value = room
        if libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0) == 0:
            return buffer.raw[: size.value]
        if ctypes.get_errno() != errno.ENOMEM:
            break
    number = ctypes.get_errno()
    raise OSError(number, f"sysctl {name}: {os.strerror(number)}")

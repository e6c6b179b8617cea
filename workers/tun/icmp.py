"""What a host answers beside TCP: echo replies, and that nobody listens on a UDP port. Pure.

Sources: RFC 792 (echo; destination unreachable, code 3), RFC 4443 sections 3.1 (code 4), 4.1, 4.2 and 2.4
(which packets cause no error, how much of them is quoted, how many errors are sent), RFC 1812 section
4.3.2.3 (576 bytes for IPv4).
"""

from struct import Struct
from typing import Final

from workers.tun.packet import ICMP, ICMPV6, Packet
from workers.tun.reset import checksum
from workers.tun.rewrite import corrected, correction, is_later_fragment, turned

_ECHO: Final = {4: (8, 0), 6: (128, 129)}  # (request, reply)
_MAX_ERROR_BYTES: Final = {4: 576, 6: 1280}
_IPV4: Final = Struct(">BBHHHBBH4s4s")
_IPV6: Final = Struct(">IHBB16s16s")
_ERROR: Final = Struct(">BBHI")
_HOP_LIMIT: Final = 64
# As Linux does by default (net.ipv4.icmp_msgs_per_sec and icmp_msgs_burst).
ERRORS_PER_SECOND: Final = 1000.0
ERRORS_AT_ONCE: Final = 50.0


class ErrorAllowance:
    """How many errors may be sent; times are monotonic seconds."""

    def __init__(self) -> None:
        self._left = ERRORS_AT_ONCE
        self._at = 0.0

    def take(self, now: float) -> bool:
        """Whether one may be sent now."""
        self._left = min(ERRORS_AT_ONCE, self._left + (now - self._at) * ERRORS_PER_SECOND)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def is_icmp(packet: Packet) -> bool:
    """Whether it is ICMP of its own version of IP."""
    return packet.protocol == (ICMP if packet.version == 4 else ICMPV6)


def build_echo_reply(data: bytes, packet: Packet) -> bytearray | None:
    """The reply to an echo request, or None if `packet` (the view of `data`) is none.

    Each fragment of a request becomes that fragment of the reply: only the type changes, and the checksum
    by as much. A later fragment does not say of what it is a part; of something else than a request it
    leads to a reply that is never complete.
    """
    if is_later_fragment(data, packet):
        return turned(data, packet)
    request, reply = _ECHO[packet.version]
    start = packet.transport_offset
    if start + 8 > len(data) or data[start] != request or data[start + 1]:
        return None
    copy = turned(data, packet)
    copy[start] = reply
    before = int.from_bytes(data[start + 2 : start + 4])
    copy[start + 2 : start + 4] = corrected(before, correction(request << 8, reply << 8)).to_bytes(
        2
    )
    return copy


def build_port_unreachable(data: bytes, packet: Packet) -> bytes:
    """The error that answers a UDP packet nobody listens for; not for a later fragment."""
    source, destination = packet.destination, packet.source
    if packet.version == 4:
        body = data[: _MAX_ERROR_BYTES[4] - _IPV4.size - _ERROR.size]
        message = _with_checksum(_ERROR.pack(3, 3, 0, 0) + body, 2)
        length = _IPV4.size + len(message)
        header = _IPV4.pack(0x45, 0xC0, length, 0, 0, _HOP_LIMIT, ICMP, 0, source, destination)
        return _with_checksum(header, 10) + message
    body = data[: _MAX_ERROR_BYTES[6] - _IPV6.size - _ERROR.size]
    message = _ERROR.pack(1, 4, 0, 0) + body
    pseudo = source + destination + len(message).to_bytes(4) + ICMPV6.to_bytes(4)
    header = _IPV6.pack(6 << 28, len(message), ICMPV6, _HOP_LIMIT, source, destination)
    return header + _with_checksum(message, 2, pseudo)


def _with_checksum(data: bytes, offset: int, pseudo: bytes = b"") -> bytes:
    value = checksum(pseudo + data + b"\0" * (len(data) % 2))
    return data[:offset] + value.to_bytes(2) + data[offset + 2 :]

"""Turns packets around, so that the kernel that has sent one takes it for its own. Pure.

    read    own c:cp -> virtual v:vp      becomes      virtual v:cp -> own c:L
    read    own c:L  -> virtual v:cp      becomes      virtual v:vp -> own c:cp

In both directions the addresses change places and one port is replaced. A sum does not depend on the
order of what is added: so the header checksum of IPv4 and the pseudo headers of TCP and UDP stay as
they are, and of the transport's checksum only the port has to be corrected (RFC 1624). Without the
whole packet at hand that works for a first fragment too; later ones have no port.

Sources: RFC 791 section 3.1, RFC 8200 sections 3 and 8.1, RFC 9293 section 3.1, RFC 768 (a UDP checksum
of 0 is none), RFC 1624 section 3 (eqn. 3).
"""

from typing import Final

from workers.tun.packet import TCP, Packet

_CHECKSUM_OFFSET: Final = {TCP: 16}
_UDP_CHECKSUM_OFFSET: Final = 6
SOURCE_PORT: Final = 0  # offsets in a TCP or UDP header
DESTINATION_PORT: Final = 2


def turned(data: bytes, packet: Packet) -> bytearray:
    """A copy with source and destination address exchanged; `packet` is the view of `data`."""
    copy = bytearray(data)
    if packet.version == 4:
        copy[12:20] = packet.destination + packet.source
    else:
        copy[8:40] = packet.destination + packet.source
    return copy


def turned_to_port(data: bytes, packet: Packet, which: int, port: int) -> bytearray | None:
    """`turned`, with the port at SOURCE_PORT or DESTINATION_PORT replaced.

    For TCP and UDP that is no later fragment. None if the transport header is cut off.
    """
    start = packet.transport_offset
    place = start + _CHECKSUM_OFFSET.get(packet.protocol, _UDP_CHECKSUM_OFFSET)
    if place + 2 > len(data):
        return None
    copy = turned(data, packet)
    before = int.from_bytes(data[start + which : start + which + 2])
    copy[start + which : start + which + 2] = port.to_bytes(2)
    checksum = int.from_bytes(data[place : place + 2])
    if packet.protocol == TCP:
        copy[place : place + 2] = corrected(checksum, correction(before, port)).to_bytes(2)
    elif checksum:
        copy[place : place + 2] = (
            corrected(checksum, correction(before, port)) or 0xFFFF
        ).to_bytes(2)
    return copy


def ports_of(data: bytes, packet: Packet) -> tuple[int, int] | None:
    """(source port, destination port) of TCP or UDP that is no later fragment, or None."""
    start = packet.transport_offset
    if start + 4 > len(data):
        return None
    return int.from_bytes(data[start : start + 2]), int.from_bytes(data[start + 2 : start + 4])


def is_later_fragment(data: bytes, packet: Packet) -> bool:
    """Whether the transport header is in another packet."""
    if not packet.fragment:
        return False
    if packet.version == 4:
        return bool(data[6] & 0x1F or data[7])
    # The fragment header is the last before the transport: see `parse_packet`.
    place = packet.transport_offset - 6
    return bool(data[place] or data[place + 1] & 0xF8)


def correction(before: int, after: int) -> int:
    """What replacing one 16-bit word adds to the one's complement sum."""
    total = (before ^ 0xFFFF) + after
    return (total & 0xFFFF) + (total >> 16)


def corrected(checksum: int, correction: int) -> int:
    """The checksum after such a replacement (RFC 1624, eqn. 3)."""
    total = (checksum ^ 0xFFFF) + correction
    return (total & 0xFFFF) + (total >> 16) ^ 0xFFFF

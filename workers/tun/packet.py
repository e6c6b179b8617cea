"""A view of one IP packet, as read from a TUN device. Pure; raises nothing on any input.

Answers for: where the headers are, whether the lengths agree, and the TCP fields the SYN gate
needs. Leaves to `policy` what may pass, and to the kernels all checksums.

    IPv4 (RFC 791 section 3.1)              IPv6 (RFC 8200 section 3)
     0  version, header length / 4           0  version, traffic class, flow label
     2  total length                         4  payload length
     6  flags, fragment offset / 8           6  next header
     9  protocol                             8  source, 16 bytes
    12  source, 4 bytes                     24  destination, 16 bytes
    16  destination, 4 bytes                40  extension headers, transport
    20  options, transport

    TCP (RFC 9293 section 3.1), offsets from the transport header
     0  source port     2  destination port     4  sequence number     8  acknowledgment number
    12  header length / 4 in the high nibble   13  flags
"""

from dataclasses import dataclass
from enum import StrEnum
from struct import Struct
from typing import Final

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10

_HOP_BY_HOP: Final = 0
_ROUTING: Final = 43
_FRAGMENT: Final = 44
_DESTINATION: Final = 60
# The headers Linux walks over to find TCP. Authentication (51), mobility (135) and the rest end
# the walk: without a security association the kernel delivers nothing behind them.
_EXTENSIONS: Final = frozenset({_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION})
# RFC 8200 section 4.1 recommends at most six; a longer chain only costs time.
_MAX_EXTENSIONS: Final = 8
_SOURCE_ROUTE_OPTIONS: Final = frozenset({131, 137})  # RFC 791: loose and strict

_TCP_HEADER: Final = Struct(">HHIIBB")


class Malformed(StrEnum):
    """Why the bytes are no packet that may be looked at further."""

    VERSION = "version"  # neither IPv4 nor IPv6, or no bytes at all
    TRUNCATED = "truncated"  # a header reaches beyond the end
    LENGTH = "length"  # the length field disagrees with the bytes read
    HEADER_LENGTH = "header_length"  # a header says it is shorter than possible
    OPTIONS = "options"  # the IPv4 options do not add up
    TOO_MANY_HEADERS = "too_many_headers"  # chain of IPv6 extension headers without end
    TCP_FLAGS = "tcp_flags"  # SYN together with FIN or RST


@dataclass(frozen=True, slots=True)
class TcpHeader:
    """The TCP fields the SYN gate and the reset builder use."""

    source_port: int
    destination_port: int
    sequence: int
    acknowledgment: int
    flags: int
    payload_length: int

    @property
    def opens_connection(self) -> bool:
        """Whether a listening kernel would start a connection for this segment."""
        return self.flags & (SYN | ACK) == SYN


@dataclass(frozen=True, slots=True)
class Packet:
    """One well-formed packet. Addresses are packed: 4 or 16 bytes.

    `protocol` is the transport protocol, for a fragment the header its own chain names next.
    `tcp` is set for TCP that is no fragment. An IPv6 "atomic" fragment (RFC 6946) is none.
    """

    version: int
    source: bytes
    destination: bytes
    protocol: int
    transport_offset: int
    fragment: bool
    source_routed: bool
    tcp: TcpHeader | None


def parse_packet(data: bytes) -> Packet | Malformed:
    """The view of `data`, one whole packet starting at its IP header. Never raises."""
    version = data[0] >> 4 if data else 0
    if version == 4:
        return _parse_ipv4(data)
    if version == 6:
        return _parse_ipv6(data)
    return Malformed.VERSION


def _parse_ipv4(data: bytes) -> Packet | Malformed:
    length = len(data)
    if length < 20:
        return Malformed.TRUNCATED
    header_length = (data[0] & 0x0F) * 4
    if header_length < 20:
        return Malformed.HEADER_LENGTH
    if data[2] << 8 | data[3] != length:
        return Malformed.LENGTH
    if header_length > length:
        return Malformed.TRUNCATED
    source_routed = _source_route(data, header_length) if header_length > 20 else False
    if isinstance(source_routed, Malformed):
        return source_routed
    # The reserved bit and "don't fragment" say nothing; "more fragments" and the offset do.
    fragment = bool(data[6] & 0x3F or data[7])
    return _with_tcp(
        data, (4, data[12:16], data[16:20]), data[9], header_length, fragment, source_routed
    )


def _source_route(data: bytes, end: int) -> bool | Malformed:
    """Whether the IPv4 options hold a source route (RFC 791 section 3.1)."""
    offset, found = 20, False
    while offset < end:
        kind = data[offset]
        if kind == 0:
            break
        if kind == 1:
            offset += 1
            continue
        if offset + 1 >= end or data[offset + 1] < 2 or offset + data[offset + 1] > end:
            return Malformed.OPTIONS
        found = found or kind in _SOURCE_ROUTE_OPTIONS
        offset += data[offset + 1]
    return found


def _parse_ipv6(data: bytes) -> Packet | Malformed:
    length = len(data)
    if length < 40:
        return Malformed.TRUNCATED
    # No jumbograms (RFC 2675): their payload length of 0 fails here.
    if (data[4] << 8 | data[5]) + 40 != length:
        return Malformed.LENGTH
    addresses = (6, data[8:24], data[24:40])
    protocol, offset, source_routed = data[6], 40, False
    for _ in range(_MAX_EXTENSIONS + 1):
        if protocol not in _EXTENSIONS:
            return _with_tcp(data, addresses, protocol, offset, False, source_routed)
        if offset + 8 > length:
            return Malformed.TRUNCATED
        size = 8
        if protocol == _FRAGMENT:
            if data[offset + 2] or data[offset + 3] & 0xF9:  # offset or "more fragments"
                return Packet(*addresses, data[offset], offset + 8, True, source_routed, None)
        else:
            size = (data[offset + 1] + 1) * 8
            if protocol == _ROUTING and data[offset + 3]:  # segments left
                source_routed = True
        protocol = data[offset]
        offset += size
        if offset > length:
            return Malformed.TRUNCATED
    return Malformed.TOO_MANY_HEADERS


def _with_tcp(
    data: bytes,
    addresses: tuple[int, bytes, bytes],
    protocol: int,
    offset: int,
    fragment: bool,  # noqa: FBT001
    source_routed: bool,  # noqa: FBT001
) -> Packet | Malformed:
    if protocol != TCP or fragment:
        return Packet(*addresses, protocol, offset, fragment, source_routed, None)
    tcp = _parse_tcp(data, offset)
    if isinstance(tcp, Malformed):
        return tcp
    return Packet(*addresses, protocol, offset, fragment, source_routed, tcp)


def _parse_tcp(data: bytes, offset: int) -> TcpHeader | Malformed:
    available = len(data) - offset
    if available < 20:
        return Malformed.TRUNCATED
    source_port, destination_port, sequence, acknowledgment, nibbles, flags = (
        _TCP_HEADER.unpack_from(data, offset)
    )
    header_length = (nibbles >> 4) * 4
    if header_length < 20:
        return Malformed.HEADER_LENGTH
    if header_length > available:
        return Malformed.TRUNCATED
    if flags & SYN and flags & (FIN | RST):
        return Malformed.TCP_FLAGS
    return TcpHeader(
        source_port,
        destination_port,
        sequence,
        acknowledgment,
        flags,
        available - header_length,
    )

"""Builds the TCP reset that answers a refused connection attempt. Pure.

    seg.flags has no ACK:  <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>
    seg.flags has ACK:     <SEQ=SEG.ACK><CTL=RST>

Source: RFC 9293 section 3.10.7.1 (what a closed port answers), section 3.1 (checksum with pseudo
header), RFC 8200 section 8.1 (pseudo header of IPv6).
"""

from struct import Struct
from typing import Final

from workers.tun.packet import ACK, FIN, RST, SYN, TCP, Packet, TcpHeader

_IPV4: Final = Struct(">BBHHHBBH4s4s")
_IPV6: Final = Struct(">IHBB16s16s")
_TCP: Final = Struct(">HHIIBBHHH")
_PSEUDO_IPV4: Final = Struct(">4s4sHH")
_PSEUDO_IPV6: Final = Struct(">16s16sII")
_HOP_LIMIT: Final = 64
_DONT_FRAGMENT: Final = 0x4000


def build_reset(packet: Packet) -> bytes | None:
    """The packet that refuses the segment in `packet`, from its destination to its source.

    None when there is nothing to refuse: no TCP header, or a reset already.
    """
    tcp = packet.tcp
    if tcp is None or tcp.flags & RST:
        return None
    sequence, acknowledgment, flags = _reply_fields(tcp)
    segment = _TCP.pack(
        tcp.destination_port, tcp.source_port, sequence, acknowledgment, 5 << 4, flags, 0, 0, 0
    )
    source, destination = packet.destination, packet.source
    if packet.version == 4:
        pseudo = _PSEUDO_IPV4.pack(source, destination, TCP, len(segment))
        header = _ipv4_header(source, destination, len(segment))
    else:
        pseudo = _PSEUDO_IPV6.pack(source, destination, len(segment), TCP)
        header = _IPV6.pack(6 << 28, len(segment), TCP, _HOP_LIMIT, source, destination)
    return header + _with_checksum(segment, 16, pseudo)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    # 65536 is 1 modulo 65535, so the one's complement sum of the words is the whole number
    # modulo 65535; the sum of headers that are not all zero is never 0 but 65535.
    return 0xFFFF - ((int.from_bytes(data) - 1) % 0xFFFF + 1 if any(data) else 0)


def _reply_fields(tcp: TcpHeader) -> tuple[int, int, int]:
    if tcp.flags & ACK:
        return tcp.acknowledgment, 0, RST
    # SYN and FIN take one sequence number each (RFC 9293 section 3.4).
    consumed = tcp.payload_length + bool(tcp.flags & SYN) + bool(tcp.flags & FIN)
    return 0, (tcp.sequence + consumed) % 2**32, RST | ACK


def _ipv4_header(source: bytes, destination: bytes, payload_length: int) -> bytes:
    header = _IPV4.pack(
        0x45,
        0,
        _IPV4.size + payload_length,
        0,
        _DONT_FRAGMENT,
        _HOP_LIMIT,
        TCP,
        0,
        source,
        destination,
    )
    return _with_checksum(header, 10)


def _with_checksum(header: bytes, offset: int, pseudo: bytes = b"") -> bytes:
    value = checksum(pseudo + header)
    return header[:offset] + value.to_bytes(2) + header[offset + 2 :]

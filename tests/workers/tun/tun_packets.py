"""Builds packets for tests, with checksums computed the slow way of RFC 1071."""

import struct

SYN, SYN_ACK, ACK, RST, FIN = 0x02, 0x12, 0x10, 0x04, 0x01


def slow_checksum(data: bytes) -> int:
    total = 0
    for index in range(0, len(data), 2):
        total += int.from_bytes(data[index : index + 2].ljust(2, b"\0"))
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tcp_segment(
    flags=ACK, *, sequence=1000, acknowledgment=0, ports=(40000, 443), options=b"", payload=b""
):
    offset = (20 + len(options)) // 4 << 4
    header = struct.pack(">HHIIBBHHH", *ports, sequence, acknowledgment, offset, flags, 64240, 0, 0)
    return header + options + payload


def ipv4(source, destination, payload, *, protocol=6, fragment=0x4000, options=b""):
    length = 20 + len(options) + len(payload)
    first = 0x45 + len(options) // 4
    header = struct.pack(
        ">BBHHHBBH4s4s", first, 0, length, 7, fragment, 64, protocol, 0, source, destination
    )
    value = slow_checksum(header + options)
    return header[:10] + value.to_bytes(2) + header[12:] + options + payload


def ipv6(source, destination, payload, *, next_header=6):
    return (
        struct.pack(">IHBB16s16s", 6 << 28, len(payload), next_header, 64, source, destination)
        + payload
    )


def extension(next_header, data=b"\0" * 6):
    return bytes([next_header, (len(data) + 2) // 8 - 1]) + data


def fragment_header(next_header, *, offset=0, more=False):
    return struct.pack(">BBHI", next_header, 0, offset << 3 | more, 99)

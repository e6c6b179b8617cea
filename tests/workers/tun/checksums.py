"""Checksums of whole packets, computed the slow way; and packets that have them."""

from tun_packets import slow_checksum

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
_PLACES = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}


def pseudo(packet: bytes, protocol: int, length: int) -> bytes:
    """The pseudo header of unfragmented TCP, UDP or ICMPv6 without extension headers."""
    if packet[0] >> 4 == 4:
        return packet[12:20] + bytes([0, protocol]) + length.to_bytes(2)
    return packet[8:40] + length.to_bytes(4) + bytes([0, 0, 0, protocol])


def transport(packet: bytes) -> tuple[int, int]:
    """(protocol, offset of its header)."""
    if packet[0] >> 4 == 4:
        return packet[9], (packet[0] & 15) * 4
    return packet[6], 40


def remainder(packet: bytes) -> int:
    """0 if the checksum of the transport header is right."""
    protocol, offset = transport(packet)
    segment = packet[offset:]
    head = b"" if protocol == ICMP else pseudo(packet, protocol, len(segment))
    return slow_checksum(head + segment)


def sealed(packet: bytes) -> bytes:
    """The packet with the right checksum of its transport header."""
    protocol, offset = transport(packet)
    place = offset + _PLACES[protocol]
    blank = packet[:place] + b"\0\0" + packet[place + 2 :]
    value = remainder(blank)
    if protocol == UDP:
        value = value or 0xFFFF
    return blank[:place] + value.to_bytes(2) + blank[place + 2 :]


def header_is_right(packet: bytes) -> bool:
    """Whether the header checksum of an IPv4 packet is right; IPv6 has none."""
    return packet[0] >> 4 == 6 or slow_checksum(packet[: (packet[0] & 15) * 4]) == 0

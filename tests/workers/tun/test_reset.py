import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tun_packets import ACK, FIN, RST, SYN, SYN_ACK, ipv4, ipv6, slow_checksum, tcp_segment

from workers.tun.packet import Packet, parse_packet
from workers.tun.reset import build_reset, checksum

ENDS = {
    "ipv4": (ipv4, b"\x64\x40\0\1", b"\x64\x40\0\x09"),
    "ipv6": (ipv6, b"\xfd" + bytes(14) + b"\1", b"\xfd" + bytes(14) + b"\x09"),
}


def reset_for(family, segment):
    build, source, destination = ENDS[family]
    packet = parse_packet(build(source, destination, segment))
    assert isinstance(packet, Packet)
    return build_reset(packet)


def parsed_reset(family, segment):
    data = reset_for(family, segment)
    assert data is not None
    packet = parse_packet(data)
    assert isinstance(packet, Packet)
    assert packet.tcp is not None
    return packet


@pytest.mark.parametrize("family", ENDS)
def test_reset_goes_back_where_the_syn_came_from(family):
    packet = parsed_reset(family, tcp_segment(SYN, ports=(40000, 443)))
    _, source, destination = ENDS[family]
    assert (packet.source, packet.destination) == (destination, source)
    assert (packet.tcp.source_port, packet.tcp.destination_port) == (443, 40000)


@pytest.mark.parametrize("family", ENDS)
@pytest.mark.parametrize(
    ("flags", "payload", "acknowledged"),
    [(SYN, b"", 1), (SYN, b"early data", 11), (FIN, b"", 1), (0, b"abc", 3)],
)
def test_segment_without_ack_is_acknowledged_in_full(family, flags, payload, acknowledged):
    tcp = parsed_reset(family, tcp_segment(flags, sequence=2**32 - 1, payload=payload)).tcp
    assert (tcp.flags, tcp.sequence) == (RST | ACK, 0)
    assert tcp.acknowledgment == (2**32 - 1 + acknowledged) % 2**32


@pytest.mark.parametrize("family", ENDS)
def test_segment_with_ack_is_reset_at_the_number_it_expects(family):
    tcp = parsed_reset(family, tcp_segment(SYN_ACK, acknowledgment=77)).tcp
    assert (tcp.flags, tcp.sequence) == (RST, 77)


@pytest.mark.parametrize("family", ENDS)
def test_reset_is_never_answered(family):
    assert reset_for(family, tcp_segment(RST)) is None


@given(
    family=st.sampled_from(sorted(ENDS)),
    sequence=st.integers(0, 2**32 - 1),
    ports=st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
)
def test_checksums_are_those_of_the_slow_way(family, sequence, ports):
    data = reset_for(family, tcp_segment(SYN, sequence=sequence, ports=ports))
    if family == "ipv4":
        assert slow_checksum(data[:20]) == 0
        pseudo = data[12:20] + struct.pack(">HH", 6, len(data) - 20)
        assert slow_checksum(pseudo + data[20:]) == 0
    else:
        pseudo = data[8:40] + struct.pack(">II", len(data) - 40, 6)
        assert slow_checksum(pseudo + data[40:]) == 0


@given(st.binary(max_size=64).filter(lambda data: len(data) % 2 == 0))
def test_checksum_equals_the_slow_way(data):
    assert checksum(data) == slow_checksum(data)

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tun_bed import DNS_IPV4, NETWORK, PREFIX, TUN_IPV4, TUN_IPV6
from tun_packets import (
    ACK,
    FIN,
    RST,
    SYN,
    SYN_ACK,
    extension,
    fragment_header,
    ipv4,
    ipv6,
    tcp_segment,
)

from workers.tun.packet import Malformed, Packet, parse_packet
from workers.tun.policy import Drop, FastPath, Perimeter, is_oversized_syn
from workers.tun.reset import build_reset
from workers.tun.syn_gate import SynGate

APP_IPV4 = b"\x64\x40\x00\x09"
APP_IPV6 = PREFIX[:8] + bytes(4) + APP_IPV4


def from_program(segment=None, **header):
    return ipv4(TUN_IPV4, APP_IPV4, tcp_segment(SYN) if segment is None else segment, **header)


def from_program6(payload=None, **header):
    return ipv6(TUN_IPV6, APP_IPV6, tcp_segment(SYN) if payload is None else payload, **header)


WELL_FORMED = {
    "ipv4 data": from_program(tcp_segment(ACK, payload=b"hello")),
    "ipv4 with options": from_program(options=b"\x07\x07\x04\0\0\0\0\0"),
    "ipv4 with nops": from_program(options=b"\1\1\1\0"),
    "ipv6 data": from_program6(tcp_segment(ACK, payload=b"hello")),
    "ipv6 behind hop-by-hop and destination options": from_program6(
        extension(60) + extension(6) + tcp_segment(SYN), next_header=0
    ),
    "ipv6 behind a used-up routing header": from_program6(
        extension(6) + tcp_segment(SYN), next_header=43
    ),
    "ipv6 atomic fragment": from_program6(fragment_header(6) + tcp_segment(SYN), next_header=44),
}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_tcp_header_is_found_behind_whatever_precedes_it(name):
    packet = parse_packet(WELL_FORMED[name])
    assert isinstance(packet, Packet)
    assert packet.tcp is not None
    assert (packet.tcp.source_port, packet.tcp.destination_port) == (40000, 443)
    assert packet.tcp.sequence == 1000
    assert not packet.fragment
    assert packet.tcp.payload_length == (5 if name.endswith("data") else 0)


def test_addresses_are_given_packed():
    packet = parse_packet(from_program6())
    assert isinstance(packet, Packet)
    assert (packet.source, packet.destination) == (TUN_IPV6, APP_IPV6)


MALFORMED = {
    "no bytes": (b"", Malformed.VERSION),
    "version 5": (b"\x55" + bytes(40), Malformed.VERSION),
    "ipv4 shorter than its header": (from_program()[:19], Malformed.TRUNCATED),
    "ipv4 header length 16": (b"\x44" + from_program()[1:], Malformed.HEADER_LENGTH),
    "ipv4 header beyond the end": (
        ipv4(TUN_IPV4, APP_IPV4, b"", protocol=17).replace(b"\x45", b"\x4f", 1),
        Malformed.TRUNCATED,
    ),
    "ipv4 bytes missing": (from_program()[:-1], Malformed.LENGTH),
    "ipv4 bytes too many": (from_program() + b"\0", Malformed.LENGTH),
    "ipv4 option beyond the options": (from_program(options=b"\x07\x09\0\0"), Malformed.OPTIONS),
    "ipv4 option of length 1": (from_program(options=b"\x07\x01\0\0"), Malformed.OPTIONS),
    "tcp header cut": (from_program(tcp_segment(SYN)[:19]), Malformed.TRUNCATED),
    "tcp offset 4": (
        from_program(tcp_segment(SYN)[:12] + b"\x40" + tcp_segment(SYN)[13:]),
        Malformed.HEADER_LENGTH,
    ),
    "tcp options beyond the end": (
        from_program(tcp_segment(SYN)[:12] + b"\xf0" + tcp_segment(SYN)[13:]),
        Malformed.TRUNCATED,
    ),
    "syn and fin": (from_program(tcp_segment(SYN | FIN)), Malformed.TCP_FLAGS),
    "syn and rst": (from_program(tcp_segment(SYN | RST)), Malformed.TCP_FLAGS),
    "ipv6 shorter than its header": (from_program6()[:39], Malformed.TRUNCATED),
    "ipv6 bytes missing": (from_program6()[:-1], Malformed.LENGTH),
    "ipv6 extension beyond the end": (
        from_program6(b"\x06\xff" + bytes(30), next_header=60),
        Malformed.TRUNCATED,
    ),
    "ipv6 chain without end": (
        from_program6(extension(60) * 30, next_header=60),
        Malformed.TOO_MANY_HEADERS,
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_packet_is_named(name):
    data, reason = MALFORMED[name]
    assert parse_packet(data) is reason


PERIMETER = Perimeter(NETWORK, 2)
ECHO = b"\x08\0\0\0\0\0\0\0"
FROM_OUTER = {
    "data": (from_program(tcp_segment(ACK)), None),
    "syn": (from_program(), None),
    "echo request": (from_program(ECHO, protocol=1), None),
    "question to dns": (ipv4(TUN_IPV4, DNS_IPV4, bytes(8), protocol=17), None),
    "udp fragment": (from_program(bytes(16), protocol=17, fragment=0x2000), None),
    "ipv6 udp fragment": (
        from_program6(fragment_header(17, more=True) + bytes(8), next_header=44),
        None,
    ),
    "other address of the host": (
        ipv4(b"\xc0\0\2\1", APP_IPV4, tcp_segment(SYN)),
        Drop.FOREIGN_SOURCE,
    ),
    "ipv6 from elsewhere": (
        ipv6(b"\x20\1" + bytes(14), APP_IPV6, tcp_segment(SYN)),
        Drop.FOREIGN_SOURCE,
    ),
    "no virtual destination": (
        ipv4(TUN_IPV4, b"\x08\x08\x08\x08", tcp_segment(SYN)),
        Drop.FOREIGN_DESTINATION,
    ),
    "router solicitation": (
        ipv6(b"\xfe\x80" + bytes(13) + b"\1", b"\xff\2" + bytes(13) + b"\2", ECHO, next_header=58),
        Drop.NOISE,
    ),
    "multicast listener report from no address": (
        ipv6(bytes(16), b"\xff\2" + bytes(13) + b"\x16", ECHO, next_header=58),
        Drop.NOISE,
    ),
    "mdns": (ipv4(TUN_IPV4, b"\xe0\0\0\xfb", bytes(8), protocol=17), Drop.NOISE),
    "broadcast": (ipv4(TUN_IPV4, b"\xff" * 4, bytes(8), protocol=17), Drop.NOISE),
    "loose source route": (from_program(options=b"\x83\7\4\x7f\0\0\1\0"), Drop.SOURCE_ROUTED),
    "ipv6 routing header with segments left": (
        from_program6(extension(6, b"\0\1" + bytes(20)) + tcp_segment(SYN), next_header=43),
        Drop.SOURCE_ROUTED,
    ),
    # The ways a SYN could be hidden in fragments (RFC 1858): tiny first fragment, later fragment
    # that overlaps the flags, and the same for IPv6 behind another header.
    "tiny first fragment": (
        from_program(tcp_segment(SYN)[:8], fragment=0x2000),
        Drop.FRAGMENTED_TCP,
    ),
    "whole syn with more to come": (from_program(fragment=0x2000), Drop.FRAGMENTED_TCP),
    "overlap at offset 8": (from_program(tcp_segment(SYN)[8:], fragment=1), Drop.FRAGMENTED_TCP),
    "ipv6 first fragment": (
        from_program6(fragment_header(6, more=True) + tcp_segment(SYN), next_header=44),
        Drop.FRAGMENTED_TCP,
    ),
    "ipv6 first fragment behind options": (
        from_program6(
            fragment_header(60, more=True) + extension(6) + tcp_segment(SYN), next_header=44
        ),
        Drop.FRAGMENTED_TCP,
    ),
    "ipv6 later fragment": (
        from_program6(fragment_header(6, offset=1) + bytes(8), next_header=44),
        Drop.FRAGMENTED_TCP,
    ),
}


@pytest.mark.parametrize("name", FROM_OUTER)
def test_packet_from_the_host_passes_or_is_dropped_for_a_reason(name):
    data, reason = FROM_OUTER[name]
    packet = parse_packet(data)
    assert isinstance(packet, Packet)
    assert PERIMETER.check_from_outer(packet) is reason


FROM_INNER = {
    "syn-ack": (ipv4(APP_IPV4, TUN_IPV4, tcp_segment(SYN_ACK)), None),
    "answer of dns": (ipv4(DNS_IPV4, TUN_IPV4, bytes(8), protocol=17), None),
    "ipv6 data": (ipv6(APP_IPV6, TUN_IPV6, tcp_segment(ACK)), None),
    "connection attempt": (ipv4(APP_IPV4, TUN_IPV4, tcp_segment(SYN)), Drop.INNER_SYN),
    "to another address": (ipv4(APP_IPV4, APP_IPV4, tcp_segment(ACK)), Drop.FOREIGN_DESTINATION),
    "from no virtual address": (
        ipv4(b"\x7f\0\0\1", TUN_IPV4, tcp_segment(ACK)),
        Drop.FOREIGN_SOURCE,
    ),
    "link-local": (
        ipv6(b"\xfe\x80" + bytes(14), TUN_IPV6, ECHO, next_header=58),
        Drop.NOISE,
    ),
}


@pytest.mark.parametrize("name", FROM_INNER)
def test_packet_from_the_inner_namespace_passes_or_is_dropped_for_a_reason(name):
    data, reason = FROM_INNER[name]
    packet = parse_packet(data)
    assert isinstance(packet, Packet)
    assert PERIMETER.check_from_inner(packet) is reason


CONTAINER, CONTAINER6 = b"\xac\x1e\0\x09", b"\xfd\x12" + bytes(13) + b"\x09"
FORWARDING = Perimeter(
    replace(
        NETWORK, forwarded_from=["172.30.0.0/24", "fd12::/64", "100.64.7.0/24", "100.64.0.1/32"]
    ),
    2,
)
FORWARDED = {
    "from a container": (CONTAINER, APP_IPV4, None),
    "from a container, ipv6": (CONTAINER6, APP_IPV6, None),
    "to the dns server": (CONTAINER, DNS_IPV4, None),
    "from the host still": (TUN_IPV4, APP_IPV4, None),
    "from beside the network": (b"\xac\x1e\1\x09", APP_IPV4, Drop.FOREIGN_SOURCE),
    "ipv6 from beside the network": (
        CONTAINER6[:7] + b"\1" + CONTAINER6[8:],
        APP_IPV6,
        Drop.FOREIGN_SOURCE,
    ),
    "to elsewhere": (CONTAINER, b"\x08\x08\x08\x08", Drop.FOREIGN_DESTINATION),
    # However it came into the list: nobody but VNet has these addresses.
    "from a virtual address": (b"\x64\x40\7\1", APP_IPV4, Drop.FOREIGN_SOURCE),
}


@pytest.mark.parametrize("name", FORWARDED)
def test_packets_of_forwarded_networks_cross_both_ways(name):
    source, destination, reason = FORWARDED[name]
    build = ipv4 if len(source) == 4 else ipv6
    there = parse_packet(build(source, destination, tcp_segment(SYN)))
    back = parse_packet(build(destination, source, tcp_segment(SYN_ACK)))
    assert isinstance(there, Packet)
    assert isinstance(back, Packet)
    assert FORWARDING.check_from_outer(there) is reason
    if reason is not Drop.FOREIGN_DESTINATION:
        opposite = Drop.FOREIGN_DESTINATION if reason is Drop.FOREIGN_SOURCE else None
        assert FORWARDING.check_from_inner(back) is opposite
        attempt = parse_packet(build(destination, source, tcp_segment(SYN)))
        assert isinstance(attempt, Packet)
        assert FORWARDING.check_from_inner(attempt) is (opposite or Drop.INNER_SYN)


def test_only_connection_attempts_to_names_are_gated():
    def is_gated(data):
        packet = parse_packet(data)
        assert isinstance(packet, Packet)
        return PERIMETER.is_gated(packet)

    assert is_gated(from_program())
    assert is_gated(from_program6())
    assert not is_gated(from_program(tcp_segment(ACK)))
    assert not is_gated(from_program(tcp_segment(SYN_ACK)))
    assert not is_gated(ipv4(TUN_IPV4, DNS_IPV4, tcp_segment(SYN)))
    assert not is_gated(ipv4(TUN_IPV4, TUN_IPV4, tcp_segment(SYN)))


def test_syn_with_data_is_held_up_to_a_limit():
    assert not is_oversized_syn(from_program(tcp_segment(SYN, payload=b"x" * 1400)))
    assert is_oversized_syn(from_program(tcp_segment(SYN, payload=b"x" * 3000)))


def _buffer(data):
    return bytearray(data.ljust(80, b"\0"))


def test_fast_path_passes_only_what_it_was_shown():
    path = FastPath()
    is_ordinary = path.recogniser()
    data = from_program(tcp_segment(ACK, payload=b"hello"))
    assert not is_ordinary(_buffer(data), len(data))
    packet = parse_packet(data)
    assert isinstance(packet, Packet)
    path.approve(packet)
    assert is_ordinary(_buffer(data), len(data))
    path.forget()
    assert not is_ordinary(_buffer(data), len(data))


def _fast_paths():
    outer, inner = FastPath(), FastPath()
    for path, pairs in (
        (outer, ((TUN_IPV4, APP_IPV4), (TUN_IPV6, APP_IPV6), (TUN_IPV4, DNS_IPV4))),
        (inner, ((APP_IPV4, TUN_IPV4), (APP_IPV6, TUN_IPV6), (DNS_IPV4, TUN_IPV4))),
    ):
        for source, destination in pairs:
            build = ipv4 if len(source) == 4 else ipv6
            packet = parse_packet(build(source, destination, tcp_segment(ACK)))
            assert isinstance(packet, Packet)
            path.approve(packet)
    return outer.recogniser(), inner.recogniser()


IS_ORDINARY = _fast_paths()


def _process(data, gate, now):
    """Everything the worker does with one packet; the fast path must never be more lenient."""
    packet = parse_packet(data)
    outer, inner = (recognise(_buffer(data), len(data)) for recognise in IS_ORDINARY)
    if isinstance(packet, Malformed):
        assert not outer
        assert not inner
        return
    drop = PERIMETER.check_from_outer(packet)
    assert not outer or (drop is None and not PERIMETER.is_gated(packet))
    assert not inner or PERIMETER.check_from_inner(packet) is None
    build_reset(packet)
    if drop is None and PERIMETER.is_gated(packet):
        gate.receive_syn(data, packet, now)
        gate.expire(now)


def _make_gate():
    return SynGate(
        max_pending=8,
        pending_seconds=50.0,
        max_remembered=8,
        remembered_seconds=20.0,
        first_flow_id=1,
    )


SEEDS = [data for data, _ in [*FROM_OUTER.values(), *FROM_INNER.values(), *MALFORMED.values()]]
SEEDS += WELL_FORMED.values()


def test_100_000_random_and_mutated_packets_raise_nothing():
    source = random.Random(20261122)
    gate = _make_gate()
    for number in range(100_000):
        if number % 4 == 0:
            data = source.randbytes(source.randrange(90))
            if data and number % 8 == 0:
                data = source.choice((b"\x45", b"\x60", b"\x4f")) + data[1:]
        else:
            mutated = bytearray(source.choice(SEEDS))
            for _ in range(source.randrange(1, 4)):
                if mutated:
                    mutated[source.randrange(len(mutated))] = source.randrange(256)
            cut = source.randrange(len(mutated) + 1) if number % 8 == 1 else len(mutated)
            data = bytes(mutated[:cut])
        _process(data, gate, float(number))


@given(st.binary(max_size=120))
def test_any_bytes_raise_nothing(data):
    _process(data, _make_gate(), 0.0)

"""Rewritten packets: the pure parts (rewrite, flow_table, icmp, redirects) and what is decided of each."""

import struct

import pytest
from checksums import ICMP, ICMPV6, TCP, UDP, header_is_right, remainder, sealed
from hypothesis import given
from hypothesis import strategies as st
from tun_bed import DNS_IPV4, DNS_IPV6, NETWORK, PREFIX, TUN_IPV4, TUN_IPV6
from tun_packets import (
    ACK,
    RST,
    SYN,
    SYN_ACK,
    extension,
    fragment_header,
    ipv4,
    ipv6,
    slow_checksum,
    tcp_segment,
)

from ipc.messages import Redirect
from workers.tun import redirects as redirects_module
from workers.tun.flow_table import FlowTable
from workers.tun.icmp import ERRORS_AT_ONCE, ErrorAllowance
from workers.tun.packet import parse_packet
from workers.tun.redirects import Redirects
from workers.tun.rewrite import DESTINATION_PORT, SOURCE_PORT, turned, turned_to_port
from workers.tun.rewriting_inspector import RewritingInspector

APP = b"\x64\x40\0\x09"
OTHER_APP = b"\x64\x40\0\x0a"
APP_IPV6 = PREFIX[:8] + bytes(4) + APP
LISTENER, DNS_PORT = 33333, 35353
FAMILIES = [(TUN_IPV4, APP, ipv4), (TUN_IPV6, APP_IPV6, ipv6)]
both_families = pytest.mark.parametrize(("own", "app", "build"), FAMILIES)
ports = st.integers(1, 65535)


def udp_segment(payload=b"question", ports=(40000, 53)):
    return struct.pack(">HHHH", *ports, 8 + len(payload), 0) + payload


def udp(build, source, destination, segment, **options):
    kind = {"protocol": UDP} if build is ipv4 else {"next_header": UDP}
    return sealed(build(source, destination, segment, **kind, **options))


def echo(build, source, destination, *, kind=None, payload=b"ping"):
    request = kind if kind is not None else (8 if build is ipv4 else 128)
    protocol = {"protocol": ICMP} if build is ipv4 else {"next_header": ICMPV6}
    body = struct.pack(">BBHHH", request, 0, 0, 7, 1) + payload
    return sealed(build(source, destination, body, **protocol))


class Doorkeeper:
    def __init__(self):
        self.syns = []

    def receive_syn(self, data, packet):
        self.syns.append(data)


class Bed:
    """An inspector that redirects one application over each family, and DNS."""

    def __init__(self):
        self.counters, self.now = {}, 0.0
        self.inspector = RewritingInspector(NETWORK, 2, self.counters, lambda: self.now)
        self.doorkeeper = self.inspector.doorkeeper = Doorkeeper()
        self.inspector.change_redirects(
            [
                Redirect(address=APP, port=443, local_port=LISTENER),
                Redirect(address=APP_IPV6, port=443, local_port=LISTENER),
                *(
                    Redirect(address=address, port=53, local_port=DNS_PORT, is_udp=is_udp)
                    for address in (DNS_IPV4, DNS_IPV6)
                    for is_udp in (False, True)
                ),
            ]
        )
        self.rewrite = self.inspector.flows.rewriter()

    def inspect(self, packet):
        found = self.inspector.inspect(packet)
        return None if found is None else bytes(found)

    def fast(self, packet):
        """What the fast path makes of it, or None if it leaves it alone."""
        buffer = bytearray(packet.ljust(len(packet) + 128, b"\xaa"))
        if self.rewrite(buffer, len(packet)):
            assert buffer[len(packet) :] == b"\xaa" * 128
            return bytes(buffer[: len(packet)])
        assert buffer[: len(packet)] == packet
        return None


@pytest.fixture
def bed():
    return Bed()


# -- bytes --


@given(
    st.sampled_from(FAMILIES),
    st.sampled_from([TCP, UDP]),
    ports,
    ports,
    ports,
    st.sampled_from([SOURCE_PORT, DESTINATION_PORT]),
    st.binary(max_size=60),
)
def test_rewritten_packet_has_the_checksum_of_a_full_computation(
    family, protocol, source_port, destination_port, new_port, which, payload
):
    own, app, build = family
    if protocol == TCP:
        segment = tcp_segment(ports=(source_port, destination_port), payload=payload)
        packet = sealed(build(own, app, segment))
    else:
        segment = udp_segment(payload, (source_port, destination_port))
        packet = udp(build, own, app, segment)
    view = parse_packet(packet)
    result = bytes(turned_to_port(packet, view, which, new_port))
    found = parse_packet(result)
    assert (found.source, found.destination) == (app, own)
    assert remainder(result) == 0
    assert result == sealed(result)  # to the bit, of the two forms of zero as well
    assert header_is_right(result)
    wanted = [source_port, destination_port]
    wanted[which // 2] = new_port
    start = found.transport_offset
    assert struct.unpack_from(">HH", result, start) == tuple(wanted)
    assert result.endswith(payload)
    # And back again.
    assert bytes(turned_to_port(result, found, which, segment_ports(segment)[which // 2])) == packet


def segment_ports(segment):
    return struct.unpack_from(">HH", segment)


def test_udp_without_a_checksum_stays_without_one():
    packet = ipv4(TUN_IPV4, DNS_IPV4, udp_segment(), protocol=UDP)
    result = bytes(turned_to_port(packet, parse_packet(packet), DESTINATION_PORT, 9))
    assert result[26:28] == b"\0\0"


def test_udp_checksum_that_becomes_zero_is_sent_as_all_ones():
    for port in range(1, 65536):
        packet = ipv4(TUN_IPV4, DNS_IPV4, udp_segment(b"", (40000, port)), protocol=UDP)
        if remainder(packet) == 0:
            break
    before = udp(ipv4, TUN_IPV4, DNS_IPV4, udp_segment(b"", (40000, 53)))
    result = bytes(turned_to_port(before, parse_packet(before), DESTINATION_PORT, port))
    assert result[26:28] == b"\xff\xff"


def test_header_options_and_extension_headers_stay_where_they_are():
    packet = ipv4(TUN_IPV4, APP, tcp_segment(), options=b"\1" * 8)
    result = turned(packet, parse_packet(packet))
    assert header_is_right(bytes(result))
    assert result[20:] == packet[20:]
    chain = extension(60) + extension(6) + tcp_segment()
    packet = ipv6(TUN_IPV6, APP_IPV6, chain, next_header=0)
    view = parse_packet(packet)
    result = turned_to_port(packet, view, DESTINATION_PORT, 9)
    assert result[40:56] == packet[40:56]
    assert result[56 + 2 : 56 + 4] == b"\0\x09"


# -- the table of redirects --


def test_redirects_come_change_and_go_in_both_directions():
    table = Redirects()
    table.change([Redirect(address=APP, port=443, local_port=5)])
    assert table.local_port(TCP, APP, 443) == 5
    assert table.port(TCP, APP, 5) == 443
    for protocol, address, port in ((UDP, APP, 443), (TCP, OTHER_APP, 443), (TCP, APP, 444)):
        assert table.local_port(protocol, address, port) is None
    table.change([Redirect(address=APP, port=443, local_port=6)])
    assert (table.port(TCP, APP, 5), table.port(TCP, APP, 6)) == (None, 443)
    # The kernel has given the port anew: whoever had it before is gone.
    table.change([Redirect(address=APP, port=80, local_port=6)])
    assert table.local_port(TCP, APP, 443) is None
    assert table.port(TCP, APP, 6) == 80
    table.change([Redirect(address=APP, port=80, local_port=0)] * 2)
    assert len(table) == 0
    assert table.port(TCP, APP, 6) is None


def test_redirects_have_a_limit(monkeypatch):
    monkeypatch.setattr(redirects_module, "MAX_REDIRECTS", 3)
    table = Redirects()
    some = [Redirect(address=APP, port=port, local_port=port) for port in range(1, 6)]
    assert table.change(some) == 2
    assert len(table) == 3
    assert table.local_port(TCP, APP, 5) is None
    # One that is there already needs no room.
    assert table.change([Redirect(address=APP, port=3, local_port=9)]) == 0
    assert table.local_port(TCP, APP, 3) == 9


# -- what becomes of a packet --


@both_families
def test_data_goes_to_the_listener_and_its_answers_come_from_the_virtual_port(bed, own, app, build):
    packet = sealed(build(own, app, tcp_segment(ACK, payload=b"data")))
    there = sealed(build(app, own, tcp_segment(ACK, ports=(40000, LISTENER), payload=b"data")))
    answer = sealed(build(own, app, tcp_segment(ACK, ports=(LISTENER, 40000), payload=b"answer")))
    back = sealed(build(app, own, tcp_segment(ACK, ports=(443, 40000), payload=b"answer")))
    for before, after in ((packet, there), (answer, back)):
        assert bed.fast(before) is None
        assert bed.inspect(before) == after
        # From then on without a closer look, and with the same bytes.
        assert bed.fast(before) == after
    assert bed.doorkeeper.syns == []


@both_families
def test_connection_attempts_are_held_and_their_answers_are_not(bed, own, app, build):
    syn = sealed(build(own, app, tcp_segment(SYN)))
    assert bed.inspect(syn) is None
    assert bed.doorkeeper.syns == [syn]
    assert bytes(bed.inspector.admitted(syn)) == sealed(
        build(app, own, tcp_segment(SYN, ports=(40000, LISTENER)))
    )
    answer = sealed(build(own, app, tcp_segment(SYN_ACK, ports=(LISTENER, 40000))))
    assert bed.inspect(answer) == sealed(build(app, own, tcp_segment(SYN_ACK, ports=(443, 40000))))
    # A SYN is held although its direction is known, and although it comes from a listener's port.
    assert bed.fast(syn) is None
    from_listener = sealed(build(own, app, tcp_segment(SYN, ports=(LISTENER, 443))))
    assert bed.inspect(from_listener) is None
    assert bed.doorkeeper.syns == [syn, from_listener]


def test_admitted_attempt_without_a_listener_is_dropped(bed):
    syn = sealed(ipv4(TUN_IPV4, OTHER_APP, tcp_segment(SYN)))
    assert bed.inspector.admitted(syn) is None
    assert bed.counters["dropped_not_redirected"] == 1


def test_large_attempt_is_not_held(bed):
    syn = sealed(ipv4(TUN_IPV4, APP, tcp_segment(SYN, payload=bytes(4000))))
    assert bed.inspect(syn) is None
    assert bed.doorkeeper.syns == []
    assert bed.counters["dropped_oversized_syn"] == 1


@both_families
def test_what_belongs_to_no_listener_is_reset(bed, own, app, build):
    packet = sealed(build(own, app, tcp_segment(ACK, acknowledgment=77, ports=(40000, 80))))
    reset = parse_packet(bed.inspect(packet))
    assert (reset.source, reset.destination) == (app, own)
    assert (reset.tcp.flags, reset.tcp.sequence, reset.tcp.source_port) == (RST, 77, 80)
    assert bed.fast(packet) is None
    # But no reset answers a reset.
    assert bed.inspect(sealed(build(own, app, tcp_segment(RST, ports=(40000, 80))))) is None
    assert bed.counters["resets"] == 1


@pytest.mark.parametrize(
    ("own", "dns", "build"), [(TUN_IPV4, DNS_IPV4, ipv4), (TUN_IPV6, DNS_IPV6, ipv6)]
)
def test_dns_is_asked_without_asking_a_proxy(bed, own, dns, build):
    question = udp(build, own, dns, udp_segment())
    answer = udp(build, own, dns, udp_segment(b"answer", (DNS_PORT, 40000)))
    assert bed.inspect(question) == udp(build, dns, own, udp_segment(ports=(40000, DNS_PORT)))
    assert bed.inspect(answer) == udp(build, dns, own, udp_segment(b"answer", (53, 40000)))
    assert bed.fast(question) == bed.inspect(question)
    syn = sealed(build(own, dns, tcp_segment(SYN, ports=(40000, 53))))
    assert bed.inspect(syn) == sealed(build(dns, own, tcp_segment(SYN, ports=(40000, DNS_PORT))))
    # On another port there is nobody, which it says.
    refused = parse_packet(
        bed.inspect(sealed(build(own, dns, tcp_segment(SYN, ports=(40000, 80)))))
    )
    assert refused.tcp.flags & RST
    assert bed.doorkeeper.syns == []


@both_families
def test_echo_request_is_answered(bed, own, app, build):
    kind = 0 if build is ipv4 else 129
    reply = bed.inspect(echo(build, own, app, payload=b"hello"))
    assert reply == echo(build, app, own, kind=kind, payload=b"hello")
    # Neither a reply nor an error is.
    assert bed.inspect(echo(build, own, app, kind=kind)) is None
    assert bed.inspect(echo(build, own, app, kind=3 if build is ipv4 else 1)) is None
    assert (bed.counters["echo_replies"], bed.counters["dropped_unserved"]) == (1, 2)


def test_fragments_of_an_echo_request_become_those_of_the_reply(bed):
    whole = echo(ipv4, TUN_IPV4, APP, payload=bytes(range(200)))[20:]
    pieces = [(whole[:96], 0x2000), (whole[96:], 96 // 8)]
    replies = [
        bed.inspect(ipv4(TUN_IPV4, APP, part, protocol=ICMP, fragment=place))
        for part, place in pieces
    ]
    body = b"".join(reply[20:] for reply in replies)
    assert body == echo(ipv4, APP, TUN_IPV4, kind=0, payload=bytes(range(200)))[20:]
    assert [reply[6:8] for reply in replies] == [b"\x20\0", b"\0\x0c"]
    assert all(header_is_right(reply) for reply in replies)


@pytest.mark.parametrize(
    ("own", "dns", "build"), [(TUN_IPV4, DNS_IPV4, ipv4), (TUN_IPV6, DNS_IPV6, ipv6)]
)
def test_fragments_of_a_long_answer_come_from_the_dns_address(bed, own, dns, build):
    segment = udp(build, own, dns, udp_segment(bytes(range(256)) * 2, (DNS_PORT, 40000)))
    segment = segment[20 if build is ipv4 else 40 :]

    def piece(data, *, offset, more):
        if build is ipv4:
            place = offset // 8 | (0x2000 if more else 0)
            return ipv4(own, dns, data, protocol=UDP, fragment=place)
        head = fragment_header(UDP, offset=offset // 8, more=more)
        return ipv6(own, dns, head + data, next_header=44)

    results = [
        bed.inspect(piece(segment[:256], offset=0, more=True)),
        bed.inspect(piece(segment[256:], offset=256, more=False)),
    ]
    head = 20 if build is ipv4 else 48
    body = b"".join(result[head:] for result in results)
    wanted = udp(build, dns, own, udp_segment(bytes(range(256)) * 2, (53, 40000)))
    assert body == wanted[20 if build is ipv4 else 40 :]
    assert len(bed.inspector.flows) == 0


@both_families
def test_udp_that_nobody_takes_is_answered_with_port_unreachable(bed, own, app, build):
    packet = udp(build, own, app, udp_segment(bytes(5000)))
    error = bed.inspect(packet)
    view = parse_packet(error)
    assert (view.source, view.destination) == (app, own)
    assert header_is_right(error)
    assert remainder(error if len(error) % 2 == 0 else error + b"\0") == 0
    body = error[view.transport_offset :]
    assert body[:2] == (b"\3\3" if build is ipv4 else b"\1\4")
    assert body[8:] == packet[: len(body) - 8]
    assert len(error) == (576 if build is ipv4 else 1280)


def test_errors_are_limited_and_later_fragments_cause_none(bed):
    packet = udp(ipv4, TUN_IPV4, APP, udp_segment())
    answers = [bed.inspect(packet) for _ in range(200)]
    assert sum(answer is not None for answer in answers) == ERRORS_AT_ONCE
    bed.now += 1
    assert bed.inspect(packet) is not None
    assert bed.inspect(ipv4(TUN_IPV4, APP, b"x" * 8, protocol=UDP, fragment=4)) is None
    # An allowance is no more than it was after a long time.
    allowance = ErrorAllowance()
    assert sum(allowance.take(1e6) for _ in range(200)) == ERRORS_AT_ONCE


@pytest.mark.parametrize(
    ("packet", "counter"),
    [
        (ipv4(b"\xc0\0\2\1", APP, b"x" * 40, protocol=132), "dropped_foreign_source"),
        (ipv4(b"\xc0\0\2\1", b"\xc0\0\2\2", tcp_segment()), "dropped_foreign_source"),
        (ipv4(TUN_IPV4, b"\xc0\0\2\1", tcp_segment()), "dropped_foreign_destination"),
        (ipv4(TUN_IPV4, TUN_IPV4, tcp_segment()), "dropped_foreign_destination"),
        (ipv4(TUN_IPV4, b"\xe0\0\0\1", b"", protocol=2), "dropped_noise"),
        (ipv4(TUN_IPV4, APP, tcp_segment(), fragment=0x2000), "dropped_fragmented_tcp"),
        (ipv4(TUN_IPV4, APP, b"x" * 40, protocol=132), "dropped_unserved"),
        (ipv4(TUN_IPV4, APP, tcp_segment()[:10]), "malformed_truncated"),
        (b"", "malformed_version"),
    ],
)
def test_what_is_not_for_vnet_gets_no_answer(bed, packet, counter):
    assert bed.inspect(packet) is None
    assert bed.counters[counter] == 1


def test_what_comes_from_elsewhere_is_refused(bed):
    source = b"\xc0\0\2\1"
    reset = bed.inspect(ipv4(source, APP, tcp_segment(SYN)))
    assert reset[12:20] == APP + source
    assert reset[33] & RST
    assert bed.counters["turned_away"] == bed.counters["dropped_foreign_source"] == 1
    assert not bed.doorkeeper.syns


@given(st.sampled_from([UDP, ICMP]), st.binary(max_size=9), st.sampled_from([0, 0x2000, 1]))
def test_truncated_transport_headers_do_no_harm(protocol, data, fragment):
    bed = Bed()
    for destination in (APP, DNS_IPV4):
        packet = ipv4(TUN_IPV4, destination, data, protocol=protocol, fragment=fragment)
        found = bed.inspect(packet)
        assert found is None or header_is_right(found)


# -- the fast path --


@both_families
def test_what_was_learnt_is_forgotten_with_the_redirect_and_with_the_ranges(bed, own, app, build):
    packet = sealed(build(own, app, tcp_segment(ACK)))
    bed.inspect(packet)
    assert bed.fast(packet) is not None
    bed.inspector.change_redirects([Redirect(address=app, port=443, local_port=0)])
    assert bed.fast(packet) is None
    assert parse_packet(bed.inspect(packet)).tcp.flags & RST
    bed.inspector.change_redirects([Redirect(address=app, port=443, local_port=7)])
    bed.inspect(packet)
    assert bed.fast(packet) is not None
    bed.inspector.replace_network(NETWORK)
    assert bed.fast(packet) is None


@both_families
def test_fast_path_leaves_alone_what_wants_a_closer_look(bed, own, app, build):
    packet = sealed(build(own, app, tcp_segment(ACK, payload=b"data")))
    bed.inspect(packet)
    start = 20 if build is ipv4 else 40
    for place, value in (
        (start + 13, SYN),
        (start + 12, 0x10),
        (start + 12, 0xF0),
        (0, 0x46),
        (0, 0),
    ):
        changed = bytearray(packet)
        changed[place] = value
        assert bed.fast(bytes(changed)) is None
    assert bed.fast(packet[:-1]) is None
    assert bed.fast(packet + b"x") is None
    if build is ipv4:
        fragment = bytearray(packet)
        fragment[6] = 0x20
        assert bed.fast(bytes(fragment)) is None


def test_flows_have_a_limit_and_the_oldest_makes_room():
    table = FlowTable(limit=3)
    views = {}
    for port in range(1, 6):
        packet = ipv4(TUN_IPV4, APP, tcp_segment(ports=(port, 443)))
        views[port] = packet
        table.learn(parse_packet(packet), (port, 443), (port, 9))
    assert len(table) == 3
    rewrite = table.rewriter()
    known = [
        p for p, packet in views.items() if rewrite(bytearray(packet + bytes(128)), len(packet))
    ]
    assert known == [3, 4, 5]


@given(
    st.sampled_from(FAMILIES),
    st.sampled_from([TCP, UDP]),
    ports,
    st.binary(max_size=60),
    st.booleans(),
)
def test_fast_path_writes_what_the_closer_look_writes(
    family, protocol, port, payload, has_checksum
):
    own, app, build = family
    dns = DNS_IPV4 if build is ipv4 else DNS_IPV6
    bed = Bed()
    if protocol == TCP:
        packet = sealed(build(own, app, tcp_segment(ACK, ports=(port, 443), payload=payload)))
    else:
        packet = udp(build, own, dns, udp_segment(payload, (port, 53)))
        if not has_checksum:
            start = 26 if build is ipv4 else 46
            packet = packet[:start] + b"\0\0" + packet[start + 2 :]
    slow = bed.inspect(packet)
    assert bed.fast(packet) == slow
    assert slow_checksum(slow[:20]) == 0 or build is ipv6

"""Any bytes as one packet from a TUN device: the view, the perimeter, the reset.

The first byte picks how the rest becomes a packet: raw, or behind a header with addresses that
mean something, so that what lies behind the address checks is reached.
"""

from byte_choices import Choices
from packet_places import NETWORK, PERIMETER, PLACES_IPV4, PLACES_IPV6, PROXIES, VNET_OWN

from ipc.probe_ports import FIRST_PROBE_PORT
from workers.tun.packet import RST, Malformed, Packet, parse_packet
from workers.tun.reset import build_reset, checksum

# What VNet itself answers at: connections to it wait for nobody.
FREE = VNET_OWN | {NETWORK.dns_ipv4, NETWORK.dns_ipv6}


def check(data: bytes) -> None:
    choices = Choices(data)
    packet_bytes = shape(choices)
    view = parse_packet(packet_bytes)
    if isinstance(view, Malformed):
        return
    check_view(view, packet_bytes)
    assert isinstance(parse_packet(packet_bytes + b"\0"), Malformed), "a byte too many"
    assert isinstance(parse_packet(packet_bytes[:-1]), Malformed), "a byte too few"
    check_perimeter(view, packet_bytes)
    check_reset(view)


def shape(choices: Choices) -> bytes:
    """A packet out of the choices; lengths and addresses are often right."""
    kind = choices.below(4)
    if kind == 0:
        return choices.rest()
    if kind == 1:
        source, destination = choices.pick(PLACES_IPV4), choices.pick(PLACES_IPV4)
        head, body = bytearray(choices.take(12).ljust(12, b"\0")), choices.rest()
        head[0] = 0x40 | max(5, head[0] & 0x0F)
        head[2:4] = min(20 + len(body), 65535).to_bytes(2)
        return bytes(head) + source + destination + body
    source, destination = choices.pick(PLACES_IPV6), choices.pick(PLACES_IPV6)
    head, body = bytearray(choices.take(8).ljust(8, b"\0")), choices.rest()
    head[0] = 0x60 | head[0] & 0x0F
    head[4:6] = min(len(body), 65535).to_bytes(2)
    if kind == 2:
        head[6] = 6
    return bytes(head) + source + destination + body


def check_view(view: Packet, data: bytes) -> None:
    if view.version == 4:
        assert (view.source, view.destination) == (data[12:16], data[16:20])
    else:
        assert (view.version, view.source, view.destination) == (6, data[8:24], data[24:40])
    assert 20 <= view.transport_offset <= len(data)
    protocol, segment, is_fragment = slow_walk(data)
    assert (view.protocol, view.fragment) == (protocol, is_fragment)
    assert data[view.transport_offset :] == segment
    assert (view.tcp is not None) == (protocol == 6 and not is_fragment)
    if view.tcp is not None:
        tcp = view.tcp
        assert tcp.source_port == int.from_bytes(segment[0:2])
        assert tcp.destination_port == int.from_bytes(segment[2:4])
        assert tcp.sequence == int.from_bytes(segment[4:8])
        assert tcp.acknowledgment == int.from_bytes(segment[8:12])
        assert tcp.flags == segment[13]
        assert tcp.payload_length == len(segment[(segment[12] >> 4) * 4 :])


def slow_walk(data: bytes) -> tuple[int, bytes, bool]:
    """(transport protocol, what it has, whether it is a fragment) as the receiving kernel sees it."""
    if data[0] >> 4 == 4:
        offset_field = int.from_bytes(data[6:8])
        return data[9], data[(data[0] & 15) * 4 :], bool(offset_field & 0x3FFF)
    kind, rest = data[6], data[40:]
    while kind in {0, 43, 44, 60}:
        following = rest[0]
        if kind == 44:
            if int.from_bytes(rest[2:4]) & 0xFFF9:
                return following, rest[8:], True
            rest = rest[8:]
        else:
            rest = rest[8 + 8 * rest[1] :]
        kind = following
    return kind, rest, False


def is_attempt(data: bytes) -> bool:
    """Whether a listening kernel would begin a connection for this packet."""
    protocol, segment, is_fragment = slow_walk(data)
    return protocol == 6 and not is_fragment and segment[13] & 0x12 == 0x02


def check_perimeter(view: Packet, data: bytes) -> None:
    protocol, _, is_fragment = slow_walk(data)
    icmp = 1 if view.version == 4 else 58
    if PERIMETER.check_from_outer(view) is None:
        assert view.source in VNET_OWN
        assert not is_fragment or protocol in {17, icmp}
        is_free = view.destination in FREE and not is_probe(view)
        assert PERIMETER.is_gated(view) == (is_attempt(data) and not is_free), "past the gate"
    if PERIMETER.check_from_inner(view) is None:
        assert view.destination in VNET_OWN
        assert not is_attempt(data)
        assert not is_fragment or protocol in {17, icmp}


def is_probe(view: Packet) -> bool:
    """Whether it goes to a port where the supervisor asks after a proxy."""
    ports = range(FIRST_PROBE_PORT, FIRST_PROBE_PORT + PROXIES)
    is_port = view.tcp is not None and view.tcp.destination_port in ports
    return is_port and view.destination == NETWORK.dns_ipv4


def check_reset(view: Packet) -> None:
    reset = build_reset(view)
    if reset is None:
        assert view.tcp is None or view.tcp.flags & RST
        return
    assert view.tcp is not None
    answer = parse_packet(reset)
    assert isinstance(answer, Packet)
    assert answer.tcp is not None
    assert answer.tcp.flags & RST
    assert (answer.source, answer.destination) == (view.destination, view.source)
    assert answer.tcp.source_port == view.tcp.destination_port
    assert answer.tcp.destination_port == view.tcp.source_port
    segment = reset[answer.transport_offset :]
    pseudo = answer.source + answer.destination + len(segment).to_bytes(4) + (6).to_bytes(4)
    assert checksum(pseudo + segment) == 0
    if view.version == 4:
        assert checksum(reset[:20]) == 0

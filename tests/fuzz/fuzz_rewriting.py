"""Any packets where they are rewritten: who is answered, that nothing slips past the gate, both paths alike.

A sequence of packets goes through both paths as in `workers.tun.pump`: the buffer is longer than the packet
and still holds parts of those before it.
"""

import fuzz_fast_path
import fuzz_packet
from byte_choices import Choices
from fuzz_packet import FREE, is_attempt, is_probe
from packet_places import NETWORK, PERIMETER, PLACES_IPV4, PLACES_IPV6, PROXIES, VNET_OWN

from ipc.messages import Redirect
from workers.tun.packet import ACK, ICMP, ICMPV6, RST, SYN, TCP, UDP, Packet, parse_packet
from workers.tun.policy import Drop
from workers.tun.rewriting_inspector import RewritingInspector

MAX_PACKETS = 40
# Those of the redirects, and some of nobody's.
PORTS = (0, 1, 53, 0x0101, 0x4040)
VIRTUAL = [*PLACES_IPV4[1:4], *PLACES_IPV6[1:4]]


class Gate:
    """Notes what is held."""

    def __init__(self) -> None:
        self.held: list[bytes] = []

    def receive_syn(self, data: bytes, packet: Packet) -> None:
        assert packet.tcp is not None
        self.held.append(data)


def check(data: bytes) -> None:
    choices = Choices(data)
    inspector, gate = make()
    rewrite = inspector.flows.rewriter()
    buffer, packet = bytearray(65536 + 128), b""
    for _ in range(MAX_PACKETS):
        if not choices:
            return
        if choices.below(16) == 15:
            change(choices, inspector)
        if not packet or choices.below(3):
            packet = shape(choices)[:65535]
        buffer[: len(packet)] = packet
        held = len(gate.held)
        if rewrite(buffer, len(packet)):
            written = bytes(buffer[: len(packet)])
            assert not is_attempt(packet), "a connection attempt takes the fast path"
            assert inspector.inspect(packet) == written, "the paths differ"
        else:
            assert bytes(buffer[: len(packet)]) == packet, "a packet was changed and not taken"
            answer = inspector.inspect(packet)
            written = b"" if answer is None else bytes(answer)
        check_decision(packet, written, is_held=len(gate.held) > held)


def make() -> tuple[RewritingInspector, Gate]:
    inspector = RewritingInspector(NETWORK, PROXIES, {}, lambda: 0.0)
    gate = inspector.doorkeeper = Gate()  # type: ignore[assignment]
    inspector.change_redirects(
        [
            Redirect(address=address, port=port, local_port=local_port, is_udp=is_udp)
            for address in VIRTUAL
            for is_udp in (False, True)
            for port, local_port in ((0x0101, 0x4040), (53, 1))
        ]
    )
    return inspector, gate


def change(choices: Choices, inspector: RewritingInspector) -> None:
    """A redirect comes, changes or goes, or the ranges do."""
    if choices.below(4) == 0:
        inspector.replace_network(NETWORK)
        return
    redirect = Redirect(
        address=choices.pick(VIRTUAL),
        port=choices.pick(PORTS),
        local_port=choices.pick(PORTS),
        is_udp=bool(choices.below(2)),
    )
    inspector.change_redirects([redirect])


def shape(choices: Choices) -> bytes:
    """A packet: mostly a good one of VNet's own, at times with a few bytes changed or a piece cut."""
    kind = choices.below(8)
    if kind == 0:
        return choices.pick([fuzz_fast_path.shape, fuzz_packet.shape])(choices)
    is_ipv6, protocol = kind % 2, choices.pick([TCP, TCP, TCP, UDP, 0])
    destination = choices.pick(PLACES_IPV6[1:4] if is_ipv6 else PLACES_IPV4[1:4])
    source = (PLACES_IPV6 if is_ipv6 else PLACES_IPV4)[0]
    ports = choices.pick(PORTS).to_bytes(2) + choices.pick(PORTS).to_bytes(2)
    checksum = choices.take(2).ljust(2, b"\0")
    if protocol == TCP:
        flags = choices.pick([ACK, ACK, SYN, SYN | ACK, RST, choices.byte()])
        body = ports + bytes(8) + b"\x50" + bytes([flags]) + b"\0\0" + checksum + b"\0\0"
    elif protocol == UDP:
        body = ports + b"\0\x08" + checksum
    else:
        protocol = ICMPV6 if is_ipv6 else ICMP
        body = bytes([128 if is_ipv6 else 8, 0]) + checksum + b"\0\7\0\1"
    body += choices.take(choices.below(32))
    if is_ipv6:
        packet = bytearray(b"\x60\0\0\0" + len(body).to_bytes(2) + bytes([protocol, 64]))
    else:
        fragment = choices.pick([0x4000, 0x4000, 0x4000, 0x2000, 0x0001]).to_bytes(2)
        head = b"\x45\0" + (20 + len(body)).to_bytes(2) + b"\0\7" + fragment
        packet = bytearray(head + bytes([64, protocol, 0, 0]))
    packet += source + destination + body
    if kind < 3:
        for _ in range(choices.below(4)):
            packet[choices.byte() % len(packet)] = choices.byte()
        del packet[choices.byte() :]
    return bytes(packet)


def check_decision(packet: bytes, written: bytes, *, is_held: bool) -> None:
    view = parse_packet(packet)
    if is_held:
        assert not written
        assert isinstance(view, Packet)
        assert is_attempt(packet)
        return
    if not written:
        return
    assert isinstance(view, Packet)
    answer = parse_packet(written)
    assert isinstance(answer, Packet), "what is written is a packet"
    assert (answer.source, answer.destination) == (view.destination, view.source)
    if view.source not in VNET_OWN:
        check_refusal(view, answer, written)
        return
    assert PERIMETER.check_from_outer(view) is None
    if view.version == 4:
        assert folded(written[: (written[0] & 15) * 4]) == folded(
            packet[: (packet[0] & 15) * 4]
        ) or (folded(written[:20]) == 0), "the header checksum is as right as it was"
    if is_attempt(packet):
        is_free = view.destination in FREE and not is_probe(view)
        assert is_free, "past the gate"
        assert answer.tcp is not None
    if answer.tcp is not None and answer.tcp.flags & RST and len(written) < len(packet):
        return
    if view.protocol == answer.protocol in {TCP, UDP} and not view.fragment:
        check_transport(packet, written, view)


def check_refusal(view: Packet, answer: Packet, written: bytes) -> None:
    """What comes from elsewhere is told that nobody is there, and not more."""
    assert PERIMETER.check_from_outer(view) is Drop.FOREIGN_SOURCE
    assert PERIMETER.is_uninvited(view)
    if view.protocol == TCP:
        assert is_reset(written)
        return
    assert view.protocol == UDP
    assert answer.protocol == (ICMP if view.version == 4 else ICMPV6)
    error = (3, 3) if view.version == 4 else (1, 4)
    assert tuple(written[answer.transport_offset :][:2]) == error


def check_transport(packet: bytes, written: bytes, view: Packet) -> None:
    """Everything behind the ports is as it was, and the checksum as wrong as it was."""
    if len(packet) != len(written):
        return  # a reset of our own
    start = view.transport_offset
    place = start + (16 if view.protocol == TCP else 6)
    before, after = packet[start + 4 :], written[start + 4 :]
    at = place - start - 4
    if before[:at] + before[at + 2 :] != after[:at] + after[at + 2 :]:
        assert is_reset(written), "more than the ports was changed"
        return
    if view.protocol == UDP and packet[place : place + 2] == b"\0\0":
        assert written[place : place + 2] == b"\0\0", "a checksum where there was none"
        return
    assert folded(packet[start:]) == folded(written[start:]), (
        "the checksum does not follow the port"
    )


def is_reset(written: bytes) -> bool:
    view = parse_packet(written)
    return isinstance(view, Packet) and view.tcp is not None and bool(view.tcp.flags & RST)


def folded(data: bytes) -> int:
    """The one's complement sum; both forms of zero are one."""
    return int.from_bytes(data + b"\0" * (len(data) % 2)) % 0xFFFF

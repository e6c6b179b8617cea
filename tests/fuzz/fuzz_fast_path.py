"""The fast path beside the full check: what the one passes the other would have passed too.

A sequence of packets goes through both directions as in `workers.tun.pump`: the buffer is longer
than the packet and still holds parts of those before it.
"""

from byte_choices import Choices
from fuzz_packet import is_attempt
from packet_places import PERIMETER, PLACES_IPV4, PLACES_IPV6

from workers.tun.packet import Packet, parse_packet
from workers.tun.policy import FastPath

MAX_PACKETS = 40


def check(data: bytes) -> None:
    choices = Choices(data)
    paths = {"outer": FastPath(), "inner": FastPath()}
    recognisers = {name: path.recogniser() for name, path in paths.items()}
    buffer = bytearray(65536)
    for _ in range(MAX_PACKETS):
        if not choices:
            return
        side = choices.pick(["outer", "inner"])
        if choices.below(32) == 31:
            paths[side].forget()
        packet_bytes = shape(choices)
        buffer[: len(packet_bytes)] = packet_bytes
        view = parse_packet(packet_bytes)
        may_pass = isinstance(view, Packet) and is_passed(side, view)
        if recognisers[side](buffer, len(packet_bytes)):
            assert may_pass, f"{packet_bytes.hex()} from {side} takes the fast path"
            assert not is_attempt(packet_bytes)
        elif isinstance(view, Packet) and may_pass:
            paths[side].approve(view)


def is_passed(side: str, view: Packet) -> bool:
    """What `workers.tun.doorkeeper` does for a packet that it looks at closely."""
    if side == "inner":
        return PERIMETER.check_from_inner(view) is None
    return PERIMETER.check_from_outer(view) is None and not PERIMETER.is_gated(view)


def shape(choices: Choices) -> bytes:
    """A packet that is nearly ordinary: a good one with a few bytes changed and a piece cut."""
    is_ipv6, protocol = choices.below(2), choices.pick([6, 6, 17, 1, 44])
    places = PLACES_IPV6 if is_ipv6 else PLACES_IPV4
    pair = choices.byte()
    source, destination = places[pair % 6], places[pair // 6 % 6]
    flags = choices.byte()
    payload = choices.take(choices.below(64))
    segment = bytes(12) + bytes([choices.pick([0x50, 0x60, 0xF0, 0x40]), flags]) + bytes(6)
    body = segment + payload
    if is_ipv6:
        head = b"\x60\0\0\0" + len(body).to_bytes(2) + bytes([protocol, 64])
    else:
        head = b"\x45\0" + (20 + len(body)).to_bytes(2) + bytes([0, 7, 0x40, 0, 64, protocol, 0, 0])
    packet = bytearray(head + source + destination + body)
    for _ in range(choices.below(4)):
        packet[choices.byte() % len(packet)] = choices.byte()
    cut = choices.byte()
    return bytes(packet[:cut]) if 0 < cut < len(packet) else bytes(packet)

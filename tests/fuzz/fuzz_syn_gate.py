"""The SYN gate beside a slow obvious model: the same commands for the same sequence of events.

The first bytes are the limits; then events: a SYN, a verdict, time, or time and expiry.
"""

from byte_choices import Choices
from slow_syn_gate import SlowSynGate

from ipc.messages import Refusal
from workers.tun.packet import RST, Packet, parse_packet
from workers.tun.reset import build_reset
from workers.tun.syn_gate import (
    AskOwner,
    CountAbsorbed,
    SynGate,
    TellAbandoned,
    WriteInner,
    WriteReset,
)

MAX_EVENTS = 300
FIRST_ID = 1000
REFUSALS = [None, None, Refusal.UNKNOWN_APP, Refusal.TIMED_OUT, Refusal.TOO_MANY, Refusal.PROBE]
PROGRAMS = [b"\x64\x40\0\1", b"\xfd" + bytes(14) + b"\1"]
APPS = [b"\x64\x40\0\x09", b"\x64\x40\0\x0a"]
WAITS = [0.0, 0.001, 0.5, 1.0, 2.0, 5.0, 100.0]


def check(data: bytes) -> None:
    choices = Choices(data)
    limits = {
        "max_pending": choices.below(5),
        "pending_seconds": choices.pick([1.0, 5.0, 0.5]),
        "max_remembered": 1 + choices.below(4),
        "remembered_seconds": choices.pick([2.0, 0.5, 0.001]),
    }
    gate = SynGate(**limits, first_flow_id=FIRST_ID)
    model = SlowSynGate(*limits.values(), FIRST_ID)
    now = 0.0
    for _ in range(MAX_EVENTS):
        if not choices:
            break
        match choices.below(8):
            case 0 | 1 | 2 | 3:
                syn, reserve = make_syn(choices), choices.pick([0, 0, 0, 2])
                packet = parse_packet(syn)
                assert isinstance(packet, Packet)
                found = gate.receive_syn(syn, packet, now, reserve=reserve)
                expected = model.syn(key_of(packet), packet.tcp.sequence, syn, now, reserve)
            case 4 | 5:
                flow_id = model.next_id - 1 - choices.below(8)
                refusal = choices.pick(REFUSALS)
                found = gate.receive_verdict(flow_id, refusal, now)
                expected = model.verdict(flow_id, refusal, now)
            case 6:
                now += choices.pick(WAITS)
                continue
            case _:
                now += choices.pick(WAITS)
                found, expected = gate.expire(now), model.expire(now)
        assert [told(command) for command in found] == expected
        compare(gate, model, limits)
    gate.expire(now + 200)
    gate.expire(now + 400)
    assert gate.pending == 0
    assert gate.next_deadline() is None
    for table in (gate._held, gate._held_by_key, gate._settled):
        assert not table, "nothing is kept for ever"


def compare(gate: SynGate, model: SlowSynGate, limits: dict) -> None:
    asked = [("ask", flow.flow_id, flow.key) for flow in model.held()]
    assert [told(question) for question in gate.questions()] == asked
    assert gate.pending == len(asked) <= limits["max_pending"] + 2
    assert gate.next_deadline() == model.next_deadline()
    for flow_id in (FIRST_ID, model.next_id - 1, model.next_id):
        question = gate.question(flow_id)
        assert (question is not None) == any(flow.flow_id == flow_id for flow in model.held())
    assert len(gate._settled) == len(model.settled()) <= limits["max_remembered"]


def make_syn(choices: Choices) -> bytes:
    """A SYN of one of a few flows and attempts; ECN flags and data may differ in a repetition."""
    which = choices.byte()
    ports = (40000 + which % 3).to_bytes(2) + (443 + which // 3 % 2).to_bytes(2)
    sequence = choices.pick([b"\0\0\0\x64", b"\0\1\0\0", b"\xff\xff\xff\xff"])
    payload = choices.take(choices.pick([0, 0, 0, 5]))
    flags = choices.pick([0x02, 0x02, 0xC2])
    segment = ports + sequence + bytes(4) + bytes([0x50, flags]) + bytes(6) + payload
    source, destination = PROGRAMS[which // 6 % 2], APPS[which // 12 % 2]
    if len(source) == 4:
        head = b"\x45\0" + (20 + len(segment)).to_bytes(2) + bytes(4) + b"\x40\6\0\0"
    else:
        head = b"\x60\0\0\0" + len(segment).to_bytes(2) + b"\6\x40"
        destination = b"\xfd" + bytes(11) + destination
    return head + source + destination + segment


def key_of(packet: Packet) -> tuple:
    tcp = packet.tcp
    assert tcp is not None
    return packet.source, tcp.source_port, packet.destination, tcp.destination_port


def told(command: object) -> tuple:
    """A command as the model has it."""
    match command:
        case AskOwner(flow_id, key):
            return ("ask", flow_id, tuple(key))
        case TellAbandoned(flow_id, key):
            return ("abandoned", flow_id, tuple(key))
        case CountAbsorbed():
            return ("absorbed",)
        case WriteInner(data, first):
            return ("inner", data, first)
        case WriteReset(data, reason, first):
            packet = parse_packet(data)
            assert isinstance(packet, Packet)
            assert packet.tcp.flags & RST
            assert build_reset(packet) is None
            # The reset acknowledges the SYN and what came in it; told here without the data.
            source, source_port, destination, destination_port = key_of(packet)
            key = (destination, destination_port, source, source_port)
            return ("reset", key, sequence_of(packet), reason, first)
    raise AssertionError(command)


def sequence_of(reset: Packet) -> int:
    """The sequence number that was refused: one of three, with up to five bytes of data behind."""
    acknowledged = reset.tcp.acknowledgment
    return next(
        sequence
        for sequence in (100, 2**16, 2**32 - 1)
        for payload in range(6)
        if (sequence + payload + 1) % 2**32 == acknowledged
    )

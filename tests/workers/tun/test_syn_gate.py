from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tun_packets import RST, SYN, ipv4, tcp_segment

from ipc.messages import Refusal
from workers.tun.packet import Packet, parse_packet
from workers.tun.syn_gate import (
    TRANSITIONS,
    AskOwner,
    CountAbsorbed,
    FlowEvent,
    FlowState,
    SynGate,
    TellAbandoned,
    WriteInner,
    WriteReset,
)

PROGRAM, APP = b"\x64\x40\0\1", b"\x64\x40\0\x09"


def make_gate(**limits):
    defaults = {
        "max_pending": 3,
        "pending_seconds": 10.0,
        "max_remembered": 4,
        "remembered_seconds": 2.0,
        "first_flow_id": 100,
    }
    return SynGate(**(defaults | limits))


def syn(port=40000, isn=1, payload=b""):
    return ipv4(PROGRAM, APP, tcp_segment(SYN, sequence=isn, ports=(port, 443), payload=payload))


def send(gate, data, now=0.0):
    packet = parse_packet(data)
    assert isinstance(packet, Packet)
    return gate.receive_syn(data, packet, now)


def test_first_syn_is_held_and_its_owner_asked():
    gate = make_gate()
    (question,) = send(gate, syn())
    assert isinstance(question, AskOwner)
    assert question.key == (PROGRAM, 40000, APP, 443)
    assert gate.pending == 1
    assert gate.question(question.flow_id) == question


def test_admitted_syn_passes_unchanged():
    gate = make_gate()
    send(gate, syn(payload=b"early"))
    assert gate.receive_verdict(100, None, 1.0) == [WriteInner(syn(payload=b"early"), first=True)]
    assert gate.pending == 0


def test_refused_syn_is_answered_with_a_reset():
    gate = make_gate()
    send(gate, syn(isn=41))
    (command,) = gate.receive_verdict(100, Refusal.PORT_NOT_ALLOWED, 1.0)
    assert isinstance(command, WriteReset)
    assert command.reason is Refusal.PORT_NOT_ALLOWED
    packet = parse_packet(command.packet)
    assert packet.tcp.flags & RST
    assert packet.tcp.acknowledgment == 42


def test_repeated_syn_is_absorbed_while_held_and_passed_after():
    gate = make_gate()
    send(gate, syn())
    assert send(gate, syn(), 1.0) == [CountAbsorbed()]
    gate.receive_verdict(100, None, 1.5)
    assert send(gate, syn(), 3.0) == [WriteInner(syn(), first=False)]


def test_repeated_syn_after_a_refusal_is_refused_without_asking():
    gate = make_gate()
    send(gate, syn())
    (first,) = gate.receive_verdict(100, Refusal.NOT_LOGGED_IN, 1.0)
    assert send(gate, syn(), 2.0) == [WriteReset(first.packet, Refusal.NOT_LOGGED_IN, first=False)]


def test_settled_flow_is_forgotten_after_its_time():
    gate = make_gate()
    send(gate, syn())
    gate.receive_verdict(100, None, 1.0)
    assert gate.next_deadline() == 3.0
    assert gate.expire(3.0) == []
    assert [type(c) for c in send(gate, syn(), 3.1)] == [AskOwner]


@pytest.mark.parametrize("admitted", [False, True])
def test_another_attempt_on_the_same_ports_abandons_the_old_one(admitted):
    gate = make_gate()
    send(gate, syn(isn=1))
    if admitted:
        gate.receive_verdict(100, None, 0.5)
    key = (PROGRAM, 40000, APP, 443)
    assert send(gate, syn(isn=2), 1.0) == [TellAbandoned(100, key), AskOwner(101, key)]
    assert gate.receive_verdict(100, None, 1.5) == []
    assert gate.receive_verdict(101, None, 1.5) == [WriteInner(syn(isn=2), first=True)]


def test_one_too_many_is_refused_at_once_and_costs_no_memory():
    gate = make_gate(max_pending=1)
    send(gate, syn(1))
    (command,) = send(gate, syn(2))
    assert command.reason is Refusal.TOO_MANY
    assert gate.pending == 1
    gate.receive_verdict(100, None, 0.0)
    assert [type(c) for c in send(gate, syn(2))] == [AskOwner]


def test_waiting_ends_at_the_deadline_with_a_reset():
    gate = make_gate()
    send(gate, syn(), 5.0)
    assert gate.next_deadline() == 15.0
    assert gate.expire(14.9) == []
    abandoned, reset = gate.expire(15.0)
    assert isinstance(abandoned, TellAbandoned)
    assert reset.reason is Refusal.TIMED_OUT
    assert gate.receive_verdict(100, None, 15.1) == []


def test_questions_can_be_asked_again_for_all_that_is_held():
    gate = make_gate()
    questions = [*send(gate, syn(1)), *send(gate, syn(2))]
    gate.receive_verdict(100, None, 0.0)
    assert list(gate.questions()) == questions[1:]


def test_memory_of_settled_flows_has_a_limit():
    gate = make_gate(max_remembered=2)
    for port in (1, 2, 3):
        (question,) = send(gate, syn(port))
        gate.receive_verdict(question.flow_id, None, 0.0)
    assert isinstance(send(gate, syn(3))[0], WriteInner)
    assert isinstance(send(gate, syn(2))[0], WriteInner)
    assert isinstance(send(gate, syn(1))[0], AskOwner)


def test_every_state_has_a_row_for_every_event_it_can_meet():
    verdicts = {FlowEvent.VERDICT_ADMITTED, FlowEvent.VERDICT_REFUSED}
    expected = {
        (state, event)
        for state in FlowState
        for event in FlowEvent
        if state is FlowState.HELD or event not in verdicts
    }
    assert set(TRANSITIONS) == expected


@dataclass
class Row:
    flow_id: int
    port: int
    isn: int
    state: str
    deadline: float
    reason: Refusal = Refusal.TIMED_OUT


class Model:
    """The gate as one list of rows that is searched from the start every time."""

    def __init__(self, max_pending, pending, max_remembered, remembered):
        self.rows = []
        self.next_id = 100
        self.limits = max_pending, pending, max_remembered, remembered

    def held(self):
        return [row for row in self.rows if row.state == "held"]

    def settle(self, row, state, now):
        self.rows.remove(row)
        settled = [other for other in self.rows if other.state != "held"]
        if len(settled) >= self.limits[2]:
            self.rows.remove(settled[0])
        row.state, row.deadline = state, now + self.limits[3]
        self.rows.append(row)

    def syn(self, port, isn, now):
        out = []
        for row in [row for row in self.rows if row.port == port]:
            if row.isn == isn:
                if row.state == "held":
                    return ["absorbed"]
                if row.state == "admitted":
                    return [("inner", port, isn, False)]
                return [("reset", port, isn, row.reason, False)]
            self.rows.remove(row)
            if row.state != "refused":
                out.append(("abandoned", row.flow_id))
        if len(self.held()) >= self.limits[0]:
            return [*out, ("reset", port, isn, Refusal.TOO_MANY, True)]
        row = Row(self.next_id, port, isn, "held", now + self.limits[1])
        self.next_id += 1
        self.rows.append(row)
        return [*out, ("ask", row.flow_id)]

    def verdict(self, flow_id, refusal, now):
        for row in self.held():
            if row.flow_id == flow_id:
                if refusal is None:
                    self.settle(row, "admitted", now)
                    return [("inner", row.port, row.isn, True)]
                row.reason = refusal
                self.settle(row, "refused", now)
                return [("reset", row.port, row.isn, refusal, True)]
        return []

    def expire(self, now):
        out = []
        for row in [row for row in self.held() if row.deadline <= now]:
            self.settle(row, "refused", now)
            out += [("abandoned", row.flow_id)]
            out += [("reset", row.port, row.isn, Refusal.TIMED_OUT, True)]
        self.rows = [row for row in self.rows if row.state == "held" or row.deadline > now]
        return out


def described(command):
    match command:
        case AskOwner(flow_id, _):
            return ("ask", flow_id)
        case TellAbandoned(flow_id, _):
            return ("abandoned", flow_id)
        case CountAbsorbed():
            return "absorbed"
        case WriteInner(data, first):
            tcp = parse_packet(data).tcp
            return ("inner", tcp.source_port, tcp.sequence, first)
        case WriteReset(data, reason, first):
            tcp = parse_packet(data).tcp
            return ("reset", tcp.destination_port, tcp.acknowledgment - 1, reason, first)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("syn"), st.integers(1, 5), st.integers(1, 2)),
        st.tuples(
            st.just("verdict"),
            st.integers(1, 6),
            st.sampled_from([None, None, Refusal.UNKNOWN_APP, Refusal.INTERNAL]),
        ),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 4.0]), st.booleans()),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_gate_does_what_the_slow_model_does(steps):
    gate, model, now = make_gate(), Model(3, 10.0, 4, 2.0), 0.0
    open_flows = set()
    for step in steps:
        match step:
            case ("syn", port, isn):
                commands, expected = send(gate, syn(port, isn), now), model.syn(port, isn, now)
            case ("verdict", back, refusal):
                flow_id = model.next_id - back
                commands = gate.receive_verdict(flow_id, refusal, now)
                expected = model.verdict(flow_id, refusal, now)
            case ("wait", seconds, expires):
                now += seconds
                commands = gate.expire(now) if expires else []
                expected = model.expire(now) if expires else []
        assert [described(command) for command in commands] == expected
        assert gate.pending == len(model.held()) <= 3
        assert gate.next_deadline() == min((r.deadline for r in model.rows), default=None)
        for command in commands:
            if isinstance(command, AskOwner):
                assert command.flow_id not in open_flows
                open_flows.add(command.flow_id)
    # Nothing waits for ever.
    gate.expire(now + 10.0)
    gate.expire(now + 20.0)
    assert gate.pending == 0
    assert gate.next_deadline() is None

"""Holds back each connection attempt until the owning proxy says yes or no. Pure.

A flow is one SYN: its key (both addresses and ports) and its initial sequence number (ISN). The
program's kernel repeats a SYN with the same ISN; another ISN on the same key is another attempt.

                      same SYN: absorbed
                          +----+                        same SYN: passed
                 SYN      |    v      admitted              +----+
      (unknown) -----> [ HELD ] ---------------> [ ADMITTED ]    |
       ^  ^  ^            |                         |    ^       |
       |  |  |            | refused, or deadline    |    +-------+
       |  |  |            v                         |
       |  |  |       [ REFUSED ] same SYN: reset    |
       |  |  +------------+ forgotten after         | forgotten after
       |  |                 remembered_seconds      | remembered_seconds
       |  +-----------------------------------------+
       +-- from every state: another SYN on the same key; the old flow is abandoned

Why settled flows are remembered for a while: the program's kernel may have sent its SYN again just
before the answer reached it. That copy must not become a second dial.

What comes out are commands; the caller executes them in order. What comes in: SYNs, verdicts, time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NamedTuple, TypeAlias

from ipc.messages import Refusal
from workers.tun.packet import Packet, TcpHeader
from workers.tun.reset import build_reset


class FlowKey(NamedTuple):
    """Both ends of a connection; addresses packed."""

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int


@dataclass(frozen=True, slots=True)
class AskOwner:
    """Ask the proxy that owns the destination whether this flow may pass."""

    flow_id: int
    key: FlowKey


@dataclass(frozen=True, slots=True)
class TellAbandoned:
    """Tell the owning proxy that this flow is given up."""

    flow_id: int
    key: FlowKey


@dataclass(frozen=True, slots=True)
class WriteInner:
    """Let the SYN through. `first` is False for a repetition."""

    packet: bytes
    first: bool


@dataclass(frozen=True, slots=True)
class WriteReset:
    """Refuse: write this reset to the outer device. `first` is False for a repetition."""

    packet: bytes
    reason: Refusal
    first: bool


@dataclass(frozen=True, slots=True)
class CountAbsorbed:
    """A repetition of a SYN that is still held was dropped."""


Command: TypeAlias = AskOwner | TellAbandoned | WriteInner | WriteReset | CountAbsorbed


class FlowState(Enum):
    """Where a remembered flow is."""

    HELD = auto()
    ADMITTED = auto()
    REFUSED = auto()


class FlowEvent(Enum):
    """What can happen to a remembered flow."""

    SYN_REPEATED = auto()
    SYN_REPLACED = auto()
    VERDICT_ADMITTED = auto()
    VERDICT_REFUSED = auto()
    DEADLINE_PASSED = auto()


class Output(Enum):
    """What an event makes the gate do."""

    ABSORB = auto()
    PASS = auto()
    RESET = auto()
    ABANDON = auto()


# (state, event) -> (next state or None for forgotten, outputs). A held flow alone is found by its
# id, so the rows of a verdict on a settled flow do not exist: late verdicts find nothing.
TRANSITIONS: Final[
    dict[tuple[FlowState, FlowEvent], tuple[FlowState | None, tuple[Output, ...]]]
] = {
    (FlowState.HELD, FlowEvent.SYN_REPEATED): (FlowState.HELD, (Output.ABSORB,)),
    (FlowState.HELD, FlowEvent.SYN_REPLACED): (None, (Output.ABANDON,)),
    (FlowState.HELD, FlowEvent.VERDICT_ADMITTED): (FlowState.ADMITTED, (Output.PASS,)),
    (FlowState.HELD, FlowEvent.VERDICT_REFUSED): (FlowState.REFUSED, (Output.RESET,)),
    (FlowState.HELD, FlowEvent.DEADLINE_PASSED): (
        FlowState.REFUSED,
        (Output.ABANDON, Output.RESET),
    ),
    (FlowState.ADMITTED, FlowEvent.SYN_REPEATED): (FlowState.ADMITTED, (Output.PASS,)),
    (FlowState.ADMITTED, FlowEvent.SYN_REPLACED): (None, (Output.ABANDON,)),
    (FlowState.ADMITTED, FlowEvent.DEADLINE_PASSED): (None, ()),
    (FlowState.REFUSED, FlowEvent.SYN_REPEATED): (FlowState.REFUSED, (Output.RESET,)),
    (FlowState.REFUSED, FlowEvent.SYN_REPLACED): (None, ()),
    (FlowState.REFUSED, FlowEvent.DEADLINE_PASSED): (None, ()),
}


@dataclass(slots=True)
class _Flow:
    flow_id: int
    key: FlowKey
    sequence: int
    state: FlowState
    deadline: float
    syn: bytes  # empty once settled
    reset: bytes
    refusal: Refusal = field(default=Refusal.TIMED_OUT)


class SynGate:
    """The table of flows that wait or were settled a moment ago.

    `now` is monotonic seconds and never goes back. At most `max_pending` flows are held, for at
    most `pending_seconds` each; one more is refused at once and not remembered, unless its `reserve`
    of further places lets it in. At most
    `max_remembered` settled flows are kept, for `remembered_seconds`; the oldest makes room.
    Flow ids count up from `first_flow_id`: a caller that restarts picks another start.
    """

    def __init__(
        self,
        *,
        max_pending: int,
        pending_seconds: float,
        max_remembered: int,
        remembered_seconds: float,
        first_flow_id: int,
    ) -> None:
        self._max_pending: Final = max_pending
        self._pending_seconds: Final = pending_seconds
        self._max_remembered: Final = max_remembered
        self._remembered_seconds: Final = remembered_seconds
        self._next_id = first_flow_id
        # Insertion order is deadline order in both: the time to wait is the same for all.
        self._held: dict[int, _Flow] = {}
        self._settled: dict[FlowKey, _Flow] = {}
        self._held_by_key: dict[FlowKey, _Flow] = {}

    @property
    def pending(self) -> int:
        """How many flows are held."""
        return len(self._held)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do; None while nothing waits."""
        firsts = (next(iter(self._held.values()), None), next(iter(self._settled.values()), None))
        return min((flow.deadline for flow in firsts if flow is not None), default=None)

    def questions(self) -> Iterator[AskOwner]:
        """One question per held flow, oldest first, for a proxy that has lost them."""
        for flow in self._held.values():
            yield AskOwner(flow.flow_id, flow.key)

    def question(self, flow_id: int) -> AskOwner | None:
        """The question of one flow; None once it is no longer held."""
        flow = self._held.get(flow_id)
        return None if flow is None else AskOwner(flow_id, flow.key)

    def receive_syn(
        self, data: bytes, packet: Packet, now: float, *, reserve: int = 0
    ) -> list[Command]:
        """A connection attempt was read from the outer device; `packet` is the view of `data`.

        `packet.tcp` is set and opens a connection. `reserve` is how many places above
        `max_pending` it may use.
        """
        tcp = packet.tcp
        assert tcp is not None, "the caller gates TCP only"
        key = FlowKey(packet.source, tcp.source_port, packet.destination, tcp.destination_port)
        known = self._held_by_key.get(key) or self._settled.get(key)
        if known is None:
            return self._hold(key, data, packet, tcp, now, reserve)
        if known.sequence == tcp.sequence:
            return self._step(known, FlowEvent.SYN_REPEATED, data, now)
        commands = self._step(known, FlowEvent.SYN_REPLACED, data, now)
        return commands + self._hold(key, data, packet, tcp, now, reserve)

    def receive_verdict(self, flow_id: int, refusal: Refusal | None, now: float) -> list[Command]:
        """The owning proxy has decided. Nothing comes out when the flow is no longer held."""
        flow = self._held.get(flow_id)
        if flow is None:
            return []
        if refusal is None:
            return self._step(flow, FlowEvent.VERDICT_ADMITTED, flow.syn, now)
        flow.refusal = refusal
        return self._step(flow, FlowEvent.VERDICT_REFUSED, flow.syn, now)

    def expire(self, now: float) -> list[Command]:
        """Gives up what has waited too long and forgets what was settled long ago."""
        commands: list[Command] = []
        for table in (self._held, self._settled):
            due: list[_Flow] = []
            for flow in table.values():
                if flow.deadline > now:
                    break
                due.append(flow)
            for flow in due:
                commands += self._step(flow, FlowEvent.DEADLINE_PASSED, b"", now)
        return commands

    def _hold(
        self,
        key: FlowKey,
        data: bytes,
        packet: Packet,
        tcp: TcpHeader,
        now: float,
        reserve: int,
    ) -> list[Command]:
        reset = build_reset(packet)
        assert reset is not None, "a SYN can be refused"
        if len(self._held) >= self._max_pending + reserve:
            return [WriteReset(reset, Refusal.TOO_MANY, first=True)]
        flow_id = self._next_id
        self._next_id += 1
        deadline = now + self._pending_seconds
        flow = _Flow(flow_id, key, tcp.sequence, FlowState.HELD, deadline, data, reset)
        self._held[flow_id] = self._held_by_key[key] = flow
        return [AskOwner(flow_id, key)]

    def _step(self, flow: _Flow, event: FlowEvent, syn: bytes, now: float) -> list[Command]:
        before = flow.state
        after, outputs = TRANSITIONS[before, event]
        if after is not before:
            self._move(flow, after, now)
        first = event is not FlowEvent.SYN_REPEATED
        return [_command(output, flow, syn, first=first) for output in outputs]

    def _move(self, flow: _Flow, after: FlowState | None, now: float) -> None:
        if flow.state is FlowState.HELD:
            del self._held[flow.flow_id], self._held_by_key[flow.key]
        else:
            del self._settled[flow.key]
        if after is None:
            return
        while len(self._settled) >= self._max_remembered:
            del self._settled[next(iter(self._settled))]
        flow.state, flow.syn = after, b""
        flow.deadline = now + self._remembered_seconds
        self._settled[flow.key] = flow


def _command(output: Output, flow: _Flow, syn: bytes, *, first: bool) -> Command:
    match output:
        case Output.ABSORB:
            return CountAbsorbed()
        case Output.PASS:
            return WriteInner(syn, first)
        case Output.RESET:
            return WriteReset(flow.reset, flow.refusal, first)
        case Output.ABANDON:
            return TellAbandoned(flow.flow_id, flow.key)

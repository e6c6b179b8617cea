"""The SYN gate as one list that is searched from the start every time. The model for `fuzz_syn_gate`.

Written from what the gate promises (`workers.tun.syn_gate`), not from how it keeps its tables.
"""

from dataclasses import dataclass

from ipc.messages import Refusal


@dataclass
class Flow:
    """One SYN that waits, or was settled a moment ago (`refusal` None: admitted)."""

    flow_id: int
    key: tuple
    sequence: int
    data: bytes
    deadline: float
    is_held: bool = True
    refusal: Refusal | None = None


class SlowSynGate:
    """Commands are tuples; a reset is told by whom it refuses and why."""

    def __init__(self, max_pending, pending_seconds, max_remembered, remembered_seconds, first_id):
        self.flows: list[Flow] = []  # those held in the order of asking, settled ones in theirs
        self.max_pending = max_pending
        self.pending_seconds = pending_seconds
        self.max_remembered = max_remembered
        self.remembered_seconds = remembered_seconds
        self.next_id = first_id

    def held(self) -> list[Flow]:
        return [flow for flow in self.flows if flow.is_held]

    def settled(self) -> list[Flow]:
        return [flow for flow in self.flows if not flow.is_held]

    def next_deadline(self) -> float | None:
        return min((flow.deadline for flow in self.flows), default=None)

    def syn(self, key, sequence, data, now, reserve) -> list[tuple]:
        commands = []
        for flow in [flow for flow in self.flows if flow.key == key]:
            if flow.sequence == sequence:
                if flow.is_held:
                    return [("absorbed",)]
                if flow.refusal is None:
                    return [("inner", data, False)]
                return [("reset", key, sequence, flow.refusal, False)]
            self.flows.remove(flow)
            if flow.is_held or flow.refusal is None:
                commands.append(("abandoned", flow.flow_id, key))
        if len(self.held()) >= self.max_pending + reserve:
            return [*commands, ("reset", key, sequence, Refusal.TOO_MANY, True)]
        deadline = now + self.pending_seconds
        self.flows.append(Flow(self.next_id, key, sequence, data, deadline))
        self.next_id += 1
        return [*commands, ("ask", self.next_id - 1, key)]

    def verdict(self, flow_id, refusal, now) -> list[tuple]:
        for flow in self.held():
            if flow.flow_id == flow_id:
                self.settle(flow, refusal, now)
                if refusal is None:
                    return [("inner", flow.data, True)]
                return [("reset", flow.key, flow.sequence, refusal, True)]
        return []

    def expire(self, now) -> list[tuple]:
        commands = []
        for flow in self.held():
            if flow.deadline <= now:
                self.settle(flow, Refusal.TIMED_OUT, now)
                commands.append(("abandoned", flow.flow_id, flow.key))
                commands.append(("reset", flow.key, flow.sequence, Refusal.TIMED_OUT, True))
        self.flows = [flow for flow in self.flows if flow.is_held or flow.deadline > now]
        return commands

    def settle(self, flow, refusal, now) -> None:
        self.flows.remove(flow)
        while len(self.settled()) >= self.max_remembered:
            self.flows.remove(self.settled()[0])
        flow.is_held, flow.refusal = False, refusal
        flow.deadline = now + self.remembered_seconds
        self.flows.append(flow)

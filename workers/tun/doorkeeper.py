"""Carries the questions of the SYN gate to the proxies and its answers to the devices.

The shell around `syn_gate`: it knows the bus, the devices, the clock and the counters, and decides
nothing but which proxy to ask (by the destination's address) and when to ask again.

A question that cannot be sent, because the proxy is not connected or its queue is full, is asked
again every few hundredths of a second, for as long as a proxy's restart may take. A proxy that says
hello is new: it is asked again whatever its predecessor may have known.

The gate's deadline is long, because a person may be asked for a second factor meanwhile. So that
nobody waits that long for a proxy that is gone, or for a verdict that was lost, what is held is asked
again every few seconds: a proxy that knows the question ignores it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final, assert_never

from ipc.addresses import as_text, owner_of_address
from ipc.errors import BusyError, PeerGoneError
from ipc.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    DialAbandoned,
    DialRequest,
    DialVerdict,
    Message,
    ProxyHello,
    Refusal,
)
from workers.tun.packet import Packet
from workers.tun.syn_gate import (
    AskOwner,
    Command,
    CountAbsorbed,
    FlowKey,
    SynGate,
    TellAbandoned,
    WriteInner,
    WriteReset,
)

log = logging.getLogger(__name__)

_ASK_AGAIN_SECONDS: Final = 0.05
_REMIND_SECONDS: Final = 5.0
# The supervisor starts a crashed proxy again within seconds, or not at all.
_UNASKED_SECONDS: Final = 30.0


class Doorkeeper:
    """Runs the gate. `send(slot, message)` raises PeerGoneError or BusyError."""

    def __init__(
        self,
        *,
        gate: SynGate,
        proxies: int,
        send: Callable[[str, Message], None],
        write_inner: Callable[[bytes], None],
        write_outer: Callable[[bytes], None],
        counters: dict[str, int],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._gate: Final = gate
        self._proxies: Final = proxies
        self._send: Final = send
        self._write_inner: Final = write_inner
        self._write_outer: Final = write_outer
        self._counters: Final = counters
        self._loop: Final = loop
        self._alarm: asyncio.TimerHandle | None = None
        # Ids of flows, and since when nobody can be asked about them.
        self._unasked: dict[int, float] = {}
        self._ask_again: asyncio.TimerHandle | None = None
        self._reminder: asyncio.TimerHandle | None = None
        self._held_before: set[int] = set()  # at the last reminder
        names = ["syns", "syns_repeated", "admitted", "verdicts_ignored", "pending_now"]
        names += [f"refused_{reason}" for reason in Refusal]
        counters.update(dict.fromkeys(names, 0))

    def receive_syn(self, data: bytes, packet: Packet) -> None:
        """A connection attempt was read; `packet` is the view of `data`."""
        self._counters["syns"] += 1
        self._execute(self._gate.receive_syn(data, packet, self._loop.time()))

    def receive_message(self, slot: str, message: AnyMessage) -> None:
        """A proxy spoke on the bus. The permit table has let only these messages through."""
        if isinstance(message, DialVerdict):
            self._receive_verdict(slot, message)
        elif isinstance(message, ProxyHello):
            self._receive_hello(slot, message)

    def stop(self) -> None:
        """Cancels the timers. What is still held stays unanswered: the program asks again."""
        for timer in (self._alarm, self._ask_again, self._reminder):
            if timer is not None:
                timer.cancel()

    def _receive_verdict(self, slot: str, verdict: DialVerdict) -> None:
        question = self._gate.question(verdict.flow_id)
        # A verdict after the deadline is ordinary; one for the flow of another proxy is not.
        if question is None or self._owner(question.key) != slot:
            self._counters["verdicts_ignored"] += 1
            if question is not None:
                log.warning("%s answered for a connection it does not own", slot)
            return
        self._unasked.pop(verdict.flow_id, None)
        now = self._loop.time()
        self._execute(self._gate.receive_verdict(verdict.flow_id, verdict.refusal, now))

    def _receive_hello(self, slot: str, hello: ProxyHello) -> None:
        if hello.version != PROTOCOL_VERSION:
            log.error("%s speaks version %d, not %d", slot, hello.version, PROTOCOL_VERSION)
            return
        for question in list(self._gate.questions()):
            if self._owner(question.key) == slot:
                self._ask(question)

    def _execute(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case AskOwner():
                    self._ask(command)
                case TellAbandoned():
                    self._abandon(command)
                case WriteInner():
                    self._counters["admitted" if command.first else "syns_repeated"] += 1
                    self._write_inner(command.packet)
                case WriteReset():
                    name = f"refused_{command.reason}" if command.first else "syns_repeated"
                    self._counters[name] += 1
                    self._write_outer(command.packet)
                case CountAbsorbed():
                    self._counters["syns_repeated"] += 1
                case _:
                    assert_never(command)
        self._counters["pending_now"] = self._gate.pending
        self._set_alarm()
        if self._gate.pending and self._reminder is None:
            self._reminder = self._loop.call_later(_REMIND_SECONDS, self._remind)

    def _ask(self, question: AskOwner) -> None:
        key = question.key
        request = DialRequest(
            flow_id=question.flow_id,
            source=key.source,
            source_port=key.source_port,
            destination=key.destination,
            destination_port=key.destination_port,
        )
        since = self._unasked.pop(question.flow_id, None)
        try:
            self._send(self._owner(key), request)
        except (PeerGoneError, BusyError) as error:
            log.debug("a connection to %s waits: %s", as_text(key.destination), error)
            self._unasked[question.flow_id] = self._loop.time() if since is None else since
            if self._ask_again is None:
                self._ask_again = self._loop.call_later(_ASK_AGAIN_SECONDS, self._ask_unasked)

    def _ask_unasked(self) -> None:
        self._ask_again = None
        now = self._loop.time()
        refused: Counter[str] = Counter()
        for flow_id, since in list(self._unasked.items()):
            question = self._gate.question(flow_id)
            if question is None:
                del self._unasked[flow_id]
            elif now - since < _UNASKED_SECONDS:
                self._ask(question)
            else:
                del self._unasked[flow_id]
                refused[self._owner(question.key)] += 1
                self._execute(self._gate.receive_verdict(flow_id, Refusal.INTERNAL, now))
        for slot, number in refused.items():
            log.warning("%s cannot be asked; connections refused: %d", slot, number)

    def _remind(self) -> None:
        self._reminder = None
        held = {question.flow_id: question for question in self._gate.questions()}
        for flow_id, question in held.items():
            if flow_id in self._held_before and flow_id not in self._unasked:
                self._ask(question)
        self._held_before = set(held)
        if held:
            self._reminder = self._loop.call_later(_REMIND_SECONDS, self._remind)

    def _abandon(self, command: TellAbandoned) -> None:
        self._unasked.pop(command.flow_id, None)
        try:
            self._send(self._owner(command.key), DialAbandoned(flow_id=command.flow_id))
        except (PeerGoneError, BusyError) as error:
            log.debug("%s was not told of an abandoned dial: %s", self._owner(command.key), error)

    def _owner(self, key: FlowKey) -> str:
        return f"proxy-{owner_of_address(key.destination, self._proxies)}"

    def _set_alarm(self) -> None:
        deadline = self._gate.next_deadline()
        if deadline is None:
            return
        if self._alarm is not None:
            if self._alarm.when() <= deadline:
                return
            self._alarm.cancel()
        self._alarm = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._alarm = None
        self._execute(self._gate.expire(self._loop.time()))

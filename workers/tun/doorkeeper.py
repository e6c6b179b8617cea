"""Carries the questions of the SYN gate to the proxies and its answers to the devices.

The shell around `syn_gate`: it knows the bus, the devices, the clock and the counters, and decides
nothing but which proxy to ask (`ipc.slots`) and when to ask again.

A question that cannot be sent, because the proxy is not connected or its queue is full, is asked
again every few hundredths of a second, for as long as a proxy's restart may take. A proxy that says
hello is new: from then on it alone is asked and listened to, and it is asked again whatever its
predecessor may have known.

The gate's deadline is long, because a person may be asked for a second factor meanwhile. So that
nobody waits that long for a proxy that is gone, or for a verdict that was lost, what is held is asked
again every few seconds: a proxy that knows the question ignores it.

The supervisor's probes are held and refused like any other SYN. A few more places are kept for them:
when the programs that wait for a hung proxy have taken all, the refusals of the gate would look like
its answers.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final, assert_never

from ipc.addresses import as_text
from ipc.bus import Sender
from ipc.connection_id import about
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
from ipc.probe_ports import probed_proxy
from ipc.slots import owner_of_connection
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
# Far more than the supervisor sends to all proxies before it gives up on one.
_PROBE_RESERVE: Final = 256


class Doorkeeper:
    """Runs the gate. `send(to, message)` raises PeerGoneError or BusyError."""

    def __init__(
        self,
        *,
        gate: SynGate,
        proxies: int,
        dns_ipv4: bytes,
        send: Callable[[Sender, Message], None],
        write_inner: Callable[[bytes], None],
        write_outer: Callable[[bytes], None],
        counters: dict[str, int],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._gate: Final = gate
        self._proxies: Final = proxies
        self._dns_ipv4: Final = dns_ipv4
        self._send_to: Final = send
        # Whose hello was the last of its slot.
        self._present: dict[str, Sender] = {}
        self._write_inner: Final = write_inner
        self._write_outer: Final = write_outer
        self._counters: Final = counters
        self._loop: Final = loop
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        # Ids of flows, and since when nobody can be asked about them.
        self._unasked: dict[int, float] = {}
        self._ask_again: asyncio.TimerHandle | None = None
        self._reminder: asyncio.TimerHandle | None = None
        self._held_before: set[int] = set()  # at the last reminder
        names = ["syns", "syns_repeated", "probes", "admitted", "verdicts_ignored", "pending_now"]
        names += [f"refused_{reason}" for reason in Refusal]
        counters.update(dict.fromkeys(names, 0))

    def receive_syn(self, data: bytes, packet: Packet) -> None:
        """A connection attempt was read; `packet` is the view of `data`."""
        self._counters["syns"] += 1
        reserve = 0
        if packet.tcp is not None and self._is_probe(
            packet.destination, packet.tcp.destination_port
        ):
            self._counters["probes"] += 1
            reserve = _PROBE_RESERVE
        self._execute(self._gate.receive_syn(data, packet, self._loop.time(), reserve=reserve))

    def receive_message(self, sender: Sender, message: AnyMessage) -> None:
        """A proxy spoke on the bus. The permit table has let only these messages through."""
        if isinstance(message, DialVerdict):
            self._receive_verdict(sender, message)
        elif isinstance(message, ProxyHello):
            self._receive_hello(sender, message)

    def have_proxies_gone(self) -> bool:
        """Whether the process of each slot that said hello last has ended, or left."""
        return not any(map(self._is_there, self._present.values()))

    def _is_there(self, proxy: Sender) -> bool:
        try:
            # Of no flow: it means nothing to a proxy.
            self._send_to(proxy, DialAbandoned(flow_id=0))
        except PeerGoneError:
            return False
        except BusyError:
            return True
        return True

    def stop(self) -> None:
        """Cancels the timers. What is still held stays unanswered: the program asks again."""
        for timer in (self._alarm, self._ask_again, self._reminder):
            if timer is not None:
                timer.cancel()

    def _receive_verdict(self, sender: Sender, verdict: DialVerdict) -> None:
        question = self._gate.question(verdict.flow_id)
        is_owner = question is not None and self._owner(question.key) == sender.slot
        # A verdict after the deadline is ordinary; so is one of a predecessor, which accepts nothing
        # any more. One for the flow of another proxy is not.
        if not is_owner or self._present.get(sender.slot) != sender:
            self._counters["verdicts_ignored"] += 1
            if question is not None and not is_owner:
                log.warning("%s answered for a connection it does not own", sender.slot)
            return
        self._unasked.pop(verdict.flow_id, None)
        now = self._loop.time()
        refusal = verdict.refusal
        if question is not None and self._is_probe(
            question.key.destination, question.key.destination_port
        ):
            refusal = Refusal.PROBE  # whatever it says: nothing listens there
        if question is not None:
            verdict_text = "admitted" if refusal is None else f"refused ({refusal})"
            self._note(question, f"{verdict_text} by {sender.slot}")
        self._execute(self._gate.receive_verdict(verdict.flow_id, refusal, now))

    def _receive_hello(self, sender: Sender, hello: ProxyHello) -> None:
        slot = sender.slot
        if hello.version != PROTOCOL_VERSION:
            log.error("%s speaks version %d, not %d", slot, hello.version, PROTOCOL_VERSION)
            return
        self._present[slot] = sender
        for question in list(self._gate.questions()):
            if self._owner(question.key) == slot:
                self._ask(question)

    def _send(self, slot: str, message: Message) -> None:
        present = self._present.get(slot)
        if present is None:
            raise PeerGoneError(f"{slot} has not said hello")
        self._send_to(present, message)

    def _execute(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case AskOwner():
                    self._note(command, "held")
                    self._ask(command)
                case TellAbandoned():
                    self._note(command, "given up")
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
            about_it = about(question.flow_id)
            log.debug(
                "a connection to %s waits: %s", as_text(key.destination), error, extra=about_it
            )
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
                if not self._is_probe(question.key.destination, question.key.destination_port):
                    refused[self._owner(question.key)] += 1
                self._note(question, f"refused, {self._owner(question.key)} cannot be asked")
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

    def _note(self, flow: AskOwner | TellAbandoned, what: str) -> None:
        """A debug line about a connection attempt; the proxy's lines about it have the same id."""
        key = flow.key
        if not log.isEnabledFor(logging.DEBUG) or self._is_probe(
            key.destination, key.destination_port
        ):
            return
        log.debug(
            "connection from %s port %d to %s port %d: %s",
            as_text(key.source),
            key.source_port,
            as_text(key.destination),
            key.destination_port,
            what,
            extra=about(flow.flow_id),
        )

    def _owner(self, key: FlowKey) -> str:
        address, port = key.destination, key.destination_port
        probed = probed_proxy(self._dns_ipv4, self._proxies, address, port)
        return probed or owner_of_connection(address, port, self._proxies)

    def _is_probe(self, address: bytes, port: int) -> bool:
        return probed_proxy(self._dns_ipv4, self._proxies, address, port) is not None

    def _set_alarm(self) -> None:
        deadline = self._gate.next_deadline()
        if deadline is None:
            return
        if self._alarm is not None:
            if self._alarm_at <= deadline:
                return
            self._alarm.cancel()
        # Remembered here: of a time that has passed uvloop's handle does not know it.
        self._alarm_at = deadline
        self._alarm = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._alarm = None
        self._execute(self._gate.expire(self._loop.time()))

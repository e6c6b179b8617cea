"""Asks through the interface, as a program would, whether tun, dns and every proxy do their work.

dns is asked for a diagnostic name; to each proxy a connection is attempted that it refuses at once
(`ipc.probe_ports`). All sockets are bound to the interface, so that no route of another program leads
them away. Nothing here blocks: `tick` looks at what has come and sends what is due. An answered socket
is closed at once, any other after `PATIENCE_SECONDS`, and meanwhile there are others: an answer may take
long, and a packet may be lost. What follows from silence is decided in `probe_blame`.
"""

import errno
import logging
import os
import select
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ipc.addresses import as_text
from ipc.messages import Network
from ipc.probe_ports import probe_port
from supervisor import diagnostic_query, this_system
from supervisor.probe_blame import DNS, Blame, Ready, Suspect

log = logging.getLogger(__name__)

DNS_PORT: Final = 53
# tun itself refuses a connection that no proxy can be asked about for 30 s; a probe must be over before
# that, or the refusal would look like the proxy's.
PATIENCE_SECONDS: Final = 20.0
# Sockets of one way; one more for a moment.
MAX_OPEN: Final = 8
# Answers are 70 bytes; a longer datagram is none.
_READ_BYTES: Final = 512
_READS: Final = 8
# The kernel has no room at this moment: a lost packet, not an obstacle.
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})


@dataclass(slots=True)
class _Probe:
    """One open question. `wanted` is the answer of dns, or empty for a connection."""

    slot: str
    processes: tuple[float, float]
    end: socket.socket
    opened_at: float
    sent_at: float
    question: bytes = b""
    wanted: bytes = b""


class Prober:
    """See the module. `outer` is the descriptor of the outer device. Times are monotonic seconds."""

    def __init__(
        self, network: Network, outer: int, *, heartbeat_seconds: float, hang_seconds: float
    ) -> None:
        self._network: Final = network
        self._blame: Final = Blame(
            network.interface,
            as_text(network.dns_ipv4),
            heartbeat_seconds=heartbeat_seconds,
            hang_seconds=hang_seconds,
        )
        self._outer: Final = select.poll()
        self._outer.register(outer, select.POLLIN)
        self._poll: Final = select.poll()
        # By descriptor, in the order in which they were opened.
        self._open: dict[int, _Probe] = {}
        # When the next one is sent, by slot, while none is open.
        self._next_at: dict[str, float] = {}
        self._told: Sequence[str] = ()

    @property
    def problems(self) -> Sequence[str]:
        """Sentences for `vnet status` about silence that is no worker's fault."""
        return self._blame.problems

    def use_times(self, *, heartbeat_seconds: float, hang_seconds: float) -> None:
        """Takes over a reloaded configuration."""
        self._blame.heartbeat_seconds = heartbeat_seconds
        self._blame.hang_seconds = hang_seconds

    def tick(self, now: float, ready: Mapping[str, Ready]) -> list[Suspect]:
        """To be called in every turn of the loop; who hangs, each process at most once."""
        self._blame.follow(now, ready)
        self._drop_replaced()
        self._read(now)
        self._drop_old(now)
        for slot in self._blame.ways:
            self._ask_if_due(slot, now)
        suspects = self._blame.judge(now, ready, self._is_waiting)
        for problem in self.problems:
            if problem not in self._told:
                log.warning("%s", problem)
        self._told = self.problems
        return suspects

    def close(self) -> None:
        """Closes all sockets; safe to call twice."""
        for probe in list(self._open.values()):
            self._close(probe)

    # -- sending --

    def _ask_if_due(self, slot: str, now: float) -> None:
        interval = self._blame.heartbeat_seconds
        youngest = self._youngest(slot)
        if youngest is None:
            is_due = now >= self._next_at.get(slot, now)
        elif youngest.question:
            if now - youngest.sent_at >= interval:
                self._send(youngest, now)
            is_due = now - youngest.opened_at >= self._patience / 2
        else:
            is_due = now - youngest.opened_at >= max(interval, self._patience / MAX_OPEN)
        if is_due:
            self._next_at[slot] = now + interval
            self._ask(slot, now)

    def _ask(self, slot: str, now: float) -> None:
        kind = socket.SOCK_DGRAM if slot == DNS else socket.SOCK_STREAM
        try:
            end = socket.socket(socket.AF_INET, kind)
        except OSError as error:
            self._fail(slot, error)
            return
        probe = _Probe(slot, self._blame.ways[slot].processes, end, now, now)
        try:
            end.setblocking(False)
            this_system.bind_to(end, self._network.interface)
            if self._begin(probe):
                end.close()
                self._blame.answered(slot, now)
                return
        except OSError as error:
            end.close()
            self._fail(slot, error)
            return
        self._open[end.fileno()] = probe
        self._poll.register(end, select.POLLIN if probe.question else select.POLLOUT)

    def _begin(self, probe: _Probe) -> bool:
        """Sends the question; whether it is answered already. Raises OSError."""
        address = as_text(self._network.dns_ipv4)
        if probe.slot != DNS:
            result = probe.end.connect_ex((address, probe_port(probe.slot)))
            if result not in (errno.EINPROGRESS, errno.ECONNREFUSED):
                raise _not_refused(result)
            return result == errno.ECONNREFUSED
        probe.end.connect((address, DNS_PORT))
        probe.question = diagnostic_query.question(os.urandom(diagnostic_query.RANDOM_BYTES))
        probe.wanted = diagnostic_query.answer(probe.question, self._network.dns_ipv4)
        probe.end.send(probe.question)
        return False

    def _send(self, probe: _Probe, now: float) -> None:
        probe.sent_at = now
        try:
            probe.end.send(probe.question)
        except OSError as error:
            self._fail(probe.slot, error)
            self._close(probe)

    # -- hearing --

    def _read(self, now: float) -> None:
        if not self._open:
            return
        for descriptor, _events in self._poll.poll(0):
            probe = self._open.get(descriptor)
            if probe is None:
                continue  # closed with another answer of its way
            try:
                is_answered = self._has_answer(probe)
            except OSError as error:
                self._fail(probe.slot, error)
                self._close(probe)
                continue
            if is_answered:
                self._blame.answered(probe.slot, now)
                for done in [other for other in self._open.values() if other.slot == probe.slot]:
                    self._close(done)

    def _has_answer(self, probe: _Probe) -> bool:
        """Whether the answer is there; raises OSError when there will be none."""
        if not probe.question:
            result = probe.end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if result == errno.ECONNREFUSED:
                return True
            raise _not_refused(result)
        try:
            return any(probe.end.recv(_READ_BYTES) == probe.wanted for _ in range(_READS))
        except BlockingIOError:
            return False

    def _is_waiting(self) -> bool:
        return any(events & select.POLLIN for _, events in self._outer.poll(0))

    # -- inside --

    @property
    def _patience(self) -> float:
        return min(self._blame.hang_seconds, PATIENCE_SECONDS)

    def _youngest(self, slot: str) -> _Probe | None:
        return next((p for p in reversed(self._open.values()) if p.slot == slot), None)

    def _drop_replaced(self) -> None:
        ways = self._blame.ways
        for probe in list(self._open.values()):
            way = ways.get(probe.slot)
            if way is None or way.processes != probe.processes:
                self._close(probe)
                self._next_at.pop(probe.slot, None)

    def _drop_old(self, now: float) -> None:
        for probe in list(self._open.values()):
            if now - probe.opened_at >= self._patience:
                self._close(probe)

    def _fail(self, slot: str, error: OSError) -> None:
        if error.errno not in _FULL:
            self._blame.failed(slot, error.strerror or str(error))

    def _close(self, probe: _Probe) -> None:
        del self._open[probe.end.fileno()]
        self._poll.unregister(probe.end)
        probe.end.close()


def _not_refused(result: int) -> OSError:
    return OSError(result, os.strerror(result) if result else "another program accepts it")

"""Whether metrics are served, where, and what: the socket, the figures, and when each is due.

    off ── metrics.listen is set ── wanted ── the address is free ── open: there is a metrics worker

Nothing here may keep VNet from its work: where the address is taken it is tried again, and a sentence for
`vnet status` says so. Only by hand VNet does not start then.
"""

import logging
import socket

from ipc import messages as m
from supervisor.exits import StartupError
from supervisor.handover import KeptMetrics
from supervisor.metrics_figures import Figures
from supervisor.metrics_socket import listen
from supervisor.run import ObservedRun

log = logging.getLogger(__name__)

# How often a taken address is tried.
RETRY_SECONDS = 2.0
# A reload frees an address and may want one like it; the process that had it needs a moment to end.
GRACE_SECONDS = 4.0
# How often the worker is told the figures. They are pushed, so that whoever asks for metrics, and however
# often, makes the supervisor do nothing.
PUSH_SECONDS = 1.0


class MetricsEndpoint:
    """See the module. `now` is monotonic seconds; an empty `wanted` is off."""

    def __init__(self, wanted: str, kept: KeptMetrics | None = None) -> None:
        """`kept` is what an earlier program of this process has left.

        It goes on where that one served; a change since then is for `use` to tell.
        """
        self.wanted = wanted if kept is None else kept.listen or wanted
        self.problems: list[str] = []
        self._socket: socket.socket | None = None
        self._figures = (
            Figures()
            if kept is None
            else Figures(kept.cpu_milliseconds, kept.started_at, kept.processes)
        )
        self._try_at = self._complain_at = self._push_at = 0.0
        if kept is not None:
            self._socket = socket.socket(fileno=kept.descriptor)

    @property
    def descriptor(self) -> int | None:
        """Of the listening socket, while there is one."""
        return None if self._socket is None else self._socket.fileno()

    def open(self) -> None:
        """Listens if that is wanted. Raises StartupError."""
        if self.wanted and self._socket is None:
            self._socket = listen(self.wanted)

    def use(self, wanted: str, now: float) -> bool:
        """Another address, or none: whether that is a change. Then there is no socket at first."""
        if wanted == self.wanted:
            return False
        self.close()
        self.wanted, self.problems = wanted, []
        self._try_at, self._complain_at = now, now + GRACE_SECONDS
        return True

    def is_open(self, now: float) -> bool:
        """Whether there is a socket; tries to make one if that is due."""
        if self.wanted and self._socket is None and now >= self._try_at:
            self._try_at = now + RETRY_SECONDS
            self._try(now)
        return self._socket is not None

    def _try(self, now: float) -> None:
        try:
            self.open()
        except StartupError as error:
            if now < self._complain_at:
                self._try_at = now
                return
            if not self.problems:
                log.error("metrics are not served: %s", error)
            self.problems = [f"Metrics are not served: {error}."]
        else:
            self.problems = []
            log.info("metrics are served at %s", self.wanted)

    def figures(self, run: ObservedRun, health: str, now: float) -> m.MetricsSnapshot:
        """The figures of this moment, for the worker."""
        self._push_at = now + PUSH_SECONDS
        return self._figures.collect(run, health)

    def is_push_due(self, now: float) -> bool:
        """Whether the worker is to be told the figures again."""
        return now >= self._push_at

    def keep(self) -> KeptMetrics | None:
        """What another program of this process needs to go on."""
        if self._socket is None:
            return None
        return KeptMetrics(
            descriptor=self._socket.fileno(),
            listen=self.wanted,
            cpu_milliseconds=dict(self._figures.past_cpu),
            processes=self._figures.processes(),
            started_at=self._figures.started_at,
        )

    def close(self) -> None:
        """Listens no more; a worker has a copy until it ends."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

"""Keeps the service manager informed from the supervisor's loop: readiness, status, watchdog."""

from collections.abc import Callable, Sequence

from supervisor.notify import Notifier
from supervisor.status import Health

# How often the status line follows; systemd shows it in `systemctl status`.
STATUS_SECONDS = 2.0
# Three signs of life in the watchdog's time, so that two may be late.
WATCHDOG_SHARE = 3

Judge = Callable[[], tuple[Health, Sequence[str]]]


class ServiceLink:
    """Call `tick` in every turn of the loop. Does nothing without a service manager."""

    def __init__(self, notifier: Notifier, watchdog_seconds: float | None, judge: Judge) -> None:
        self._notifier = notifier
        self._judge = judge
        self._alive_seconds = (
            None if watchdog_seconds is None else watchdog_seconds / WATCHDOG_SHARE
        )
        self._next_alive = self._next_status = 0.0
        self._is_ready = self._is_reloading = False

    @property
    def longest_sleep(self) -> float | None:
        """How long the loop may sleep without being late for the watchdog."""
        return self._alive_seconds

    def tick(self, now: float, *, are_well: bool) -> None:
        """Says what is due at monotonic time `now`.

        `are_well` is False when a worker cannot even be killed: then the watchdog gets no answer,
        and the service manager ends everything.
        """
        if not self._notifier.is_heard:
            return
        if self._alive_seconds is not None and are_well and now >= self._next_alive:
            self._next_alive = now + self._alive_seconds
            self._notifier.alive()
        if now < self._next_status:
            return
        self._next_status = now + STATUS_SECONDS
        health, reasons = self._judge()
        text = ": ".join([health, *reasons[:1]])
        if self._is_ready or self._is_reloading or health is Health.STARTING:
            self._notifier.status(text)
        else:
            # Also when it is degraded: it runs, and waiting would not mend it.
            self._is_ready = True
            self._notifier.ready(text)

    def reloading(self) -> None:
        """The configuration is read again."""
        self._notifier.reloading()
        self._is_reloading = True

    def reloaded(self) -> None:
        """That is done, as the next tick says."""
        self._is_reloading = self._is_ready = False
        self._next_status = 0.0

    def stopping(self) -> None:
        """VNet ends."""
        self._notifier.stopping()

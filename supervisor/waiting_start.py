"""A service waits for what another program has at the moment: its range, interface name or address.

Started by hand VNet ends then, with the status of a conflict. As a service it counts as started, is
degraded and says why, and goes on once there is room: a network that came up first when the machine started
must not keep it away for good. That another VNet runs is found out before, and does end it.
"""

import logging
import os
import selectors
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from supervisor import control_messages as cm
from supervisor.control import ControlSocket
from supervisor.diag.known import known_before
from supervisor.exits import ConflictError, ExitStatus
from supervisor.notify import Notifier, watchdog_seconds
from supervisor.reasons import ReasonId
from supervisor.service_link import ServiceLink
from supervisor.settings import Settings, version
from supervisor.status import Health, Status, Summary, SupervisorStatus

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 2.0
T = TypeVar("T")


class StoppedError(Exception):
    """VNet was told to stop while it waited."""


class WaitingStart:
    """See the module. `selector` has the signals, `is_stopped` says whether one of them ends VNet."""

    def __init__(
        self,
        settings: Settings,
        control_path: Path,
        selector: selectors.BaseSelector,
        notifier: Notifier,
        is_stopped: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._control_path = control_path
        self._selector = selector
        self._is_stopped = is_stopped
        self._service = ServiceLink(
            notifier,
            watchdog_seconds(os.environ, os.getpid()),
            lambda: (Health.DEGRADED, [self._reason]),
        )
        self._began = time.monotonic()
        self._reason = ""
        self._stop_is_asked = False

    def run(self, make: Callable[[], T]) -> T:
        """What `make` returns once it raises no ConflictError any more.

        Raises:
            StoppedError: VNet is to stop.
        """
        control: ControlSocket | None = None
        try:
            while True:
                try:
                    return make()
                except ConflictError as error:
                    self._tell(str(error))
                if control is None:
                    control = ControlSocket(self._control_path, self._selector, self._answer)
                self._wait(control)
        finally:
            if control is not None:
                control.close()

    def _tell(self, why: str) -> None:
        reason = f"VNet waits, because {why}."
        if reason != self._reason:
            log.warning("%s", reason)
        self._reason = reason

    def _wait(self, control: ControlSocket) -> None:
        until = time.monotonic() + RETRY_SECONDS
        while (now := time.monotonic()) < until:
            self._service.tick(now, are_well=True)
            longest = min(until - now, self._service.longest_sleep or RETRY_SECONDS)
            for key, events in self._selector.select(longest):
                key.data(events)
            control.drop_silent(time.monotonic())
            if self._stop_is_asked or self._is_stopped():
                raise StoppedError

    def _answer(self, uid: int, line: bytes) -> bytes:
        try:
            request = cm.decode(line)
        except msgspec.MsgspecError as error:
            return _said(ExitStatus.USAGE, f"not a request: {error}")
        user = self._settings.user
        is_allowed = uid in (0, os.geteuid(), user.uid)
        if isinstance(request, cm.Status):
            return cm.encode(self._status() if is_allowed else self._summary()) + b"\n"
        if not is_allowed:
            return _said(
                ExitStatus.NOT_PERMITTED,
                f"only root and {user.name} may do that: run it with sudo",
            )
        if isinstance(request, cm.Diag):
            return cm.encode(known_before(self._settings, self._status())) + b"\n"
        if isinstance(request, cm.Stop):
            self._stop_is_asked = True
            return _said(ExitStatus.OK, "VNet stops")
        return _said(
            ExitStatus.CONFLICT,
            f"{self._reason} Until then it can be stopped only, and restarted by its service manager.",
        )

    def _summary(self) -> Summary:
        return Summary(
            health=Health.DEGRADED,
            reasons=[self._reason],
            reason_ids=[ReasonId.WAITING_FOR_ROOM],
        )

    def _status(self) -> Status:
        return Status(
            health=Health.DEGRADED,
            reasons=[self._reason],
            reason_ids=[ReasonId.WAITING_FOR_ROOM],
            supervisor=SupervisorStatus(
                pid=os.getpid(),
                version=version(),
                uptime_seconds=round(time.monotonic() - self._began, 1),
                user=self._settings.user.name,
            ),
        )


def _said(status: ExitStatus, text: str) -> bytes:
    return cm.encode(cm.Answer(status=status, text=text)) + b"\n"

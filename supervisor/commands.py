"""Carries out what `vnet` commands ask for over the control socket."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import assert_never

import msgspec

from ipc.messages import SetLogLevel
from supervisor import access, config, next_start, reload_plan, settings
from supervisor import control_messages as cm
from supervisor.control import Promise
from supervisor.crew import CannotReplaceError
from supervisor.diag.known import known_of
from supervisor.exits import ExitStatus, MisconfiguredError
from supervisor.in_force import SYNC_SECONDS
from supervisor.reload_plan import ReloadPlan
from supervisor.run import Run
from supervisor.status import Health, Summary
from supervisor.status_report import StatusReporter
from supervisor.upgrade import UpgradeError

log = logging.getLogger(__name__)

# A turn of the loop that is busy.
_ROOM_SECONDS = 5.0


class Commands:
    """Answers one request at a time; who asks decides what is answered."""

    def __init__(self, supervisor: Run) -> None:
        self._supervisor = supervisor
        self._reporter = StatusReporter(supervisor)

    def answer(self, uid: int, line: bytes) -> bytes | Promise:
        """The answer to one request line, with its line feed, or the promise of one."""
        try:
            request = cm.decode(line)
        except msgspec.MsgspecError as error:
            return _answer(ExitStatus.USAGE, f"not a request: {error}")
        is_allowed = uid in (0, os.geteuid(), self._supervisor.settings.user.uid)
        if isinstance(request, cm.Status):
            whole = self._reporter.collect(os.getpid())
            summary = Summary(
                health=whole.health, reasons=whole.reasons, reason_ids=whole.reason_ids
            )
            shown = whole if is_allowed else summary
            return cm.encode(shown) + b"\n"
        if not is_allowed:
            return _answer(
                ExitStatus.NOT_PERMITTED,
                f"only {self._owners()} may do that: run it with sudo",
            )
        return self._carry_out(request)

    def _owners(self) -> str:
        return " and ".join(dict.fromkeys(("root", self._supervisor.settings.user.name)))

    def judge(self) -> tuple[Health, list[str]]:
        """Health and its reasons now."""
        return self._reporter.judge()

    def reload(self, then: Callable[[ExitStatus, str], None]) -> None:
        """Reads the configuration again; tells `then` what is in force now and what needs a restart.

        Once, as soon as it is so; what is wrong at once.
        """
        supervisor = self._supervisor
        try:
            new = config.read(supervisor.settings.config_path)
            access.check(new.security)
        except MisconfiguredError as error:
            then(ExitStatus.USAGE, f"the configuration is wrong and was not taken over: {error}")
            return
        except access.UnansweredError as error:
            then(ExitStatus.USAGE, f"the configuration was not taken over: {error}")
            return
        planned = reload_plan.plan(supervisor.settings.config, new)
        home = settings.teleport_home(planned.config, supervisor.settings.user, os.environ)
        try:
            supervisor.use_config(planned, home.absolute())
        except CannotReplaceError as error:
            then(ExitStatus.USAGE, f"the configuration was not taken over: {error}")
            return
        supervisor.when_in_force(lambda late: then(ExitStatus.OK, _reloaded(planned, late)))

    def _carry_out(
        self, request: cm.Stop | cm.Reload | cm.Restart | cm.LogLevel | cm.Logs | cm.Diag
    ) -> bytes | Promise:
        supervisor = self._supervisor
        match request:
            case cm.Stop():
                supervisor.order_stop()
                return _answer(ExitStatus.OK, "VNet stops")
            case cm.Reload():
                return self._reload()
            case cm.Restart():
                return self._restart(request)
            case cm.LogLevel():
                return self._set_log_level(request)
            case cm.Logs():
                return self._read_log(request)
            case cm.Diag():
                status = self._reporter.collect(os.getpid())
                return cm.encode(known_of(supervisor, status)) + b"\n"
            case _:
                assert_never(request)

    def _reload(self) -> bytes | Promise:
        answers: list[bytes] = []
        promise = Promise(SYNC_SECONDS + _ROOM_SECONDS)

        def tell(status: ExitStatus, text: str) -> None:
            answers.append(_answer(status, text))
            promise.give(answers[0])

        self.reload(tell)
        return answers[0] if answers else promise

    def _restart(self, request: cm.Restart) -> bytes | Promise:
        name = request.worker
        workers = self._supervisor.workers
        if name != "all" and name not in workers:
            known = ", ".join(workers)
            return _answer(ExitStatus.USAGE, f"there is no worker {name!r}; there are: {known}")
        slots = [slot for slot in workers if name in ("all", slot)]
        if not request.drain:
            for slot in slots:
                self._supervisor.restart(workers[slot])
            return _answer(ExitStatus.OK, f"restarting {name}")
        try:
            if name == "all":
                return self._supervisor.order_upgrade()
            self._supervisor.replace(slots)
        except (CannotReplaceError, UpgradeError) as error:
            return _answer(ExitStatus.CONFLICT, str(error))
        return _answer(ExitStatus.OK, f"replacing {name}; what is open goes on")

    def _set_log_level(self, request: cm.LogLevel) -> bytes:
        if request.next_start:
            try:
                next_start.keep_log_level(self._supervisor.settings.state_dir, request.level)
            except OSError as error:
                return _answer(ExitStatus.INTERNAL, f"the level cannot be kept: {error}")
            return _answer(ExitStatus.OK, f"the next start has log level {request.level}")
        logging.getLogger().setLevel(request.level.upper())
        self._supervisor.use_log_level(SetLogLevel(level=request.level.upper()))
        return _answer(ExitStatus.OK, f"log level is {request.level}")

    def _read_log(self, request: cm.Logs) -> bytes:
        known = ["supervisor", *self._supervisor.workers]
        if request.worker is not None and request.worker not in known:
            text = f"there is no worker {request.worker!r}; there are: {', '.join(known)}"
            return _answer(ExitStatus.USAGE, text)
        piece = self._supervisor.log_book.read(
            request.after, worker=request.worker, level=request.level.value, limit=request.limit
        )
        return cm.encode(piece) + b"\n"


def _reloaded(planned: ReloadPlan, late: Sequence[str]) -> str:
    text = "reloaded"
    if planned.changed:
        text += f", in force now: {', '.join(planned.changed)}"
    if late:
        text += f"; not taken over yet, see vnet status: {', '.join(late)}"
    if planned.waiting:
        text += f"; these keys need a restart of VNet: {', '.join(planned.waiting)}"
    return text


def _answer(status: ExitStatus, text: str) -> bytes:
    return cm.encode(cm.Answer(status=status, text=text)) + b"\n"

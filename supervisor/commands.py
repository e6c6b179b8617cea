"""Carries out what `vnet` commands ask for over the control socket."""

import logging
import os
from typing import assert_never

import msgspec

from ipc.messages import SetLogLevel
from supervisor import config
from supervisor import control_messages as cm
from supervisor.exits import ExitStatus, MisconfiguredError
from supervisor.run import Run
from supervisor.status import Health, Summary
from supervisor.status_report import StatusReporter

log = logging.getLogger(__name__)


class Commands:
    """Answers one request at a time; who asks decides what is answered."""

    def __init__(self, supervisor: Run) -> None:
        self._supervisor = supervisor
        self._reporter = StatusReporter(supervisor)

    def answer(self, uid: int, line: bytes) -> bytes:
        """The answer to one request line, with its line feed."""
        try:
            request = cm.decode(line)
        except msgspec.MsgspecError as error:
            return _answer(ExitStatus.USAGE, f"not a request: {error}")
        is_allowed = uid in (0, os.geteuid(), self._supervisor.settings.user.uid)
        if isinstance(request, cm.Status):
            whole = self._reporter.collect(os.getpid())
            shown = whole if is_allowed else Summary(health=whole.health, reasons=whole.reasons)
            return cm.encode(shown) + b"\n"
        if not is_allowed:
            return _answer(
                ExitStatus.NOT_PERMITTED,
                f"only root and {self._supervisor.settings.user.name} may do that",
            )
        return self._carry_out(request)

    def judge(self) -> tuple[Health, list[str]]:
        """Health and its reasons now."""
        return self._reporter.judge()

    def reload(self) -> str:
        """Reads the configuration again; says what is in force now and what needs a restart."""
        supervisor = self._supervisor
        try:
            new = config.read(supervisor.settings.config_path)
        except MisconfiguredError as error:
            return f"the configuration is wrong and was not taken over: {error}"
        old = supervisor.settings.config
        supervisor.use_upstream(new.dns.upstream)
        waiting = [
            f"{section}.{key}" if section else key
            for section, key in _changed_keys(old, new)
            if (section, key) != ("dns", "upstream")
        ]
        if waiting:
            return f"reloaded; these keys need a restart of VNet: {', '.join(waiting)}"
        return "reloaded"

    def _carry_out(self, request: cm.Stop | cm.Reload | cm.Restart | cm.LogLevel) -> bytes:
        supervisor = self._supervisor
        match request:
            case cm.Stop():
                supervisor.order_stop()
                return _answer(ExitStatus.OK, "VNet stops")
            case cm.Reload():
                text = self.reload()
                return _answer(
                    ExitStatus.OK if text.startswith("reloaded") else ExitStatus.USAGE, text
                )
            case cm.Restart():
                return self._restart(request.worker)
            case cm.LogLevel():
                logging.getLogger().setLevel(request.level.upper())
                supervisor.use_log_level(SetLogLevel(level=request.level.upper()))
                return _answer(ExitStatus.OK, f"log level is {request.level}")
            case _:
                assert_never(request)

    def _restart(self, name: str) -> bytes:
        workers = self._supervisor.workers
        if name != "all" and name not in workers:
            known = ", ".join(workers)
            return _answer(ExitStatus.USAGE, f"there is no worker {name!r}; there are: {known}")
        for slot, worker in workers.items():
            if name in ("all", slot):
                self._supervisor.restart(worker)
        return _answer(ExitStatus.OK, f"restarting {name}")


def _answer(status: ExitStatus, text: str) -> bytes:
    return cm.encode(cm.Answer(status=status, text=text)) + b"\n"


def _changed_keys(old: config.Config, new: config.Config) -> list[tuple[str, str]]:
    changed = []
    for field in old.__struct_fields__:
        before, after = getattr(old, field), getattr(new, field)
        if isinstance(before, msgspec.Struct):
            changed += [
                (field, key)
                for key in before.__struct_fields__
                if getattr(before, key) != getattr(after, key)
            ]
        elif before != after:
            changed.append(("", field))
    return changed

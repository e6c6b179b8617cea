"""`vnet diag`: a report on what keeps names and connections from working, with or without a VNet."""

import errno
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from supervisor import config as configuration
from supervisor import control_messages as cm
from supervisor import settings
from supervisor.cli.control_client import AskError, ask, not_understood
from supervisor.cli.diag_clients import probe_proxies, read_home_facts
from supervisor.cli.screen import is_terminal
from supervisor.diag import run
from supervisor.diag.facts import VnetFacts
from supervisor.diag.markdown import file_name, render
from supervisor.diag.model import Report
from supervisor.exits import ExitStatus, MisconfiguredError

_STATUS_OF_ERRNO: Final = {
    errno.EACCES: ExitStatus.NOT_PERMITTED,
    errno.EPERM: ExitStatus.NOT_PERMITTED,
    errno.EROFS: ExitStatus.NOT_PERMITTED,
    errno.ENOENT: ExitStatus.USAGE,
    errno.ENOTDIR: ExitStatus.USAGE,
    errno.ELOOP: ExitStatus.USAGE,
    errno.EISDIR: ExitStatus.USAGE,
}


class DiagError(Exception):
    """There is no report. The text is one line: why, and what to do."""

    def __init__(self, status: ExitStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. `output` is a file, or a folder for a file of the usual name."""

    run_dir: Path
    state_dir: Path
    config: Path | None
    as_json: bool
    output: Path | None


def diagnose(options: Options, environment: Mapping[str, str]) -> ExitStatus:
    """Prints or saves the report; DEGRADED if there are issues.

    Raises:
        DiagError: the caller may not ask, or the report cannot be saved.
    """
    created = datetime.now(UTC)
    # Before the work: a place that cannot be written should be known at once.
    file = None if options.output is None else _open(options.output, options, created)
    try:
        report = _look(options, environment, created)
    except BaseException:
        # Ctrl-C as well: an empty file is no report.
        if file is not None and file.is_new:
            file.path.unlink(missing_ok=True)
        raise
    text = _text(report, options, created)
    if file is None:
        print(text, end="", flush=True)
    else:
        _save(file, text)
    return ExitStatus.DEGRADED if report.has_issues else ExitStatus.OK


def _look(options: Options, environment: Mapping[str, str], created: datetime) -> Report:
    subject, ca_file, insecure = _subject(options, environment)
    clients = run.Clients(
        partial(read_home_facts, subject.teleport_home),
        partial(
            probe_proxies,
            subject.teleport_home,
            ca_file,
            insecure=insecure,
            environment=environment,
        ),
    )
    progress = _Progress()
    try:
        return run.diagnose(subject, clients, created, progress.done)
    finally:
        progress.clear()


def leave(status: ExitStatus) -> NoReturn:
    """Ends the process without waiting for what did not answer in time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


def _subject(options: Options, environment: Mapping[str, str]) -> tuple[run.Subject, str, bool]:
    """What is diagnosed, `teleport.ca_file` and `teleport.insecure`."""
    config = _configuration(options.config)
    vnet: VnetFacts | None = None
    is_silent, why = False, ""
    try:
        vnet = _ask(options.run_dir)
    except AskError as error:
        if error.status is ExitStatus.NOT_PERMITTED:
            raise DiagError(error.status, str(error)) from error
        is_silent, why = error.status is not ExitStatus.NOT_RUNNING, str(error)
    name = config.user or None
    if vnet is not None and vnet.status.supervisor is not None:
        name = vnet.status.supervisor.user
    try:
        user = settings.find_user(name, environment)
    except MisconfiguredError as error:
        raise DiagError(ExitStatus.USAGE, str(error)) from error
    home = settings.teleport_home(config, user, environment)
    ca_file = config.teleport.ca_file if vnet is None else vnet.ca_file
    if ca_file.startswith("~/"):
        ca_file = str(user.home / ca_file[2:])
    subject = run.Subject(
        vnet=vnet,
        error=why,
        is_silent=is_silent,
        user=user,
        teleport_home=home if vnet is None else Path(vnet.teleport_home),
        state_dir=options.state_dir if vnet is None else Path(vnet.state_dir),
        os_wanted=config.dns.os_integration,
        version=settings.version(),
    )
    return subject, ca_file, config.teleport.insecure if vnet is None else vnet.insecure


def _configuration(path: Path | None) -> configuration.Config:
    """A named configuration must be right; the default one counts if it can be read."""
    try:
        return configuration.read(path)
    except MisconfiguredError as error:
        if path is not None:
            raise DiagError(ExitStatus.USAGE, str(error)) from error
        return configuration.Config()


def _ask(run_dir: Path) -> VnetFacts:
    data = ask(run_dir, cm.Diag())
    try:
        return msgspec.json.decode(data, type=VnetFacts)
    except msgspec.MsgspecError as error:
        try:
            refusal = msgspec.json.decode(data, type=cm.Answer)
        except (msgspec.MsgspecError, ValueError):
            raise AskError(ExitStatus.INTERNAL, not_understood(error)) from error
        if refusal.status == ExitStatus.NOT_PERMITTED:
            raise AskError(ExitStatus.NOT_PERMITTED, refusal.text) from error
        # One that was started before this command was installed does not know the question.
        text = f"The running VNet does not answer diagnostics ({refusal.text})"
        raise AskError(ExitStatus.INTERNAL, text) from error


def _text(report: Report, options: Options, created: datetime) -> str:
    if options.as_json:
        return msgspec.json.encode(report).decode() + "\n"
    return render(report, created.astimezone().strftime("%Y-%m-%d %H:%M:%S %z"))


# -- saving --


@dataclass(frozen=True, slots=True)
class _File:
    descriptor: int
    path: Path
    is_new: bool


def _open(output: Path, options: Options, created: datetime) -> _File:
    path = output
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    if output.is_dir():
        suffix = "json" if options.as_json else "txt"
        path = output / file_name(created.astimezone(), suffix)
        # Nobody has named it: root must not write where a link in a shared folder leads.
        flags |= os.O_EXCL
    is_new = not path.exists()
    try:
        # For the owner alone: it tells much of the machine.
        return _File(os.open(path, flags | os.O_NOFOLLOW, 0o600), path, is_new)
    except OSError as error:
        status = _STATUS_OF_ERRNO.get(error.errno or 0, ExitStatus.INTERNAL)
        raise DiagError(
            status, f"{path} cannot be written ({error.strerror}): name another file with --output"
        ) from error


def _save(file: _File, text: str) -> None:
    try:
        with os.fdopen(file.descriptor, "w", encoding="utf-8") as opened:
            if stat.S_ISREG(os.fstat(file.descriptor).st_mode):
                os.ftruncate(file.descriptor, 0)
            opened.write(text)
    except OSError as error:
        raise DiagError(
            ExitStatus.INTERNAL, f"{file.path} cannot be written ({error.strerror}): make room"
        ) from error
    print(f"vnet: the report is in {file.path}", file=sys.stderr)


class _Progress:
    """One line on a terminal that counts what has been looked at."""

    def __init__(self) -> None:
        self._is_shown = is_terminal(sys.stderr)
        self._count = 0
        self._show("looking at this machine")

    def done(self, name: str) -> None:
        """One more is done."""
        self._count += 1
        self._show(f"{self._count} looked at, last: {name}")

    def clear(self) -> None:
        """Takes the line away."""
        self._show("")

    def _show(self, text: str) -> None:
        if self._is_shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

"""`vnet logs`: the last lines of a running VNet's log, and with --follow those that come.

    ask after number n --> piece --> print --> ask after `next`, at once or a moment later

A supervisor that restarts has a new book whose numbers begin anew; all of it is shown.
"""

import sys
import time
from pathlib import Path

import msgspec

from supervisor import control_messages as cm
from supervisor import logs
from supervisor.cli.control_client import AskError, ask, not_understood
from supervisor.cli.screen import has_colour
from supervisor.cli.text import BOLD, PLAIN, RED, YELLOW
from supervisor.exits import ExitStatus
from supervisor.log_book import LogEntry, Piece

POLL_SECONDS = 0.25

_COLOURS = {"warning": YELLOW, "error": RED, "critical": f"{BOLD}{RED}"}


def show(
    run_dir: Path, *, follow: bool, worker: str | None, level: cm.Level, as_json: bool
) -> ExitStatus:
    """Prints the lines to standard output, and what is to be said of them to standard error.

    Raises:
        AskError: VNet does not run, or does not answer this user or about this worker.
    """
    printer = _Printer(as_json=as_json)
    reader = _Reader(run_dir, worker, level)
    try:
        while True:
            piece = reader.read(is_patient=follow)
            if piece is not None:
                for entry in piece.entries:
                    printer.print(entry)
                sys.stdout.flush()
            if piece is not None and piece.more:
                continue
            if not follow:
                return ExitStatus.OK
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        return ExitStatus.OK


class _Reader:
    """Where we are in the log, and what was said of it."""

    def __init__(self, run_dir: Path, worker: str | None, level: cm.Level) -> None:
        self._run_dir = run_dir
        self._worker = worker
        self._level = level
        self._book = ""
        self._next = 0
        # As long as it is behind: lines that are gone are older than what was asked for.
        self._catches_up = True
        self._trouble = ""

    def read(self, *, is_patient: bool) -> Piece | None:
        """The next piece; None when VNet does not answer just now and that is waited for."""
        request = cm.Logs(after=self._next, worker=self._worker, level=self._level)
        try:
            piece = _ask(self._run_dir, request)
        except AskError as error:
            if not (is_patient and self._book) or error.status not in _PASSING:
                raise
            self._say_once(str(error))
            return None
        self._trouble = ""
        if piece.book != self._book:
            if self._book:
                _say("VNet was started anew")
            has_asked_anew = self._next == 0
            self._book, self._next, self._catches_up = piece.book, 0, True
            if not has_asked_anew:
                return self.read(is_patient=is_patient)
        if piece.has_missed and not self._catches_up:
            _say("lines are missing here: they came too fast")
        self._next = piece.next
        self._catches_up = self._catches_up and piece.more
        return piece

    def _say_once(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            _say(trouble)


# What a restart of the supervisor looks like from here.
_PASSING = (ExitStatus.NOT_RUNNING, ExitStatus.INTERNAL)


def _ask(run_dir: Path, request: cm.Logs) -> Piece:
    data = ask(run_dir, request)
    try:
        return msgspec.json.decode(data, type=Piece)
    except msgspec.MsgspecError as error:
        try:
            refusal = msgspec.json.decode(data, type=cm.Answer)
            raise AskError(ExitStatus(refusal.status), refusal.text) from error
        except (msgspec.MsgspecError, ValueError):
            raise AskError(ExitStatus.INTERNAL, not_understood(error)) from error


class _Printer:
    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._has_colour = has_colour(sys.stdout)

    def print(self, entry: LogEntry) -> None:
        if self._as_json:
            text = logs.json_line(entry)
        else:
            colour = _COLOURS.get(entry.level, "") if self._has_colour else ""
            text = logs.text_line(entry, before=colour, after=PLAIN if colour else "")
        print(text)


def _say(text: str) -> None:
    print(f"vnet: {text}", file=sys.stderr, flush=True)

"""An upgrade in place: this process executes its program anew.

    the same command as a child, which checks that it understands our state -- status 0 --> execve(2)

The new program keeps the process id, the children and the descriptors that are named in the handover
(`supervisor.handover`); all others are closed by the kernel. Signals stay blocked until it listens for
them.
"""

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from supervisor import control_messages as cm
from supervisor.control import Promise
from supervisor.exits import ExitStatus
from supervisor.handover import Handover, HandoverError, seal, unseal

log = logging.getLogger(__name__)

# Names the descriptor of the state; the rest of the command line is the user's.
VARIABLE: Final = "VNET_HANDOVER_FD"
CHECK_FLAG: Final = "--check-config"
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
# The check loads all of the program, which takes about two seconds.
CHECK_SECONDS: Final = 30.0
# How long it is waited for the end of what is half done.
QUIET_SECONDS: Final = 5.0
_MAX_OUTPUT: Final = 64 * 1024
_MAX_REASON: Final = 400
_FIRST_OWN: Final = 3


class UpgradeError(Exception):
    """The program cannot be executed anew; the text is one line, and nothing has changed."""


def command() -> list[str]:
    """What started this process, to be started again."""
    # The interpreter by its whole name: it may have been found on a search path.
    return [sys.executable, *sys.orig_argv[1:]]


def take_descriptor(environment: MutableMapping[str, str]) -> int | None:
    """The descriptor of what an earlier program of this process hands over, or None.

    It is close-on-exec from now on and no longer in the environment.

    Raises:
        HandoverError: the variable names none.
    """
    text = environment.pop(VARIABLE, None)
    if text is None:
        return None
    try:
        descriptor = int(text)
        os.set_inheritable(descriptor, False)
    except (ValueError, OverflowError, OSError) as error:
        raise HandoverError(f"{VARIABLE}={text!r} is no open descriptor: {error}") from error
    return descriptor


def adopt(descriptor: int) -> Handover:
    """What an earlier program of this process hands over; it is this one's from now on.

    Raises:
        HandoverError: it is none, or another process's.
    """
    state = unseal(descriptor)
    os.close(descriptor)
    if state.pid != os.getpid():
        raise HandoverError(f"the state is that of process {state.pid}, not of {os.getpid()}")
    for inherited in state.descriptors():
        try:
            os.set_inheritable(inherited, False)
        except OSError as error:
            raise HandoverError(f"descriptor {inherited} was not handed over") from error
    return state


def load_everything() -> None:
    """Imports what a supervisor and its workers run. Raises whatever is wrong with it."""
    from supervisor.spawn import WORKER_MODULES  # noqa: PLC0415  # only this needs it

    for name in ("supervisor.supervisor", "workers.runtime", *WORKER_MODULES.values()):
        importlib.import_module(name)


class Check:
    """The new program, asked whether it can go on with this state; never blocks.

    Its last line is `answer`: what it is if it can, otherwise why it cannot.
    """

    def __init__(self, program: Sequence[str], state: Handover, now: float) -> None:
        """Starts the child. Raises UpgradeError."""
        self.answer = ""
        self._output = bytearray()
        self._deadline = now + CHECK_SECONDS
        try:
            descriptor = seal(state)
            try:
                self._child = subprocess.Popen(
                    [*program, CHECK_FLAG],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[descriptor],
                    env={**os.environ, VARIABLE: str(descriptor)},
                )
            finally:
                os.close(descriptor)
        except (OSError, HandoverError) as error:
            raise UpgradeError(f"the new program cannot be checked: {error}") from error
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdout.fileno(), False)

    def poll(self, now: float) -> bool | None:
        """Whether the new program can go on; None while it is being asked."""
        status = self._child.poll()
        self._read()
        if status is None:
            if now < self._deadline:
                return None
            self._child.kill()
            self._child.wait()
            self._finish(f"it did not answer within {CHECK_SECONDS:g} s")
            return False
        lines = self._output.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        # Of a traceback, the place: its last line does not say it.
        place = next((line.strip() for line in reversed(lines) if _is_place(line)), "")
        said = f"{said} ({place})" if place else said
        self._finish(said or f"it ended with status {status}")
        return status == 0

    def close(self) -> None:
        """Ends the child, if there is one still."""
        if self._child.returncode is None:
            self._child.kill()
            self._child.wait()
        self._finish(self.answer)

    def _read(self) -> None:
        assert self._child.stdout is not None
        with contextlib.suppress(OSError):
            # One more piece than the pipe holds is never needed: a child that writes more waits.
            self._output += os.read(self._child.stdout.fileno(), _MAX_OUTPUT)
        del self._output[:-_MAX_OUTPUT]

    def _finish(self, answer: str) -> None:
        self.answer = "".join(c if c.isprintable() else " " for c in answer)[:_MAX_REASON]
        assert self._child.stdout is not None
        self._child.stdout.close()


def _is_place(line: str) -> bool:
    return line.startswith('  File "')


class Upgrade:
    """The way from the order to the moment at which the program is to be executed."""

    def __init__(self) -> None:
        self._check: Check | None = None
        self._promise: Promise | None = None
        self._answer: str | None = None  # of a program that can go on
        self._give_up_at = 0.0

    def order(self, program: Sequence[str], state: Handover, now: float) -> Promise:
        """Begins to check the program; the promised answer is that of the command.

        Raises:
            UpgradeError: it cannot be begun now.
        """
        if self._promise is not None:
            raise UpgradeError("an upgrade is under way already: wait for it")
        self._check = Check(program, state, now)
        self._promise = Promise(CHECK_SECONDS + QUIET_SECONDS)
        log.info("the installed version is checked before it takes over")
        return self._promise

    def is_due(self, now: float, *, is_quiet: bool) -> bool:
        """Whether the program is to be executed now; `is_quiet`: nothing is half done."""
        if self._check is not None:
            can_go_on = self._check.poll(now)
            if can_go_on is None:
                return False
            answer, self._check = self._check.answer, None
            if not can_go_on:
                self._end(
                    ExitStatus.INTERNAL,
                    f"the installed version cannot take over, nothing has changed: {answer}",
                )
                return False
            self._answer, self._give_up_at = answer, now + QUIET_SECONDS
        if self._answer is None:
            return False
        if not is_quiet and now > self._give_up_at:
            self._answer = None
            self._end(ExitStatus.CONFLICT, "workers are being replaced: try again in a moment")
            return False
        return is_quiet

    def begin(self) -> None:
        """Answers the command: the program is executed next."""
        answer, self._answer = self._answer, None
        self._end(ExitStatus.OK, f"{answer} takes over; what is open goes on")

    def close(self) -> None:
        """Ends the check, if there is one."""
        if self._check is not None:
            self._check.close()
            self._check = None

    def _end(self, status: ExitStatus, text: str) -> None:
        log.log(logging.INFO if status is ExitStatus.OK else logging.ERROR, "%s", text)
        if self._promise is not None:
            self._promise.give(cm.encode(cm.Answer(status=status, text=text)) + b"\n")
            self._promise = None


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks what the supervisor listens to, for this thread, while the block lasts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals() -> None:
    """For a program that is there after `become`, when its handlers are."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def become(program: Sequence[str], state: Handover, environment: Mapping[str, str]) -> NoReturn:
    """Executes the program in place of this one; `environment` is added to what is there.

    The caller has blocked the signals and stopped all threads that touch the descriptors.

    Raises:
        UpgradeError: it could not be executed; all is as before.
    """
    kept: set[int] = set()
    try:
        descriptor = seal(state)
        kept = {descriptor, *state.descriptors()}
        try:
            for number in _open_descriptors():
                os.set_inheritable(number, number in kept)
            os.execve(  # noqa: S606  # the command line that started this process
                program[0],
                list(program),
                {**os.environ, **environment, VARIABLE: str(descriptor)},
            )
        finally:
            # Only reached when it failed.
            for number in kept:
                os.set_inheritable(number, False)
            os.close(descriptor)
    except (OSError, HandoverError) as error:
        raise UpgradeError(f"{program[0]} cannot be executed: {error}") from error


def _open_descriptors() -> list[int]:
    """All but the standard ones."""
    listed = Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")
    found = [int(entry.name) for entry in listed.iterdir()]
    present = []
    for number in found:
        # The directory's own descriptor is among them, and gone.
        with contextlib.suppress(OSError):
            os.fstat(number)
            present.append(number)
    return [number for number in present if number >= _FIRST_OWN]

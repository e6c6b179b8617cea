"""Forks one worker. The child never returns to the supervisor's code.

The child gets its end of the channel, its log pipe and a pipe as its standard error, and closes everything
else (TUN devices and sockets come over the channel, so that it holds just what it was given). It imports its
code, makes its listening socket of the bus, then gives up its rights (`supervisor.confinement`), says
what it has given up, and starts the event loop.
"""

import contextlib
import faulthandler
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from ipc import bus_socket
from ipc.channel import Channel, make_pair
from ipc.log_limit import LimitFilter
from ipc.logpipe import WorkerLogHandler, WorkerLogReceiver, make_pipe
from ipc.permits import Role, role_of
from ipc.slots import SSH
from supervisor import privileges
from supervisor.confinement import apply
from supervisor.confinement.apply import ConfinementError
from supervisor.confinement.landlock_rules import Reach
from supervisor.error_output import ErrorOutputReceiver
from supervisor.handover import KeptProcess
from supervisor.privileges import Identity

# Modules are named, not imported: the supervisor never loads what a worker uses (ZeroMQ starts
# threads, and they do not survive a fork).
WORKER_MODULES = {
    Role.TUN: "workers.tun.worker",
    Role.DNS: "workers.dns.worker",
    Role.PROXY: "workers.proxy.worker",
    Role.METRICS: "workers.metrics.worker",
}
# What one of several workers with the same program needs beside it.
MORE_MODULES = {SSH: ("workers.proxy.ssh.housekeeping", "workers.proxy.ssh.opening")}
_late_imports = logging.getLogger(f"{__name__}.late_imports")

# A worker that gets it writes the stacks of its threads to its standard error, and goes on.
DUMP_SIGNAL = signal.SIGUSR1
# Exit status of a worker whose code raised; the traceback is in the log.
CRASHED = 70
# Connections need two descriptors each, queries in flight one.
MAX_FILES = 65536
# dns needs few, and as many connections to a proxy's bus would leave that one without any; metrics has
# few connections.
MAX_FILES_OF = {Role.TUN: MAX_FILES, Role.DNS: 8192, Role.PROXY: MAX_FILES, Role.METRICS: 256}


@dataclass(frozen=True, slots=True)
class Spawned:
    """A forked worker, seen from the supervisor."""

    pid: int
    channel: Channel
    log_receiver: WorkerLogReceiver
    error_receiver: ErrorOutputReceiver

    def descriptors(self) -> list[int]:
        """All that is open for this worker: channel, log, standard error; the latter two may have ended."""
        ends = (
            self.channel.fileno(),
            self.log_receiver.descriptor,
            self.error_receiver.descriptor,
        )
        return [descriptor for descriptor in ends if descriptor >= 0]

    def keep(self, *, lets_go: bool) -> KeptProcess:
        """What another program needs to go on with it; `lets_go` ends the threads that read its log."""
        receivers = (self.log_receiver, self.error_receiver)
        if lets_go:
            (log_end, log_unread), (error_end, error_unread) = (r.detach() for r in receivers)
        else:
            log_end, error_end = (r.descriptor for r in receivers)
            log_unread = error_unread = b""
        return KeptProcess(
            pid=self.pid,
            channel=self.channel.fileno(),
            log=log_end,
            log_unread=log_unread,
            error_output=error_end,
            error_output_unread=error_unread,
        )

    def heard_again(self, kept: KeptProcess, slot: str, log_handler: logging.Handler) -> "Spawned":
        """After `keep` has let go in vain: its log is read again. Raises OSError."""
        return Spawned(self.pid, self.channel, *_receive_again(slot, kept, log_handler))

    @classmethod
    def adopt(cls, kept: KeptProcess, slot: str, log_handler: logging.Handler) -> "Spawned":
        """A child of this process that an earlier program of it has forked. Raises OSError."""
        end = socket.socket(fileno=kept.channel)
        end.setblocking(False)
        channel = Channel(end, Role.SUPERVISOR, role_of(slot), takes_descriptors=False)
        return cls(kept.pid, channel, *_receive_again(slot, kept, log_handler))


def spawn(slot: str, identity: Identity, reach: Reach, log_handler: logging.Handler) -> Spawned:
    """Forks a worker for this slot, which becomes `identity` and reaches the files of `reach`.

    Raises:
        OSError: no process, thread or descriptor is left.
    """
    ours, theirs = make_pair()
    try:
        with theirs, _pipes() as pipes:
            pid = _fork(slot, identity, reach, theirs, pipes)
        log_receiver, error_receiver = _receive(slot, pid, pipes, log_handler)
    except BaseException:
        ours.close()
        raise
    channel = Channel(ours, Role.SUPERVISOR, role_of(slot), takes_descriptors=False)
    return Spawned(pid, channel, log_receiver, error_receiver)


class _Pipes(NamedTuple):
    log_reader: int
    log_writer: int
    error_reader: int
    error_writer: int


@contextlib.contextmanager
def _pipes() -> Iterator[_Pipes]:
    """Closes the child's ends afterwards, and ours as well if the block fails."""
    with contextlib.ExitStack() as always, contextlib.ExitStack() as if_it_fails:
        ends = []
        for _ in ("log", "standard error"):
            reader, writer = make_pipe()
            if_it_fails.callback(os.close, reader)
            always.callback(os.close, writer)
            # A worker must never wait for its supervisor to read.
            os.set_blocking(writer, False)
            ends += [reader, writer]
        yield _Pipes(*ends)
        if_it_fails.pop_all()


def _fork(
    slot: str,
    identity: Identity,
    reach: Reach,
    end: socket.socket,
    pipes: _Pipes,
) -> int:
    supervisor_pid = os.getpid()
    with warnings.catch_warnings():
        # The log receivers are threads of ours; the child touches nothing that they hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _live(slot, identity, reach, end, pipes, supervisor_pid)
    return pid


def _receive(
    slot: str, pid: int, pipes: _Pipes, log_handler: logging.Handler
) -> tuple[WorkerLogReceiver, ErrorOutputReceiver]:
    """Receivers close what they are given, also when they cannot be made. Raises OSError."""
    try:
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(_put_down, pid)
            with contextlib.ExitStack() as if_the_first_fails:
                if_the_first_fails.callback(os.close, pipes.error_reader)
                log_receiver = WorkerLogReceiver(pipes.log_reader, slot, log_handler, pid=pid)
                if_the_first_fails.pop_all()
            error_receiver = ErrorOutputReceiver(pipes.error_reader, slot, log_handler, pid=pid)
            if_it_fails.pop_all()
    except RuntimeError as error:
        # Python says so when there is no thread left.
        raise OSError(f"its log cannot be received: {error}") from error
    return log_receiver, error_receiver


def _receive_again(
    slot: str, kept: KeptProcess, log_handler: logging.Handler
) -> tuple[WorkerLogReceiver, ErrorOutputReceiver]:
    try:
        return (
            WorkerLogReceiver(kept.log, slot, log_handler, pid=kept.pid, buffered=kept.log_unread),
            ErrorOutputReceiver(
                kept.error_output,
                slot,
                log_handler,
                pid=kept.pid,
                buffered=kept.error_output_unread,
            ),
        )
    except RuntimeError as error:
        # Python says so when there is no thread left.
        raise OSError(f"the log of {slot} cannot be received: {error}") from error


def _put_down(pid: int) -> None:
    """Ends a child whom nobody hears; the receiver that there may be ends with it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _live(
    slot: str,
    identity: Identity,
    reach: Reach,
    end: socket.socket,
    pipes: _Pipes,
    supervisor_pid: int,
) -> None:
    """The whole life of the child."""
    # A collection would look at, and so copy, all that the supervisor has: see `_import`.
    gc.disable()
    status = CRASHED
    try:
        _cut_loose(slot, end, pipes, supervisor_pid)
        handler = WorkerLogHandler(pipes.log_writer)
        handler.addFilter(LimitFilter(handler.emit))
        logging.getLogger().handlers[:] = [handler]
        try:
            _work(slot, identity, reach, end, supervisor_pid)
            status = 0
        except ConfinementError as error:
            logging.getLogger(__name__).error("%s cannot be confined: %s", slot, error)
        except BaseException:
            logging.getLogger(__name__).exception("%s crashed", slot)
    except BaseException:  # noqa: BLE001  # the outermost frame: nothing may pass the fork
        with contextlib.suppress(BaseException):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _cut_loose(slot: str, end: socket.socket, pipes: _Pipes, supervisor_pid: int) -> None:
    privileges.die_with_parent(supervisor_pid)
    privileges.name_process(f"vnet-{slot}")
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(pipes.error_writer, 2)
    _close_all_but({0, 1, 2, end.fileno(), pipes.log_writer})
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True, chain=False)


def _close_all_but(kept: set[int]) -> None:
    # The supervisor's objects still hold these numbers, but none of them is collected: its frames are
    # below this one on the stack, and the child leaves with _exit.
    lowest = 0
    for descriptor in sorted(kept):
        # An empty range would reach close_range(2) as one without end.
        if lowest < descriptor:
            os.closerange(lowest, descriptor)
        lowest = descriptor + 1
    os.closerange(lowest, max(MAX_FILES, os.sysconf("SC_OPEN_MAX")))


def _work(
    slot: str, identity: Identity, reach: Reach, end: socket.socket, supervisor_pid: int
) -> None:
    role = role_of(slot)
    runtime, module = _import(slot)
    listening = None if reach.bus_dir is None else bus_socket.listen(reach.bus_dir, slot)
    confinement = apply.confine(role, identity, reach, MAX_FILES_OF[role], supervisor_pid)
    # Said by this code, before any of the worker's own runs.
    Channel(end, role, Role.SUPERVISOR, takes_descriptors=False).send(confinement.report)
    sys.addaudithook(_report_late_import)
    what_is_new = confinement.awaited.what_is_new if confinement.awaited else None
    runtime.run(slot, end, module.main, listening, what_is_new)


def _import(slot: str) -> tuple[ModuleType, ModuleType]:
    """`workers.runtime` and the module of the slot's role.

    What they and the supervisor have made until now stays as long as the process: no collection looks
    at it again, which saves a third of the time to import and pauses of tens of milliseconds later.
    """
    runtime = importlib.import_module("workers.runtime")
    module = importlib.import_module(WORKER_MODULES[role_of(slot)])
    for name in MORE_MODULES.get(slot, ()):
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    return runtime, module


def _report_late_import(event: str, arguments: tuple[object, ...]) -> None:
    """A worker may not be able to read its own program any more: all is imported before.

    Where it can, this tells what `workers.preload` lacks.
    """
    # The second argument is the file, known only when a module has been found.
    if event == "import" and arguments[1] is None and arguments[0] not in sys.modules:
        _late_imports.warning("%s is imported by a confined worker", arguments[0])

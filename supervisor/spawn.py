"""Forks one worker. The child never returns to the supervisor's code.

The child gets its end of the channel, its log pipe and standard error, and closes everything else
(TUN devices and sockets come over the channel, so that it holds just what it was given). It imports its
code, makes its listening socket of the bus, then gives up its rights (`supervisor.confinement`), says
what it has given up, and starts the event loop.
"""

import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
import traceback
import warnings
from dataclasses import dataclass

from ipc import bus_socket
from ipc.channel import Channel, make_pair
from ipc.logpipe import WorkerLogHandler, WorkerLogReceiver, make_pipe
from ipc.permits import Role, role_of
from supervisor import privileges
from supervisor.confinement import apply
from supervisor.confinement.apply import ConfinementError
from supervisor.confinement.landlock_rules import Reach
from supervisor.privileges import Identity

# Modules are named, not imported: the supervisor never loads what a worker uses (ZeroMQ starts
# threads, and they do not survive a fork).
WORKER_MODULES = {
    Role.TUN: "workers.tun.worker",
    Role.DNS: "workers.dns.worker",
    Role.PROXY: "workers.proxy.worker",
}
_late_imports = logging.getLogger(f"{__name__}.late_imports")

# Exit status of a worker whose code raised; the traceback is in the log.
CRASHED = 70
# Connections need two descriptors each, queries in flight one.
MAX_FILES = 65536


@dataclass(frozen=True, slots=True)
class Spawned:
    """A forked worker, seen from the supervisor."""

    pid: int
    channel: Channel
    log_receiver: WorkerLogReceiver


def spawn(slot: str, identity: Identity, reach: Reach, log_handler: logging.Handler) -> Spawned:
    """Forks a worker for this slot, which becomes `identity` and reaches the files of `reach`.

    Raises:
        OSError: no process or descriptor is left.
    """
    ours, theirs = make_pair()
    try:
        with theirs:
            pid, receiver = _fork(slot, identity, reach, theirs, log_handler)
    except BaseException:
        ours.close()
        raise
    channel = Channel(ours, Role.SUPERVISOR, role_of(slot), takes_descriptors=False)
    return Spawned(pid, channel, receiver)


def _fork(
    slot: str,
    identity: Identity,
    reach: Reach,
    end: socket.socket,
    log_handler: logging.Handler,
) -> tuple[int, WorkerLogReceiver]:
    log_reader, log_writer = make_pipe()
    try:
        # Before the fork, so that no child is left whom nobody hears; without a child it ends.
        receiver = _receive_log(log_reader, slot, log_handler)
        supervisor_pid = os.getpid()
        with warnings.catch_warnings():
            # The log receivers are threads of ours; the child touches nothing that they hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _live(slot, identity, reach, end, log_writer, supervisor_pid)
    finally:
        os.close(log_writer)
    return pid, receiver


def _receive_log(log_reader: int, slot: str, log_handler: logging.Handler) -> WorkerLogReceiver:
    try:
        return WorkerLogReceiver(log_reader, slot, log_handler)
    except (OSError, RuntimeError) as error:
        os.close(log_reader)
        # Python says RuntimeError when there is no thread left.
        raise OSError(f"its log cannot be received: {error}") from error


def _live(
    slot: str,
    identity: Identity,
    reach: Reach,
    end: socket.socket,
    log_writer: int,
    supervisor_pid: int,
) -> None:
    """The whole life of the child."""
    status = CRASHED
    try:
        _cut_loose(slot, end, log_writer, supervisor_pid)
        logging.getLogger().handlers[:] = [WorkerLogHandler(log_writer)]
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


def _cut_loose(slot: str, end: socket.socket, log_writer: int, supervisor_pid: int) -> None:
    privileges.die_with_parent(supervisor_pid)
    privileges.name_process(f"vnet-{slot}")
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    # Standard error stays for the stack of a crash; the others are the supervisor's own.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    _close_all_but({0, 1, 2, end.fileno(), log_writer})
    faulthandler.enable(file=2, all_threads=True)


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
    runtime = importlib.import_module("workers.runtime")
    module = importlib.import_module(WORKER_MODULES[role])
    listening = None if reach.bus_dir is None else bus_socket.listen(reach.bus_dir, slot)
    confinement = apply.confine(role, identity, reach, MAX_FILES, supervisor_pid)
    # Said by this code, before any of the worker's own runs.
    Channel(end, role, Role.SUPERVISOR, takes_descriptors=False).send(confinement.report)
    sys.addaudithook(_report_late_import)
    what_is_new = confinement.awaited.what_is_new if confinement.awaited else None
    runtime.run(slot, end, module.main, listening, what_is_new)


def _report_late_import(event: str, arguments: tuple[object, ...]) -> None:
    """A worker may not be able to read its own program any more: all is imported before.

    Where it can, this tells what `workers.preload` lacks.
    """
    # The second argument is the file, known only when a module has been found.
    if event == "import" and arguments[1] is None and arguments[0] not in sys.modules:
        _late_imports.warning("%s is imported by a confined worker", arguments[0])

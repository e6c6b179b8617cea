"""A supervisor in a process of its own, with pretended workers and without a data plane."""

import contextlib
import math
import os
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pretend_worker
from run_fakes import NETWORK, ROOM_BYTES, settings

from ipc import messages as m
from supervisor import control_messages as cm
from supervisor import host, link_making, logs, spawn, supervisor, this_system
from supervisor.cli.control_client import AskError, ask_status, order
from supervisor.config import parse
from supervisor.dataplane import KeptLink
from supervisor.osconfig.route_conflicts import HostRoutes
from supervisor.settings import User
from supervisor.status import Status, WorkerStatus
from supervisor.supervisor import Supervisor
from workers import memory_limit

DEADLINE_SECONDS = 30.0
CONFIG = """
dns.os_integration = "none"
[supervisor]
heartbeat_seconds = 0.1
hang_seconds = 1.5
restart_max = 3
"""


class NoDataPlane:
    """Nothing of the kernel: descriptors of /dev/null."""

    def __init__(self, _network: object) -> None:
        self._null = os.open(os.devnull, os.O_RDWR)

    @property
    def tun_descriptors(self) -> list[int]:
        return [self._null, self._null]

    dns_descriptors = tun_descriptors

    def set_ranges(self, ranges: list[str]) -> dict[str, OSError]:
        """All the same."""
        return {}

    def set_forwarded(self, networks: list[str]) -> dict[str, OSError]:
        """All the same."""
        return {}

    has_ipv6 = True
    kind = m.DataPlaneKind.NAMESPACE
    has_family_header = False

    def keep(self) -> KeptLink:
        """Good enough to be named."""
        return KeptLink(NETWORK, self._null, self._null, self._null, ())

    def open_listener(self, _address: bytes, _port: int) -> socket.socket:
        return socket.socket()

    def close(self) -> None:
        os.close(self._null)

    remove = close


class NoProber:
    """Sends nothing, there being no interface."""

    problems = ()

    def __init__(self, _network: object, _outer: int, **_times: float) -> None:
        pass

    def use_times(self, **_times: float) -> None:
        """All the same."""

    def tick(self, _now: float, _ready: object) -> list[object]:
        """Nobody is suspected."""
        return []

    def close(self) -> None:
        """Nothing is open."""


class NoNetworkWatch:
    """Looks at nothing: the machine's network is not the test's affair."""

    problems = ()
    next_look_at = math.inf

    def __init__(self, _data_plane: object, **_options: object) -> None:
        self._silence = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def fileno(self) -> int:
        return self._silence.fileno()

    def tick(self, _now: float) -> None:
        """Nothing ever changes."""

    def in_the_way(self, _block: object, *, is_routed: bool) -> str:
        """Nothing is."""
        return ""

    def close(self) -> None:
        self._silence.close()


class SupervisedRun:
    """See the module; `behaviours` as in pretend_worker."""

    def __init__(self, directory: Path, config: str) -> None:
        self.directory = directory
        self.log_path = directory / "log"
        self.run_dir = directory / "run"
        self.settings = settings(
            parse(CONFIG + config),
            run_dir=self.run_dir,
            state_dir=directory / "state",
            user=User("root" if os.getuid() == 0 else "me", os.getuid(), os.getgid(), directory),
        )
        self.pid = 0

    def start(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                self._live()
            except BaseException:  # noqa: BLE001  # the log is shown when the test fails
                traceback.print_exc()
            finally:
                os._exit(99)

    def _live(self) -> None:
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        handler = logs.set_up("INFO", "text")
        memory_limit.BASE_BYTES = ROOM_BYTES  # type: ignore[misc]  # see there
        link_making.NamespaceDataPlane = NoDataPlane  # type: ignore[misc,assignment]
        supervisor.Prober = NoProber  # type: ignore[misc,assignment]
        host.NetworkWatch = NoNetworkWatch  # type: ignore[misc,assignment]
        this_system.read_host = HostRoutes
        for role in spawn.WORKER_MODULES:
            spawn.WORKER_MODULES[role] = pretend_worker.__name__
        Supervisor(self.settings, handler).run()
        os._exit(0)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def status(self) -> Status:
        return ask_status(self.run_dir, cm.Status(), DEADLINE_SECONDS)[0]

    def worker(self, slot: str) -> WorkerStatus:
        return next(worker for worker in self.status().workers or () if worker.name == slot)

    def order(self, request: cm.Request) -> None:
        order(self.run_dir, request, DEADLINE_SECONDS)

    def wait_for(self, condition: Callable[[Status], object]) -> Status:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            with contextlib.suppress(AskError):
                found = self.status()
                if condition(found):
                    return found
            assert time.monotonic() < deadline, self.log
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.log
            time.sleep(0.01)

    def wait_for_worker(self, slot: str, **wanted: object) -> WorkerStatus:
        def is_so(found: Status) -> bool:
            worker = next(worker for worker in found.workers or () if worker.name == slot)
            return all(getattr(worker, name) == value for name, value in wanted.items())

        self.wait_for(is_so)
        return self.worker(slot)

    def wait_until_healthy(self) -> Status:
        return self.wait_for(lambda found: found.health == "healthy")

    def stop(self) -> int:
        """Ends it; returns the exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def supervised_run(
    directory: Path, config: str = "", **behaviours: pretend_worker.Behaviour
) -> Iterator[SupervisedRun]:
    """Behaviours by slot, with `_` for `-`. Stops cleanly at the end, or says why not."""
    run = SupervisedRun(directory, config)
    pretend_worker.BEHAVIOURS.clear()
    pretend_worker.BEHAVIOURS.update(
        (slot.replace("_", "-"), behave) for slot, behave in behaviours.items()
    )
    run.start()
    try:
        yield run
    except BaseException:
        os.kill(run.pid, signal.SIGKILL)
        os.waitpid(run.pid, 0)
        raise
    assert run.stop() == 0, run.log
    assert not run.run_dir.exists()

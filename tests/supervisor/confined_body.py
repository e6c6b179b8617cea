"""The body of a confined worker that tries things, and the supervisor's part around it.

The worker comes about as every worker does (`supervisor.spawn`); what it finds out goes through
memory that it shares with the test, because it can write no file.
"""

import contextlib
import errno
import json
import logging
import mmap
import os
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
from run_fakes import NETWORK, ROOM_BYTES

from ipc import messages as m
from ipc.errors import PeerGoneError
from ipc.permits import Role, role_of
from supervisor import spawn
from supervisor.confinement.landlock_rules import Reach
from supervisor.privileges import Identity
from workers import memory_limit
from workers.runtime import Runtime

RESULT_BYTES = 1 << 16
SECONDS = 30.0
Attempts = Mapping[str, Callable[[], object]]

# Set before the fork.
ATTEMPTS: dict[str, Callable[[], object]] = {}
RESULT = mmap.mmap(-1, RESULT_BYTES)


async def main(runtime: Runtime) -> None:
    """Tries one after the other; writes down what came of each."""
    runtime.ready()
    for name, attempt in ATTEMPTS.items():
        note(name, outcome_of(attempt))


def outcome_of(attempt: Callable[[], object]) -> str:
    """The name of the error, or what the attempt returned."""
    try:
        return str(attempt())
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    except Exception as error:  # noqa: BLE001  # the test looks at it
        return repr(error)


def note(name: str, outcome: str) -> None:
    noted = outcomes() | {name: outcome}
    RESULT.seek(0)
    RESULT.write(json.dumps(noted).encode().ljust(RESULT_BYTES, b" "))


def outcomes() -> dict[str, str]:
    RESULT.seek(0)
    return json.loads(RESULT.read(RESULT_BYTES).strip(b" \0") or b"{}")


@dataclass
class Ended:
    """What a confined worker has done."""

    report: m.Confined | None
    outcomes: dict[str, str]
    status: int  # as of waitstatus_to_exitcode
    log: str


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def common(slot: str, keys: m.BusKeys | None = None, bus_dir: str = "/nowhere") -> m.Common:
    return m.Common(
        slot=slot,
        proxies=2,
        bus_dir=bus_dir,
        keys=keys or m.BusKeys(public="k" * 40, secret="k" * 40, peers={}),
        heartbeat_seconds=0.1,
        log_level="INFO",
    )


def configuration(common: m.Common) -> m.Message:
    match role_of(common.slot):
        case Role.TUN:
            return m.ConfigureTun(
                common=common, network=NETWORK, max_pending=1, pending_seconds=1.0
            )
        case Role.DNS:
            return m.ConfigureDns(common=common, network=NETWORK, upstream=[], ttl_seconds=1)
        case Role.METRICS:
            return m.ConfigureMetrics(common=common)
        case _:
            return m.ConfigureProxy(
                common=common,
                network=NETWORK,
                teleport_home="",
                book_path="",
                prompts_dir="",
                max_connections=1,
                max_listeners=1,
                ca_file="",
                insecure=False,
                mfa_seconds=5.0,
            )


def run_confined(
    monkeypatch: pytest.MonkeyPatch,
    slot: str,
    identity: Identity,
    reach: Reach,
    attempts: Attempts,
    config: m.Message | None = None,
    meanwhile: Callable[[int], None] = lambda _pid: None,
) -> Ended:
    """Spawns the worker, waits for its end. `meanwhile` is called with its process id often."""
    monkeypatch.setitem(spawn.WORKER_MODULES, role_of(slot), __name__)
    monkeypatch.setattr(memory_limit, "BASE_BYTES", ROOM_BYTES)
    ATTEMPTS.clear()
    ATTEMPTS.update(attempts)
    RESULT[:] = bytes(RESULT_BYTES)
    handler = _Lines()
    spawned = spawn.spawn(slot, identity, reach, handler)
    report = None
    deadline = time.monotonic() + SECONDS
    try:
        with contextlib.suppress(PeerGoneError):  # one that cannot be confined ends at once
            spawned.channel.send(config or configuration(common(slot)))
        while time.monotonic() < deadline:
            meanwhile(spawned.pid)
            select.select([spawned.channel], [], [], 0.02)
            try:
                while (received := spawned.channel.receive()) is not None:
                    if isinstance(received[0], m.Confined):
                        report = received[0]
            except PeerGoneError:
                break
        else:
            os.kill(spawned.pid, 9)
    finally:
        _, status = os.waitpid(spawned.pid, 0)
        spawned.channel.close()
        spawned.log_receiver.thread.join(SECONDS)
        spawned.error_receiver.thread.join(SECONDS)
    return Ended(report, outcomes(), os.waitstatus_to_exitcode(status), "\n".join(handler.lines))

"""A service that finds its range taken: it counts as started, says why, and goes on once there is room."""

import contextlib
import dataclasses
import json
import os
import pwd
import selectors
import socket
import threading
from pathlib import Path

import pytest
from run_fakes import settings
from test_service_link import Service

from supervisor import config as configuration
from supervisor import control_messages as cm
from supervisor import waiting_start
from supervisor.cli import diag
from supervisor.cli.control_client import AskError, ask_status, order
from supervisor.exits import ConflictError, ExitStatus, StartupError
from supervisor.settings import User
from supervisor.waiting_start import StoppedError, WaitingStart

DEADLINE_SECONDS = 20.0
TAKEN = "the range 10.9.0.0/16 is used by something else: vpn0 has the route 10.9.0.0/16"


class Waited:
    """A start that cannot be made until `is_free` is set, beside a thread that asks."""

    def __init__(self, directory):
        self.directory = directory
        self.service = Service(str(directory / "notify"), None)
        self.is_free = threading.Event()
        self.is_stopped = False
        self.selector = selectors.DefaultSelector()
        self.reader, self.waker = socket.socketpair()
        self.selector.register(self.reader, selectors.EVENT_READ, lambda _: self.reader.recv(9))
        self.settings = settings()
        self.tries = 0
        self.error: StartupError = ConflictError(TAKEN)

    def make(self):
        self.tries += 1
        if not self.is_free.is_set():
            raise self.error
        return "made"

    def run(self):
        waiting = WaitingStart(
            self.settings,
            self.directory / "control.sock",
            self.selector,
            self.service.notifier,
            lambda: self.is_stopped,
        )
        return waiting.run(self.make)

    @contextlib.contextmanager
    def beside(self, work):
        """Runs `work` in a thread once the control socket answers; fails when that has failed."""
        failures = []

        def live():
            try:
                self.ask_until_answered()
                work()
            except BaseException as error:  # noqa: BLE001  # raised again below
                failures.append(error)
                self.is_free.set()

        thread = threading.Thread(target=live)
        thread.start()
        try:
            yield
        finally:
            thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()
        if failures:
            raise failures[0]

    def ask_until_answered(self):
        for _ in range(10_000):
            with contextlib.suppress(AskError):
                return ask_status(self.directory, cm.Status())[0]
            threading.Event().wait(0.002)
        raise AssertionError("nobody answers")

    def close(self):
        self.service.close()
        self.selector.close()
        self.reader.close()
        self.waker.close()


@pytest.fixture
def waited(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting_start, "RETRY_SECONDS", 0.05)
    made = Waited(tmp_path)
    yield made
    made.close()


def test_nothing_is_said_where_there_is_room_at_once(waited):
    waited.is_free.set()
    assert waited.run() == "made"
    assert waited.service.heard() == []
    assert not (waited.directory / "control.sock").exists()


def test_while_it_waits_it_counts_as_started_and_says_why_and_then_it_goes_on(waited):
    seen = []

    def look():
        seen.append(ask_status(waited.directory, cm.Status())[0])
        waited.is_free.set()

    with waited.beside(look):
        assert waited.run() == "made"
    assert waited.tries > 1
    [status] = seen
    assert status.health == "degraded"
    assert status.reasons == [f"VNet waits, because {TAKEN}."]
    lines = waited.service.heard()
    assert lines.count("READY=1") == 1
    assert f"STATUS=degraded: VNet waits, because {TAKEN}." in lines
    # The whole VNet listens there next.
    assert not (waited.directory / "control.sock").exists()


def test_vnet_stop_ends_it_and_other_orders_say_why_not(waited):
    said = []

    def ask():
        for request in (cm.Reload(), cm.Restart(worker="all"), cm.Logs()):
            with pytest.raises(AskError) as caught:
                order(waited.directory, request)
            said.append(caught.value)
        order(waited.directory, cm.Stop())

    with waited.beside(ask), pytest.raises(StoppedError):
        waited.run()
    assert len(said) == 3
    assert {error.status for error in said} == {ExitStatus.CONFLICT}
    assert all(TAKEN in str(error) for error in said)


def test_vnet_diag_says_what_it_waits_for(waited, tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "DEFAULT_PATH", Path("/nonexistent/vnet.toml"))
    entry = pwd.getpwuid(os.getuid())
    waited.settings = dataclasses.replace(
        settings(),
        user=User(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir)),
        teleport_home=tmp_path / "tsh",
        state_dir=tmp_path / "state",
    )
    asked = diag.Options(
        run_dir=waited.directory,
        state_dir=tmp_path / "other",
        config=None,
        as_json=True,
        output=tmp_path / "report",
    )

    def look():
        diag.diagnose(asked, {})
        waited.is_free.set()

    with waited.beside(look):
        waited.run()
    report = json.loads((tmp_path / "report").read_text())
    assert report["networkStackAttempt"]["error"] == "VNet has no network yet"
    checks = {check["id"]: check for check in report["checks"]}
    [found] = checks["vnet"]["checkReport"]["findings"]
    assert (found["id"], found["text"]) == ("vnet-degraded", f"VNet waits, because {TAKEN}.")
    # What does not need the network is looked at, with the settings of this VNet.
    assert {name for name, check in checks.items() if check["status"] == "ERROR"} == {
        "routes",
        "dns",
        "ipv6",
    }
    assert str(tmp_path / "tsh") in str(checks["logins"])
    assert str(tmp_path / "state") in str(checks["leftovers"])


def test_a_signal_ends_it_at_once(waited, monkeypatch):
    monkeypatch.setattr(waiting_start, "RETRY_SECONDS", 1000.0)

    def interrupt():
        waited.is_stopped = True
        waited.waker.send(b"x")

    with waited.beside(interrupt), pytest.raises(StoppedError):
        waited.run()
    assert waited.tries == 1


def test_what_waiting_does_not_mend_is_not_waited_for(waited):
    waited.error = StartupError("no memory")
    with pytest.raises(StartupError, match="no memory"):
        waited.run()
    assert waited.tries == 1
    assert waited.service.heard() == []

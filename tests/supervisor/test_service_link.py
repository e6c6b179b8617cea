"""What the service manager hears of a run, and when (supervisor.service_link)."""

import socket

import pytest

from supervisor.notify import Notifier
from supervisor.service_link import STATUS_SECONDS, ServiceLink
from supervisor.status import Health


class Service:
    """A service manager, and a run of which it hears."""

    def __init__(self, path, watchdog_seconds):
        self.health, self.reasons = Health.STARTING, ["wait."]
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._end.bind(path)
        self.notifier = Notifier({"NOTIFY_SOCKET": path})
        self.link = ServiceLink(
            self.notifier, watchdog_seconds, lambda: (self.health, self.reasons)
        )

    def heard_at(self, now, *, are_well=True):
        self.link.tick(now, are_well=are_well)
        return self.heard()

    def heard(self):
        lines = []
        while True:
            try:
                lines += self._end.recv(4096).decode().splitlines()
            except BlockingIOError:
                return lines

    def close(self):
        self._end.close()
        self.notifier.close()


@pytest.fixture
def service(tmp_path):
    service = Service(str(tmp_path / "notify"), 30.0)
    yield service
    service.close()


def test_service_is_ready_once_the_workers_are(service):
    assert service.heard_at(1.0) == ["WATCHDOG=1", "STATUS=starting: wait."]
    service.health, service.reasons = Health.HEALTHY, []
    assert service.heard_at(1.1) == []
    assert service.heard_at(1.0 + STATUS_SECONDS) == ["READY=1", "STATUS=healthy"]
    service.health, service.reasons = Health.DEGRADED, ["The login has expired."]
    assert service.heard_at(10.0) == ["STATUS=degraded: The login has expired."]
    service.link.stopping()
    assert service.heard() == ["STOPPING=1"]


def test_degraded_start_is_a_start(service):
    service.health = Health.DEGRADED
    assert "READY=1" in service.heard_at(1.0)


def test_reload_ends_with_ready(service):
    service.health, service.reasons = Health.HEALTHY, []
    service.heard_at(1.0)
    service.link.reloading()
    assert service.heard()[0] == "RELOADING=1"
    assert "READY=1" not in service.heard_at(1.0 + STATUS_SECONDS)  # not in force everywhere
    service.link.reloaded()
    assert "READY=1" in service.heard_at(1.1)


def test_watchdog_is_answered_in_time_and_only_while_the_workers_are_well(service):
    service.heard_at(1.0)
    assert service.link.longest_sleep == 10.0
    assert "WATCHDOG=1" not in service.heard_at(10.9)
    assert "WATCHDOG=1" in service.heard_at(11.0)
    assert "WATCHDOG=1" not in service.heard_at(40.0, are_well=False)
    assert "WATCHDOG=1" in service.heard_at(41.0)


def test_without_a_service_manager_health_is_not_even_judged():
    def judge():
        raise AssertionError("nobody asked")

    ServiceLink(Notifier({}), None, judge).tick(1.0, are_well=True)

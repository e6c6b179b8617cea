"""What the service manager hears (supervisor.notify), with a socket in its place."""

import os
import socket

import pytest

from supervisor.notify import Notifier, watchdog_seconds


@pytest.fixture
def manager(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(5)
        yield end


@pytest.fixture
def notifier(manager):
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "PATH": "/bin"}
    notifier = Notifier(environment)
    assert environment == {"PATH": "/bin"}  # children must not speak in our name
    yield notifier
    notifier.close()


def heard(manager):
    return manager.recv(4096).decode().splitlines()


def test_life_of_a_service_is_told(notifier, manager):
    notifier.ready("healthy")
    assert heard(manager) == ["READY=1", "STATUS=healthy"]
    notifier.status("healthy")  # nothing new
    notifier.status("degraded: a\nsecond line")
    assert heard(manager) == ["STATUS=degraded: a second line"]
    notifier.reloading()
    first, second = heard(manager)
    assert first == "RELOADING=1"
    assert second.removeprefix("MONOTONIC_USEC=").isdecimal()
    notifier.alive()
    assert heard(manager) == ["WATCHDOG=1"]
    notifier.stopping()
    assert heard(manager) == ["STOPPING=1"]


def test_abstract_address_is_understood():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0vnet-test-{os.getpid()}")
        end.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": f"@vnet-test-{os.getpid()}"})
        notifier.alive()
        assert heard(end) == ["WATCHDOG=1"]
        notifier.close()


@pytest.mark.parametrize("address", [None, "", "relative"])
def test_without_a_service_manager_nothing_happens(address):
    notifier = Notifier({} if address is None else {"NOTIFY_SOCKET": address})
    assert not notifier.is_heard
    notifier.ready("healthy")
    notifier.close()


def test_manager_that_does_not_listen_any_more_stops_nobody(notifier, manager, caplog):
    manager.close()
    notifier.alive()
    assert "cannot be told" in caplog.text


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "7"}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_is_only_for_the_process_that_is_meant(environment, seconds):
    assert watchdog_seconds(environment, 7) == seconds

"""What the service manager hears and keeps (supervisor.notify), with a socket in its place."""

import contextlib
import os
import socket

import pytest

from supervisor import notify
from supervisor.notify import Notifier, take_stored, watchdog_seconds


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


def test_descriptors_are_kept_with_their_name(notifier, manager):
    reader, writer = os.pipe()
    notifier.store("tun", [reader])
    data, descriptors, _, _ = socket.recv_fds(manager, 4096, 10)
    assert data.decode().splitlines() == ["FDSTORE=1", "FDPOLL=0", "FDNAME=tun"]
    os.write(writer, b"x")
    assert os.read(descriptors[0], 1) == b"x"
    notifier.remove("tun")
    assert heard(manager) == ["FDSTOREREMOVE=1", "FDNAME=tun"]
    for descriptor in (reader, writer, *descriptors):
        os.close(descriptor)


def test_a_successor_is_told_where_the_service_manager_is(manager):
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    assert notifier.environment == {"NOTIFY_SOCKET": manager.getsockname()}
    assert Notifier({}).environment == {}
    notifier.close()


def test_manager_that_does_not_read_costs_two_seconds_in_all(
    notifier, manager, monkeypatch, caplog
):
    slept: list[float] = []
    monkeypatch.setattr(notify.time, "sleep", slept.append)
    for _ in range(600):  # more than any queue of datagrams has by default
        notifier.remove("tun")
    assert sum(slept) == pytest.approx(notify.PATIENCE_SECONDS, abs=0.1)
    assert "cannot be told" in caplog.text
    # It is back: what is said from now on is heard.
    manager.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while manager.recv(4096):
            pass
    manager.settimeout(5)
    notifier.alive()
    assert heard(manager) == ["WATCHDOG=1"]


def test_several_descriptors_at_once_wait_for_a_slow_manager(notifier, manager, monkeypatch):
    got: list[str] = []

    def read_one(_seconds: float) -> None:
        data, descriptors, _, _ = socket.recv_fds(manager, 4096, 10)
        got.append(data.decode())
        for descriptor in descriptors:
            os.close(descriptor)

    monkeypatch.setattr(notify.time, "sleep", read_one)
    for number in range(2000):
        notifier.store(f"n{number}", [0])
        if len(got) > 10:
            break
    assert got[:3] == [f"FDSTORE=1\nFDPOLL=0\nFDNAME=n{number}\n" for number in range(3)]


@pytest.fixture
def stored():
    """Runs `take_stored` in a child whose descriptors 3 and 4 are a pipe."""

    def take(environment: dict[str, str]) -> object:
        reader, writer = os.pipe()
        said, say = os.pipe()
        high = [os.dup2(end, number) for end, number in ((reader, 200), (writer, 201), (say, 202))]
        pid = os.fork()
        if pid == 0:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)
            text = {
                name: value.replace("PID", str(os.getpid())) for name, value in environment.items()
            }
            found = take_stored(text, os.getpid())
            kept = [d for descriptors in found.values() for d in descriptors]
            inherited = [d for d in kept if os.get_inheritable(d)]
            os.write(high[2], repr((found, text, inherited)).encode())
            os._exit(0)
        for end in (reader, writer, say, *high):
            os.close(end)
        os.waitpid(pid, 0)
        with os.fdopen(said) as pipe:
            return eval(pipe.read())

    return take


def test_kept_descriptors_come_back_by_name(stored):
    environment = {"LISTEN_PID": "PID", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "tun:dns", "A": "b"}
    # No child takes them for its own: neither by the environment nor over exec.
    assert stored(environment) == ({"tun": [3], "dns": [4]}, {"A": "b"}, [])


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, {}),
        ({"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "tun:dns"}, {}),
        ({"LISTEN_PID": "PID", "LISTEN_FDS": "many"}, {}),
        ({"LISTEN_PID": "PID", "LISTEN_FDS": "-1"}, {}),
        ({"LISTEN_PID": "PID", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "tun:tun"}, {"tun": [3, 4]}),
        ({"LISTEN_PID": "PID", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "tun"}, {"tun": [3], "": [4]}),
        ({"LISTEN_PID": "PID", "LISTEN_FDS": "1"}, {"": [3]}),
    ],
)
def test_descriptors_that_are_not_meant_for_us_are_left_alone(stored, environment, found):
    assert stored(environment) == (found, {}, [])


@pytest.mark.parametrize("address", [None, "", "relative"])
def test_without_a_service_manager_nothing_happens(address):
    notifier = Notifier({} if address is None else {"NOTIFY_SOCKET": address})
    assert not notifier.is_heard
    notifier.ready("healthy")
    notifier.store("tun", [0])
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

"""Calls against a real dbus-daemon that is stopped, restarted, and serves services that hang."""

import os
import signal
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from bus_bed import ErrorAnswer, FakeNetworkManager, FakeResolved, PrivateBus, Service

from supervisor.osconfig import bus_facts
from supervisor.osconfig.bus_facts import BusFacts, NetworkManagerRole, Presence, ResolvedUse
from supervisor.osconfig.dbus import (
    BusError,
    Call,
    NoAnswerError,
    NoBusError,
    NoServiceError,
    RefusedError,
    SystemBus,
)

NAME = "test.vnet.Clock"
ASK = Call(NAME, "/test/vnet", "test.vnet.Clock", "Ask", "s", ("time",))
# The limit of 2 s, and what a busy machine adds.
BOUNDED_SECONDS = 4.0


@pytest.fixture
def bus(tmp_path):
    found = PrivateBus(tmp_path)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture
def service(bus):
    with Service(bus.address, NAME) as found:
        found.answers["Ask"] = lambda body, _path: ("si", (body[0].upper(), 7))
        yield found


@pytest.fixture
def system_bus(bus):
    found = SystemBus(bus.environment)
    yield found
    found.close()


def test_a_call_is_answered(system_bus, service):
    assert system_bus.within().ask(ASK, tuple[str, int]) == ("TIME", 7)
    assert service.calls == [("test.vnet.Clock", "Ask", ("time",))]


def test_an_answer_of_another_kind_is_an_error(system_bus, service):
    with pytest.raises(BusError, match="unknown way"):
        system_bus.within().ask(ASK, tuple[int])


def test_nobody_has_the_name(system_bus, bus):
    calls = system_bus.within()
    assert calls.owner(NAME) == ""
    with pytest.raises(NoServiceError, match=NAME):
        calls.do(ASK)


def test_the_errors_of_a_service_are_told(system_bus, service):
    def refuse(_body, _path):
        raise ErrorAnswer("test.vnet.Error.Late", "the clock\nis slow.")

    service.answers["Ask"] = refuse
    with pytest.raises(RefusedError) as caught:
        system_bus.within().do(ASK)
    assert caught.value.name == "test.vnet.Error.Late"
    assert str(caught.value) == "the clock is slow (test.vnet.Error.Late)"
    # The connection is in order.
    service.answers["Ask"] = lambda _body, _path: ("", ())
    system_bus.within().do(ASK)


def test_a_service_that_hangs_costs_no_more_than_the_limit_for_all_calls_together(
    system_bus, service
):
    service.hanging = {"Ask"}
    calls = system_bus.within()
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(NoAnswerError):
            calls.do(ASK)
    assert time.monotonic() - began < BOUNDED_SECONDS
    service.hanging = set()
    system_bus.within().do(ASK)


@pytest.mark.parametrize("was_connected", [True, False])
def test_a_bus_that_hangs_costs_no_more_than_the_limit(system_bus, service, bus, was_connected):
    if was_connected:
        system_bus.within().do(ASK)
    os.kill(bus.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(BusError):
            system_bus.within().do(ASK)
    finally:
        os.kill(bus.pid, signal.SIGCONT)
    assert time.monotonic() - began < BOUNDED_SECONDS
    system_bus.within().do(ASK)


def test_calls_go_on_after_a_restart_of_the_bus(system_bus, bus):
    with Service(bus.address, NAME):
        before = system_bus.within().owner(NAME)
        assert before
        bus.stop()
        with pytest.raises(NoBusError):
            system_bus.within().owner(NAME)
    bus.start()
    assert system_bus.within().owner(NAME) == ""
    bus.stop()
    bus.start()
    # The old connection is found to be dead only with this call.
    assert system_bus.within().owner(NAME) == ""


@pytest.mark.parametrize(
    "address", ["", "nonsense", "tcp:host=192.0.2.1", "unix:path=/nowhere/bus", "unix:abstract="]
)
def test_without_a_bus_the_error_says_so(tmp_path, address):
    # An empty variable stands for the default address, which may be a bus of this machine.
    with pytest.raises(NoBusError, match="cannot be reached"):
        SystemBus({"DBUS_SYSTEM_BUS_ADDRESS": address or f"unix:path={tmp_path}/none"}).within().do(
            ASK
        )


def test_what_is_no_bus_is_refused(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "bus"))
    listener.listen()

    def talk():
        end, _ = listener.accept()
        with end:
            end.recv(1024)
            end.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        with pytest.raises(NoBusError):
            SystemBus({"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/bus"}).within().do(ASK)
    finally:
        thread.join()
        listener.close()


def elsewhere(tmp_path):
    """A /proc in which every process but the own has another network."""
    for name in ("self", str(os.getpid())):
        (tmp_path / "proc" / name / "net").mkdir(parents=True)
        (tmp_path / "proc" / name / "net/dev").touch()
    return tmp_path / "proc"


def is_here(bus, processes, name=NAME):
    with closing(SystemBus(bus.environment, processes)) as system_bus:
        return system_bus.within().is_here(name)


def test_a_service_of_this_network_is_told_from_one_elsewhere(bus, service, tmp_path):
    assert is_here(bus, Path("/proc"))
    assert not is_here(bus, elsewhere(tmp_path))
    assert not is_here(bus, tmp_path / "nothing")
    assert not is_here(bus, Path("/proc"), "test.vnet.Nobody")


def test_facts_of_a_bus_with_nothing(system_bus):
    assert bus_facts.dbus_facts(system_bus) == BusFacts()


def test_facts_with_both_services(system_bus, bus):
    with FakeResolved(bus.address), FakeNetworkManager(bus.address, "systemd-resolved"):
        found = bus_facts.dbus_facts(system_bus)
    assert found == BusFacts(
        resolved=Presence.HERE,
        network_manager=Presence.HERE,
        dns_mode="systemd-resolved",
        rc_manager="symlink",
    )
    assert found.network_manager_role is NetworkManagerRole.FEEDS_RESOLVED


def test_facts_with_the_services_of_the_host_of_a_container(bus, tmp_path):
    with (
        FakeResolved(bus.address),
        FakeNetworkManager(bus.address),
        closing(SystemBus(bus.environment, elsewhere(tmp_path))) as system_bus,
    ):
        found = bus_facts.dbus_facts(system_bus)
    assert found == BusFacts(resolved=Presence.ELSEWHERE, network_manager=Presence.ELSEWHERE)
    assert found.network_manager_role is NetworkManagerRole.NONE


def test_facts_with_a_network_manager_that_hangs(system_bus, bus):
    with FakeResolved(bus.address), FakeNetworkManager(bus.address) as manager:
        manager.hanging = {"*"}
        began = time.monotonic()
        found = bus_facts.dbus_facts(system_bus)
    assert time.monotonic() - began < BOUNDED_SECONDS
    assert found == BusFacts(resolved=Presence.HERE, network_manager=Presence.SILENT)


def test_facts_without_a_bus(tmp_path):
    found = bus_facts.dbus_facts(SystemBus({"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/x"}))
    assert found.problem
    assert found.resolved is Presence.ABSENT


STUB = "# comment\nnameserver 127.0.0.53\noptions edns0 trust-ad\n"


@pytest.mark.parametrize(
    ("resolv_conf", "nsswitch", "use"),
    [
        (STUB, "hosts: files dns\n", ResolvedUse.ALL),
        (STUB, "hosts: files resolve [!UNAVAIL=return] dns\n", ResolvedUse.ALL),
        ("nameserver 127.0.0.54\n", "", ResolvedUse.ALL),
        ("nameserver 192.0.2.1\n", "hosts: files dns\n", ResolvedUse.NONE),
        # The stub as a second server is asked only when the first is silent.
        ("nameserver 192.0.2.1\nnameserver 127.0.0.53\n", "hosts: dns\n", ResolvedUse.NONE),
        ("nameserver 192.0.2.1\n", "hosts:\tfiles resolve dns # x\n", ResolvedUse.C_LIBRARY),
        ("", "passwd: files\nhosts: mymachines resolve\n", ResolvedUse.C_LIBRARY),
        ("", "# hosts: resolve\nhosts: files # resolve\n", ResolvedUse.NONE),
        ("", "", ResolvedUse.NONE),
    ],
)
def test_who_asks_systemd_resolved(resolv_conf, nsswitch, use):
    assert bus_facts.resolved_use(resolv_conf, nsswitch) is use


@pytest.mark.parametrize(
    ("mode", "rc_manager", "role"),
    [
        ("systemd-resolved", "unmanaged", NetworkManagerRole.FEEDS_RESOLVED),
        ("dnsmasq", "symlink", NetworkManagerRole.RUNS_DNSMASQ),
        ("dnsmasq", "resolvconf", NetworkManagerRole.RUNS_DNSMASQ),
        ("dnsmasq", "unmanaged", NetworkManagerRole.NONE),
        ("default", "symlink", NetworkManagerRole.REWRITES_FILE),
        ("default", "file", NetworkManagerRole.REWRITES_FILE),
        ("default", "netconfig", NetworkManagerRole.REWRITES_FILE),
        ("default", "resolvconf", NetworkManagerRole.FEEDS_RESOLVCONF),
        ("default", "unmanaged", NetworkManagerRole.NONE),
        ("none", "symlink", NetworkManagerRole.NONE),
    ],
)
def test_what_network_manager_does(mode, rc_manager, role):
    assert bus_facts.network_manager_role(mode, rc_manager) is role


def test_who_asks_a_dnsmasq():
    assert bus_facts.asks_dnsmasq("nameserver 127.0.0.1\n")
    assert not bus_facts.asks_dnsmasq("nameserver 192.0.2.1\nnameserver 127.0.0.1\n")
    assert not bus_facts.asks_dnsmasq(STUB)
    assert not bus_facts.asks_dnsmasq("")

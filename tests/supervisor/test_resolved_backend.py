"""What systemd-resolved is told of VNet's link; against one of our own on a real bus."""

import socket
import time
from contextlib import closing
from dataclasses import replace
from itertools import count

import pytest
from bus_bed import FakeNetworkManager, FakeResolved, PrivateBus

from supervisor import nameservers
from supervisor.osconfig import resolved
from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.dbus import SystemBus
from supervisor.osconfig.resolved import ResolvedBackend
from supervisor.osconfig.wish import ResolverWish

V4, V6 = bytes((100, 64, 0, 2)), bytes((0xFD, *[0] * 14, 2))
WISH = ResolverWish("vnet0", 7, ("corp.example.test", "db.example.test"), (V4, V6))
IN_FORCE = {
    "DNS": [(socket.AF_INET, V4), (socket.AF_INET6, V6)],
    "Domains": [("corp.example.test", True), ("db.example.test", True)],
    "DefaultRoute": False,
    "LLMNR": "no",
    "MulticastDNS": "no",
    "DNSSEC": "no",
    "DNSOverTLS": "no",
}
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
    with FakeResolved(bus.address) as found:
        yield found


@pytest.fixture
def backend(bus, tmp_path):
    system_bus = SystemBus(bus.environment)
    # Each look at the clock is an hour after the one before.
    yield ResolvedBackend(system_bus, tmp_path / "uplinks", count(0, 3600).__next__)
    system_bus.close()


def test_the_link_is_set_up_and_reverted(backend, service):
    backend.apply(WISH)
    assert service.links[7] == IN_FORCE
    # No moment in which names of others would be asked of VNet.
    members = service.members()
    assert members.index("SetLinkDefaultRoute") < members.index("SetLinkDNS")
    assert members.index("SetLinkDomains") < members.index("SetLinkDNS")
    assert backend.check() == []
    backend.undo()
    assert service.links[7] == {}
    calls = len(service.calls)
    backend.undo()
    assert len(service.calls) == calls


def test_nothing_is_said_twice(backend, service):
    backend.apply(WISH)
    calls = len(service.calls)
    backend.apply(WISH)
    assert len(service.calls) == calls
    assert backend.check() == []
    assert "SetLinkDNS" not in service.members()[calls:]


def test_zones_that_come_and_go_are_one_call_each(backend, service):
    backend.apply(WISH)
    calls = len(service.calls)
    backend.apply(replace(WISH, zones=("new.example.test",)))
    assert service.members()[calls:] == ["SetLinkDomains"]
    assert service.links[7]["Domains"] == [("new.example.test", True)]


def test_without_zones_no_server_is_asked_on_the_link(backend, service):
    backend.apply(replace(WISH, zones=()))
    assert (service.links[7]["DNS"], service.links[7]["Domains"]) == ([], [])
    backend.apply(WISH)
    assert service.links[7] == IN_FORCE
    backend.apply(replace(WISH, zones=()))
    assert (service.links[7]["DNS"], service.links[7]["Domains"]) == ([], [])
    assert backend.check() == []


def test_the_root_and_single_labels_are_never_asked_for(backend, service):
    backend.apply(replace(WISH, zones=("", ".", "com", "corp.example.test")))
    assert service.links[7]["Domains"] == [("corp.example.test", True)]


def test_without_a_link_nothing_is_called(backend, service):
    backend.apply(replace(WISH, index=0))
    assert backend.check() == []
    backend.undo()
    assert service.calls == []


def test_another_link_is_set_up_in_full(backend, service):
    backend.apply(WISH)
    service.links[9] = service.links.pop(7)
    service.links[9].clear()
    backend.apply(replace(WISH, index=9))
    assert service.links[9] == IN_FORCE


def test_settings_come_back_after_a_restart_of_systemd_resolved(backend, service):
    backend.apply(WISH)
    service.stop()
    with pytest.raises(OsConfigError, match="systemctl start systemd-resolved"):
        backend.check()
    service.links[7].clear()
    service.start()
    assert backend.check() == []
    assert service.links[7] == IN_FORCE


def test_settings_come_back_with_the_next_wish_as_well(backend, service):
    backend.apply(WISH)
    service.links[7].clear()
    service.restart()
    backend.apply(replace(WISH, zones=("db.example.test", "corp.example.test")))
    assert service.links[7]["DNS"] == IN_FORCE["DNS"]


def test_settings_come_back_after_a_restart_of_the_bus(backend, service, bus):
    backend.apply(WISH)
    bus.stop()
    with pytest.raises(OsConfigError, match="D-Bus"):
        backend.check()
    service.stop()
    service.links[7].clear()
    bus.start()
    service.start()
    assert backend.check() == []
    assert service.links[7] == IN_FORCE


def test_what_somebody_changes_is_mended_and_told_when_it_goes_on(backend, service):
    backend.apply(WISH)
    for setting, value in (("DNS", []), ("DefaultRoute", True), ("DNSSEC", "yes")):
        service.links[7][setting] = value
        answer = backend.check()
        assert service.links[7] == IN_FORCE
    (sentence,) = answer
    assert "Another program changes the DNS settings of vnet0" in sentence
    assert backend.check() == []


def test_settings_are_read_again_only_now_and_then(bus, service):
    with closing(SystemBus(bus.environment)) as system_bus:
        backend = ResolvedBackend(system_bus, clock=lambda: 100.0)
        backend.apply(WISH)
        for _ in range(5):
            assert backend.check() == []
    assert service.members().count("GetAll") == 1


def test_zones_in_another_order_are_no_change(backend, service):
    backend.apply(WISH)
    service.links[7]["Domains"].reverse()
    calls = len(service.calls)
    assert backend.check() == []
    assert "SetLinkDomains" not in service.members()[calls:]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("org.freedesktop.resolve1.LinkBusy", "systemd-networkd manages vnet0"),
        ("org.freedesktop.resolve1.NoSuchLink", "does not know vnet0 yet"),
        ("org.freedesktop.DBus.Error.AccessDenied", "AccessDenied"),
    ],
)
def test_what_it_refuses_is_told_and_tried_again(backend, service, error, sentence):
    accept = service.answers["SetLinkDomains"]
    service.refuse("SetLinkDomains", error)
    with pytest.raises(OsConfigError, match=sentence):
        backend.apply(WISH)
    assert "DNS" not in service.links[7]
    with pytest.raises(OsConfigError, match=sentence):
        backend.check()
    service.answers["SetLinkDomains"] = accept
    assert backend.check() == []
    assert service.links[7] == IN_FORCE


def test_an_old_one_that_knows_less_is_set_up_all_the_same(backend, service):
    for member in ("SetLinkDefaultRoute", "SetLinkDNSOverTLS", "SetLinkMulticastDNS"):
        del service.answers[member]
    backend.apply(WISH)
    assert service.links[7]["DNS"] == IN_FORCE["DNS"]
    assert service.links[7]["Domains"] == IN_FORCE["Domains"]
    assert backend.check() == []


def test_a_refused_dnssec_is_logged_once_with_its_consequence(backend, service, caplog):
    service.refuse("SetLinkDNSSEC", "org.freedesktop.DBus.Error.NotSupported")
    backend.apply(WISH)
    service.links[7]["DNSSEC"] = "yes"
    assert backend.check() == []
    service.restart()
    assert backend.check() == []
    assert caplog.text.count("DNSSEC=yes") == 1


@pytest.mark.parametrize("member", ["SetLinkDefaultRoute", "SetLinkDNSSEC", "SetLinkDNS"])
def test_one_that_hangs_costs_2_seconds_and_is_told(backend, service, member):
    service.hanging = {member}
    began = time.monotonic()
    with pytest.raises(OsConfigError, match="does not answer"):
        backend.apply(WISH)
    assert time.monotonic() - began < BOUNDED_SECONDS
    service.hanging = set()
    assert backend.check() == []
    assert service.links[7] == IN_FORCE


def test_an_undo_that_hangs_costs_2_seconds_and_is_told(backend, service):
    backend.apply(WISH)
    service.hanging = {"*"}
    began = time.monotonic()
    with pytest.raises(OsConfigError, match="ends with the interface"):
        backend.undo()
    assert time.monotonic() - began < BOUNDED_SECONDS


def test_an_undo_needs_neither_link_nor_service_nor_bus(backend, service, bus):
    backend.apply(WISH)
    del service.links[7]
    backend.undo()
    backend.apply(replace(WISH, index=0))
    service.links[7] = {}
    backend.apply(WISH)
    service.stop()
    backend.undo()
    service.start()
    backend.apply(WISH)
    bus.stop()
    backend.undo()
    bus.start()


def test_a_systemd_resolved_of_another_network_is_left_alone(bus, service, tmp_path):
    with closing(SystemBus(bus.environment, tmp_path / "no-processes")) as system_bus:
        backend = ResolvedBackend(system_bus)
        for attempt in (lambda: backend.apply(WISH), backend.check):
            with pytest.raises(OsConfigError, match="another network namespace"):
                attempt()
        # It would be the settings of somebody else's link.
        backend.undo()
    assert service.calls == []


def test_network_manager_is_kept_off_the_link(backend, service, bus):
    with FakeNetworkManager(bus.address, "systemd-resolved") as manager:
        backend.apply(WISH)
        assert manager.devices == {"vnet0": False}
        backend.check()
    assert manager.members().count("Set") == 1


def test_a_network_manager_that_hangs_is_in_nobodys_way(backend, service, bus):
    with FakeNetworkManager(bus.address) as manager:
        manager.hanging = {"*"}
        began = time.monotonic()
        backend.apply(WISH)
        assert time.monotonic() - began < BOUNDED_SECONDS
    assert service.links[7] == IN_FORCE


def test_upstream_are_the_servers_that_it_asks_itself(backend, service, tmp_path):
    assert backend.upstream() is None
    uplinks = tmp_path / "uplinks"
    uplinks.write_text(
        "# This is /run/systemd/resolve/resolv.conf\nnameserver 100.64.0.2\nnameserver 127.0.0.53\n"
        "nameserver 192.0.2.53\nnameserver fe80::1%1\nnameserver fe80::2%eth7\n"
    )
    backend.apply(WISH)
    loopback = socket.if_indextoname(1)
    assert backend.upstream() == [
        ("192.0.2.53", 53, ""),
        ("fe80::1", 53, loopback),
        ("fe80::2", 53, "eth7"),
    ]
    uplinks.write_text("# nothing\n")
    assert backend.upstream() == []


def test_the_messages_name_the_link_and_have_the_documented_signatures():
    found = {call.member: (call.signature, call.body) for call, _ in resolved.settings(WISH)}
    assert found["SetLinkDNS"] == ("ia(iay)", (7, IN_FORCE["DNS"]))
    assert found["SetLinkDomains"] == ("ia(sb)", (7, IN_FORCE["Domains"]))
    assert found["SetLinkDefaultRoute"] == ("ib", (7, False))
    assert {found[f"SetLink{name}"] for name in ("DNSSEC", "DNSOverTLS", "LLMNR")} == {
        ("is", (7, "no"))
    }


@pytest.mark.parametrize(
    ("text", "uplinks", "found"),
    [
        ("nameserver 127.0.0.53\n", [("192.0.2.53", 53, "")], [("192.0.2.53", 53, "")]),
        ("nameserver 192.0.2.1\n", [("192.0.2.53", 53, "")], [("192.0.2.1", 53, "")]),
        ("nameserver 127.0.0.53\n", None, [("127.0.0.53", 53, "")]),
        ("nameserver 127.0.0.53\n", [], [("127.0.0.53", 53, "")]),
    ],
    ids=["stub", "no stub", "no systemd-resolved", "no uplink"],
)
def test_the_stub_is_never_upstream_where_its_uplinks_are_known(
    tmp_path, monkeypatch, text, uplinks, found
):
    (tmp_path / "resolv.conf").write_text(text)
    monkeypatch.setattr(nameservers, "RESOLV_CONF", tmp_path / "resolv.conf")
    monkeypatch.setattr(nameservers, "read_uplinks", lambda: uplinks)
    assert nameservers.find_servers([], None) == found
    assert nameservers.find_servers(["192.0.2.9"], None) == [("192.0.2.9", 53, "")]

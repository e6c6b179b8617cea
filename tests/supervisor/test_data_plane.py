"""The data plane with real devices, in a network namespace of a forked child's own.

Nothing pumps packets here: only what the kernel was told is looked at.
"""

import dataclasses
import gc
import os
import socket
import subprocess
import traceback
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import msgspec
import pytest
from run_fakes import NETWORK

from ipc import messages as m
from supervisor import namespace, network
from supervisor.config import NetworkConfig
from supervisor.dataplane import KeptLink, UnfitLinkError
from supervisor.devices import Links
from supervisor.exits import ConflictError, NotPermittedError
from supervisor.namespace_plane import INNER_NAME, NamespaceDataPlane

pytestmark = pytest.mark.root


def in_own_network(action: Callable[[], None]) -> None:
    """Runs `action` in a child with a network namespace of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            namespace._check(namespace._libc.unshare(namespace.CLONE_NEWNET))
            action()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # shown, and the parent fails
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def ipv4(text: str) -> bytes:
    return IPv4Address(text).packed


def ipv6(text: str) -> bytes:
    return IPv6Address(text).packed


def test_outer_device_has_addresses_routes_and_mtu():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        link = ip("link", "show", "vnet0")
        assert "mtu 65535" in link
        assert ",UP" in link
        addresses = ip("addr", "show", "vnet0")
        assert "inet 100.64.0.1/32" in addresses
        assert "inet6 fd60:67ec:4325::1/128" in addresses
        assert "tentative" not in addresses
        assert "fe80::" not in addresses
        assert "100.64.0.0/10 proto static src 100.64.0.1" in ip("route", "show", "dev", "vnet0")
        assert "fd60:67ec:4325::/64" in ip("-6", "route", "show", "dev", "vnet0")
        plane.close()

    in_own_network(check)


def test_inner_namespace_has_every_virtual_address_but_the_outer_devices():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        assert INNER_NAME not in interfaces()
        with namespace.inside(plane._namespace):
            assert interfaces() == {"lo", INNER_NAME}
            for address, device in (("100.99.1.2", "local"), ("100.64.0.1", INNER_NAME)):
                assert device in ip("route", "get", address)
            assert "local" in ip("-6", "route", "get", "fd60:67ec:4325::6440:304")
            assert INNER_NAME in ip("-6", "route", "get", "fd60:67ec:4325::1")
        assert "vnet0" in interfaces()
        plane.close()

    in_own_network(check)


def test_dns_sockets_are_bound_in_the_inner_namespace():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        sockets = [socket.socket(fileno=os.dup(number)) for number in plane.dns_descriptors]
        assert [end.type for end in sockets] == [socket.SOCK_DGRAM] * 2 + [socket.SOCK_STREAM] * 2
        names = [end.getsockname()[:2] for end in sockets]
        assert names == [("100.64.0.2", 53), ("fd60:67ec:4325::2", 53)] * 2
        assert not any(map(os.get_blocking, plane.dns_descriptors))
        with namespace.inside(plane._namespace):
            client = socket.create_connection(("100.64.0.2", 53), timeout=5)
        sockets[2].setblocking(True)
        accepted, _ = sockets[2].accept()
        assert accepted.getsockname() == ("100.64.0.2", 53)
        for end in (*sockets, client, accepted):
            end.close()
        plane.close()

    in_own_network(check)


def test_listener_accepts_on_its_virtual_address_only():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        for packed, text in (
            (ipv4("100.99.1.2"), "100.99.1.2"),
            (ipv6("fd60:67ec:4325::6463:102"), "fd60:67ec:4325::6463:102"),
        ):
            listener = plane.open_listener(packed, 80)
            assert not listener.getblocking()
            assert not listener.get_inheritable()
            with namespace.inside(plane._namespace):
                client = socket.create_connection((text, 80), timeout=5)
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((text, 81), timeout=5)
            listener.setblocking(True)
            accepted, _ = listener.accept()
            assert accepted.getsockname()[:2] == (text, 80)
            with pytest.raises(OSError, match="in use"):
                plane.open_listener(packed, 80)
            for end in (listener, client, accepted):
                end.close()
            plane.open_listener(packed, 80).close()  # in spite of TIME_WAIT
        plane.close()

    in_own_network(check)


def routed() -> set[str]:
    return {line.split()[0] for line in ip("route", "show", "dev", "vnet0").splitlines()}


def test_ranges_can_be_set_again_and_again():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        own = NETWORK.ranges[0]
        for wanted in ([own], [own, "10.1.0.0/16", "10.2.0.0/24"], [own, "10.2.0.0/24"], [own]):
            for _ in range(2):
                plane.set_ranges(wanted)
                assert routed() == set(wanted)
                with namespace.inside(plane._namespace):
                    for address, block in (("10.1.9.9", wanted[1:2]), ("100.99.1.2", [own])):
                        if block and block[0].startswith(address[:4]):
                            assert "local" in ip("route", "get", address)
        listener = plane.open_listener(ipv4("100.99.1.2"), 80)
        listener.close()
        plane.close()

    in_own_network(check)


def test_answers_go_back_to_exactly_the_forwarded_networks():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        outside = everything_set()

        def has_way_back(address: str) -> bool:
            with namespace.inside(plane._namespace):
                done = subprocess.run(
                    ["ip", "route", "get", address], check=False, capture_output=True, text=True
                )
            return INNER_NAME in done.stdout

        steps = [
            ["172.30.0.0/24"],
            ["172.30.0.0/24", "fd12::/64", "10.9.0.0/16"],
            ["fd12::/64", "100.64.0.1/32", "fd60:67ec:4325::1/128"],
            [],
        ]
        for wanted in steps:
            for _ in range(2):
                assert plane.set_forwarded(wanted) == {}
                assert has_way_back("172.30.0.9") == ("172.30.0.0/24" in wanted)
                assert has_way_back("fd12::9") == ("fd12::/64" in wanted)
                assert has_way_back("10.9.1.1") == ("10.9.0.0/16" in wanted)
                assert has_way_back("100.64.0.1")
                assert has_way_back("fd60:67ec:4325::1")
                assert not has_way_back("172.30.1.9")
                with namespace.inside(plane._namespace):
                    assert "local" in ip("route", "get", "100.99.1.2")
        assert everything_set() == outside
        # Whoever goes on with the link takes away what an earlier process has routed.
        plane.set_forwarded(["172.30.0.0/24"])
        kept = copies(plane.keep())
        plane.close()
        plane = NamespaceDataPlane.adopt(kept)
        assert has_way_back("172.30.0.9")
        plane.set_forwarded(["10.9.0.0/16"])
        assert (has_way_back("172.30.0.9"), has_way_back("10.9.1.1")) == (False, True)
        plane.close()

    in_own_network(check)


def test_forwarded_network_that_cannot_be_routed_does_no_harm_to_others():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        with namespace.inside(plane._namespace):
            Path("/proc/sys/net/ipv6/conf/vnet-inner/disable_ipv6").write_text("1")
        failed = plane.set_forwarded(["172.30.0.0/24", "fd12::/64"])
        assert list(failed) == ["fd12::/64"]
        assert isinstance(failed["fd12::/64"], OSError)
        with namespace.inside(plane._namespace):
            assert INNER_NAME in ip("route", "get", "172.30.0.9")
        plane.close()

    in_own_network(check)


def test_range_whose_routes_are_half_there_is_completed():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        ip("route", "add", "10.1.0.0/16", "dev", "vnet0")
        plane.set_ranges([*NETWORK.ranges, "10.1.0.0/16"])
        ip("route", "del", "10.1.0.0/16", "dev", "vnet0")
        plane.set_ranges(NETWORK.ranges)
        assert routed() == set(NETWORK.ranges)
        plane.close()

    in_own_network(check)


def test_range_that_is_routed_elsewhere_is_not_taken_silently():
    def check() -> None:
        ip("tuntap", "add", "other", "mode", "tun")
        ip("link", "set", "other", "up")
        ip("route", "add", "10.1.0.0/16", "dev", "other")
        plane = NamespaceDataPlane(NETWORK)
        failed = plane.set_ranges([*NETWORK.ranges, "10.1.0.0/16", "10.2.0.0/16"])
        assert list(failed) == ["10.1.0.0/16"]
        assert isinstance(failed["10.1.0.0/16"], FileExistsError)
        # The others do not suffer from it.
        assert routed() == {*NETWORK.ranges, "10.2.0.0/16"}
        plane.close()
        ip("route", "add", NETWORK.ranges[0], "dev", "other")
        with pytest.raises(ConflictError, match="routed to another interface"):
            NamespaceDataPlane(NETWORK)
        assert "vnet0" not in interfaces()

    in_own_network(check)


def test_removed_device_is_an_os_error():
    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        ip("link", "del", "vnet0")
        assert "10.1.0.0/16" in plane.set_ranges([*NETWORK.ranges, "10.1.0.0/16"])
        plane.close()

    in_own_network(check)


def test_nothing_is_left_after_close():
    def check() -> None:
        NamespaceDataPlane(NETWORK).close()  # what libraries open once
        descriptors, before = open_descriptors(), interfaces()
        for _ in range(3):
            plane = NamespaceDataPlane(NETWORK)
            plane.set_ranges([*NETWORK.ranges, "10.1.0.0/16"])
            plane.close()
            plane.close()
            assert interfaces() == before
            assert "100.64" not in ip("route", "show", "table", "all")
        assert open_descriptors() == descriptors

    in_own_network(check)


@pytest.mark.parametrize("taken", ["interface", "tun address", "dns address"])
def test_what_is_taken_is_a_conflict_and_nothing_is_left(taken):
    def check() -> None:
        ip("tuntap", "add", "vnet0" if taken == "interface" else "other", "mode", "tun")
        if taken != "interface":
            address = "100.64.0.1" if taken == "tun address" else "100.64.0.2"
            ip("addr", "add", f"{address}/32", "dev", "other")
        before, descriptors = interfaces(), open_descriptors()
        with pytest.raises(ConflictError, match=r"network\.(interface|ipv4_cidr_range)"):
            NamespaceDataPlane(NETWORK)
        assert interfaces() == before
        assert open_descriptors() <= descriptors

    in_own_network(check)


@pytest.mark.parametrize("capability", ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"])
def test_missing_right_is_named(capability):
    def check() -> None:
        number = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}[capability]
        drop_capability(number)
        with pytest.raises(NotPermittedError, match=capability):
            NamespaceDataPlane(NETWORK)
        assert "vnet0" not in interfaces()

    in_own_network(check)


def drop_capability(number: int) -> None:
    import ctypes

    from supervisor.privileges import CAPABILITY_VERSION, _libc

    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    words = (ctypes.c_uint32 * 6)()
    assert _libc.capget(header, words) == 0
    for word in (0, 1, 2):  # effective, permitted, inheritable
        words[word] &= ~(1 << number)
    assert _libc.capset(header, words) == 0


def test_missing_tun_device_is_not_permitted(monkeypatch):
    monkeypatch.setattr("supervisor.devices.TUN_PATH", Path("/nowhere/tun"))
    with pytest.raises(NotPermittedError, match="modprobe tun"):
        NamespaceDataPlane(NETWORK)


def test_without_ipv6_there_is_none():
    def check() -> None:
        plane = NamespaceDataPlane(network.plan(NetworkConfig(interface="v4only", mtu=1280), None))
        assert len(plane.dns_descriptors) == 2
        assert "inet6" not in ip("addr", "show", "v4only")
        assert "mtu 1280" in ip("link", "show", "v4only")
        plane.close()

    in_own_network(check)


def test_namespace_lives_as_long_as_its_descriptor_and_is_entered_for_a_block_only():
    def check() -> None:
        here = os.readlink("/proc/thread-self/ns/net")  # noqa: PTH115
        inner = namespace.make_network_namespace()
        with namespace.inside(inner):
            links = Links()
            links.bring_up("lo")
            assert links.addresses() == {ipv4("127.0.0.1"), ipv6("::1")}
            links.close()
        with pytest.raises(ZeroDivisionError), namespace.inside(inner):
            raise ZeroDivisionError
        assert os.readlink("/proc/thread-self/ns/net") == here  # noqa: PTH115
        os.close(inner)
        with pytest.raises(OSError), namespace.inside(inner):
            pass
        assert os.readlink("/proc/thread-self/ns/net") == here  # noqa: PTH115

    in_own_network(check)


def test_plan_is_a_message_part():
    assert isinstance(NETWORK, m.Network)


# -- going on with the link of an earlier process --


def copies(kept: KeptLink) -> KeptLink:
    """The same link as another process would get it."""
    return KeptLink(
        network=kept.network,
        outer=os.dup(kept.outer),
        inner=os.dup(kept.inner),
        namespace=os.dup(kept.namespace),
        # As a service manager gives them back.
        dns=tuple(os.dup(descriptor) for descriptor in reversed(kept.dns)),
    )


def everything_set() -> tuple[str, ...]:
    """What the kernel was told, but for counters and times."""
    return (
        ip("-br", "link"),
        ip("-br", "addr"),
        ip("route", "show", "table", "all"),
        ip("-6", "route", "show", "table", "all"),
    )


def test_link_is_gone_on_with_as_it_is():
    def check() -> None:
        first = NamespaceDataPlane(NETWORK)
        first.set_ranges([*NETWORK.ranges, "10.1.0.0/16"])
        index, before = socket.if_nametoindex("vnet0"), everything_set()
        with namespace.inside(first._namespace):
            inner_before = everything_set()
        listener = first.open_listener(ipv4("100.99.1.2"), 80)
        kept = copies(first.keep())
        first.close()
        second = NamespaceDataPlane.adopt(kept)
        assert socket.if_nametoindex("vnet0") == index
        assert everything_set() == before
        with namespace.inside(second._namespace):
            assert everything_set() == inner_before
            # The listener is where the new ones will be.
            socket.create_connection(("100.99.1.2", 80), timeout=5).close()
        assert second.keep().network.ranges == [*NETWORK.ranges, "10.1.0.0/16"]
        names = [socket.socket(fileno=os.dup(d)) for d in second.dns_descriptors]
        assert [(end.type, end.getsockname()[0]) for end in names] == [
            (kind, address)
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)
            for address in ("100.64.0.2", "fd60:67ec:4325::2")
        ]
        second.set_ranges(NETWORK.ranges)
        assert routed() == set(NETWORK.ranges)
        for end in (*names, listener):
            end.close()
        second.close()
        assert "vnet0" not in interfaces()

    in_own_network(check)


def test_what_the_link_lacks_is_mended():
    def check() -> None:
        first = NamespaceDataPlane(NETWORK)
        first.set_ranges([*NETWORK.ranges, "10.1.0.0/16"])
        index, before = socket.if_nametoindex("vnet0"), everything_set()
        with namespace.inside(first._namespace):
            inner_before = everything_set()
            ip("link", "set", INNER_NAME, "down")
            ip("route", "flush", "table", "local", "10.1.0.0/16")
            ip("link", "set", "lo", "down")
        ip("addr", "flush", "dev", "vnet0")
        ip("link", "set", "vnet0", "down")
        ip("link", "set", "vnet0", "mtu", "1400")
        kept = copies(first.keep())
        first.close()
        second = NamespaceDataPlane.adopt(kept)
        assert socket.if_nametoindex("vnet0") == index
        assert set(before[2].splitlines()) == set(ip("route", "show", "table", "all").splitlines())
        assert everything_set()[:2] == before[:2]
        with namespace.inside(second._namespace):
            assert everything_set()[:2] == inner_before[:2]
            assert "local" in ip("route", "get", "10.1.2.3")
            assert INNER_NAME in ip("route", "get", "100.64.0.1")
        second.close()

    in_own_network(check)


def test_range_that_another_interface_has_now_is_left_out(caplog):
    def check() -> None:
        first = NamespaceDataPlane(NETWORK)
        kept = copies(first.keep())
        first.close()
        ip("tuntap", "add", "other", "mode", "tun")
        ip("link", "set", "other", "up")
        ip("route", "add", "10.1.0.0/16", "dev", "other")
        routed_before = msgspec.structs.replace(NETWORK, ranges=[*NETWORK.ranges, "10.1.0.0/16"])
        second = NamespaceDataPlane.adopt(dataclasses.replace(kept, network=routed_before))
        assert second.keep().network.ranges == NETWORK.ranges
        assert "10.1.0.0/16 cannot be routed any more" in caplog.text
        second.close()

    in_own_network(check)


@pytest.mark.parametrize("harm", ["deleted", "renamed", "moved", "no dns", "swapped", "no tun"])
def test_link_beyond_mending_is_removed_altogether(harm):
    def check() -> None:
        NamespaceDataPlane(NETWORK).close()  # what libraries open once
        descriptors = open_descriptors()
        first = NamespaceDataPlane(NETWORK)
        kept = copies(first.keep())
        if harm == "deleted":
            ip("link", "del", "vnet0")
        elif harm == "renamed":
            ip("link", "set", "vnet0", "down")
            ip("link", "set", "vnet0", "name", "vnet5")
        elif harm == "moved":
            other = namespace.make_network_namespace()
            ip("link", "set", "vnet0", "netns", f"/proc/{os.getpid()}/fd/{other}")
            os.close(other)
        elif harm == "no dns":
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, kept.dns[0])
            os.close(null)
        elif harm == "swapped":
            kept = dataclasses.replace(kept, outer=kept.inner, inner=kept.outer)
        else:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, kept.outer)
            os.close(null)
        # Another process, the service manager, has copies as well: it is first here.
        with pytest.raises(UnfitLinkError):
            NamespaceDataPlane.adopt(kept)
        first.close()
        assert not {"vnet0", "vnet5"} & interfaces()
        assert open_descriptors() == descriptors
        NamespaceDataPlane(NETWORK).close()

    in_own_network(check)


def test_removed_link_is_gone_though_others_have_copies():
    def check() -> None:
        first = NamespaceDataPlane(NETWORK)
        kept = copies(first.keep())
        first.remove()
        assert "vnet0" not in interfaces()
        first.remove()
        kept.close()

    in_own_network(check)

"""The data plane without an inner namespace, with a real device in a network of its own.

Nothing rewrites packets here: only what the kernel was told is looked at.
"""

import errno
import os
import socket
import subprocess

import msgspec
import pytest
from own_network import in_own_network, ip
from run_fakes import NETWORK, settings

from ipc.messages import DataPlaneKind, Redirect
from supervisor import link_making
from supervisor.dataplane import KeptLink, LinkLostError, UnfitLinkError
from supervisor.devices import LinuxHost
from supervisor.exits import ConflictError, MisconfiguredError
from supervisor.link_store import LinkStore
from supervisor.namespace import inside, make_network_namespace
from supervisor.namespace_plane import NoNamespaceError
from supervisor.notify import Notifier
from supervisor.rewriting_plane import RewritingDataPlane

pytestmark = pytest.mark.root

APP, APP_IPV6 = socket.inet_aton("100.99.1.2"), NETWORK.ipv6_prefix[:8] + b"\0" * 7 + b"\x09"
OWN = {4: "100.64.0.1", 16: "fd60:67ec:4325::1"}


def make(network=NETWORK) -> RewritingDataPlane:
    return RewritingDataPlane(network, LinuxHost())


def everything_set() -> tuple[str, ...]:
    return (
        ip("-br link"),
        ip("-br addr"),
        ip("route show table all"),
        ip("-6 route show table all"),
    )


def test_device_has_addresses_and_routes_and_there_is_no_other():
    def check() -> None:
        plane = make()
        assert {name for _, name in socket.if_nameindex()} == {"lo", "vnet0"}
        addresses = ip("addr show vnet0")
        assert "inet 100.64.0.1/32" in addresses
        assert "inet6 fd60:67ec:4325::1/128" in addresses
        assert "100.64.0.0/10 proto static src 100.64.0.1" in ip("route show dev vnet0")
        assert plane.has_ipv6
        assert len(plane.tun_descriptors) == 1
        failed = plane.set_ranges([*NETWORK.ranges, "10.1.0.0/16"])
        assert failed == {}
        assert "10.1.0.0/16" in ip("route show dev vnet0")
        plane.remove()
        assert {name for _, name in socket.if_nameindex()} == {"lo"}

    in_own_network(check)


def test_dns_sockets_are_where_the_redirects_say():
    def check() -> None:
        plane = make()
        ends = [socket.socket(fileno=os.dup(number)) for number in plane.dns_descriptors]
        assert [end.type for end in ends] == [socket.SOCK_DGRAM] * 2 + [socket.SOCK_STREAM] * 2
        assert [end.getsockname()[0] for end in ends] == [OWN[4], OWN[16]] * 2
        assert plane.dns_redirects == [
            Redirect(
                address=address,
                port=53,
                local_port=end.getsockname()[1],
                is_udp=end.type == socket.SOCK_DGRAM,
            )
            for address, end in zip([NETWORK.dns_ipv4, NETWORK.dns_ipv6] * 2, ends, strict=True)
        ]
        for end in ends:
            end.close()
        plane.close()

    in_own_network(check)


@pytest.mark.parametrize("address", [APP, APP_IPV6])
def test_each_listener_has_a_port_that_nobody_else_gets(address):
    def check() -> None:
        plane = make()
        listeners = [plane.open_listener(address, port) for port in (80, 443)]
        ports = {listener.getsockname()[1] for listener in listeners}
        assert len(ports) == 2
        for listener in listeners:
            where = listener.getsockname()[:2]
            assert where[0] == OWN[len(address)]
            assert not listener.getblocking()
            assert not listener.get_inheritable()
            with socket.socket(listener.family) as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with pytest.raises(OSError, match="in use"):
                    other.bind(where)
            listener.close()
        plane.close()

    in_own_network(check)


def test_other_machines_do_not_reach_the_sockets():
    def check() -> None:
        plane = make()
        listener = plane.open_listener(APP, 80)
        where = listener.getsockname()
        there = make_network_namespace()
        target = f"/proc/{os.getpid()}/fd/{there}"
        ip(f"link add here type veth peer name there netns {target}")
        ip("addr add 192.0.2.1/24 dev here")
        ip("link set here up")
        with inside(there):
            ip("addr add 192.0.2.2/24 dev there")
            ip("link set there up")
            ip("route add 100.64.0.1/32 via 192.0.2.1")
            # The way is open: only the sockets are not there for it.
            subprocess.run(["ping", "-c1", "-W5", where[0]], check=True, capture_output=True)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(where, timeout=5)
            with socket.socket(type=socket.SOCK_DGRAM) as asking:
                asking.settimeout(5)
                asking.connect((where[0], plane.dns_redirects[0].local_port))
                asking.send(b"a question")
                with pytest.raises(ConnectionRefusedError):
                    asking.recv(100)
        os.close(there)
        listener.close()
        plane.close()

    in_own_network(check)


def test_without_ipv6_there_is_none():
    def check() -> None:
        plane = make(
            msgspec.structs.replace(NETWORK, ipv6_prefix=None, tun_ipv6=None, dns_ipv6=None)
        )
        assert len(plane.dns_descriptors) == len(plane.dns_redirects) == 2
        with pytest.raises(OSError, match="IPv6 is off"):
            plane.open_listener(APP_IPV6, 80)
        plane.close()

    in_own_network(check)


def test_taken_address_is_a_conflict_and_nothing_is_left():
    def check() -> None:
        ip("link set lo up")
        ip("addr add 100.64.0.1/32 dev lo")
        with pytest.raises(ConflictError, match=r"100\.64\.0\.1 is taken"):
            make()
        assert {name for _, name in socket.if_nameindex()} == {"lo"}

    in_own_network(check)


def test_what_others_take_away_is_mended():
    def check() -> None:
        plane = make()
        plane.set_ranges([*NETWORK.ranges, "10.1.0.0/16"])
        before = everything_set()
        ip("addr flush dev vnet0")
        ip("link set vnet0 down")
        assert "it was down" in plane.mend()
        assert everything_set()[:2] == before[:2]
        assert set(everything_set()[2].splitlines()) == set(before[2].splitlines())
        ip("link del vnet0")
        with pytest.raises(LinkLostError):
            plane.mend()
        plane.close()

    in_own_network(check)


# -- going on with the link of an earlier process --


def copies(kept: KeptLink) -> KeptLink:
    dns = tuple(os.dup(descriptor) for descriptor in reversed(kept.dns))
    return KeptLink(kept.network, os.dup(kept.outer), None, None, dns)


def test_link_is_gone_on_with_as_it_is():
    def check() -> None:
        first = make()
        first.set_ranges([*NETWORK.ranges, "10.1.0.0/16"])
        index, before = socket.if_nametoindex("vnet0"), everything_set()
        redirects = first.dns_redirects
        kept = copies(first.keep())
        assert kept.kind is DataPlaneKind.REWRITING
        first.close()
        second = RewritingDataPlane.adopt(kept, LinuxHost())
        assert socket.if_nametoindex("vnet0") == index
        assert everything_set() == before
        # tun may still have the table of before.
        assert second.dns_redirects == redirects
        assert second.keep().network.ranges == [*NETWORK.ranges, "10.1.0.0/16"]
        second.close()
        assert "vnet0" not in {name for _, name in socket.if_nameindex()}

    in_own_network(check)


@pytest.mark.parametrize("harm", ["deleted", "renamed", "no dns", "no tun"])
def test_link_beyond_mending_is_removed_altogether(harm):
    def check() -> None:
        first = make()
        kept = copies(first.keep())
        if harm == "deleted":
            ip("link del vnet0")
        elif harm == "renamed":
            ip("link set vnet0 down")
            ip("link set vnet0 name vnet5")
        else:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, kept.dns[0] if harm == "no dns" else kept.outer)
            os.close(null)
        with pytest.raises(UnfitLinkError):
            RewritingDataPlane.adopt(kept, LinuxHost())
        first.close()
        assert {name for _, name in socket.if_nameindex()} == {"lo"}
        make().close()

    in_own_network(check)


# -- which of the two --


def make_link(monkeypatch, tmp_path, wish):
    monkeypatch.setenv("VNET_DATA_PLANE", wish)
    return link_making.make(settings(state_dir=tmp_path), None, LinkStore(Notifier({})), list)


@pytest.mark.parametrize(
    ("wish", "kind"), [("auto", "namespace"), ("", "namespace"), ("rewriting", "rewriting")]
)
def test_wish_decides_and_a_namespace_is_the_default(monkeypatch, tmp_path, wish, kind):
    def check() -> None:
        plane, network = make_link(monkeypatch, tmp_path, wish)
        assert plane.kind == kind
        assert network.interface == "vnet0"
        plane.close()

    in_own_network(check)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EPERM, "no"), "CAP_SYS_ADMIN"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    ],
)
def test_where_a_namespace_cannot_be_made_packets_are_rewritten(
    monkeypatch, tmp_path, caplog, error, reason
):
    def refuse() -> int:
        raise error

    monkeypatch.setattr("supervisor.namespace_plane.make_network_namespace", refuse)

    def check() -> None:
        plane, _ = make_link(monkeypatch, tmp_path, "auto")
        assert plane.kind is DataPlaneKind.REWRITING
        lines = [record.getMessage() for record in caplog.records]
        assert sum("packets are rewritten" in line and reason in line for line in lines) == 1
        plane.close()
        with pytest.raises(NoNamespaceError, match=reason):
            make_link(monkeypatch, tmp_path, "namespace")
        assert {name for _, name in socket.if_nameindex()} == {"lo"}

    in_own_network(check)


def test_unknown_wish_is_a_mistake():
    with pytest.raises(MisconfiguredError, match="'tap' is none of auto, namespace, rewriting"):
        link_making.wished({"VNET_DATA_PLANE": "tap"})

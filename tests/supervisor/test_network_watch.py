"""Looking after the interface, with the kernel itself, in a network namespace of a child's own."""

import select
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import msgspec
import pytest
from own_network import add_link, in_own_network, ip
from run_fakes import NETWORK

from supervisor import network, network_watch
from supervisor.dataplane import LinkLostError
from supervisor.host_network import HostNetwork, Monitor, read_host
from supervisor.namespace_plane import NamespaceDataPlane
from supervisor.network_watch import HostChange, NetworkWatch
from supervisor.osconfig.route_conflicts import conflicts

pytestmark = pytest.mark.root

PATIENCE_SECONDS = 20.0
OWN = IPv4Network(NETWORK.ranges[0])


class Watched:
    """A data plane and its watch; to be used in a namespace of its own."""

    def __init__(self, outsiders=()) -> None:
        self.plane = NamespaceDataPlane(NETWORK)
        self.network = NETWORK
        self.changes: list[HostChange] = []
        self.watch = NetworkWatch(
            self.plane,
            network=lambda: self.network,
            outsiders=lambda: outsiders,
            user=0,
            is_auto=True,
        )

    def turn(self) -> None:
        """One turn of a loop, as the supervisor has it."""
        seconds = max(0.0, min(0.1, self.watch.next_look_at - time.monotonic()))
        if select.select([self.watch], [], [], seconds)[0]:
            self.watch.hear()
        if change := self.watch.tick(time.monotonic()):
            self.changes.append(change)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, (self.watch.problems, self.changes)
            self.turn()

    def settle(self) -> None:
        """Until nothing is heard and nothing is to be looked at soon."""
        self.until(lambda: self.watch.next_look_at > time.monotonic() + 5)

    @property
    def problem(self) -> str:
        return "\n".join(self.watch.problems)


def routed(what: str = "route show dev vnet0") -> str:
    return ip(what)


# -- what the kernel says --


SCENARIOS = {
    "nothing": [],
    "tailscale": [
        "route add 100.64.0.0/10 dev a0 table 52",
        "route add throw 127.0.0.0/8 table 52",
        "rule add pref 5210 fwmark 0x80000/0xff0000 lookup main",
        "rule add pref 5250 fwmark 0x80000/0xff0000 unreachable",
        "rule add pref 5270 lookup 52",
    ],
    "wg-quick": [
        "route add default dev a0 table 51820",
        "rule add pref 200 lookup main suppress_prefixlength 0",
        "rule add pref 201 not fwmark 51820 lookup 51820",
    ],
    "halves": ["route add 0.0.0.0/1 dev a0", "route add 128.0.0.0/1 dev a0"],
    "table before": ["route add default dev a0 table 7", "rule add pref 7 lookup 7"],
    "throw before": [
        "route add default dev a0 table 7",
        "route add throw 100.0.0.0/8 table 7",
        "rule add pref 7 lookup 7",
    ],
    "high table": ["route add default dev a0 table 1000", "rule add pref 7 lookup 1000"],
    "goto": [
        "route add default dev a0 table 7",
        "rule add pref 6 goto 32766",
        "rule add pref 7 lookup 7",
    ],
    "to elsewhere": ["route add default dev a0 table 7", "rule add pref 7 to 10.0.0.0/8 lookup 7"],
    "not to here": [
        "route add default dev a0 table 7",
        "rule add pref 7 not to 100.0.0.0/8 lookup 7",
    ],
    "to a part": ["route add default dev a0 table 7", "rule add pref 7 to 100.64.0.0/25 lookup 7"],
    "other user": [
        "route add default dev a0 table 7",
        "rule add pref 7 uidrange 4000-5000 lookup 7",
    ],
    "this user": ["route add default dev a0 table 7", "rule add pref 7 uidrange 0-5 lookup 7"],
    "some ports": ["route add default dev a0 table 7", "rule add pref 7 dport 22 lookup 7"],
    "source": ["route add default dev a0 table 7", "rule add pref 7 from 10.9.0.0/16 lookup 7"],
    "bound": ["route add default dev a0 table 7", "rule add pref 7 oif a0 lookup 7"],
    "vrf": ["route add default dev a0 table 7", "rule add pref 7 l3mdev"],
    "refused": ["rule add pref 7 to 100.64.0.0/25 prohibit"],
    "blackhole": ["route add blackhole 100.64.0.0/25"],
    "two ways": ["route add 100.64.0.0/25 nexthop dev a0 nexthop dev a0"],
    "wide": ["route add 100.0.0.0/8 dev a0"],
    "lan": ["address add 100.64.0.77/25 dev a0"],
    "default": ["route add default dev a0 metric 100"],
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_kernel_agrees(name):
    def check() -> None:
        add_link("a0", "10.200.0.2/32")
        ip(*SCENARIOS[name])
        found = conflicts(read_host(), "vnet0", OWN, 0)
        plane = NamespaceDataPlane(NETWORK)
        assert conflicts(read_host(), "vnet0", OWN, 0) == found
        kernel = HostNetwork()
        # Every scenario that takes a part takes the first 128 addresses.
        addresses = [OWN[3].packed, OWN[100].packed, OWN[50].packed]
        ways = {kernel.way_to(address).interface for address in addresses}
        assert (found == []) == (ways == {"vnet0"}), (found, ways)
        kernel.close()
        plane.close()

    in_own_network(check)


def test_what_cannot_be_looked_at_leaves_nothing_open(monkeypatch):
    def refuse(_network):
        raise OSError("no room")

    def check() -> None:
        plane = NamespaceDataPlane(NETWORK)
        open_before = set(Path("/proc/self/fd").iterdir())
        monkeypatch.setattr(HostNetwork, "read", refuse)
        with pytest.raises(OSError, match="no room"):
            NetworkWatch(plane, network=lambda: NETWORK, outsiders=tuple, user=0, is_auto=True)
        assert set(Path("/proc/self/fd").iterdir()) == open_before
        plane.close()

    in_own_network(check)


def test_monitor_hears_what_changes_and_survives_to_be_told_too_much():
    def check() -> None:
        monitor = Monitor()
        assert not monitor.has_heard()
        add_link("a0")
        select.select([monitor], [], [], PATIENCE_SECONDS)
        while monitor.has_heard():
            pass
        monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        ip(*(f"route add 10.{number}.0.0/16 dev a0" for number in range(100)))
        assert monitor.has_heard()
        while monitor.has_heard():
            pass
        ip("route delete 10.1.0.0/16 dev a0")
        select.select([monitor], [], [], PATIENCE_SECONDS)
        assert monitor.has_heard()
        monitor.close()

    in_own_network(check)


# -- the watch --


@pytest.mark.parametrize(
    ("command", "what", "sign"),
    [
        ("route delete 100.64.0.0/10", "route show dev vnet0", "100.64.0.0/10"),
        ("address delete 100.64.0.1/32 dev vnet0", "address show dev vnet0", "100.64.0.1/32"),
        (
            "-6 address delete fd60:67ec:4325::1/128 dev vnet0",
            "-6 route show dev vnet0",
            "src fd60",
        ),
        ("-6 route delete fd60:67ec:4325::/64", "-6 route show dev vnet0", "::/64"),
        ("link set vnet0 down", "link show dev vnet0", ",UP"),
    ],
)
def test_what_is_taken_away_is_put_back(command, what, sign):
    def check() -> None:
        watched = Watched()
        before = ip(what)
        assert sign in before
        watched.settle()
        ip(command)
        assert sign not in ip(what)
        watched.until(lambda: ip(what) == before)
        watched.settle()
        assert watched.problem == ""

    in_own_network(check)


def lose_after_mending(monkeypatch, commands: list[str]) -> None:
    """Carries out the last of these commands, which it takes away, each time after the interface was mended."""
    mend = NamespaceDataPlane.mend

    def mend_and_lose(plane) -> list[str]:
        missing = mend(plane)
        if commands:
            ip(commands.pop())
        return missing

    monkeypatch.setattr(NamespaceDataPlane, "mend", mend_and_lose)


@pytest.mark.parametrize(
    "command", ["-6 route delete fd60:67ec:4325::/64", "route delete 100.64.0.0/10"]
)
def test_what_is_taken_away_during_a_look_is_put_back_and_no_problem(monkeypatch, command):
    def check() -> None:
        watched = Watched()
        watched.settle()
        commands = [command]
        lose_after_mending(monkeypatch, commands)
        before = ip("route show dev vnet0"), ip("-6 route show dev vnet0")
        watched.watch.next_look_at = 0.0
        watched.turn()
        assert not commands
        assert watched.problem == ""
        assert (ip("route show dev vnet0"), ip("-6 route show dev vnet0")) == before

    in_own_network(check)


def test_what_is_taken_away_in_two_steps_during_a_look_is_put_back_and_no_problem(monkeypatch):
    def check() -> None:
        watched = Watched()
        watched.settle()
        # Programs such as "ip address flush" take one thing after the other.
        commands = ["-6 route delete fd60:67ec:4325::/64", "route delete 100.64.0.0/10"]
        lose_after_mending(monkeypatch, commands)
        before = ip("route show dev vnet0"), ip("-6 route show dev vnet0")
        watched.watch.next_look_at = 0.0
        watched.turn()
        assert not commands
        assert watched.problem == ""
        # By itself, since what it was not sure of may be true.
        assert watched.watch.next_look_at < time.monotonic() + 5
        watched.until(lambda: (ip("route show dev vnet0"), ip("-6 route show dev vnet0")) == before)
        watched.settle()
        assert watched.problem == ""

    in_own_network(check)


def test_a_look_that_waits_does_not_put_the_next_one_off(monkeypatch):
    def check() -> None:
        watched = Watched()
        watched.settle()
        read = HostNetwork.read

        def read_slowly(kernel):
            time.sleep(0.5)
            return read(kernel)

        monkeypatch.setattr(HostNetwork, "read", read_slowly)
        watched.watch.next_look_at = 0.0
        watched.turn()
        now = time.monotonic()
        # The busy machine of the moment says nothing about what a look costs.
        assert watched.watch.next_look_at < now + network_watch.LOOK_SECONDS + 10
        ip("route delete 100.64.0.0/10")
        watched.watch.hear()
        assert watched.watch.next_look_at < now + 4

    in_own_network(check)


def test_mending_is_a_change_since_what_was_missing_may_have_kept_a_range_away():
    def check() -> None:
        watched = Watched()
        watched.settle()
        watched.changes.clear()
        ip("address flush dev vnet0")
        watched.until(lambda: "100.64.0.1" in ip("address show dev vnet0"))
        watched.until(lambda: watched.changes)
        assert not any(change.has_moved for change in watched.changes)

    in_own_network(check)


def test_somebody_who_takes_it_away_again_and_again_is_a_problem(monkeypatch):
    def check() -> None:
        watched = Watched()
        for _ in range(network_watch.MENDS_IN_A_ROW):
            ip("route delete 100.64.0.0/10")
            watched.until(lambda: "100.64.0.0/10" in routed())
        watched.until(lambda: "keeps taking addresses or routes away from vnet0" in watched.problem)
        monkeypatch.setattr(network_watch, "MENDS_WINDOW_SECONDS", 0.1)
        watched.watch.next_look_at = 0.0
        watched.until(lambda: not watched.problem)

    in_own_network(check)


def test_conflict_is_told_while_it_lasts():
    def check() -> None:
        watched = Watched()
        watched.settle()
        assert watched.problem == ""
        add_link("docker0", "100.70.0.1/16")
        watched.until(lambda: "docker0 has the route 100.70.0.0/16" in watched.problem)
        assert "restart VNet" in watched.problem
        ip("link delete docker0")
        watched.until(lambda: not watched.problem)

    in_own_network(check)


def test_conflict_that_comes_and_goes_does_not_flap():
    def check() -> None:
        watched = Watched()
        add_link("docker0", "100.70.0.1/16")
        watched.until(lambda: watched.problem)
        for _ in range(3):
            for state in ("down", "up"):
                ip(f"address {'flush' if state == 'down' else 'add 100.70.0.1/16'} dev docker0")
                looks = len(watched.changes)
                watched.until(lambda looks=looks: len(watched.changes) > looks)
                assert len(watched.watch.problems) == 1

    in_own_network(check)


def test_range_is_free_a_while_after_what_was_in_its_way_is_gone():
    def check() -> None:
        watched = Watched()
        block = IPv4Network("10.5.0.0/16")

        def text() -> str:
            return watched.watch.in_the_way(block, is_routed=False)

        assert text() == ""
        add_link("docker0", "10.5.3.1/24")
        watched.until(text)
        assert text() == "docker0 has the route 10.5.3.0/24"
        assert watched.watch.in_the_way(block, is_routed=True) == ""
        ip("link delete docker0")
        began = time.monotonic()
        seen = len(watched.changes)
        watched.until(lambda: len(watched.changes) > seen)
        assert text() == "docker0 has the route 10.5.3.0/24"
        # It says by itself that it is time to ask again.
        seen = len(watched.changes)
        watched.until(lambda: len(watched.changes) > seen)
        assert text() == ""
        assert time.monotonic() - began >= network_watch.LINGER_SECONDS

    in_own_network(check)


def test_range_that_takes_a_neighbourhood_away_is_given_up():
    def check() -> None:
        watched = Watched()
        add_link("lan0", "10.1.2.3/8")
        block = IPv4Network("10.5.0.0/16")
        watched.until(lambda: watched.watch.in_the_way(block, is_routed=True))
        assert "lan0" in watched.watch.in_the_way(block, is_routed=True)

    in_own_network(check)


def test_route_of_somebody_else_in_place_of_ours_is_left_to_them():
    def check() -> None:
        watched = Watched()
        add_link("vpn0", "10.200.0.2/32")
        ip("route replace 100.64.0.0/10 dev vpn0")
        watched.until(lambda: "vpn0 has the route 100.64.0.0/10" in watched.problem)
        assert "dev vpn0" in ip("route show 100.64.0.0/10")
        ip("link delete vpn0")
        watched.until(lambda: "100.64.0.0/10" in routed())
        watched.until(lambda: not watched.problem)

    in_own_network(check)


def test_packets_that_go_elsewhere_are_found_by_asking_the_kernel():
    def check() -> None:
        watched = Watched()
        add_link("vpn0", "fd00::2/128")
        # Of the rules for IPv6 nobody but the kernel knows.
        ip("-6 route add default dev vpn0 table 7", "-6 rule add pref 7 lookup 7")
        watched.until(lambda: "Packets to fd60:67ec:4325::/64 go to vpn0" in watched.problem)
        ip("-6 rule delete pref 7")
        watched.until(lambda: not watched.problem)

    in_own_network(check)


def test_outsider_that_is_routed_into_vnet_is_named():
    def check() -> None:
        proxy = IPv4Address("192.0.2.9").packed
        watched = Watched([("The Teleport proxy", proxy), ("The nameserver", OWN[7].packed)])
        watched.until(lambda: "The nameserver 100.64.0.7 cannot be reached" in watched.problem)
        assert "192.0.2.9" not in watched.problem
        ip("route add default dev vnet0")
        watched.until(lambda: "The Teleport proxy 192.0.2.9 cannot be reached" in watched.problem)
        assert "routes 0.0.0.0/0 into vnet0" in watched.problem
        ip("route delete default dev vnet0")
        watched.until(lambda: "192.0.2.9" not in watched.problem)

    in_own_network(check)


def test_new_default_route_and_long_sleep_are_a_new_place(monkeypatch):
    def check() -> None:
        watched = Watched()
        watched.settle()
        assert not any(change.has_moved for change in watched.changes)
        add_link("wlan0", "10.1.2.3/24")
        ip("route add default via 10.1.2.1 dev wlan0")
        watched.until(lambda: any(change.has_moved for change in watched.changes))
        watched.settle()
        watched.changes.clear()
        asleep = network_watch._seconds_asleep()
        monkeypatch.setattr(network_watch, "_seconds_asleep", lambda: asleep + 60)
        watched.turn()
        assert [change.has_moved for change in watched.changes] == [True]
        watched.turn()
        assert len(watched.changes) == 1

    in_own_network(check)


@pytest.mark.parametrize("command", ["link delete vnet0", "link set vnet0 down name other0"])
def test_lost_interface_is_the_end(command):
    def check() -> None:
        watched = Watched()
        if "name" in command:
            ip("link set vnet0 down", "link set vnet0 name other0")
        else:
            ip(command)
        with pytest.raises(LinkLostError, match="vnet0 was deleted or renamed"):
            watched.settle()

    in_own_network(check)


# -- IPv6 --


def disable_ipv6(interface: str, value: int = 1) -> None:
    Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6").write_text(str(value))


def test_ipv6_that_is_switched_off_on_the_interface_comes_back_with_it():
    def check() -> None:
        watched = Watched()
        watched.settle()
        disable_ipv6("vnet0")
        watched.until(lambda: [c.has_ipv6 for c in watched.changes][-1:] == [False])
        watched.network = network.without_ipv6(NETWORK)
        watched.settle()
        assert watched.problem == ""
        disable_ipv6("vnet0", 0)
        watched.until(lambda: watched.changes[-1].has_ipv6)
        assert "fd60:67ec:4325::/64" in ip("-6 route show dev vnet0")

    in_own_network(check)


@pytest.mark.parametrize("interface", ["all", "default"])
def test_without_ipv6_at_the_start_there_is_no_failure(interface):
    def check() -> None:
        disable_ipv6(interface)
        plane = NamespaceDataPlane(NETWORK)
        assert not plane.has_ipv6
        # Its DNS server has the address all the same, which nobody is told.
        assert len(plane.dns_descriptors) == 4
        plane.close()

    in_own_network(check)


def test_plan_without_ipv6_has_none_left():
    plan = network.without_ipv6(NETWORK)
    assert plan == network.plan(network.NetworkConfig(), None)
    assert network.dns_addresses(plan) == [NETWORK.dns_ipv4]
    assert msgspec.structs.replace(plan, ranges=[]) != NETWORK

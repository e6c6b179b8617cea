"""What VNet asks of macOS, as far as it goes without a Mac: command lines, outputs, bytes.

The outputs are written after the manual pages of ifconfig, netstat and route and the sources of XNU.
"""

import errno
import os
import socket
import struct
from ipaddress import IPv4Address, IPv4Network

import pytest

from supervisor import network
from supervisor.config import NetworkConfig
from supervisor.exits import ConflictError, NotPermittedError, StartupError
from supervisor.macos import commands, host_network, output, utun
from supervisor.macos import run as run_module
from supervisor.macos.host import MacHost, MacLinks
from supervisor.macos.host_network import HostNetwork, is_change
from supervisor.osconfig.route_conflicts import conflicts, describe, free_part, strays, taken_of
from supervisor.rewriting_plane import RewritingDataPlane

OWN = bytes([10, 99, 0, 1])
OWN6 = bytes.fromhex("fd6067ec4325") + bytes(9) + b"\1"

INTERFACES = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\toptions=1203<RXCSUM,TXCSUM,TXSTATUS,SW_TIMESTAMP>
\tinet 127.0.0.1 netmask 0xff000000
\tinet6 ::1 prefixlen 128
\tinet6 fe80::1%lo0 prefixlen 64 scopeid 0x1
\tnd6 options=201<PERFORMNUD,DAD>
gif0: flags=8010<POINTOPOINT,MULTICAST> mtu 1280
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether a4:83:e7:01:02:03
\tinet6 fe80::14f1:c0d2:5d6b:4a01%en0 prefixlen 64 secured scopeid 0x6
\tinet 192.168.1.10 netmask 0xffffff00 broadcast 192.168.1.255
\tmedia: autoselect
\tstatus: active
utun3: flags=8051<UP,POINTOPOINT,RUNNING,MULTICAST> mtu 1280
\tinet 100.101.102.103 --> 100.101.102.103 netmask 0xffffffff
\tinet6 fd7a:115c:a1e0::1 prefixlen 48
"""
ROUTES = """\
Routing tables

Internet:
Destination        Gateway            Flags               Netif Expire
default            192.168.1.1        UGScg                 en0
default            link#21            UCSIg               utun3
10.5/16            192.168.1.77       UGSc                  en0
100.64/10          link#21            UCS                 utun3
100.101.102.103    100.101.102.103    UH                  utun3
127                127.0.0.1          UCS                   lo0
127.0.0.1          127.0.0.1          UH                    lo0
169.254            link#6             UCS                   en0      !
172.20.3           127.0.0.1          UGSR                  lo0
192.168.1          link#6             UCS                   en0      !
192.168.1.1/32     link#6             UCS                   en0      !
192.168.1.1        a4:91:b1:aa:bb:cc  UHLWIir               en0   1183
224.0.0/4          link#6             UmCS                  en0      !
255.255.255.255/32 link#6             UCS                   en0      !
"""
ROUTES6 = """\
Routing tables

Internet6:
Destination                             Gateway                                 Flags               Netif Expire
default                                 fe80::%utun0                            UGcIg               utun0
::1                                     ::1                                     UHL                   lo0
fd60:67ec:4325::/64                     fe80::1%utun7                           Uc                  utun7
fd60:67ec:4325::1                       link#22                                 UHL                   lo0
fe80::%lo0/64                           fe80::1%lo0                             UcI                   lo0
"""
OLD_ROUTES = """\
Internet:
Destination        Gateway            Flags        Refs      Use   Netif Expire
default            192.168.1.1        UGSc           43        0     en0
10.99/16           utun7              USc             1        4   utun7
"""
GET = """\
   route to: 10.99.3.4
destination: 10.99.0.0
       mask: 255.255.0.0
  interface: utun7
      flags: <UP,DONE,STATIC>
 recvpipe  sendpipe  ssthresh  rtt,msec    rttvar  hopcount      mtu     expire
       0         0         0         0         0         0      1500         0
"""


# -- utun --


def test_the_question_for_the_control_is_as_the_kernel_lays_it_out():
    assert utun.CTLIOCGINFO == 0xC0644E03
    query = utun.control_query()
    assert len(query) == 100
    assert query[:4] == bytes(4)
    assert query[4:].rstrip(b"\0") == b"com.apple.net.utun_control"
    assert utun.control_id(struct.pack("=I96s", 5, b"com.apple.net.utun_control")) == 5


@pytest.mark.parametrize(
    ("name", "unit"), [("utun0", 1), ("utun7", 8), ("vnet0", 0), ("utun", 0), ("utun07", 0)]
)
def test_only_names_of_utun_can_be_chosen(name, unit):
    assert utun.unit_of(name) == unit


def test_the_name_in_the_answer_ends_with_a_zero():
    assert utun.name_of(b"utun7\0\0\0\0") == "utun7"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EPERM, NotPermittedError),
        (errno.EBUSY, ConflictError),
        (errno.ENOMEM, StartupError),
    ],
)
def test_why_there_is_no_device_is_said(number, kind):
    error = utun.explain("utun7", OSError(number, os.strerror(number)))
    assert type(error) is kind


# -- commands --


def test_addresses_are_added_without_a_subnet_and_only_once():
    nothing = frozenset[str]()
    assert commands.add_address("utun7", OWN, nothing) == [
        [
            "/sbin/ifconfig",
            "utun7",
            "inet",
            "10.99.0.1",
            "10.99.0.1",
            "netmask",
            "255.255.255.255",
            "alias",
        ]
    ]
    assert commands.add_address("utun7", OWN6, nothing) == [
        ["/sbin/ifconfig", "utun7", "inet6", "fd60:67ec:4325::1", "prefixlen", "128", "alias"]
    ]
    assert commands.add_address("utun7", OWN6, frozenset({"fd60:67ec:4325::1"})) == []


def test_routes_come_and_go_and_what_is_so_already_is_left():
    nothing, there = frozenset[str](), frozenset({"10.99.0.0/16", "fd60:67ec:4325::/64"})
    add4 = ["/sbin/route", "-n", "add", "-inet", "-net", "10.99.0.0/16", "-interface", "utun7"]
    add6 = [
        "/sbin/route",
        "-n",
        "add",
        "-inet6",
        "fd60:67ec:4325::",
        "-prefixlen",
        "64",
        "-interface",
        "utun7",
    ]
    for block, add in (("10.99.0.0/16", add4), ("fd60:67ec:4325::/64", add6)):
        delete = ["delete" if word == "add" else word for word in add]
        assert commands.add_route("utun7", block, nothing) == [add]
        assert commands.add_route("utun7", block, there) == []
        assert commands.remove_route("utun7", block, there) == [delete]
        assert commands.remove_route("utun7", block, nothing) == []


# -- output --


def test_interfaces_have_their_addresses_without_zones():
    found = {each.name: each for each in output.read_interfaces(INTERFACES)}
    assert list(found) == ["lo0", "gif0", "en0", "utun3"]
    assert found["en0"].is_up
    assert not found["gif0"].is_up
    assert found["en0"].mtu == 1500
    assert found["en0"].addresses == ("fe80::14f1:c0d2:5d6b:4a01", "192.168.1.10")
    assert found["utun3"].addresses == ("100.101.102.103", "fd7a:115c:a1e0::1")


def test_destinations_are_whole_again_in_every_version_of_the_table():
    found = {str(route.destination): route for route in output.read_routes(ROUTES)}
    for text in ("0.0.0.0/0", "10.5.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "192.168.1.0/24"):
        assert text in found
    assert found["192.168.1.1/32"].interface == "en0"
    assert found["169.254.0.0/16"].interface == "en0"
    old = output.read_routes(OLD_ROUTES)
    assert [(str(route.destination), route.interface) for route in old] == [
        ("0.0.0.0/0", "en0"),
        ("10.99.0.0/16", "utun7"),
    ]
    found6 = {str(route.destination): route.interface for route in output.read_routes(ROUTES6)}
    assert found6["fd60:67ec:4325::/64"] == "utun7"
    assert found6["::/0"] == "utun0"
    assert found6["fe80::/64"] == "lo0"


@pytest.mark.parametrize("text", ["", "Destination\n", ROUTES[:200], "\x00\xff\n" * 3, "a b c d"])
def test_what_is_no_table_has_no_routes_or_fewer(text):
    assert len(output.read_routes(text)) <= 3
    assert output.read_interfaces(text) == []


def test_conflicts_are_found_in_what_the_system_says():
    host = output.host_routes(INTERFACES, ROUTES)
    assert host.addresses == (
        ("lo0", IPv4Address("127.0.0.1")),
        ("en0", IPv4Address("192.168.1.10")),
        ("utun3", IPv4Address("100.101.102.103")),
    )
    pool = IPv4Network("100.64.0.0/10")
    assert "utun3 has the route 100.64.0.0/10" in describe(conflicts(host, "utun7", pool, 501))
    assert free_part(pool, taken_of(host, "utun7", pool, 501), longest=24) is None
    # Less than an address: a default route, one for some sockets only, a neighbour.
    assert conflicts(host, "utun7", IPv4Network("10.99.0.0/16"), 501) == []
    lan = conflicts(host, "utun7", IPv4Network("192.168.0.0/16"), 501)
    assert "en0 has the route 192.168.1.0/24" in describe(lan)
    assert any(conflict.suffers is False for conflict in lan)
    refused = conflicts(host, "utun7", IPv4Network("172.20.0.0/16"), 501)
    assert "refused" in describe(refused)
    # VNet's own interface is in nobody's way, and others' routes into it are strays.
    assert conflicts(host, "utun3", pool, 501) == []
    [stray] = strays(host, "utun3", [], IPv4Address("100.101.102.103"))
    assert stray.destination == pool


def test_where_an_address_goes_is_read_from_route_get():
    assert HostNetwork(lambda _command: GET).way_to(OWN).interface == "utun7"
    assert HostNetwork(lambda _command: "").way_to(OWN).problem == "no route"

    def refuse(_command):
        raise output.route_error("route: writing to routing socket: not in table\n")

    assert HostNetwork(refuse).way_to(OWN).problem == "no route"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("add net 10.99.0.0: gateway utun7\n", None),
        ("add net 10.99.0.0: gateway utun7: File exists\n", FileExistsError),
        ("route: writing to routing socket: not in table\n", ProcessLookupError),
        ("route: must be root to alter routing table\n", PermissionError),
    ],
)
def test_that_route_has_done_nothing_is_read_from_what_it_says(text, kind):
    assert type(output.route_error(text)) is (kind or type(None))


def message(kind: int, error: int = 0) -> bytes:
    return struct.pack("=HBB20xi", 92, 5, kind, error) + bytes(64)


def test_questions_and_failures_on_the_routing_socket_are_no_changes():
    """Everybody hears what `route get` asks: a look would lead to the next one for ever."""
    for kind in (0x1, 0x2, 0x3, 0xC, 0xD, 0xE):
        assert is_change(message(kind))
    assert not is_change(message(0x4))
    assert not is_change(message(0x1, errno.EEXIST))
    assert not is_change(b"")
    assert not is_change(message(0x1)[:10])


# -- the system's programs, and one that pretends to be all of them --


def test_a_program_that_fails_is_quoted(tmp_path):
    program = tmp_path / "ifconfig"
    program.write_text("#!/bin/sh\necho interface utun7 does not exist >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(OSError, match="interface utun7 does not exist"):
        run_module.run([str(program), "utun7"])
    with pytest.raises(OSError, match="No such file"):
        run_module.run([str(tmp_path / "none")])


def test_what_route_prints_counts_although_its_status_is_good(tmp_path, monkeypatch):
    program = tmp_path / "route"
    program.write_text("#!/bin/sh\necho 'add net 10.99.0.0: gateway utun7: File exists'\n")
    program.chmod(0o755)
    monkeypatch.setattr(run_module, "ROUTE", str(program))
    with pytest.raises(FileExistsError):
        run_module.run([str(program), "-n", "add"])


class FakeMac:
    """One utun interface and a table of routes, behind ifconfig, netstat and route."""

    def __init__(self, name: str = "utun7") -> None:
        self.name = name
        self.is_up = False
        self.addresses: list[str] = []
        self.routes: dict[str, str] = {"default": "en0", "192.168.1": "en0"}
        self.changed: list[list[str]] = []

    def __call__(self, command: list[str]) -> str:
        program, *words = command
        if program == commands.NETSTAT:
            return self._table("inet6" in words)
        if program == commands.ROUTE:
            self._route(words)
            return ""
        if words in ([self.name], ["-a"]):
            return self._interface()
        self.changed.append(words)
        if words[1] == "mtu":
            raise OSError(errno.EIO, "ioctl (set mtu): Invalid argument")
        if words[1] in ("up", "down"):
            self.is_up = words[1] == "up"
        else:
            self.addresses.append(words[2])
        return ""

    def _interface(self) -> str:
        flags = "8051<UP,POINTOPOINT,RUNNING,MULTICAST>" if self.is_up else "8010<POINTOPOINT>"
        lines = [f"{self.name}: flags={flags} mtu 1500"]
        lines += [f"\tinet{'6' * (':' in text)} {text} netmask x" for text in self.addresses]
        return "\n".join(lines) + "\n"

    def _table(self, is_version6: bool) -> str:
        lines = ["Destination Gateway Flags Netif Expire"]
        for text, interface in self.routes.items():
            if (":" in text) == is_version6:
                lines.append(f"{text} {interface} USc {interface}")
        return "\n".join(lines) + "\n"

    def _route(self, words: list[str]) -> None:
        self.changed.append(words)
        action = words[1]
        block = words[4].replace(".0.0/", "/")
        if action == "add" and block in self.routes:
            raise FileExistsError(errno.EEXIST, "File exists")
        if action == "add":
            self.routes[block] = self.name
        else:
            del self.routes[block]


class FakeHost(MacHost):
    """macOS without its system calls."""

    def __init__(self, mac: FakeMac) -> None:
        super().__init__(mac)
        self.mac = mac

    def make_device(self, name):
        mac = self.mac

        class Device(utun.UtunDevice):
            def name(self):
                if self.fileno() < 0:
                    raise OSError(errno.EBADF, "closed")
                return mac.name

        return Device(os.open(os.devnull, os.O_RDWR))

    def restrict(self, end: socket.socket, interface: str) -> None:
        assert interface == self.mac.name


@pytest.fixture
def plane(monkeypatch):
    monkeypatch.setattr(socket, "if_nametoindex", lambda name: 7)
    mac = FakeMac()
    config = NetworkConfig(ipv4_cidr_range="10.99.0.0/16", ipv6="off")
    made = RewritingDataPlane(network.plan(config, None), FakeHost(mac))
    yield made
    made.close()


def test_the_data_plane_is_made_of_commands(plane):
    mac = plane._host.mac
    assert mac.is_up
    assert mac.addresses == ["10.99.0.1"]
    assert mac.routes["10.99/16"] == "utun7"
    # The name is the system's, and the MTU what it wants.
    assert plane.keep().network.interface == "utun7"
    assert plane.has_family_header
    assert [redirect.port for redirect in plane.dns_redirects] == [53, 53]


def test_what_is_missing_is_put_back_and_nothing_else_is_done(plane):
    mac = plane._host.mac
    mac.changed.clear()
    assert plane.mend() == []
    assert mac.changed == []
    del mac.routes["10.99/16"]
    mac.addresses.clear()
    assert len(plane.mend()) == 2
    assert mac.addresses == ["10.99.0.1"]
    assert mac.routes["10.99/16"] == "utun7"
    mac.is_up = False
    assert plane.mend() == ["it was down"]


def test_ranges_of_clusters_come_and_go(plane):
    mac = plane._host.mac
    assert plane.set_ranges(["10.99.0.0/16", "10.5.0.0/16"]) == {}
    assert mac.routes["10.5/16"] == "utun7"
    mac.routes["10.6/16"] = "en5"
    failed = plane.set_ranges(["10.99.0.0/16", "10.6.0.0/16"])
    assert isinstance(failed["10.6.0.0/16"], FileExistsError)
    assert mac.routes["10.6/16"] == "en5"
    assert "10.5/16" not in mac.routes


def test_at_the_end_the_interface_is_taken_down(plane):
    plane.remove()
    assert plane._host.mac.changed[-1] == ["utun7", "down"]
    plane.remove()


def test_links_know_all_addresses_of_the_machine():
    links = MacLinks(lambda _command: INTERFACES)
    assert bytes([192, 168, 1, 10]) in links.addresses()
    assert socket.inet_pton(socket.AF_INET6, "fd7a:115c:a1e0::1") in links.addresses()


def test_there_is_no_state_of_an_interface_that_is_gone():
    with pytest.raises(OSError, match="no interface utun9"):
        output.link_state("utun9", INTERFACES, ROUTES, ROUTES6)


def test_the_routing_socket_is_told_from_its_messages(monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    monkeypatch.setattr(host_network.socket, "socket", lambda *_arguments: ours)
    monitor = host_network.Monitor()
    assert not monitor.has_heard()
    theirs.send(message(0x4))
    assert not monitor.has_heard()
    theirs.send(message(0x4))
    theirs.send(message(0x2))
    assert monitor.has_heard()
    monitor.close()
    theirs.close()

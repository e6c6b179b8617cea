import fcntl
import os
import socket
import tempfile
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_fakes import NETWORK, USER

from ipc import messages as m
from supervisor import nameservers, network, places
from supervisor.config import Config, NetworkConfig
from supervisor.exits import ConflictError, MisconfiguredError, NotPermittedError, StartupError
from supervisor.handover import KeptListener
from supervisor.listeners import ListenerRefusedError, Listeners
from supervisor.nameservers import LOOK_SECONDS, Nameservers
from supervisor.osconfig import resolv_conf
from supervisor.places import RunDirectory
from supervisor.settings import find_user, run_dir, teleport_home


def test_second_run_is_told_who_runs(tmp_path):
    first = RunDirectory(tmp_path / "run")
    with pytest.raises(ConflictError, match=f"process {os.getpid()}"):
        RunDirectory(tmp_path / "run")
    first.close()
    RunDirectory(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()


def test_lock_of_a_file_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """A run that ends removes its lock file, perhaps between another's open and lock."""
    run = tmp_path / "run"
    run.mkdir()
    real, calls = fcntl.flock, []

    def flock_late(descriptor: int, operation: int) -> None:
        if not calls:
            (run / "lock").unlink()
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    first = RunDirectory(run)
    monkeypatch.undo()
    assert len(calls) == 2
    with pytest.raises(ConflictError):
        RunDirectory(run)
    first.close()


def test_another_program_goes_on_with_the_run_as_it_is(tmp_path):
    first = RunDirectory(tmp_path / "run")
    (first.make_bus(None) / "tun").touch()
    (first.make_prompts(USER, change_owner=False) / "proxy-0.sock").touch()
    second = RunDirectory.adopt(tmp_path / "run", first.lock)
    assert (second.bus_path / "tun").exists()
    assert (second.prompts_path / "proxy-0.sock").exists()
    with pytest.raises(ConflictError):
        RunDirectory(tmp_path / "run")
    second.close()
    assert not (tmp_path / "run").exists()


def test_what_a_dead_run_left_is_cleared(tmp_path):
    (tmp_path / "bus" / "deep").mkdir(parents=True)
    (tmp_path / "bus" / "tun").touch()
    (tmp_path / "lock").write_text("99999\n")
    run = RunDirectory(tmp_path)
    bus = run.make_bus(None)
    assert list(bus.iterdir()) == []
    assert bus.stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    run.close()


@pytest.mark.root
def test_bus_lets_its_group_through_and_nothing_be_changed():
    with tempfile.TemporaryDirectory(prefix="vnet-places-") as directory:
        Path(directory).chmod(0o755)
        run = RunDirectory(Path(directory) / "run")
        found = run.make_bus(64_999).stat()
        assert found.st_gid == 64_999
        assert found.st_mode & 0o7777 == 0o2710
        run.close()


def test_prompts_have_a_directory_of_the_users_own(tmp_path):
    run = RunDirectory(tmp_path / "run")
    (run.path / "mfa").mkdir()
    (run.path / "mfa" / "proxy-0.sock").touch()  # left by a run that was killed
    prompts = run.make_prompts(USER, change_owner=False)
    assert prompts == run.path / "mfa"
    assert prompts.stat().st_mode & 0o7777 == 0o700
    assert list(prompts.iterdir()) == []
    run.close()
    assert not run.path.exists()


@pytest.mark.root
def test_prompts_belong_to_the_user(tmp_path):
    run = RunDirectory(tmp_path / "run")
    found = run.make_prompts(USER, change_owner=True).stat()
    assert (found.st_uid, found.st_gid) == (USER.uid, USER.gid)
    run.close()


def test_run_directory_leaves_room_for_every_socket(tmp_path):
    deepest = "/mfa/proxy-63.sock"
    assert len(deepest) + places.MAX_PATH_BYTES == 107


def test_run_directory_that_workers_cannot_reach_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o700)
    run = RunDirectory(tmp_path / "closed" / "run")
    with pytest.raises(MisconfiguredError, match=r"which other users cannot enter"):
        run.make_bus(1)
    run.close()


def test_run_directory_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="cannot be used"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(MisconfiguredError, match="too long"):
        RunDirectory(tmp_path / ("x" * 100))


def test_state_directory_is_the_users_own(tmp_path):
    own = places.make_state_directory(tmp_path / "a" / "state", USER, change_owner=False)
    assert own == tmp_path / "a" / "state" / "alice"
    assert own.stat().st_mode & 0o777 == 0o700
    assert places.make_state_directory(tmp_path / "a" / "state", USER, change_owner=False) == own


@pytest.mark.root
def test_state_directory_is_given_to_the_user_again_at_each_start(tmp_path):
    for _ in range(2):
        own = places.make_state_directory(tmp_path, USER, change_owner=True)
        assert (own.stat().st_uid, own.stat().st_gid) == (USER.uid, USER.gid)
        os.chown(own, 0, 0)


def test_state_directory_that_cannot_be_made_is_not_permitted(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotPermittedError, match="--state-dir"):
        places.make_state_directory(tmp_path / "file", USER, change_owner=False)


def test_prefix_is_drawn_once(tmp_path):
    first = places.ipv6_prefix(tmp_path)
    assert places.ipv6_prefix(tmp_path) == first
    assert IPv6Address(first) in ip_network("fd00::/8")
    assert first[6:] == bytes(10)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ipv6-prefix"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"nonsense", b"0011", b"00" * 16])
def test_corrupted_prefix_is_drawn_anew_and_kept(tmp_path, content):
    (tmp_path / "ipv6-prefix").write_bytes(content)
    drawn = places.ipv6_prefix(tmp_path)
    assert places.ipv6_prefix(tmp_path) == drawn


def test_prefix_does_not_need_a_disk(tmp_path):
    assert len(places.ipv6_prefix(tmp_path / "none")) == 16


# -- addresses --


def test_own_addresses_are_the_first_of_the_range():
    found = network.plan(NetworkConfig(ipv4_cidr_range="10.7.0.0/24", mtu=1500), None)
    assert found.ranges == ["10.7.0.0/24"]
    assert IPv4Address(found.tun_ipv4) == IPv4Address("10.7.0.1")
    assert IPv4Address(found.dns_ipv4) == IPv4Address("10.7.0.2")
    assert (found.ipv6_prefix, found.tun_ipv6, found.dns_ipv6) == (None, None, None)
    assert network.dns_addresses(found) == [found.dns_ipv4]
    assert network.ipv6_range(found) is None


def test_ipv6_addresses_are_in_the_prefix():
    assert str(IPv6Address(NETWORK.tun_ipv6)) == "fd60:67ec:4325::1"
    assert str(IPv6Address(NETWORK.dns_ipv6)) == "fd60:67ec:4325::2"
    assert str(network.ipv6_range(NETWORK)) == "fd60:67ec:4325::/64"
    assert NETWORK.ranges == ["100.64.0.0/10"]


@given(st.binary(max_size=20))
def test_prefix_takes_five_random_bytes(data):
    if len(data) == 5:
        assert network.ula_prefix(data) == b"\xfd" + data + bytes(10)
    else:
        with pytest.raises(ValueError, match="5 bytes"):
            network.ula_prefix(data)


@given(st.binary(max_size=20))
def test_only_virtual_addresses_that_are_not_vnets_own_get_listeners(address):
    if network.is_virtual(NETWORK, address):
        if len(address) == 4:
            block = IPv4Network(NETWORK.ranges[0])
            assert IPv4Address(address) in list_of_ends_left_out(block)
        else:
            assert len(address) == 16
            assert address.startswith(NETWORK.ipv6_prefix[:8])


def list_of_ends_left_out(block: IPv4Network):
    class Hosts:
        def __contains__(self, address: IPv4Address) -> bool:
            return (
                address in block
                and address not in (block.network_address, block.broadcast_address)
                and address not in (block[1], block[2])
            )

    return Hosts()


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("100.64.0.0", False), ("100.64.0.1", False), ("100.64.0.2", False), ("100.64.0.3", True),
        ("100.127.255.254", True), ("100.127.255.255", False), ("100.128.0.3", False),
        ("127.0.0.1", False), ("0.0.0.0", False), ("10.1.0.3", False),
    ],
)  # fmt: skip
def test_virtual_ipv4_addresses(text, is_one):
    assert network.is_virtual(NETWORK, IPv4Address(text).packed) is is_one


# -- listeners --


class FakeListener:
    def __init__(self, number: int) -> None:
        self.number = number
        self.is_open = True

    def fileno(self) -> int:
        return self.number

    def getsockname(self) -> tuple[str, int]:
        return "100.64.0.1", 40000 + self.number

    def close(self) -> None:
        self.is_open = False


class FakeDataPlane:
    def __init__(self, kind: m.DataPlaneKind = m.DataPlaneKind.NAMESPACE) -> None:
        self.kind = kind
        self.opened: list[FakeListener] = []
        self.error: OSError | None = None

    def open_listener(self, _address: bytes, _port: int) -> FakeListener:
        if self.error is not None:
            raise self.error
        self.opened.append(FakeListener(len(self.opened)))
        return self.opened[-1]


def address_of(proxy: int, start: int = 3) -> bytes:
    from ipc.addresses import owner_of_address

    base = int(IPv4Address("100.64.0.0"))
    candidates = (IPv4Address(base + n).packed for n in range(start, start + 1000))
    return next(address for address in candidates if owner_of_address(address, 2) == proxy)


@pytest.fixture
def plane():
    return FakeDataPlane()


@pytest.fixture
def listeners(plane):
    return Listeners(plane, proxies=2, limit=9)


def test_listener_is_opened_once_and_outlives_the_proxy(listeners, plane):
    address = address_of(0)
    first = listeners.open("proxy-0", NETWORK, address, 80)
    assert listeners.open("proxy-0", NETWORK, address, 80) == first
    assert len(plane.opened) == 1
    assert list(listeners.of("proxy-0")) == [(address, 80, first)]
    assert list(listeners.of("proxy-1")) == []


def test_listener_is_the_owners_only(listeners, plane):
    with pytest.raises(ListenerRefusedError, match="belongs to proxy-1"):
        listeners.open("proxy-0", NETWORK, address_of(1), 80)
    with pytest.raises(ListenerRefusedError, match="belongs to ssh"):
        listeners.open("proxy-0", NETWORK, address_of(0), 22)
    listeners.open("proxy-0", NETWORK, address_of(0), 80)
    listeners.close("proxy-1", address_of(0), 80)
    assert plane.opened[0].is_open
    listeners.close("proxy-0", address_of(0), 80)
    assert not plane.opened[0].is_open
    listeners.close("proxy-0", address_of(0), 80)  # a second time does no harm


@pytest.mark.parametrize(
    ("address", "port"),
    [
        (b"\x7f\0\0\1", 80),
        (NETWORK.dns_ipv4, 53),
        (NETWORK.dns_ipv6, 53),
        (NETWORK.tun_ipv4, 80),
        (bytes(16), 80),
        (b"\x64\x40\0\5" * 2, 80),
        (address_of(0), 0),
    ],
)
def test_other_addresses_get_no_listener(listeners, plane, address, port):
    with pytest.raises(ListenerRefusedError, match="no virtual address"):
        listeners.open("proxy-0", NETWORK, address, port)
    assert not plane.opened


def test_limit_and_the_kernels_refusal_are_told(listeners, plane):
    for port in (1, 2, 3):
        listeners.open("proxy-0", NETWORK, address_of(0), port)
    with pytest.raises(ListenerRefusedError, match="proxy-0 has 3 listeners already"):
        listeners.open("proxy-0", NETWORK, address_of(0), 4)
    listeners.close("proxy-0", address_of(0), 1)
    plane.error = OSError(24, "Too many open files")
    with pytest.raises(ListenerRefusedError, match="Too many open files"):
        listeners.open("proxy-0", NETWORK, address_of(0), 4)
    listeners.close_all()
    assert not any(listener.is_open for listener in plane.opened)


def test_listeners_go_on_in_another_program(listeners, plane):
    address = address_of(0)
    kept = socket.socket()
    handed = [KeptListener(address=address, port=80, descriptor=kept.detach())]
    listeners.adopt(handed)
    [(found, port, descriptor)] = listeners.of("proxy-0")
    assert (found, port) == (address, 80)
    assert listeners.keep() == handed
    assert listeners.open("proxy-0", NETWORK, address, 80) == descriptor
    assert not plane.opened
    assert not os.get_inheritable(descriptor)
    listeners.close("proxy-0", address, 80)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.fixture
def told():
    return []


@pytest.fixture
def redirected(told):
    """Listeners where packets are rewritten, three of them for each proxy."""
    plane = FakeDataPlane(m.DataPlaneKind.REWRITING)
    return Listeners(plane, proxies=2, limit=9, tell=told.extend)


def test_redirect_is_told_before_the_listener_is(redirected, told):
    address = address_of(0)
    first = redirected.open("proxy-0", NETWORK, address, 80)
    assert told == [m.Redirect(address=address, port=80, local_port=40000 + first)]
    assert redirected.open("proxy-0", NETWORK, address, 80) == first
    assert len(told) == 1
    assert redirected.redirects() == told


def test_listener_that_is_not_used_keeps_its_port_for_the_connections_it_had(redirected, told):
    address = address_of(0)
    first = redirected.open("proxy-0", NETWORK, address, 80)
    redirected.close("proxy-0", address, 80)
    # A proxy that is started now is not given it, but tun is told of it.
    assert list(redirected.of("proxy-0")) == []
    assert len(told) == len(redirected.redirects()) == 1
    assert redirected.open("proxy-0", NETWORK, address, 80) == first
    assert list(redirected.of("proxy-0")) == [(address, 80, first)]
    assert len(told) == 1


def test_unused_listener_makes_room_when_its_proxy_needs_it(redirected, told):
    address = address_of(0)
    for port in (1, 2, 3):
        redirected.open("proxy-0", NETWORK, address, port)
    redirected.open("proxy-1", NETWORK, address_of(1), 9)
    redirected.close("proxy-1", address_of(1), 9)
    with pytest.raises(ListenerRefusedError, match="proxy-0 has 3 listeners already"):
        redirected.open("proxy-0", NETWORK, address, 4)
    for port in (2, 1):
        redirected.close("proxy-0", address, port)
    told.clear()
    redirected.open("proxy-0", NETWORK, address, 4)
    assert [(redirect.port, bool(redirect.local_port)) for redirect in told] == [
        (2, False),
        (4, True),
    ]
    assert {redirect.port for redirect in redirected.redirects()} == {1, 3, 4, 9}
    redirected.close_all()
    assert redirected.redirects() == []


def test_used_and_unused_listeners_go_on_in_another_program(redirected, told):
    used, idle = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    local_ports = {end.getsockname()[1] for end in (used, idle)}
    address = address_of(0)
    handed = [
        KeptListener(address=address, port=1, descriptor=used.detach()),
        KeptListener(address=address, port=2, descriptor=idle.detach(), is_idle=True),
    ]
    redirected.adopt(handed)
    assert [port for _, port, _ in redirected.of("proxy-0")] == [1]
    assert {redirect.local_port for redirect in redirected.redirects()} == local_ports
    assert redirected.keep() == handed
    assert redirected.open("proxy-0", NETWORK, address, 2) == handed[1].descriptor
    assert told == []
    redirected.close_all()


# -- nameservers --


def test_resolv_conf_is_read_as_the_c_library_does():
    text = """
# nameserver 192.0.2.9
; nameserver 192.0.2.9
nameserver 192.0.2.1   # the first
nameserver\t192.0.2.2
nameserver 192.0.2.1
nameserver fe80::1%eth0
 nameserver 192.0.2.3
nameserver
nameserver 0.0.0.0
nameserver not-an-address
options edns0
"""
    assert resolv_conf.nameservers(text) == [
        ("192.0.2.1", ""),
        ("192.0.2.2", ""),
        ("fe80::1", "eth0"),
        ("192.0.2.3", ""),
    ]


@given(st.text())
def test_any_resolv_conf_can_be_read(text):
    assert len(resolv_conf.nameservers("nameserver 192.0.2.1\n" * 20 + text)) <= 8


def test_nameservers_follow_the_system_and_never_name_vnet(tmp_path, monkeypatch, caplog):
    path: Path = tmp_path / "resolv.conf"
    monkeypatch.setattr(nameservers, "RESOLV_CONF", path)
    own = network.dns_addresses(NETWORK)
    found = Nameservers([], own)
    assert found.upstream == []
    assert "no upstream nameserver" in caplog.text
    path.write_text("nameserver 100.64.0.2\nnameserver fd60:67ec:4325::2\nnameserver 192.0.2.1\n")
    assert found.has_changed(now=1.0)
    assert found.upstream == [m.Upstream(address=bytes([192, 0, 2, 1]))]
    path.write_text("nameserver 192.0.2.2\n")
    assert not found.has_changed(now=1.0 + LOOK_SECONDS / 2)
    assert found.has_changed(now=1.0 + LOOK_SECONDS)
    assert not found.has_changed(now=1.0 + 2 * LOOK_SECONDS)
    path.unlink()
    assert not found.has_changed(now=1.0 + 3 * LOOK_SECONDS)
    assert found.has_changed(now=1.0 + 4 * LOOK_SECONDS)
    assert found.upstream == []


def test_file_that_is_empty_while_it_is_written_takes_no_nameserver_away(tmp_path, monkeypatch):
    path: Path = tmp_path / "resolv.conf"
    monkeypatch.setattr(nameservers, "RESOLV_CONF", path)
    path.write_text("nameserver 192.0.2.1\n")
    found = Nameservers([], [])
    now = 0.0
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.2"):
        before = list(found.upstream)
        path.write_text("")
        now += LOOK_SECONDS
        assert not found.has_changed(now)
        assert found.upstream == before
        path.write_text(f"nameserver {address}\n")
        now += LOOK_SECONDS
        assert found.has_changed(now) == (found.upstream != before)
        assert [server.address for server in found.upstream] == [IPv4Address(address).packed]


def test_configured_nameservers_come_first():
    found = Nameservers(["192.0.2.1:5353", "[fe80::1%eth0]:53"], [])
    packed = IPv6Address("fe80::1").packed
    assert found.upstream == [
        m.Upstream(address=bytes([192, 0, 2, 1]), port=5353),
        m.Upstream(address=packed, scope="eth0"),
    ]
    found.configure(["192.0.2.3"])
    assert found.has_changed(now=0.0)
    assert [server.address for server in found.upstream] == [bytes([192, 0, 2, 3])]


# -- settings --


def test_run_directory_flag_precedes_environment_precedes_default():
    environment = {"VNET_RUN_DIR": "/tmp/other"}
    assert run_dir(Path("/a"), environment) == Path("/a")
    assert run_dir(None, environment) == Path("/tmp/other")
    assert run_dir(None, {"VNET_RUN_DIR": ""}) == Path("/run/vnet")


def test_home_is_the_environments_then_the_files_then_tsh():
    configured = Config(teleport_home="~/elsewhere")
    assert teleport_home(configured, USER, {"TELEPORT_HOME": "/x"}) == Path("/x")
    assert teleport_home(configured, USER, {}) == USER.home / "elsewhere"
    assert teleport_home(Config(), USER, {}) == USER.home / ".tsh"


def test_user_is_named_or_who_called_sudo_or_the_caller():
    assert find_user("root", {}).uid == 0
    assert find_user(None, {"SUDO_USER": "nobody"}).name == "nobody"
    assert find_user(None, {}).uid == os.getuid()
    with pytest.raises(MisconfiguredError, match="knows no user 'x y'"):
        find_user("x y", {})

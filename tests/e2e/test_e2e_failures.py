"""What goes wrong outside VNet: logins, clusters, limits. Nothing hangs, nothing needs a restart."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import threading
from collections.abc import Iterator

import dnslib
import psutil
import pytest
from demo_bed import VNET, bare_bed, demo_bed, supervisor_in
from private_bed import AT_ONCE_SECONDS, Bed, read_all, read_exactly, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

CLUSTER = """
[[clusters]]
name = "shaky.test"
proxy_addr = "localhost:3080"
custom_dns_zones = ["shaky.test"]

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"
public_addr = "echo.shaky.test"

[[clusters.apps]]
name = "other"
uri = "tcp://echo.backend.internal:7"
public_addr = "other.shaky.test"
"""
CONFIG = """
[dns]
upstream = ["127.0.0.54"]
os_integration = "none"
[teleport]
ca_file = "{home}/web-ca.pem"
"""
APP, OTHER, FOREIGN = "echo.shaky.test", "other.shaky.test", "example.org"
SERVER = "100.64.0.2"
UPSTREAM_ADDRESS = "192.0.2.7"


@contextlib.contextmanager
def upstream_dns(bed: Bed) -> Iterator[None]:
    """A DNS server on 127.0.0.54 that knows the address of every name."""
    stopping = threading.Event()
    end = bed.open_socket(kind=socket.SOCK_DGRAM, timeout=0.1)

    def serve() -> None:
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                data, client = end.recvfrom(4096)
                reply = dnslib.DNSRecord.parse(data).reply()
                reply.add_answer(*dnslib.RR.fromZone(f"{reply.q.qname} 5 A {UPSTREAM_ADDRESS}"))
                end.sendto(reply.pack(), client)

    with end:
        end.bind(("127.0.0.54", 53))
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()


@pytest.fixture
def cluster() -> Iterator[Bed]:
    """A private network with an embedded cluster and an upstream DNS server, without VNet."""
    with bare_bed() as bed, upstream_dns(bed):
        path = bed.directory / "cluster.toml"
        path.write_text(CLUSTER)
        home = bed.environment["TELEPORT_HOME"]
        with bed.running(VNET, "demo-cluster", "--cluster", str(path), "--home", home):
            wait_until((bed.directory / "tsh" / "current-profile").exists, "the cluster runs")
            yield bed


def config_of(bed: Bed) -> str:
    return CONFIG.format(home=bed.environment["TELEPORT_HOME"])


@pytest.fixture
def vnet(cluster) -> Iterator[Bed]:
    """The same with a healthy VNet."""
    with supervisor_in(cluster, config=config_of(cluster)):
        cluster.wait_for_health("healthy")
        yield cluster


def echo_works(bed: Bed, name: str = APP) -> bool:
    try:
        with bed.connect(bed.resolve(name, server=SERVER)[0], 7) as end:
            end.sendall(b"hello")
            end.shutdown(socket.SHUT_WR)
            return read_all(end) == b"hello"
    except ConnectionRefusedError:
        return False


def assert_foreign_names_are_forwarded(bed: Bed) -> None:
    assert bed.resolve(FOREIGN, server=SERVER) == [UPSTREAM_ADDRESS]


def reasons(bed: Bed) -> str:
    return " ".join(bed.status()["reasons"])


def test_the_cluster_and_vnet_started_apart_work_together(vnet):
    assert echo_works(vnet)
    assert_foreign_names_are_forwarded(vnet)


def test_proxies_work_as_the_vnet_user_with_files_that_only_this_user_may_read(cluster):
    """Their own program may be out of reach then, as it is where it lies in root's home."""
    user = pwd.getpwnam("daemon")
    home = cluster.directory / "home-of-user"
    shutil.copytree(cluster.environment["TELEPORT_HOME"], home)
    for path in (home, *home.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
    config = CONFIG.format(home=home)
    with supervisor_in(
        cluster, "--user", user.pw_name, config=config, env={"TELEPORT_HOME": str(home)}
    ):
        cluster.wait_for_health("healthy")
        assert echo_works(cluster)
        pid = cluster.outer_pid(cluster.worker("proxy-0")["pid"])
        assert set(psutil.Process(pid).uids()) == {user.pw_uid}


def test_without_a_tsh_home_vnet_forwards_everything_and_says_what_to_do(cluster):
    bed = cluster
    with supervisor_in(bed, config=config_of(bed), env={"TELEPORT_HOME": "/does/not/exist"}):
        bed.wait_for_health("degraded")
        [reason] = bed.status()["reasons"]
        assert "/does/not/exist" in reason
        assert "tsh login" in reason
        for name in (FOREIGN, APP):
            assert bed.resolve(name, server=SERVER) == [UPSTREAM_ADDRESS]
        assert bed.seconds_until_refused("100.64.77.77", 80) < AT_ONCE_SECONDS


def test_a_login_that_comes_later_is_taken_over(cluster):
    """By successors of the proxies: a confined one may not read what it has not seen."""
    bed = cluster
    home, hidden = bed.directory / "tsh", bed.directory / "hidden"
    config = config_of(bed).replace(str(home / "web-ca.pem"), str(bed.directory / "ca.pem"))
    shutil.copy(home / "web-ca.pem", bed.directory / "ca.pem")
    home.rename(hidden)
    with supervisor_in(bed, config=config):
        bed.wait_for_health("degraded")
        pids = {name: bed.worker(name)["pid"] for name in ("tun", "dns")}
        hidden.rename(home)
        bed.wait_for_health("healthy")
        wait_until(
            lambda: bed.resolve(APP, server=SERVER) != [UPSTREAM_ADDRESS], "the app is known"
        )
        assert echo_works(bed)
        assert {name: bed.worker(name)["pid"] for name in pids} == pids
        assert all(worker["restarts"] == 0 for worker in bed.status()["workers"])


def test_a_logout_cuts_connections_at_once(vnet):
    bed, home = vnet, vnet.directory / "tsh"
    with bed.connect(bed.resolve(APP, server=SERVER)[0], 7) as end:
        end.sendall(b"!")
        assert read_exactly(end, 1) == b"!"
        shutil.rmtree(home / "keys")
        for profile in home.glob("*.yaml"):
            profile.unlink()
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    wait_until(lambda: "cuts connections: 1" in bed.log(), "a log line")


def restart_all(bed: Bed) -> None:
    before = bed.pids()
    bed.output("vnet", "restart", "all")
    for name, pid in before.items():
        bed.wait_for_successor(name, pid)


def test_with_the_cluster_down_known_names_come_from_the_book(vnet):
    bed = vnet
    address = bed.resolve(APP, server=SERVER)[0]
    assert echo_works(bed)
    with bed.faults("proxy_down"):
        wait_until(lambda: not _listens(bed, 3080), "the proxy is down")
        assert bed.seconds_until_refused(address, 7) < AT_ONCE_SECONDS
        # No worker remembers anything now.
        restart_all(bed)
        assert bed.resolve(APP, server=SERVER) == [address]
        assert bed.seconds_until_refused(address, 7) < AT_ONCE_SECONDS
        assert_foreign_names_are_forwarded(bed)
    wait_until(lambda: echo_works(bed), "the app works again")
    bed.wait_for_health("healthy")


def _listens(bed: Bed, port: int) -> bool:
    try:
        bed.connect("127.0.0.1", port).close()
    except OSError:
        return False
    return True


def test_with_the_cluster_down_at_the_start_known_names_come_from_the_book(cluster):
    bed, config = cluster, config_of(cluster)
    with supervisor_in(bed, config=config):
        bed.wait_for_health("healthy")
        addresses = [bed.resolve(name, server=SERVER)[0] for name in (APP, OTHER)]
    with bed.faults("proxy_down"):
        wait_until(lambda: not _listens(bed, 3080), "the proxy is down")
        with supervisor_in(bed, config=config):
            bed.wait_for_health("degraded")
            assert [c["state"] for c in bed.status()["clusters"]] == ["unreachable"]
            assert [bed.resolve(name, server=SERVER)[0] for name in (APP, OTHER)] == addresses
            assert bed.seconds_until_refused(addresses[0], 7) < AT_ONCE_SECONDS
            assert_foreign_names_are_forwarded(bed)
            (bed.directory / "tsh" / "faults").write_text("")
            bed.wait_for_health("healthy")
            wait_until(lambda: echo_works(bed), "the app works")
            assert bed.resolve(APP, server=SERVER) == addresses[:1]


def test_addresses_are_the_same_after_a_restart(cluster):
    bed, config = cluster, config_of(cluster)
    found = []
    for _ in range(2):
        with supervisor_in(bed, config=config):
            bed.wait_for_health("healthy")
            found.append([bed.resolve(APP, kind, SERVER)[0] for kind in ("A", "AAAA")])
    assert found[0] == found[1]


def test_refused_certificates_refuse_the_connection_at_once(vnet):
    bed = vnet
    address = bed.resolve(APP, server=SERVER)[0]
    with bed.faults("refuse_certs"):
        assert bed.seconds_until_refused(address, 7) < AT_ONCE_SECONDS
    wait_until(lambda: echo_works(bed), "the app works again")


def test_apps_closed_by_the_cluster_end_connections_and_later_ones_work(vnet):
    bed = vnet
    with bed.connect(bed.resolve(APP, server=SERVER)[0], 7) as end:
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"
        with bed.faults("close_apps"), contextlib.suppress(ConnectionError):
            assert read_all(end) == b""
    wait_until(lambda: echo_works(bed), "the app works again")


@contextlib.contextmanager
def hanging_cluster(bed: Bed) -> Iterator[None]:
    """A cluster that accepts connections (its kernel does) and answers nothing."""
    listener = bed.output("ss", "-Hltnp", "sport = :3080")
    pid = bed.outer_pid(int(listener.rpartition("pid=")[2].split(",")[0]))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        # nsenter stops itself together with its child.
        os.kill(psutil.Process(pid).ppid(), signal.SIGCONT)
        os.kill(pid, signal.SIGCONT)


def test_a_client_that_vanishes_during_the_dial_leaves_nothing_behind(vnet):
    bed = vnet
    address = bed.resolve(APP, server=SERVER)[0]
    assert echo_works(bed)
    proxy = bed.owner_of(address)
    wait_until(lambda: bed.status()["connections"]["active"] == 0, "nothing is open")
    before = bed.open_files(proxy)

    def vanish() -> None:
        with bed.open_socket(timeout=0.3) as end, pytest.raises(TimeoutError):
            end.connect((address, 7))

    with hanging_cluster(bed):
        for _ in range(4):
            vanish()

        def is_dialling() -> bool:
            # A proxy that looks too late finds nobody.
            vanish()
            return bed.open_files(proxy) > before

        wait_until(is_dialling, "the proxy dials")
    wait_until(lambda: bed.open_files(proxy) <= before, "every descriptor is closed")
    assert echo_works(bed)


def test_a_cluster_that_answers_nothing_is_given_up_in_time(vnet):
    bed = vnet
    address = bed.resolve(APP, server=SERVER)[0]
    assert echo_works(bed)
    with hanging_cluster(bed):
        # The dial's own limit is 10 s.
        assert 5 < bed.seconds_until_refused(address, 7) < 15
        assert_foreign_names_are_forwarded(bed)
    wait_until(lambda: echo_works(bed), "the app works again")


def test_more_connections_than_allowed_are_refused_at_once():
    config = "[proxy]\nworkers = 1\nmax_connections = 5\n"
    with demo_bed(config=config) as bed, contextlib.ExitStack() as open_ones:
        address = bed.resolve("echo.demo.test")[0]
        ends = [open_ones.enter_context(bed.connect(address, 7)) for _ in range(5)]
        for end in ends:
            end.sendall(b"!")
            assert read_exactly(end, 1) == b"!"
        assert bed.seconds_until_refused(address, 7) < AT_ONCE_SECONDS
        wait_until(lambda: "refused (too_many)" in bed.log(), "a log line")
        ends[0].close()

        def one_more() -> bool:
            try:
                open_ones.enter_context(bed.connect(address, 7))
            except ConnectionRefusedError:
                return False
            return True

        wait_until(one_more, "there is room for another")

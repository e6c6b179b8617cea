"""SSH when something goes wrong: logins that end, workers that die, files that vanish."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
from demo_bed import demo_bed
from private_bed import PATIENCE_SECONDS, Bed, wait_until
from second_factors import Waiting, started
from shared_cluster import CONFIG
from sshd_bed import (
    CLUSTER,
    LOGIN,
    SSH_FAILED,
    SSHD_PORT,
    home,
    ssh,
    ssh_command,
    ssh_config,
    sshd_in,
)

pytestmark = [pytest.mark.root, pytest.mark.e2e]

WRITTEN_IN_EACH_RUN = ("vnet_known_hosts", "vnet_ssh_config")
FILES = ("id_vnet", "id_vnet.pub", "vnet_host_key", *WRITTEN_IN_EACH_RUN)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def module_bed() -> Iterator[Bed]:
    """One demo, which each test leaves working."""
    with demo_bed(CLUSTER, CONFIG) as bed, sshd_in(bed, "real.ssh.test", SSHD_PORT):
        yield bed
        # A clean stop takes the configuration away, and leaves the keys.
        ssh_config(bed)
        bed.output("vnet", "stop")
        wait_until(lambda: not (home(bed) / "vnet_ssh_config").exists(), "it is removed")
        assert (home(bed) / "id_vnet.pub").exists()


@pytest.fixture
def bed(module_bed) -> Bed:
    module_bed.wait_for_health("healthy")
    return module_bed


def works(bed: Bed, host: str = "node1.ssh.test") -> bool:
    return ssh(bed, host, "echo here").stdout == b"here\n"


@contextlib.contextmanager
def session(bed: Bed, host: str = "node1.ssh.test") -> Iterator[Waiting]:
    """A session whose command has begun, and goes on."""
    mark = bed.directory / f"begun-{next(_numbers)}"
    command = f"touch {mark}; exec sleep 100"
    with started(bed, *ssh_command(bed, "-l", LOGIN, host, command)) as client:

        def has_begun() -> bool:
            assert not client.is_over, client.result()
            return mark.exists()

        wait_until(has_begun, "the session is there")
        yield client


def assert_is_cut(client: Waiting) -> None:
    status, told = client.result(PATIENCE_SECONDS)
    assert status == SSH_FAILED, told


@pytest.mark.parametrize("host", ["node1.ssh.test", "real.ssh.test"])
def test_logout_cuts_sessions_and_a_new_login_serves_again(bed, host):
    with session(bed, host) as client:
        with bed.faults("logout"):
            assert_is_cut(client)
            wait_until(lambda: not works(bed, host), "nobody is logged in")
        wait_until(lambda: works(bed, host), "the new login works")


def test_expired_login_refuses_and_a_new_one_serves_again(bed):
    assert works(bed)
    with bed.faults("expire_login"):

        def is_refused() -> bool:
            return b"Connection refused" in ssh(bed, "node1.ssh.test", "true").stderr

        # Of its two certificates one may end a moment before the other.
        wait_until(is_refused, "the login has expired")
    wait_until(lambda: works(bed), "the new login works")


def test_killed_worker_costs_its_sessions_and_nothing_else(bed):
    pid = int(bed.worker("ssh")["pid"])
    with session(bed) as client:
        bed.kill(pid)
        assert_is_cut(client)
    bed.wait_for_successor("ssh", pid)
    # The client trusts the successor's authority, too.
    wait_until(lambda: works(bed), "the successor serves")


def test_replaced_worker_lets_its_sessions_go_on(bed):
    pid = int(bed.worker("ssh")["pid"])
    begun, go = (bed.directory / f"{name}-{next(_numbers)}" for name in ("begun", "go"))
    command = f"touch {begun}; while ! test -e {go}; do sleep 0.05; done; echo whole"
    with started(bed, *ssh_command(bed, "-l", LOGIN, "node1.ssh.test", command)) as client:
        wait_until(begun.exists, "the session is there")
        bed.output("vnet", "restart", "ssh", "--drain")
        bed.wait_for_successor("ssh", pid)
        wait_until(lambda: works(bed), "the successor serves")
        assert not client.is_over
        go.touch()
        assert client.result() == (0, "whole\n")


def test_other_workers_may_die_during_a_session(bed):
    with session(bed) as client:
        for name in ("tun", "dns", "proxy-0"):
            pid = int(bed.worker(name)["pid"])
            bed.kill(pid)
            bed.wait_for_successor(name, pid)
        bed.wait_for_health("healthy")
        assert not client.is_over
        assert works(bed)


def test_node_that_goes_away_cuts_its_sessions(bed):
    with session(bed) as client, bed.faults("node_offline node1"):
        assert_is_cut(client)
    wait_until(lambda: works(bed), "the node is back")


def test_proxy_that_goes_away_cuts_and_comes_back(bed):
    with session(bed) as client, bed.faults("proxy_down"):
        assert_is_cut(client)
        assert b"refused" in ssh(bed, "node1.ssh.test", "true").stderr
    wait_until(lambda: works(bed), "the proxy is back")


def test_client_that_is_killed_ends_the_session_at_the_node(bed):
    mark = bed.directory / f"hung-up-{next(_numbers)}"
    begun = bed.directory / f"begun-{next(_numbers)}"
    command = f"trap 'touch {mark}; exit' HUP; touch {begun}; while :; do sleep 0.05; done"
    with started(bed, *ssh_command(bed, "-l", LOGIN, "node1.ssh.test", command)):
        wait_until(begun.exists, "the session is there")
    wait_until(mark.exists, "the node has hung up")


def test_files_are_private_and_written_again_when_they_have_vanished(bed):
    ssh_config(bed)
    for name in FILES:
        assert (home(bed) / name).stat().st_mode & 0o777 == 0o600, name
    for name in WRITTEN_IN_EACH_RUN:
        (home(bed) / name).unlink()
    # They are looked at every 30 s, and when a login comes or goes.
    with bed.faults("logout"):
        pass
    for name in WRITTEN_IN_EACH_RUN:
        wait_until((home(bed) / name).exists, "it is written again", 45)
    wait_until(lambda: works(bed), "the new login works")

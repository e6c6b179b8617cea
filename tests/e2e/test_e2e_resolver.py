"""VNet in `/etc/resolv.conf`: names are found by programs, and everything is as before afterwards.

Each bed has a mount namespace with a copy of `/etc`; the machine's own is never touched.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from demo_bed import SUPERVISOR, VNET, bare_bed, stop, supervisor_pid
from private_bed import Bed, wait_until
from test_e2e_failures import APP, CLUSTER, FOREIGN, UPSTREAM_ADDRESS, upstream_dns

pytestmark = [pytest.mark.root, pytest.mark.e2e]

PARTS = Path(__file__).parent.parent / "supervisor"
FAULTS = str(PARTS / "fault_steps.py")
CONFIG = """
[dns]
os_integration = "{wanted}"
[teleport]
ca_file = "{home}/web-ca.pem"
"""
# What fails is tried again after 5 s. The disk may be busy, and what is changed has to be on it.
FOLLOWED_SECONDS = 4.0
BEFORE = "# by hand\nnameserver 127.0.0.54\nsearch corp.test\noptions timeout:2 attempts:1\n"


def tree(directory: Path) -> Mapping[str, object]:
    sys.path.append(str(PARTS))
    try:
        from fault_steps import tree as look
    finally:
        sys.path.remove(str(PARTS))
    return look(directory)


@contextmanager
def own_etc(kind: str = "file") -> Iterator[Bed]:
    """A private network whose `/etc` is a copy, without anything in `/run`."""
    with bare_bed() as bed:
        etc = bed.directory / "etc"
        bed.output("cp", "-a", "/etc/.", str(etc))
        (etc / "nsswitch.conf").write_text("hosts: files dns\n")
        bed.output("mount", "--bind", str(etc), "/etc")
        bed.output("mount", "-t", "tmpfs", "none", "/run")
        own = etc / "resolv.conf"
        own.unlink(missing_ok=True)
        target = bed.directory / "upper.conf"
        target.write_text(BEFORE)
        if kind == "link":
            own.symlink_to(target)
        else:
            own.write_text(BEFORE)
        if kind == "mount":
            bed.output("mount", "--bind", str(target), "/etc/resolv.conf")
        yield bed


@contextmanager
def with_cluster(kind: str = "file") -> Iterator[Bed]:
    with own_etc(kind) as bed, upstream_dns(bed):
        path = bed.directory / "cluster.toml"
        path.write_text(CLUSTER)
        home = bed.environment["TELEPORT_HOME"]
        with bed.running(VNET, "demo-cluster", "--cluster", str(path), "--home", home):
            wait_until((bed.directory / "tsh" / "current-profile").exists, "the cluster runs")
            yield bed


@contextmanager
def vnet_in(bed: Bed, wanted: str = "auto", *program: str) -> Iterator[int]:
    """A VNet that may change the bed's `/etc`; its process id."""
    config = bed.directory / "vnet.toml"
    config.write_text(CONFIG.format(wanted=wanted, home=bed.environment["TELEPORT_HOME"]))
    options = ["--config", str(config), "--run-dir", str(bed.directory / "run")]
    options += ["--state-dir", str(state_of(bed))]
    bed.logs = [bed.directory / "vnet.log"]
    with bed.running(*(program or (SUPERVISOR,)), *options, log_name="vnet") as process:
        try:
            yield supervisor_pid(process)
        finally:
            stop(process)


def state_of(bed: Bed) -> Path:
    return bed.directory / "vnet-state"


def wait_until_nothing_is_left(bed: Bed) -> None:
    """Workers of a VNet that was killed end by themselves, and the interface with the last of them."""
    wait_until(lambda: "vnet0" not in bed.output("ip", "link"), "the interface is gone")


def etc_of(bed: Bed) -> dict[str, object]:
    """`/etc` as programs in the bed see it."""
    return dict(tree(bed.path("/etc")))


def address_of(bed: Bed, name: str) -> str:
    """What a program gets from the C library."""
    done = bed.run("getent", "ahostsv4", name)
    return done.stdout.decode().split()[0] if done.returncode == 0 else ""


def first_server(bed: Bed) -> str:
    text = bed.path("/etc/resolv.conf").read_text()
    return next(line.split()[1] for line in text.splitlines() if line.startswith("nameserver"))


def wait_until_healthy(bed: Bed) -> None:
    bed.wait_for_health("healthy")
    assert address_of(bed, APP).startswith("100.")


@pytest.mark.parametrize("kind", ["file", "mount", "link"])
def test_programs_find_names_of_both_worlds_and_nothing_is_left_behind(kind):
    with with_cluster(kind) as bed:
        before = etc_of(bed)
        with vnet_in(bed):
            wait_until_healthy(bed)
            assert first_server(bed) == "100.64.0.2"
            assert address_of(bed, FOREIGN) == UPSTREAM_ADDRESS
            assert "search corp.test" in bed.path("/etc/resolv.conf").read_text()
            assert bed.status()["network"]["os_integration"] == "resolv.conf"
            [line] = [line for line in bed.log().splitlines() if "resolver: resolv.conf" in line]
            assert "because" in line
        assert etc_of(bed) == before


def test_zones_of_a_logout_and_a_login_are_followed_at_once():
    with with_cluster() as bed:
        before = etc_of(bed)
        home = bed.path(bed.environment["TELEPORT_HOME"])
        [profile] = home.glob("*.yaml")
        with vnet_in(bed):
            wait_until_healthy(bed)
            for _ in range(2):
                profile.rename(profile.with_suffix(".away"))
                wait_until(lambda: not bed.status()["network"]["dns_zones"], "the zones go")
                wait_until(
                    lambda: first_server(bed) == "127.0.0.54", "so does VNet", FOLLOWED_SECONDS
                )
                profile.with_suffix(".away").rename(profile)
                wait_until(lambda: bed.status()["network"]["dns_zones"], "the zones come")
                wait_until(
                    lambda: first_server(bed) == "100.64.0.2", "so does VNet", FOLLOWED_SECONDS
                )
        assert etc_of(bed) == before


def test_what_a_dhcp_client_writes_is_used_and_is_what_comes_back():
    with with_cluster() as bed:
        resolv_conf = bed.path("/etc/resolv.conf")
        new = "nameserver 127.0.0.54\nsearch new.test\n"
        with vnet_in(bed):
            wait_until_healthy(bed)
            written = resolv_conf.with_name("resolv.conf.dhcp")
            written.write_text(new)
            # Before VNet can have noticed: looking at all of /etc may take longer than that.
            newest = etc_of(bed)
            newest[resolv_conf.name] = newest.pop(written.name)
            written.replace(resolv_conf)
            wait_until(lambda: first_server(bed) == "100.64.0.2", "VNet is first again")
            assert "search new.test" in resolv_conf.read_text()
            wait_until(lambda: address_of(bed, FOREIGN) == UPSTREAM_ADDRESS, "names are found")
            assert address_of(bed, APP).startswith("100.")
        assert etc_of(bed) == newest


def test_after_a_kill_names_are_still_found_and_the_next_start_mends_it():
    with with_cluster() as bed:
        before = etc_of(bed)
        with vnet_in(bed) as pid:
            wait_until_healthy(bed)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: bed.health() == "none", "VNet is dead")
            assert first_server(bed) == "100.64.0.2"
            assert address_of(bed, FOREIGN) == UPSTREAM_ADDRESS
        wait_until_nothing_is_left(bed)
        with vnet_in(bed):
            wait_until_healthy(bed)
            assert address_of(bed, FOREIGN) == UPSTREAM_ADDRESS
            assert "/etc/resolv.conf is restored" in bed.log()
            done = bed.run(VNET, "repair", "--state-dir", str(state_of(bed)))
            assert done.returncode == 6
            assert b"stop it first" in done.stderr
        assert etc_of(bed) == before


def test_a_start_with_none_mends_what_a_killed_one_has_left():
    with with_cluster() as bed:
        before = etc_of(bed)
        with vnet_in(bed) as pid:
            wait_until_healthy(bed)
            os.kill(pid, signal.SIGKILL)
        wait_until_nothing_is_left(bed)
        with vnet_in(bed, "none"):
            bed.wait_for_health("healthy")
            assert etc_of(bed) == before
            assert bed.status()["network"]["os_integration"] == "none"


@pytest.mark.parametrize("step", [2, 6, 9])
def test_a_supervisor_killed_in_the_middle_of_a_change_is_repaired(step):
    with with_cluster() as bed:
        before = etc_of(bed)
        with vnet_in(bed, "resolv.conf", sys.executable, FAULTS, str(step)) as pid:
            wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it is killed")
            assert (state_of(bed) / "os-backup").exists()
            said = bed.output(VNET, "repair", "--state-dir", str(state_of(bed)))
            assert etc_of(bed) == before, said
            assert sorted(path.name for path in state_of(bed).glob("os-*")) == ["os-lock"]


def test_a_new_program_in_place_keeps_the_file_as_it_is():
    with with_cluster() as bed:
        before = etc_of(bed)
        with vnet_in(bed):
            wait_until_healthy(bed)
            pid, applied = bed.status()["supervisor"]["pid"], etc_of(bed)
            bed.output(VNET, "restart", "all", "--drain")
            bed.wait_for_health("healthy")
            assert bed.status()["supervisor"]["pid"] == pid
            assert bed.status()["network"]["os_integration"] == "resolv.conf"
            assert etc_of(bed) == applied
            assert address_of(bed, FOREIGN) == UPSTREAM_ADDRESS
            assert address_of(bed, APP).startswith("100.")
        assert etc_of(bed) == before


def test_a_named_back_end_that_is_not_there_degrades_vnet_and_no_more():
    with with_cluster() as bed:
        before = etc_of(bed)
        with vnet_in(bed, "resolved"):
            bed.wait_for_health("degraded")
            wait_until(
                lambda: "'resolved' is not possible" in " ".join(bed.status()["reasons"]),
                "the reason is said",
            )
            assert bed.resolve(APP, server="100.64.0.2")
            assert etc_of(bed) == before


def kill_at_each_step(bed: Bed, *kinds: str, least: int = 15) -> None:
    """In the bed's `/etc`, which is best in memory, where syncing costs nothing."""
    script = str(PARTS / "killed_settings.py")
    results = json.loads(bed.output(sys.executable, script, *kinds, timeout=110))
    assert tuple(results) == kinds
    for kind, found in results.items():
        assert found["wrong"] == [], kind
        assert least < found["steps"] < 99, kind


@pytest.mark.parametrize(
    "kinds", [("file", "mount"), ("link", "missing"), ("macos", "macos-others")], ids="-".join
)
def test_killed_at_each_step_of_applying_and_undoing_everything_is_restored(kinds):
    with own_etc() as bed:
        bed.output("mount", "-t", "tmpfs", "none", "/etc")
        kill_at_each_step(bed, *kinds)

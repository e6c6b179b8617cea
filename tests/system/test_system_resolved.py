"""systemd-resolved in a booted Debian: VNet sets up its link by itself, and keeps it as it should be.

The uplink's server knows names of its own, one of them in VNet's zone. A second cluster has another
zone; its login comes and goes.
"""

from collections.abc import Iterator

import dnslib
import pytest
from booted_bed import BootedBed
from far_end import HEALTHY_SECONDS, HELLO, PROXY, PYTHON, UNIT, UPSTREAM, USER, ZONE
from private_bed import wait_until

# Of one test, not of the tree that may have to be made first.
ONE_TEST = pytest.mark.timeout(180, func_only=True)
pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.system, ONE_TEST]

STUB = "127.0.0.53"
UPLINK = "127.0.0.56"
FOREIGN, FOREIGN_ADDRESS = "foreign.example.net", "192.0.2.78"
# In VNet's zone, but no app.
PLAIN, PLAIN_ADDRESS = f"plain.{ZONE}", "192.0.2.77"
SECOND, SECOND_ZONE, SECOND_PROXY = "teleport.second.test", "second.example.org", "127.0.1.2"
SECOND_APP = f"hello.{SECOND_ZONE}"
# After a login, a logout or a restart of systemd-resolved, on a machine that may be busy.
SOON_SECONDS = 20.0

HOME = f"/home/{USER}/.tsh"
OTHER_HOME = f"/home/{USER}/second"
DROP_IN = "/etc/systemd/resolved.conf.d/zz-test.conf"
CONFIG = f"""
[teleport]
ca_file = "/home/{USER}/authorities.pem"
"""
CLUSTER = f"""
[[clusters]]
name = "second.test"
proxy_addr = "{SECOND}:3080"
custom_dns_zones = ["{SECOND_ZONE}"]

[[clusters.apps]]
name = "hello"
uri = "tcp://hello.backend.internal:80"
public_addr = "{SECOND_APP}"
"""
NAMES = {
    "teleport.demo.test": PROXY,
    SECOND: SECOND_PROXY,
    FOREIGN: FOREIGN_ADDRESS,
    PLAIN: PLAIN_ADDRESS,
}
_RUN_DNS = f"""
import asyncio
from demo import upstream_dns
asyncio.run(upstream_dns.serve("{UPLINK}", 53, {NAMES!r}))
"""
_RUN_CLUSTER = f"""
import asyncio, pathlib
from demo.cluster.config import parse_cluster_file
from demo.cluster.server import run_demo_cluster
clusters = parse_cluster_file(pathlib.Path("/var/tmp/second.toml").read_text())
home = pathlib.Path("{OTHER_HOME}")
asyncio.run(run_demo_cluster(clusters, home, bind_hosts={{"second.test": "{SECOND_PROXY}"}}))
"""
_LOG_IN = f"""
set -e
cp -a {OTHER_HOME}/keys/{SECOND} {HOME}/keys/
cp -a {OTHER_HOME}/{SECOND}.yaml {HOME}/
"""
_LOG_OUT = f"rm -rf {HOME}/keys/{SECOND} {HOME}/{SECOND}.yaml"


@pytest.fixture(scope="module")
def surroundings(session_machine) -> Iterator[BootedBed]:
    """The shared system with another uplink, a second cluster, and a configuration of no words."""
    bed = session_machine
    config = bed.path("/etc/vnet/vnet.toml")
    before = config.read_text()
    bed.run("systemctl", "stop", "vnet@*.service")
    bed.path("/var/tmp/second.toml").write_text(CLUSTER)
    bed.start_program("test-second-dns", PYTHON, "-c", _RUN_DNS)
    use_uplink(bed, UPLINK)
    bed.start_program("test-second-cluster", PYTHON, "-c", _RUN_CLUSTER, user=USER)
    profile = bed.path(f"{OTHER_HOME}/current-profile")
    wait_until(profile.exists, "the second cluster runs")
    authorities = [bed.path(f"{home}/web-ca.pem").read_text() for home in (HOME, OTHER_HOME)]
    bed.path(f"/home/{USER}/authorities.pem").write_text("".join(authorities))
    config.write_text(CONFIG)
    try:
        yield bed
    finally:
        bed.run("systemctl", "stop", "vnet@*.service")
        config.write_text(before)
        bed.output("sh", "-c", _LOG_OUT)
        bed.run("systemctl", "stop", "test-second-cluster.service", "test-second-dns.service")
        bed.path(DROP_IN).unlink()
        bed.systemctl("restart", "systemd-resolved.service")


@pytest.fixture
def served(surroundings, machine) -> BootedBed:
    """The same with a healthy VNet of one login."""
    start(surroundings)
    return surroundings


def start(bed: BootedBed) -> None:
    bed.output("sh", "-c", _LOG_OUT)
    bed.systemctl("start", UNIT)
    bed.wait_for_health("healthy", HEALTHY_SECONDS)


def use_uplink(bed: BootedBed, server: str) -> None:
    """Has systemd-resolved ask this server, and forget what it was told by the one before."""
    bed.path(DROP_IN).write_text(f"[Resolve]\nDNS=\nDNS={server}\n")
    bed.systemctl("restart", "systemd-resolved.service")


def log_in(bed: BootedBed) -> None:
    bed.output("sh", "-c", _LOG_IN, user=USER)


def link(bed: BootedBed, setting: str) -> str:
    """One setting of VNet's link, as resolvectl shows it."""
    shown = bed.output("resolvectl", "--no-pager", setting, "vnet0")
    return shown.partition(":")[2].strip()


def zones(bed: BootedBed) -> list[str]:
    return sorted(link(bed, "domain").split())


def servers(bed: BootedBed) -> list[str]:
    return bed.status()["network"]["dns_addresses"]


def address_of(bed: BootedBed, name: str) -> str:
    """What a program gets through nss-resolve, "" for nothing."""
    found = bed.run("getent", "ahostsv4", name).stdout.decode().split()
    return found[0] if found else ""


def through_the_stub(bed: BootedBed, name: str) -> list[str]:
    """What a program gets that asks the server in /etc/resolv.conf itself, as dig does."""
    try:
        answer = bed.ask(name, server=STUB)
    except TimeoutError:
        return ["no answer"]
    return [str(record.rdata) for record in answer.rr]


def assert_is_served(bed: BootedBed, name: str = HELLO) -> None:
    address = address_of(bed, name)
    assert address.startswith("100.")
    assert through_the_stub(bed, name) == [address]


def test_the_link_has_vnets_servers_and_zones_and_nothing_else_goes_there(served):
    assert served.status()["network"]["os_integration"] == "resolved"
    assert link(served, "dns").split() == servers(served)
    assert f"~{ZONE}" in zones(served)
    assert all(zone.startswith("~") and "." in zone for zone in zones(served))
    assert link(served, "default-route") == "no"
    for setting in ("dnssec", "dnsovertls", "llmnr", "mdns"):
        assert link(served, setting) == "no", setting
    assert "resolver: resolved, because" in served.journal(UNIT)


def test_programs_of_both_kinds_find_apps(served):
    assert_is_served(served)
    page = served.output("curl", "--silent", "--show-error", f"http://{HELLO}/")
    assert "Hello from VNet" in page


def test_other_names_go_where_they_went_before(served):
    assert address_of(served, FOREIGN) == FOREIGN_ADDRESS
    assert through_the_stub(served, FOREIGN) == [FOREIGN_ADDRESS]
    assert link(served, "default-route") == "no"


def test_names_in_vnets_zone_that_are_no_apps_go_to_the_uplink(served):
    assert address_of(served, PLAIN) == PLAIN_ADDRESS
    assert through_the_stub(served, PLAIN) == [PLAIN_ADDRESS]
    # Never in a circle through systemd-resolved.
    answer = served.ask(f"nothing.{ZONE}", server=STUB)
    assert answer.header.rcode == dnslib.RCODE.NXDOMAIN


def test_a_new_uplink_is_followed(served):
    try:
        use_uplink(served, UPSTREAM)
        wait_until(lambda: not through_the_stub(served, PLAIN), "its names are gone", SOON_SECONDS)
    finally:
        use_uplink(served, UPLINK)
    wait_until(
        lambda: through_the_stub(served, PLAIN) == [PLAIN_ADDRESS], "they are back", SOON_SECONDS
    )


def test_zones_come_with_a_login_and_go_with_the_logout(served):
    assert not address_of(served, SECOND_APP)
    log_in(served)
    wait_until(lambda: f"~{SECOND_ZONE}" in zones(served), "the zone is there", SOON_SECONDS)
    assert_is_served(served, SECOND_APP)
    assert_is_served(served)
    served.output("sh", "-c", _LOG_OUT)
    wait_until(lambda: f"~{SECOND_ZONE}" not in zones(served), "the zone is gone", SOON_SECONDS)
    assert not address_of(served, SECOND_APP)
    assert_is_served(served)


@pytest.mark.parametrize("remembers", [True, False])
def test_settings_come_back_after_a_restart_of_systemd_resolved(served, remembers):
    before = zones(served)
    served.systemctl("kill", "--signal=KILL", "systemd-resolved.service")
    served.run("systemctl", "stop", "systemd-resolved.service")
    if not remembers:
        served.output("rm", "-rf", "/run/systemd/resolve/netif")
    served.systemctl("start", "systemd-resolved.service")
    wait_until(lambda: zones(served) == before, "the zones are back", SOON_SECONDS)
    wait_until(lambda: link(served, "dns").split() == servers(served), "and the servers")
    assert link(served, "default-route") == "no"
    assert_is_served(served)
    wait_until(lambda: served.health() == "healthy", "VNet is healthy")


def test_what_somebody_else_sets_is_mended(served):
    before = zones(served)
    served.output("resolvectl", "revert", "vnet0")
    wait_until(lambda: zones(served) == before, "the zones are back", SOON_SECONDS)
    wait_until(lambda: link(served, "dns").split() == servers(served), "and the servers")
    assert_is_served(served)


def test_dnssec_and_dns_over_tls_for_all_other_links_are_in_nobodys_way(served):
    log_in(served)
    try:
        # Of zones below "test" it wants no signatures anyway.
        served.path(DROP_IN).write_text(
            f"[Resolve]\nDNS=\nDNS={UPLINK}\nDNSSEC=yes\nDNSOverTLS=yes\n"
        )
        served.systemctl("restart", "systemd-resolved.service")
        wait_until(lambda: f"~{SECOND_ZONE}" in zones(served), "the zone is there", SOON_SECONDS)
        wait_until(
            lambda: address_of(served, SECOND_APP).startswith("100."), "it is found", SOON_SECONDS
        )
        assert not address_of(served, FOREIGN)
    finally:
        use_uplink(served, UPLINK)


def test_while_systemd_resolved_does_not_run_the_status_says_so(served):
    served.systemctl("mask", "--runtime", "--now", "systemd-resolved.service")
    try:
        served.wait_for_health("degraded")
        assert "systemd-resolved does not run" in " ".join(served.status()["reasons"])
    finally:
        served.systemctl("unmask", "--runtime", "systemd-resolved.service")
        served.systemctl("start", "systemd-resolved.service")
    served.wait_for_health("healthy")
    assert_is_served(served)


def test_after_the_stop_everything_is_as_before(surroundings, machine):
    def state() -> dict[str, object]:
        return {
            "resolvectl": [
                # As far as the longest label lets them, lines are indented.
                line.strip()
                for line in machine.output("resolvectl", "--no-pager", "status").splitlines()
                # Which server answered last is no setting.
                if line.strip() and "Current DNS Server" not in line
            ],
            "files": {
                path: found
                for path, found in machine.files("/var", "/home", "/usr", "/opt", "/root").items()
                if path.startswith("/etc")
            },
            "resolv.conf": machine.path("/etc/resolv.conf").readlink(),
            # What systemd-resolved remembers of links; the directory for that stays when it is empty.
            "links": sorted(
                path.name
                for path in machine.path("/run/systemd/resolve").rglob("*")
                if not path.is_dir()
            ),
        }

    before = state()
    start(machine)
    assert_is_served(machine)
    machine.systemctl("stop", UNIT)
    assert state() == before
    assert address_of(machine, FOREIGN) == FOREIGN_ADDRESS
    assert not address_of(machine, HELLO)

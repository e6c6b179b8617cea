"""NetworkManager in a booted Debian, with its dnsmasq and with systemd-resolved.

NetworkManager sets up the uplink, whose DNS server is on the far side in a network of its own.
"""

from collections.abc import Iterator

import debian_tree
import pytest
from booted_bed import BootedBed, booted
from far_end import CLUSTER, HEALTHY_SECONDS, HELLO, PROXY, PYTHON, UNIT, USER, ZONE, install
from private_bed import wait_until

# Of one test, not of the tree that may have to be made first.
ONE_TEST = pytest.mark.timeout(180, func_only=True)
pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.system, ONE_TEST]

PACKAGES = ("network-manager", "dnsmasq-base")
UPLINK = "192.0.2.1"
FOREIGN, FOREIGN_ADDRESS = "foreign.example.net", "192.0.2.78"
# In VNet's zone, but no app.
PLAIN, PLAIN_ADDRESS = f"plain.{ZONE}", "192.0.2.77"
DROP_IN = "/etc/NetworkManager/dnsmasq.d/vnet.conf"
CONNECTION = f"""
[connection]
id=uplink
type=ethernet
interface-name=uplink0
[ipv4]
method=manual
address1=192.0.2.2/24,{UPLINK}
dns={UPLINK}
[ipv6]
method=disabled
"""
CONFIG = f"""
[teleport]
ca_file = "/home/{USER}/.tsh/web-ca.pem"
"""
NAMES = {"teleport.demo.test": PROXY, FOREIGN: FOREIGN_ADDRESS, PLAIN: PLAIN_ADDRESS}
_RUN_DNS = f"""
import asyncio
from demo import upstream_dns
asyncio.run(upstream_dns.serve("{UPLINK}", 53, {NAMES!r}))
"""
_RUN_CLUSTER = f"""
import asyncio, pathlib
from demo.cluster.config import parse_cluster_file
from demo.cluster.server import run_demo_cluster
clusters = parse_cluster_file(pathlib.Path("/var/tmp/cluster.toml").read_text())
home = pathlib.Path("/home/{USER}/.tsh")
asyncio.run(run_demo_cluster(clusters, home, bind_hosts={{"demo.test": "{PROXY}"}}))
"""


@pytest.fixture(scope="module")
def system(debian, package) -> Iterator[BootedBed]:
    """A system whose resolver is the dnsmasq of NetworkManager."""
    with booted(debian_tree.tree(*PACKAGES)) as bed:
        install(bed, package)
        bed.systemctl("mask", "--now", "systemd-resolved.service")
        # What a system has where NetworkManager looks after the resolver.
        bed.output("ln", "-sf", "/run/NetworkManager/resolv.conf", "/etc/resolv.conf")
        give_uplink(bed, "dns=dnsmasq\nrc-manager=symlink")
        give_cluster(bed)
        yield bed


@pytest.fixture
def fed(debian, package) -> Iterator[BootedBed]:
    """A system in which NetworkManager tells systemd-resolved of its servers, with a healthy VNet."""
    with booted(debian_tree.tree(*PACKAGES)) as bed:
        install(bed, package)
        give_uplink(bed, "dns=systemd-resolved")
        give_cluster(bed)
        start(bed)
        yield bed


def give_cluster(bed: BootedBed) -> None:
    bed.path("/var/tmp/cluster.toml").write_text(CLUSTER)
    bed.path("/etc/vnet/vnet.toml").write_text(CONFIG)
    bed.start_program("test-cluster", PYTHON, "-c", _RUN_CLUSTER, user=USER)
    profile = bed.path(f"/home/{USER}/.tsh/current-profile")
    wait_until(profile.exists, "the cluster runs and the user is logged in")


def give_uplink(bed: BootedBed, main: str) -> None:
    """An interface with a DNS server behind it, which NetworkManager sets up."""
    bed.systemctl("stop", "NetworkManager.service")
    for words in (
        "netns add far",
        "link add uplink0 type veth peer name far0 netns far",
        "-n far address add 192.0.2.1/24 dev far0",
        "-n far link set lo up",
        "-n far link set far0 up",
    ):
        bed.output("ip", *words.split())
    bed.start_program("test-dns", "ip", "netns", "exec", "far", PYTHON, "-c", _RUN_DNS)
    settings = bed.path("/etc/NetworkManager/conf.d/test.conf")
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(f"[main]\n{main}\nno-auto-default=*\n")
    connection = bed.path("/etc/NetworkManager/system-connections/uplink.nmconnection")
    connection.write_text(CONNECTION)
    connection.chmod(0o600)
    bed.systemctl("start", "NetworkManager.service")
    wait_until(lambda: address_of(bed, FOREIGN), "names are found through NetworkManager")


@pytest.fixture
def stopped(system) -> BootedBed:
    """The system without a running VNet."""
    system.run("systemctl", "stop", UNIT)
    return system


@pytest.fixture
def served(stopped) -> BootedBed:
    """The system with a healthy VNet."""
    start(stopped)
    return stopped


def start(bed: BootedBed) -> None:
    bed.systemctl("start", UNIT)
    bed.wait_for_health("healthy", HEALTHY_SECONDS)


def address_of(bed: BootedBed, name: str) -> str:
    found = bed.run("getent", "ahostsv4", name).stdout.decode().split()
    return found[0] if found else ""


def test_apps_are_found_and_other_names_as_before(served):
    assert served.status()["network"]["os_integration"] == "networkmanager"
    assert f"server=/{ZONE}/100.64.0.2\n" in served.path(DROP_IN).read_text()
    wait_until(lambda: address_of(served, HELLO).startswith("100."), "the app is found")
    assert served.resolve(HELLO, server="127.0.0.1") == [address_of(served, HELLO)]
    page = served.output("curl", "--silent", "--show-error", f"http://{HELLO}/")
    assert "Hello from VNet" in page
    assert address_of(served, FOREIGN) == FOREIGN_ADDRESS
    # Asked of VNet, and by it of NetworkManager's servers.
    assert address_of(served, PLAIN) == PLAIN_ADDRESS


def test_network_manager_leaves_the_link_alone(served):
    wait_until(
        lambda: "vnet0:unmanaged" in served.output("nmcli", "-t", "-f", "DEVICE,STATE", "device"),
        "it is not managed",
    )
    assert "100.64.0.1" in served.output("ip", "address", "show", "dev", "vnet0")
    assert address_of(served, HELLO)


def test_it_survives_a_restart_of_network_manager(served):
    served.systemctl("restart", "NetworkManager.service")
    wait_until(lambda: address_of(served, FOREIGN), "names are found again")
    wait_until(lambda: address_of(served, HELLO).startswith("100."), "apps as well")
    wait_until(lambda: served.health() == "healthy", "VNet is healthy")


def test_after_the_stop_everything_is_as_before(stopped):
    bed = stopped
    before = bed.files("/var", "/home", "/usr", "/proc", "/root")
    start(bed)
    wait_until(lambda: address_of(bed, HELLO).startswith("100."), "the app is found")
    bed.systemctl("stop", UNIT)
    assert bed.files("/var", "/home", "/usr", "/proc", "/root") == before
    assert not bed.path(DROP_IN).exists()
    wait_until(lambda: address_of(bed, FOREIGN) == FOREIGN_ADDRESS, "names are found")
    assert not address_of(bed, HELLO)


def test_after_a_kill_the_next_start_puts_it_right(served):
    pid = int(served.property_of(UNIT, "MainPID"))
    served.output("mkdir", "-p", f"/run/systemd/system/{UNIT}.d")
    drop_in = served.path(f"/run/systemd/system/{UNIT}.d/test.conf")
    drop_in.write_text("[Service]\nRestart=no\n")
    served.systemctl("daemon-reload")
    try:
        served.output("kill", "-KILL", str(pid))
        wait_until(lambda: served.property_of(UNIT, "ActiveState") == "failed", "it is dead")
        assert served.path(DROP_IN).exists()
        served.output("vnet", "repair")
        assert not served.path(DROP_IN).exists()
        wait_until(lambda: address_of(served, FOREIGN) == FOREIGN_ADDRESS, "names are found")
        wait_until(lambda: not address_of(served, HELLO), "apps are not")
    finally:
        drop_in.unlink()
        served.systemctl("daemon-reload")
        served.run("systemctl", "reset-failed", UNIT)


def settings_of_link(bed: BootedBed) -> list[str]:
    shown = bed.output("resolvectl", "--no-pager", "status", "vnet0").splitlines()
    # Which server answered last is no setting.
    return [line for line in shown if "Current DNS Server" not in line]


def test_where_it_feeds_systemd_resolved_the_link_keeps_vnets_settings(fed):
    def is_served() -> bool:
        return address_of(fed, HELLO).startswith("100.")

    assert fed.status()["network"]["os_integration"] == "resolved"
    wait_until(is_served, "the app is found")
    assert "vnet0:unmanaged" in fed.output("nmcli", "-t", "-f", "DEVICE,STATE", "device")
    assert address_of(fed, PLAIN) == PLAIN_ADDRESS
    before = settings_of_link(fed)
    fed.output("nmcli", "connection", "down", "uplink")
    wait_until(is_served, "the app is found without an uplink")
    fed.output("nmcli", "connection", "up", "uplink")
    fed.systemctl("restart", "NetworkManager.service")
    wait_until(lambda: address_of(fed, FOREIGN) == FOREIGN_ADDRESS, "names are found")
    wait_until(lambda: address_of(fed, PLAIN) == PLAIN_ADDRESS, "those in the zone as well")
    wait_until(is_served, "the app is found")
    assert settings_of_link(fed) == before
    assert fed.health() == "healthy"

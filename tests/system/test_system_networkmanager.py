"""NetworkManager in a booted Debian, with its dnsmasq and with systemd-resolved.

NetworkManager sets up the uplink, whose DNS server is on the far side in a network of its own.
"""

from collections.abc import Iterator

import debian_tree
import pytest
from booted_bed import BootedBed, booted
from far_end import CLUSTER, HEALTHY_SECONDS, HELLO, PROXY, PYTHON, UNIT, USER, ZONE, install
from private_bed import wait_until

from supervisor.cli.control_client import AskError

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
    """Returns when VNet is healthy with the zone that only the cluster knows."""
    bed.systemctl("start", UNIT)
    wait_until(lambda: ZONE in zones(bed), "the cluster has told its zone", HEALTHY_SECONDS)
    bed.wait_for_health("healthy", HEALTHY_SECONDS)


def zones(bed: BootedBed) -> list[str]:
    try:
        return list(bed.status()["network"]["dns_zones"])
    except AskError:
        return []


def wait_for(bed: BootedBed, name: str, wanted: str) -> None:
    """Returns once a name is found at this address, or at one that begins so.

    NetworkManager's dnsmasq is started anew with each change. A question that comes in that moment fails
    or is lost, one of a proxy for its cluster's address too, which is asked again after 5 s: what the
    cluster has to be asked for, connections to apps too, fails until then.
    """
    wait_until(lambda: address_of(bed, name).startswith(wanted), f"{name} is found")


def page_of(bed: BootedBed, name: str) -> str:
    """What an app answers, "" while it cannot be reached."""
    return bed.run("curl", "--silent", f"http://{name}/").stdout.decode()


def wait_for_none(bed: BootedBed, name: str) -> None:
    """Returns once a name is not found."""
    wait_until(lambda: not address_of(bed, name), f"{name} is not found")


def address_of(bed: BootedBed, name: str) -> str:
    found = bed.run("getent", "ahostsv4", name).stdout.decode().split()
    return found[0] if found else ""


def is_unmanaged(bed: BootedBed) -> bool:
    return "vnet0:unmanaged" in bed.output("nmcli", "-t", "-f", "DEVICE,STATE", "device")


def test_apps_are_found_and_other_names_as_before(served):
    assert served.status()["network"]["os_integration"] == "networkmanager"
    assert f"server=/{ZONE}/100.64.0.2\n" in served.path(DROP_IN).read_text()
    wait_for(served, HELLO, "100.")
    # From dnsmasq, as what programs ask.
    assert served.resolve(HELLO, server="127.0.0.1") == [address_of(served, HELLO)]
    wait_until(lambda: "Hello from VNet" in page_of(served, HELLO), "the app answers")
    wait_for(served, FOREIGN, FOREIGN_ADDRESS)
    # Asked of VNet, and by it of NetworkManager's servers.
    wait_for(served, PLAIN, PLAIN_ADDRESS)


def test_network_manager_leaves_the_link_alone(served):
    wait_until(lambda: is_unmanaged(served), "the link is not managed")
    assert "100.64.0.1" in served.output("ip", "address", "show", "dev", "vnet0")
    wait_for(served, HELLO, "100.")


def test_it_survives_a_restart_of_network_manager(served):
    served.systemctl("restart", "NetworkManager.service")
    wait_for(served, FOREIGN, FOREIGN_ADDRESS)
    wait_for(served, HELLO, "100.")
    served.wait_for_health("healthy")


def test_after_the_stop_everything_is_as_before(stopped):
    bed = stopped
    before = bed.files("/var", "/home", "/usr", "/proc", "/root")
    start(bed)
    wait_for(bed, HELLO, "100.")
    bed.systemctl("stop", UNIT)
    assert bed.files("/var", "/home", "/usr", "/proc", "/root") == before
    assert not bed.path(DROP_IN).exists()
    wait_for(bed, FOREIGN, FOREIGN_ADDRESS)
    wait_for_none(bed, HELLO)


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
        wait_for(served, FOREIGN, FOREIGN_ADDRESS)
        wait_for_none(served, HELLO)
    finally:
        drop_in.unlink()
        served.systemctl("daemon-reload")
        served.run("systemctl", "reset-failed", UNIT)


def settings_of_link(bed: BootedBed) -> list[str]:
    shown = bed.output("resolvectl", "--no-pager", "status", "vnet0").splitlines()
    # Which server answered last is no setting.
    return [line for line in shown if "Current DNS Server" not in line]


def test_where_it_feeds_systemd_resolved_the_link_keeps_vnets_settings(fed):
    assert fed.status()["network"]["os_integration"] == "resolved"
    wait_for(fed, HELLO, "100.")
    wait_until(lambda: is_unmanaged(fed), "the link is not managed")
    wait_for(fed, PLAIN, PLAIN_ADDRESS)
    before = settings_of_link(fed)
    fed.output("nmcli", "connection", "down", "uplink")
    wait_for(fed, HELLO, "100.")
    fed.output("nmcli", "connection", "up", "uplink")
    fed.systemctl("restart", "NetworkManager.service")
    wait_for(fed, FOREIGN, FOREIGN_ADDRESS)
    wait_for(fed, PLAIN, PLAIN_ADDRESS)
    wait_for(fed, HELLO, "100.")
    wait_until(lambda: settings_of_link(fed) == before, "the link's settings are as before")
    fed.wait_for_health("healthy")

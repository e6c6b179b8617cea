"""What VNet meets in a booted system: the package, a cluster, the Internet's DNS, a login."""

import shutil
from pathlib import Path

from booted_bed import BootedBed
from private_bed import wait_until

PYTHON = "/usr/lib/vnet/bin/python"
USER = "alice"
UNIT = f"vnet@{USER}.service"
ZONE = "corp.example.test"
ECHO = f"echo.{ZONE}"
HELLO = f"hello.{ZONE}"
# Not 127.0.0.53 and .54, which are systemd-resolved's.
UPSTREAM = "127.0.0.55"
PROXY = "127.0.1.1"
HEALTHY_SECONDS = 40.0

CLUSTER = f"""
[[clusters]]
name = "demo.test"
proxy_addr = "teleport.demo.test:3080"
custom_dns_zones = ["{ZONE}"]

[[clusters.apps]]
name = "hello"
uri = "tcp://hello.backend.internal:80"
public_addr = "{HELLO}"

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"
public_addr = "{ECHO}"
"""
# The rest is VNet's to find out: systemd-resolved, and whom that asks.
CONFIG = f"""
[teleport]
ca_file = "/home/{USER}/.tsh/web-ca.pem"
"""
_RUN_DNS = f"""
import asyncio
from demo import upstream_dns
asyncio.run(upstream_dns.serve("{UPSTREAM}", 53, {{"teleport.demo.test": "{PROXY}"}}))
"""
_RUN_CLUSTER = f"""
import asyncio, pathlib
from demo.cluster.config import parse_cluster_file
from demo.cluster.server import run_demo_cluster
clusters = parse_cluster_file(pathlib.Path("/var/tmp/cluster.toml").read_text())
home = pathlib.Path("/home/{USER}/.tsh")
asyncio.run(run_demo_cluster(clusters, home, bind_hosts={{"demo.test": "{PROXY}"}}))
"""


def copy_in(bed: BootedBed, package: Path) -> str:
    """The package's path in the system."""
    shutil.copyfile(package, bed.path("/var/tmp/vnet.deb"))
    return "/var/tmp/vnet.deb"


def install(bed: BootedBed, package: Path) -> None:
    """Installs the package as a user would without a network."""
    bed.output("dpkg", "--install", copy_in(bed, package), timeout=120)


def give_cluster(bed: BootedBed) -> None:
    """Starts a cluster and a DNS server, logs the user in, and configures VNet for them."""
    # systemd-resolved asks nobody on a machine without a network.
    for words in (
        "link add uplink0 type veth peer name far0",
        # Without addresses that come a second later.
        "link set far0 addrgenmode none",
        "link set uplink0 addrgenmode none",
        "link set far0 up",
        "address add 192.0.2.2/24 dev uplink0",
        "link set uplink0 up",
        "route add default via 192.0.2.1",
    ):
        bed.output("ip", *words.split())
    bed.path("/etc/vnet/vnet.toml").write_text(CONFIG)
    bed.path("/var/tmp/cluster.toml").write_text(CLUSTER)
    settings = bed.path("/etc/systemd/resolved.conf.d")
    settings.mkdir(exist_ok=True)
    (settings / "test.conf").write_text(f"[Resolve]\nDNS={UPSTREAM}\nDNSSEC=no\n")
    bed.systemctl("restart", "systemd-resolved.service")
    bed.start_program("test-dns", PYTHON, "-c", _RUN_DNS)
    bed.start_program("test-cluster", PYTHON, "-c", _RUN_CLUSTER, user=USER)
    profile = bed.path(f"/home/{USER}/.tsh/current-profile")
    wait_until(profile.exists, "the cluster runs and the user is logged in")


def start_service(bed: BootedBed) -> None:
    """Starts VNet, and returns when it is healthy and the system asks it for its names."""
    bed.systemctl("start", UNIT)
    bed.wait_for_health("healthy", HEALTHY_SECONDS)
    wait_until(lambda: ZONE in domains(bed), "the system's resolver has the zone")


def domains(bed: BootedBed) -> set[str]:
    """The routing domains of VNet's link; none while there is no link."""
    shown = bed.run("resolvectl", "domain", "vnet0").stdout.decode()
    return {word.removeprefix("~") for word in shown.partition(":")[2].split()}

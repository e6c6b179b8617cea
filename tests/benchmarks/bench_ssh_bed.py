"""What SSH is measured in: VNet, a cluster with Debian's sshd as a node, and an app of another cluster.

    ssh ── VNet ── embedded cluster (ProxySSH) ──┐
    ssh ─────────────────────────────────────────┴── sshd
    socat ── VNet ── far end                             the app beside it

The embedded cluster is written in Python, too, and is in the way: its CPU is counted apart. The app has
a cluster of its own, whose address `bench_far_end` takes once VNet has its certificates.
"""

import contextlib
import os
import pwd
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import bench_programs as programs
from bench_cluster import RunningCluster, join_login, running_cluster
from bench_far_end import Place, Way, running_far_end
from bench_programs import Programs, wait_for
from bench_socat import DIRECTIONS
from bench_vnet import Vnet, start_upstream_dns, start_vnet

from demo import linux
from demo.cluster.authorities import issue_web_certificate, make_authority
from demo.cluster.config import App, Cluster, ClusterFile, Node, check_clusters
from demo.cluster.server import EmbeddedCluster

APPS_ZONE, NODES_ZONE = "apps.test", "nodes.test"
ADDRESSES = {APPS_ZONE: "127.0.1.1", NODES_ZONE: "127.0.1.2"}
APP_PORT = 9001
LOCAL, SSHD_PORT = "127.0.0.1", 2222
NODE = f"real.{NODES_ZONE}"
USER = "alice"
# Nodes without SSH: bytes for ever, and where bytes go. The names are those of `bench_socat`.
RAW_PORTS = {"sink": 2223, "source": 2224}
# More than any stream moves.
HUGE_BYTES = 1 << 40
LOGIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Bed:
    """The running parts; `far_end` is the process that the app leads to."""

    directory: Path
    programs: Programs
    vnet: Vnet
    cluster: RunningCluster
    far_end: int

    @property
    def nodes_home(self) -> Path:
        """The tsh home of the login to the cluster with the nodes."""
        return self.directory / "nodes-tsh"

    @property
    def keys(self) -> Path:
        """Its keys and certificates."""
        return self.nodes_home / "keys" / host_of(NODES_ZONE)

    @property
    def huge_file(self) -> Path:
        """Zeros that take no room."""
        return self.directory / "memory" / "zeros"

    def options(self, path: str) -> list[str]:
        """For ssh and sftp: how the node is reached by a path, `vnet` or `direct`."""
        config = self.vnet.home / "vnet_ssh_config" if path == "vnet" else self.direct_config
        return ["-F", str(config), "-o", "BatchMode=yes", "-o", "IdentityAgent=none"]

    @property
    def direct_config(self) -> Path:
        return self.directory / "direct_ssh_config"

    @property
    def sshd_log(self) -> str:
        return (self.directory / "sshd.log").read_text(errors="replace")


def host_of(zone: str) -> str:
    """The name of a cluster's proxy."""
    return f"teleport.{zone}"


def app_name(app: str) -> str:
    """The DNS name of the app `sink` or `source`."""
    return f"{app}.{APPS_ZONE}"


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Bed]:
    """The bed in this process's own namespaces."""
    home, nodes_home = directory / "tsh", directory / "nodes-tsh"
    with Programs(directory) as started:
        proxies = {host_of(zone): address for zone, address in ADDRESSES.items()}
        start_upstream_dns(started, directory, proxies)
        prepare = partial(_write_certificates, directory)
        with (
            running_cluster(_apps_cluster(), home, ADDRESSES, prepare) as apps,
            running_cluster(_nodes_cluster(), nodes_home, ADDRESSES) as nodes,
        ):
            join_login(home, nodes_home, host_of(NODES_ZONE))
            authorities = directory / "web-ca.pem"
            more = (nodes_home / "web-ca.pem").read_bytes()
            authorities.write_bytes(authorities.read_bytes() + more)
            _start_nodes(started, directory, nodes_home)
            vnet = start_vnet(started, directory, authorities)
            _fetch_certificates()
            apps.give_up_addresses()
            with running_far_end({Way.PLAIN: _place(directory)}) as far_end:
                bed = Bed(directory, started, vnet, nodes, far_end)
                _write_direct_config(bed)
                config = vnet.home / "vnet_ssh_config"
                wait_for(
                    lambda: config.exists() and f"*.{NODES_ZONE}" in config.read_text(),
                    "VNet has not written its ssh configuration",
                    LOGIN_SECONDS,
                )
                yield bed


# --- clusters ---------------------------------------------------------------------------------


def _apps_cluster() -> ClusterFile:
    uri = f"tcp://{LOCAL}:{APP_PORT}"
    apps = tuple(App(name=app, uri=uri, public_addr=app_name(app)) for app in DIRECTIONS.values())
    return _file(Cluster(name=APPS_ZONE, proxy_addr=f"{host_of(APPS_ZONE)}:443", apps=apps))


def _nodes_cluster() -> ClusterFile:
    raw = (Node(hostname=name, addr=f"{LOCAL}:{port}") for name, port in RAW_PORTS.items())
    cluster = Cluster(
        name=NODES_ZONE,
        proxy_addr=f"{host_of(NODES_ZONE)}:443",
        user=USER,
        logins=(_own_name(),),
        nodes=(Node(hostname="real", addr=f"{LOCAL}:{SSHD_PORT}"), *raw),
    )
    return _file(cluster)


def _file(cluster: Cluster) -> ClusterFile:
    return check_clusters(ClusterFile(clusters=(cluster,)))


def _own_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _write_certificates(directory: Path, cluster: EmbeddedCluster) -> None:
    """What the app's far end needs; VNet trusts it beside the cluster's own proxy."""
    now, place = datetime.now(UTC), _place(directory)
    web_ca = make_authority("Benchmark Web CA", now)
    web = issue_web_certificate(web_ca, (host_of(APPS_ZONE),), now)
    Path(place.web).write_bytes(web.certificate_pem() + web.key_pem())
    state = cluster.states[APPS_ZONE]
    Path(place.users).write_bytes(state.user_ca.tls.certificate_pem())
    both = cluster.web_ca_file.read_bytes() + web_ca.tls.certificate_pem()
    (directory / "web-ca.pem").write_bytes(both)


def _place(directory: Path) -> Place:
    web, users = (str(directory / f"app-{kind}.pem") for kind in ("web", "users"))
    # Nothing is upgraded: the certificate for that is never shown.
    return Place(ADDRESSES[APPS_ZONE], web, web, users)


def _fetch_certificates() -> None:
    """One connection to each app."""
    with socket.create_server((LOCAL, APP_PORT)):
        for app in DIRECTIONS.values():
            socket.create_connection((app_name(app), APP_PORT), timeout=20).close()


# --- nodes ------------------------------------------------------------------------------------


def _start_nodes(started: Programs, directory: Path, nodes_home: Path) -> None:
    # Zeros of a file system in memory are read without making pages of them.
    memory = directory / "memory"
    memory.mkdir()
    linux.mount("bench", memory, "tmpfs")
    with (memory / "zeros").open("wb") as file:
        file.truncate(HUGE_BYTES)
    files = nodes_home / "nodes" / NODE
    started.start("sshd", programs.sshd(directory, files, LOCAL, SSHD_PORT))
    block = programs.SOCAT_BLOCK
    listen = {name: programs.socat_listen(LOCAL, port) for name, port in RAW_PORTS.items()}
    started.start("raw-sink", ["socat", "-u", block, listen["sink"], "OPEN:/dev/null,wronly"])
    started.start("raw-source", ["socat", "-U", block, listen["source"], "OPEN:/dev/zero,rdonly"])
    for port in (SSHD_PORT, *RAW_PORTS.values()):
        programs.wait_for_port(LOCAL, port)


def _write_direct_config(bed: Bed) -> None:
    """The same sshd with the same user certificate, which the login has left in the tsh home.

    The key without its certificate, which sshd would refuse first, is not offered; so the certificate
    has to lie beside the key.
    """
    key = bed.directory / "direct-key"
    shutil.copy(bed.keys / USER, key)
    certificate = bed.keys / f"{USER}-ssh" / f"{NODES_ZONE}-cert.pub"
    shutil.copy(certificate, key.with_name(f"{key.name}-cert.pub"))
    bed.direct_config.write_text(
        f"""Host {NODE}
    HostName {LOCAL}
    Port {SSHD_PORT}
    HostKeyAlias {NODE}
    IdentityFile {key}
    PubkeyAcceptedAlgorithms ssh-ed25519-cert-v01@openssh.com
    UserKnownHostsFile {bed.nodes_home / "known_hosts"}
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    IdentitiesOnly yes
"""
    )

"""What the benchmark of a whole VNet measures in: a private network with VNet and a far end.

    client ── VNet ──TLS──┐
    client ──────TLS──────┼── nginx (the proxy's address) ── socat, iperf3, redis     direct
    client ── relay ──TLS─┘                                                          socat, nginx

VNet logs in to an embedded cluster and fetches the certificate of each app from it. Then the
cluster gives the proxy's address up and nginx takes it: the cluster still answers on connections
it has, and all bytes go through compiled code, as they would with a real proxy. nginx does what a
proxy does: it ends TLS 1.3, checks the app certificate against the cluster's authority, and finds
the backend by the app named in it. It offers `teleport-tcp`, not the ping variant.
"""

import contextlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import bench_programs as programs
from bench_cluster import running_cluster
from bench_programs import Programs
from bench_vnet import Vnet, start_upstream_dns, start_vnet
from cryptography.hazmat.primitives.asymmetric import ec

from demo.cluster.authorities import (
    issue_user_certificate,
    issue_web_certificate,
    make_authority,
    private_key_pem,
)
from demo.cluster.config import App, Cluster, ClusterFile, check_clusters
from demo.cluster.identity import USAGE_APPS, AppRoute
from demo.cluster.server import EmbeddedCluster
from demo.cluster.state import ClusterState

ZONE = "bench.test"
PROXY_HOST = f"teleport.{ZONE}"
PROXY_ADDRESS, PROXY_PORT = "127.0.1.1", 443
LOCAL = "127.0.0.1"
# App name -> port of its backend.
BACKENDS = {"sink": 9001, "source": 9002, "iperf": 9003, "redis": 9004, "page": 9005}
# Where a relay in the place of VNet listens: relay -> app -> port.
RELAYS = {
    "socat": {"sink": 9011, "source": 9012},
    "nginx": {"sink": 9021, "source": 9022},
}
FRESH_NAMES = 300
# Answers every head with the same few bytes.
WEB_SERVER = """
import socket, sys, threading
def serve(end):
    data = b""
    while more := end.recv(65536):
        data += more
        while b"\\r\\n\\r\\n" in data:
            data = data.partition(b"\\r\\n\\r\\n")[2]
            end.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=128)
while True:
    end = listener.accept()[0]
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=serve, args=(end,), daemon=True).start()
"""


@dataclass(frozen=True, slots=True)
class Bed:
    """The running far end and VNet."""

    directory: Path
    programs: Programs
    vnet: Vnet

    @property
    def web_ca(self) -> Path:
        return self.directory / "web-ca.pem"

    def certificate(self, app: str) -> Path:
        """A client certificate with its key for an app, as VNet gets one."""
        return self.directory / f"{app}.pem"


def name_of(app: str) -> str:
    """The DNS name of an app."""
    return f"{app}.{ZONE}"


def fresh_names() -> list[str]:
    """Names of apps that nobody has asked for yet."""
    return [name_of(f"fresh-{number:03}") for number in range(FRESH_NAMES)]


@contextlib.contextmanager
def running(directory: Path, *, only_dns: bool = False) -> Iterator[Bed]:
    """A bed in this process's own namespaces; with `only_dns` the cluster keeps the address."""
    with Programs(directory) as started:
        start_upstream_dns(started, directory, {PROXY_HOST: PROXY_ADDRESS})
        prepare = partial(_write_certificates, directory)
        addresses = {ZONE: PROXY_ADDRESS}
        with running_cluster(_clusters(), directory / "tsh", addresses, prepare) as cluster:
            if not only_dns:
                _start_backends(started)
            bed = Bed(directory, started, start_vnet(started, directory, directory / "web-ca.pem"))
            if not only_dns:
                _fetch_certificates()
                cluster.give_up_addresses()
                _start_far_end(bed)
            yield bed


# --- cluster ----------------------------------------------------------------------------------


def _clusters() -> ClusterFile:
    apps = [
        App(name=name, uri=f"tcp://{LOCAL}:{port}", public_addr=name_of(name))
        for name, port in BACKENDS.items()
    ]
    apps += [
        App(name=name.partition(".")[0], uri=f"tcp://{LOCAL}:9", public_addr=name)
        for name in fresh_names()
    ]
    cluster = Cluster(
        name=ZONE,
        proxy_addr=f"{PROXY_HOST}:{PROXY_PORT}",
        custom_dns_zones=(ZONE,),
        apps=tuple(apps),
    )
    return check_clusters(ClusterFile(clusters=(cluster,)))


def _write_certificates(directory: Path, cluster: EmbeddedCluster) -> None:
    """What nginx and the direct clients need; VNet trusts nginx beside the cluster's own proxy."""
    now, state = datetime.now(UTC), cluster.states[ZONE]
    web_ca = make_authority("Benchmark Web CA", now)
    web = issue_web_certificate(web_ca, (PROXY_HOST,), now)
    (directory / "web.pem").write_bytes(web.certificate_pem() + web.key_pem())
    both = cluster.web_ca_file.read_bytes() + web_ca.tls.certificate_pem()
    (directory / "web-ca.pem").write_bytes(both)
    (directory / "user-ca.pem").write_bytes(state.user_ca.tls.certificate_pem())
    for app in BACKENDS:
        (directory / f"{app}.pem").write_bytes(_app_certificate(state, app, now))


def _app_certificate(state: ClusterState, app: str, now: datetime) -> bytes:
    identity = state.login_identity(now)
    route = AppRoute(app, name_of(app), state.name, "0" * 64)
    key = ec.generate_private_key(ec.SECP256R1())
    identity = replace(identity, usage=(USAGE_APPS,), route_to_app=route)
    certificate = issue_user_certificate(state.user_ca, identity, key.public_key(), now)
    return certificate + private_key_pem(key)


# --- VNet -------------------------------------------------------------------------------------


def _fetch_certificates() -> None:
    """One connection to each app, so that VNet has all certificates."""
    for app, port in BACKENDS.items():
        with socket.create_connection((name_of(app), port), timeout=20):
            pass


# --- far end ----------------------------------------------------------------------------------


def _start_backends(started: Programs) -> None:
    block = programs.SOCAT_BLOCK
    listen = {app: programs.socat_listen(LOCAL, port) for app, port in BACKENDS.items()}
    started.start("sink", ["socat", "-u", block, listen["sink"], "OPEN:/dev/null,wronly"])
    started.start("source", ["socat", "-U", block, listen["source"], "OPEN:/dev/zero,rdonly"])
    started.start("iperf", ["iperf3", "-s", "-B", LOCAL, "-p", str(BACKENDS["iperf"])])
    started.start("redis", programs.redis(started.home, LOCAL, BACKENDS["redis"]))
    started.start("page", [sys.executable, "-c", WEB_SERVER, LOCAL, str(BACKENDS["page"])])
    for port in BACKENDS.values():
        programs.wait_for_port(LOCAL, port)


def _start_far_end(bed: Bed) -> None:
    # nginx shows attributes it has no name for as hexadecimal digits: here the public address.
    routes = "".join(
        f"~*{name_of(app).encode().hex()} {LOCAL}:{port};" for app, port in BACKENDS.items()
    )
    server = programs.nginx_tls_server(
        f"{PROXY_ADDRESS}:{PROXY_PORT}",
        "$backend",
        certificate=bed.directory / "web.pem",
        client_ca=bed.directory / "user-ca.pem",
        alpn="teleport-tcp",
    )
    routing = f"map $ssl_client_s_dn $backend {{ {routes} }}"
    bed.programs.start("far", programs.nginx(bed.directory, "far-nginx", routing + server))
    programs.wait_for_port(PROXY_ADDRESS, PROXY_PORT)


def start_relays(bed: Bed) -> None:
    """Starts the compiled plain-to-TLS relays that VNet is compared with."""
    far_end = f"{PROXY_ADDRESS}:{PROXY_PORT}"
    for app, port in RELAYS["socat"].items():
        upstream = direct_address(bed, app)
        listen = programs.socat_listen(LOCAL, port)
        bed.programs.start(f"socat-{app}", ["socat", programs.SOCAT_BLOCK, listen, upstream])
    servers = "".join(
        programs.nginx_tls_relay(f"{LOCAL}:{port}", far_end, certificate=bed.certificate(app))
        for app, port in RELAYS["nginx"].items()
    )
    bed.programs.start("relay-nginx", programs.nginx(bed.directory, "relay-nginx", servers))
    for ports in RELAYS.values():
        for port in ports.values():
            programs.wait_for_port(LOCAL, port)


def direct_address(bed: Bed, app: str) -> str:
    """The socat address of a direct TLS connection to an app's backend."""
    return programs.socat_tls(
        f"{PROXY_ADDRESS}:{PROXY_PORT}",
        certificate=bed.certificate(app),
        ca=bed.web_ca,
        name=PROXY_HOST,
    )

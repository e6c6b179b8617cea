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

import asyncio
import contextlib
import multiprocessing
import os
import pwd
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import bench_programs as programs
from bench_programs import Programs, wait_for
from cryptography.hazmat.primitives.asymmetric import ec

from demo import linux
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
from demo.private_network import bring_up_loopback, use_own_resolver
from demo.session import toml
from supervisor.cli.control_client import AskError, ask_status
from supervisor.control_messages import Status as AskStatus
from supervisor.status import Health, Status

ZONE = "bench.test"
PROXY_HOST = f"teleport.{ZONE}"
PROXY_ADDRESS, PROXY_PORT = "127.0.1.1", 443
UPSTREAM_DNS = "127.0.0.54"
FORWARDED_ZONE = "forwarded.test"
LOCAL = "127.0.0.1"
# App name -> port of its backend.
BACKENDS = {"sink": 9001, "source": 9002, "iperf": 9003, "redis": 9004}
# Where a relay in the place of VNet listens: relay -> app -> port.
RELAYS = {
    "socat": {"sink": 9011, "source": 9012},
    "nginx": {"sink": 9021, "source": 9022},
}
FRESH_NAMES = 300
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Bed:
    """The running far end and VNet."""

    directory: Path
    programs: Programs
    dns_address: str

    @property
    def web_ca(self) -> Path:
        return self.directory / "web-ca.pem"

    def certificate(self, app: str) -> Path:
        """A client certificate with its key for an app, as VNet gets one."""
        return self.directory / f"{app}.pem"

    def vnet(self) -> dict[str, list[int]]:
        """VNet's processes by name."""
        status = _status(self.directory)
        assert status is not None
        assert status.workers is not None
        assert status.supervisor is not None
        workers = {worker.name: [worker.pid] for worker in status.workers if worker.pid}
        return {"supervisor": [status.supervisor.pid], **workers}


def name_of(app: str) -> str:
    """The DNS name of an app."""
    return f"{app}.{ZONE}"


def fresh_names() -> list[str]:
    """Names of apps that nobody has asked for yet."""
    return [name_of(f"fresh-{number:03}") for number in range(FRESH_NAMES)]


@contextlib.contextmanager
def running(directory: Path, *, only_dns: bool = False) -> Iterator[Bed]:
    """A bed in this process's own namespaces; with `only_dns` the cluster keeps the address."""
    bring_up_loopback()
    resolv_conf = use_own_resolver(directory, UPSTREAM_DNS)
    with Programs(directory) as started:
        names = {PROXY_HOST: PROXY_ADDRESS, "known.test": "192.0.2.1"}
        upstream = programs.dnsmasq(UPSTREAM_DNS, names, {FORWARDED_ZONE: "192.0.2.2"})
        started.start("dnsmasq", upstream)
        with _cluster(directory) as give_up_address:
            if not only_dns:
                _start_backends(started)
            _start_vnet(started, directory)
            dns_address = _wait_until_healthy(started, directory)
            resolv_conf.write_text(f"nameserver {dns_address}\n")
            bed = Bed(directory, started, dns_address)
            if not only_dns:
                _fetch_certificates()
                give_up_address()
                _start_far_end(bed)
            yield bed


# --- cluster ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _cluster(directory: Path) -> Iterator[Callable[[], None]]:
    """Runs the embedded cluster in a process; gives a function that frees the proxy's address."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_cluster, args=(directory, theirs), daemon=True)
    process.start()
    theirs.close()
    _expect(ours, "ready")

    def give_up_address() -> None:
        ours.send("give up the address")
        _expect(ours, "done")

    try:
        yield give_up_address
    finally:
        process.terminate()
        process.join()


def _expect(pipe: Connection, word: str) -> None:
    said = pipe.recv() if pipe.poll(START_SECONDS) else "nothing"
    if said != word:
        raise RuntimeError(f"the embedded cluster says {said}")


def _run_cluster(directory: Path, pipe: Connection) -> None:
    linux.die_with_parent()
    asyncio.run(_serve_cluster(directory, pipe))


async def _serve_cluster(directory: Path, pipe: Connection) -> None:
    home = directory / "tsh"
    home.mkdir(mode=0o700)
    async with EmbeddedCluster(_clusters(), home, bind_hosts={ZONE: PROXY_ADDRESS}) as cluster:
        _write_certificates(directory, cluster.states[ZONE], cluster.web_ca_file)
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        cluster.stop_listening()
        pipe.send("done")
        await asyncio.Event().wait()


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


def _write_certificates(directory: Path, state: ClusterState, cluster_web_ca: Path) -> None:
    """What nginx and the direct clients need; VNet trusts nginx beside the cluster's own proxy."""
    now = datetime.now(UTC)
    web_ca = make_authority("Benchmark Web CA", now)
    web = issue_web_certificate(web_ca, (PROXY_HOST,), now)
    (directory / "web.pem").write_bytes(web.certificate_pem() + web.key_pem())
    both = cluster_web_ca.read_bytes() + web_ca.tls.certificate_pem()
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


def _start_vnet(started: Programs, directory: Path) -> None:
    config = {
        "dns": {"upstream": [UPSTREAM_DNS], "os_integration": "none"},
        "teleport": {"ca_file": str(directory / "web-ca.pem")},
    }
    (directory / "vnet.toml").write_text(toml(config))
    arguments = [sys.executable, "-m", "supervisor.main", "--config", str(directory / "vnet.toml")]
    arguments += ["--run-dir", str(directory / "run"), "--state-dir", str(directory / "state")]
    arguments += ["--user", pwd.getpwuid(os.getuid()).pw_name]
    started.start("vnet", arguments, {"TELEPORT_HOME": str(directory / "tsh")})


def _status(directory: Path) -> Status | None:
    try:
        return ask_status(directory / "run", AskStatus())[0]
    except AskError:
        return None


def _wait_until_healthy(started: Programs, directory: Path) -> str:
    def is_healthy() -> bool:
        started.check("vnet")
        status = _status(directory)
        return status is not None and status.health is Health.HEALTHY

    wait_for(is_healthy, "VNet is not healthy", START_SECONDS)
    status = _status(directory)
    assert status is not None
    assert status.network is not None
    return status.network.dns_addresses[0]


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

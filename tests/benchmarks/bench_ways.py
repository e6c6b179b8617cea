"""Bytes per second by each way to a proxy, beside plain TLS routing to the same far end.

plain       TLS routing, `teleport-tcp`: the baseline
ping        the same with `teleport-tcp-ping`
upgrade     through a load balancer: a connection upgrade, in it `teleport-tcp`
database    a PostgreSQL database's connection, with `teleport-postgres`

Each is a cluster of its own, from which VNet gets its certificates; then `bench_far_end` takes the
proxies' addresses.
"""

import contextlib
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bench_cluster import running_cluster
from bench_far_end import Place, Way, running_far_end
from bench_figures import Figure, medians
from bench_programs import Programs
from bench_socat import DIRECTIONS, move
from bench_vnet import Vnet, start_upstream_dns, start_vnet

from demo.cluster.authorities import issue_host_certificate, issue_web_certificate, make_authority
from demo.cluster.config import App, Cluster, ClusterFile, Database, check_clusters
from demo.cluster.server import EmbeddedCluster

ADDRESSES = {way: f"127.0.1.{number}" for number, way in enumerate(Way, start=1)}
# Nothing is sent to them: the embedded cluster connects when VNet fetches its certificates.
BACKEND = ("127.0.0.1", 9001)
PORT = 5432


def measure(directory: Path, seconds: float, rounds: int) -> list[Figure]:
    """Rounds of all ways in turn."""
    with _running(directory) as (vnet, far_end):
        return list(_figures(medians([_round(vnet, far_end, seconds) for _ in range(rounds)])))


def _round(vnet: Vnet, far_end: int, seconds: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for direction, app in DIRECTIONS.items():
        for way in Way:
            watched = partial(_watched, vnet, far_end)
            address = f"TCP:{_address(way, app)}:{PORT},nodelay"
            moved = move(address, direction, 1, seconds, watched)
            key = f"{direction} {way.name}"
            found[f"{key} gbits"] = moved.gbits
            found[f"{key} proxies"] = moved.cpu["proxies"]
            found[f"{key} far end"] = moved.cpu["far end"]
    return found


def _watched(vnet: Vnet, far_end: int) -> dict[str, list[int]]:
    pids = vnet.pids()
    proxies = [pid for name in pids if name.startswith("proxy-") for pid in pids[name]]
    return {"proxies": proxies, "far end": [far_end]}


# --- the bed ----------------------------------------------------------------------------------


def _cluster(way: Way) -> str:
    return f"{way.name.lower()}.test"


def _host(way: Way) -> str:
    return f"teleport.{_cluster(way)}"


def _address(way: Way, app: str) -> str:
    return f"{app}.db.{_host(way)}" if way is Way.DATABASE else f"{app}.{_cluster(way)}"


@contextlib.contextmanager
def _running(directory: Path) -> Iterator[tuple[Vnet, int]]:
    """VNet with all its certificates, and the process of the far end."""
    with Programs(directory) as started:
        proxies = {_host(way): address for way, address in ADDRESSES.items()}
        start_upstream_dns(started, directory, proxies)
        addresses = {_cluster(way): address for way, address in ADDRESSES.items()}
        prepare = partial(_write_certificates, directory)
        home = directory / "tsh"
        with running_cluster(_clusters(), home, addresses, prepare) as cluster:
            vnet = start_vnet(started, directory, directory / "web-ca.pem")
            _fetch_certificates()
            cluster.give_up_addresses()
            with running_far_end({way: _place(directory, way) for way in Way}) as pid:
                yield vnet, pid


def _clusters() -> ClusterFile:
    clusters = [
        Cluster(
            name=_cluster(way),
            proxy_addr=f"{_host(way)}:443",
            custom_dns_zones=(_cluster(way),),
            conn_upgrade_required=way is Way.UPGRADE,
            apps=() if way is Way.DATABASE else _apps(way),
            databases=_databases() if way is Way.DATABASE else (),
        )
        for way in Way
    ]
    return check_clusters(ClusterFile(clusters=tuple(clusters)))


def _apps(way: Way) -> tuple[App, ...]:
    uri = "tcp://{}:{}".format(*BACKEND)
    return tuple(
        App(name=app, uri=uri, public_addr=_address(way, app)) for app in DIRECTIONS.values()
    )


def _databases() -> tuple[Database, ...]:
    uri = "{}:{}".format(*BACKEND)
    return tuple(Database(name=app, protocol="postgres", uri=uri) for app in DIRECTIONS.values())


def _place(directory: Path, way: Way) -> Place:
    files = (str(directory / f"{way.name.lower()}-{kind}.pem") for kind in ("web", "host", "users"))
    return Place(ADDRESSES[way], *files)


def _write_certificates(directory: Path, cluster: EmbeddedCluster) -> None:
    now = datetime.now(UTC)
    web_ca = make_authority("Benchmark Web CA", now)
    both = cluster.web_ca_file.read_bytes() + web_ca.tls.certificate_pem()
    (directory / "web-ca.pem").write_bytes(both)
    for way in Way:
        place, state, names = _place(directory, way), cluster.states[_cluster(way)], (_host(way),)
        web = issue_web_certificate(web_ca, names, now)
        host = issue_host_certificate(state.host_ca, names, "Proxy", now)
        for path, pair in ((place.web, web), (place.host, host)):
            Path(path).write_bytes(pair.certificate_pem() + pair.key_pem())
        Path(place.users).write_bytes(state.user_ca.tls.certificate_pem())


def _fetch_certificates() -> None:
    """One connection by each way to each app."""
    with socket.create_server(BACKEND):
        for way in Way:
            for app in DIRECTIONS.values():
                socket.create_connection((_address(way, app), PORT), timeout=20).close()


def _figures(found: dict[str, float]) -> Iterator[Figure]:
    for measured, label, unit in (
        ("gbits", "one stream", "Gbit/s"),
        ("proxies", "CPU of the proxies", "s/GB"),
        ("far end", "CPU of the far end", "s/GB"),
    ):
        for way in (Way.PING, Way.UPGRADE, Way.DATABASE):
            for direction in DIRECTIONS:
                yield Figure(
                    f"{label} {direction}, {_LABELS[way]}",
                    unit,
                    found[f"{direction} {way.name} {measured}"],
                    found[f"{direction} {Way.PLAIN.name} {measured}"],
                    "TLS routing",
                )


_LABELS = {
    Way.PING: "ping variant",
    Way.UPGRADE: "connection upgrade",
    Way.DATABASE: "to a database",
}

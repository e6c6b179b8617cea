"""Embedded clusters, a DNS server and logins for private networks, each started alone."""

import contextlib
import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import dnslib
from demo_bed import VNET
from private_bed import Bed, wait_until

# The address of every name, for the DNS server here.
UPSTREAM_ADDRESS = "192.0.2.7"
_RUN_CLUSTER = """
import asyncio, json, pathlib, sys
from demo.cluster.config import parse_cluster_file
from demo.cluster.server import run_demo_cluster

clusters = parse_cluster_file(pathlib.Path(sys.argv[1]).read_text())
home, hosts = pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
asyncio.run(run_demo_cluster(clusters, home, bind_hosts=hosts))
"""


@contextlib.contextmanager
def upstream_dns(bed: Bed, address: str = "127.0.0.54") -> Iterator[None]:
    """A DNS server that knows the address of every name."""
    stopping = threading.Event()
    end = bed.open_socket(kind=socket.SOCK_DGRAM, timeout=0.1)

    def serve() -> None:
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                data, client = end.recvfrom(4096)
                reply = dnslib.DNSRecord.parse(data).reply()
                reply.add_answer(*dnslib.RR.fromZone(f"{reply.q.qname} 5 A {UPSTREAM_ADDRESS}"))
                end.sendto(reply.pack(), client)

    with end:
        end.bind((address, 53))
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()


@contextlib.contextmanager
def cluster_in(
    bed: Bed, clusters: str, home: Path, hosts: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Runs `vnet demo-cluster` with this cluster file; gives its tsh home as it is seen from here.

    `home`, a new folder, is the same as the bed's programs see it. With `hosts` the proxies of the
    clusters it names listen on these addresses.
    """
    seen = bed.path(home)
    path = seen.with_name(f"{home.name}-clusters.toml")
    path.write_text(clusters)
    inner = str(home.with_name(path.name))
    command = [VNET, "demo-cluster", "--cluster", inner, "--home", str(home)]
    if hosts is not None:
        command = [sys.executable, "-c", _RUN_CLUSTER, inner, str(home), json.dumps(hosts)]
    with bed.running(*command, log_name=f"cluster-{home.name}") as process:

        def is_up() -> bool:
            assert process.poll() is None, "the embedded cluster has ended"
            return (seen / "current-profile").exists()

        wait_until(is_up, "the cluster runs")
        yield seen


def copy_login(
    source: Path, home: Path, profile: str, copy: Callable[[Path, Path], object] = shutil.copyfile
) -> None:
    """Adds a profile of one tsh home to another, the keys first as `tsh login` does."""
    keys = source / "keys" / profile
    for path in sorted(path for path in keys.rglob("*") if path.is_file()):
        target = home / "keys" / profile / path.relative_to(keys)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy(path, target)
    copy(source / f"{profile}.yaml", home / f"{profile}.yaml")


def remove_login(home: Path, profile: str) -> None:
    """Takes a profile away, as `tsh logout --proxy` does."""
    shutil.rmtree(home / "keys" / profile)
    (home / f"{profile}.yaml").unlink()

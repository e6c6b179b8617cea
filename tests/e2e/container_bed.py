"""A network namespace behind a pair of veth devices, as a container has it, beside a demo."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import dnslib
from private_bed import Bed, children, wait_until

from supervisor.namespace import inside

BRIDGE, BRIDGE6 = "172.30.0.1", "fd12::1"
ADDRESS, ADDRESS6 = "172.30.0.9", "fd12::9"
NETWORKS = ["172.30.0.0/24", "fd12::/64"]
MASQUERADE = """
table inet container {
    chain leaving {
        type nat hook postrouting priority srcnat;
        oifname "vnet0" masquerade
    }
}
"""


class Container:
    """Sockets of the container; everything in it is gone with the block that made it."""

    def __init__(self, pid: int) -> None:
        self._namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Lets go of the namespace."""
        os.close(self._namespace)

    def open_socket(self, address: str, kind: socket.SocketKind, timeout: float) -> socket.socket:
        """A socket for the family of this address."""
        with inside(self._namespace):
            end = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        end.settimeout(timeout)
        return end

    def connect(self, address: str, port: int, timeout: float = 20) -> socket.socket:
        """A connection to an address."""
        end = self.open_socket(address, socket.SOCK_STREAM, timeout)
        try:
            end.connect((address, port))
        except BaseException:
            end.close()
            raise
        return end

    def ask(self, name: str, kind: str, server: str, *, over_tcp: bool = False) -> dnslib.DNSRecord:
        """The DNS server's whole answer."""
        query = dnslib.DNSRecord.question(name, kind).pack()
        how = socket.SOCK_STREAM if over_tcp else socket.SOCK_DGRAM
        with self.open_socket(server, how, 10) as end:
            end.connect((server, 53))
            end.send(len(query).to_bytes(2) + query if over_tcp else query)
            data = end.recv(65535)
            return dnslib.DNSRecord.parse(data[2:] if over_tcp else data)

    def resolve(self, name: str, kind: str, server: str, *, over_tcp: bool = False) -> str:
        """The first record of a name, as text."""
        answer = self.ask(name, kind, server, over_tcp=over_tcp)
        assert answer.header.rcode == 0, dnslib.RCODE[answer.header.rcode]
        return str(answer.rr[0].rdata)


@contextlib.contextmanager
def container_in(bed: Bed) -> Iterator[Container]:
    """Behind the bed's host, which forwards for it."""
    with bed.running("unshare", "--net", "sleep", "infinity", log_name="container") as process:
        outer = wait_until(lambda: _inner_most(process.pid, "sleep"), "the container runs")
        inner = next(
            line.split()[-1]
            for line in Path(f"/proc/{outer}/status").read_text().splitlines()
            if line.startswith("NSpid:")
        )
        for line in (
            "link add veth0 type veth peer name eth0",
            f"link set eth0 netns {inner}",
            f"address add {BRIDGE}/24 dev veth0",
            f"address add {BRIDGE6}/64 dev veth0 nodad",
            "link set veth0 up",
        ):
            bed.output("ip", *line.split())
        within = ("nsenter", f"--target={inner}", "--net", "ip")
        for line in (
            "link set lo up",
            f"address add {ADDRESS}/24 dev eth0",
            f"address add {ADDRESS6}/64 dev eth0 nodad",
            "link set eth0 up",
            f"route add default via {BRIDGE}",
            f"-6 route add default via {BRIDGE6}",
        ):
            bed.output(*within, *line.split())
        _set(bed, "ipv4/ip_forward", "ipv6/conf/all/forwarding")
        container = Container(outer)
        try:
            yield container
        finally:
            container.close()
            bed.output("ip", "link", "delete", "veth0")


@contextlib.contextmanager
def masquerading(bed: Bed) -> Iterator[None]:
    """The host gives what goes to VNet its own address."""
    bed.output("nft", "-f", "-", stdin=MASQUERADE.encode())
    try:
        yield
    finally:
        bed.output("nft", "delete", "table", "inet", "container")


def list_networks(bed: Bed, networks: Sequence[str], security: str = "") -> None:
    """Has VNet take over another `allow_forwarded_from`; `security` is the rest of that section."""
    path = bed.run_dir.parent / "vnet.toml"
    before = path.read_text().partition("[security]")[0]
    path.write_text(f"{before}[security]\nallow_forwarded_from = {list(networks)}\n{security}\n")
    bed.reload()


def _set(bed: Bed, *settings: str) -> None:
    for setting in settings:
        bed.output("sh", "-c", f"echo 1 > /proc/sys/net/{setting}")


def _inner_most(pid: int, name: str) -> int | None:
    """The process of this name below `pid`."""
    for child in children(pid):
        if (Path(f"/proc/{child}/comm").read_text().strip()) == name:
            return child
        if (found := _inner_most(child, name)) is not None:
            return found
    return None

"""Clusters that are reached in different ways, each with the same apps and one leaf."""

import itertools
import random
import socket
import ssl
import threading
from collections.abc import Iterable, Mapping

from private_bed import Bed, read_all

# Name of a way to a proxy, and its keys in the cluster file. The cluster is <name>.test.
WAYS = {
    "upgrade": "conn_upgrade_required = true",
    "separate": "tls_routing = false\nssh_proxy_port = 3023",
    "both": "tls_routing = false\nssh_proxy_port = 3023\nconn_upgrade_required = true",
}
WEB_PORT, SSH_PORT = 3080, 3023
PING_SECONDS = 0.1
MUCH = random.Random(3).randbytes(20 << 20)

_CLUSTERS = """
[[clusters]]
name = "{way}.test"
proxy_addr = "teleport.{way}.test:{port}"
ping_interval_seconds = {ping}
{keys}
[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"
[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"

[[clusters]]
name = "leaf-of-{way}.test"
leaf_of = "{way}.test"
[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"
[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"
"""
_numbers = itertools.count()


def clusters(ways: Mapping[str, str]) -> str:
    """A cluster file."""
    return "".join(
        _CLUSTERS.format(way=way, port=WEB_PORT, ping=PING_SECONDS, keys=keys)
        for way, keys in ways.items()
    )


def app(way: str, name: str = "echo") -> str:
    """The DNS name of an app."""
    return f"{name}.teleport.{way}.test"


def leaf_app(way: str, name: str = "echo") -> str:
    """The DNS name of an app of the leaf."""
    return f"{name}.leaf-of-{way}.test"


def never_asked(way: str) -> str:
    """A name, new at each call, that only the cluster itself can say something about."""
    return f"never-asked-{next(_numbers)}.teleport.{way}.test"


def exchange(bed: Bed, address: str, data: bytes = b"hello") -> bytes:
    """What the echo app sends back; a half-close tells it where the data ends."""
    with bed.connect(address, 7) as end:

        def send() -> None:
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        answer = read_all(end)
        thread.join()
    return answer


def exchange_works(bed: Bed, address: str) -> bool:
    """Whether the echo app can be reached."""
    try:
        return exchange(bed, address) == b"hello"
    except ConnectionRefusedError:
        return False


def resolves(bed: Bed, name: str, server: str = "") -> bool:
    """Whether the name has an address."""
    answer = bed.ask(name, server=server)
    return answer.header.rcode == 0 and bool(answer.rr)


def states(bed: Bed, among: Iterable[str] = ()) -> dict[str, str]:
    """The state of each cluster, or of these."""
    wanted = set(among)
    return {
        cluster["name"]: cluster["state"]
        for cluster in bed.status()["clusters"]
        if not wanted or cluster["name"] in wanted
    }


def assert_is_web_port(bed: Bed, address: str, way: str) -> None:
    """The proxy's web server answers at its port of this address."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host = f"teleport.{way}.test"
    with (
        bed.connect(address, WEB_PORT) as end,
        context.wrap_socket(end, server_hostname=host) as web,
    ):
        web.sendall(f"GET /webapi/ping HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert web.recv(4096).startswith(b"HTTP/1.1 200")

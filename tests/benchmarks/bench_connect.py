"""New connections: how many a second, and how long each takes.

One is connect, a PING to Redis, its answer, close; the time is that of all of it but the close.
The direct client is the same program with a TLS handshake after the connect.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable

from bench_bed import BACKENDS, PROXY_ADDRESS, PROXY_HOST, PROXY_PORT, Bed, name_of
from bench_figures import Aim, Compare, Figure, medians, percentile
from bench_programs import cpu_seconds

CLIENTS = (1, 16)
TIMEOUT_SECONDS = 20.0
RATE_AIM = Aim(Compare.VALUE, least=300)
LATENCY_AIM = Aim(Compare.EXCESS, most=5)


def measure(bed: Bed, seconds: float, rounds: int) -> list[Figure]:
    """Rounds of VNet and direct in turn."""
    paths = {"direct": direct(bed), "vnet": through_vnet()}
    found = []
    for _ in range(rounds):
        values: dict[str, float] = {}
        for clients in CLIENTS:
            for path, connect in paths.items():
                values |= _watched_load(bed, f"{path} {clients}", connect, clients, seconds)
        found.append(values)
    return list(_figures(medians(found)))


def through_vnet() -> Callable[[], socket.socket]:
    """A function that connects to Redis through VNet."""
    address = socket.gethostbyname(name_of("redis"))
    return lambda: socket.create_connection((address, BACKENDS["redis"]), TIMEOUT_SECONDS)


def direct(bed: Bed) -> Callable[[], socket.socket]:
    """A function that connects to Redis by TLS to the far end."""
    context = ssl.create_default_context(cafile=str(bed.web_ca))
    context.load_cert_chain(bed.certificate("redis"))
    context.set_alpn_protocols(["teleport-tcp"])

    def connect() -> socket.socket:
        plain = socket.create_connection((PROXY_ADDRESS, PROXY_PORT), TIMEOUT_SECONDS)
        return context.wrap_socket(plain, server_hostname=PROXY_HOST)

    return connect


def ping(connection: socket.socket) -> None:
    """A few bytes each way."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(b"PING\r\n")
    answer = connection.recv(64)
    if answer != b"+PONG\r\n":
        raise RuntimeError(f"Redis answers {answer!r}")


def _watched_load(
    bed: Bed, key: str, connect: Callable[[], socket.socket], clients: int, seconds: float
) -> dict[str, float]:
    """The load, and CPU seconds of each process per connection; it is less noisy than a rate."""
    watched = bed.vnet.pids() | {"far end": bed.programs.pids("far")}
    cpu = {name: -cpu_seconds(pids) for name, pids in watched.items()}
    found = _load(key, connect, clients, seconds)
    for name, pids in watched.items():
        cpu[name] += cpu_seconds(pids)
    connections = found[f"{key} count"]
    return found | {f"{key} cpu {name}": spent / connections for name, spent in cpu.items()}


def _load(
    key: str, connect: Callable[[], socket.socket], clients: int, seconds: float
) -> dict[str, float]:
    """Clients that each connect again and again."""
    taken: list[float] = []
    failures: list[BaseException] = []
    end = time.monotonic() + seconds

    def repeat() -> None:
        try:
            while (begin := time.monotonic()) < end:
                with connect() as connection:
                    ping(connection)
                    taken.append(time.monotonic() - begin)
        except (OSError, RuntimeError) as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat) for _ in range(clients)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - begin
    if failures:
        raise RuntimeError(f"{len(failures)} of {clients} clients failed: {failures[0]}")
    return {
        f"{key} count": len(taken),
        f"{key} rate": len(taken) / elapsed,
        f"{key} p50": percentile(taken, 50) * 1e3,
        f"{key} p99": percentile(taken, 99) * 1e3,
    }


def _figures(found: dict[str, float]) -> list[Figure]:
    figures = []
    for clients in CLIENTS:
        label = "one client" if clients == 1 else f"{clients} clients"
        for measure_, unit, aim in (
            ("rate", "1/s", RATE_AIM if clients > 1 else None),
            ("p50", "ms", LATENCY_AIM if clients == 1 else None),
            ("p99", "ms", None),
        ):
            text = "connections" if measure_ == "rate" else f"connect {measure_}"
            figures.append(
                Figure(
                    f"{text}, {label}",
                    unit,
                    found[f"vnet {clients} {measure_}"],
                    found[f"direct {clients} {measure_}"],
                    "direct TLS",
                    aim,
                )
            )
    return figures + _cpu_figures(found)


def _cpu_figures(found: dict[str, float]) -> list[Figure]:
    busiest = max(CLIENTS)
    prefix = f"vnet {busiest} cpu "
    figures = []
    for key, spent in found.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            is_far = name == "far end"
            baseline = found[f"direct {busiest} cpu {name}"] * 1e3 if is_far else None
            text = f"CPU of a connection: {name}"
            figures.append(
                Figure(text, "ms", spent * 1e3, baseline, "direct TLS" if is_far else "")
            )
    return figures

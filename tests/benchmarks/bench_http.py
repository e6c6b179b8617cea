"""What looking for HTTP costs: the same connections with the check on and off, in turn.

Redis and socat stand for what is no HTTP. The web server is a few lines of Python
(`bench_bed.WEB_SERVER`), which take the larger part of each request.
"""

import socket
import time
import tomllib
from collections.abc import Callable, Iterator

from bench_bed import BACKENDS, Bed, name_of
from bench_connect import ping
from bench_figures import Aim, Compare, Figure, medians, percentile
from bench_socat import DIRECTIONS, move

from demo.session import toml
from supervisor.cli.control_client import order
from supervisor.control_messages import Reload

TIMEOUT_SECONDS = 20.0
REQUEST_AIM = Aim(Compare.EXCESS, most=1)
# What is a browser's, in size: a request with a cookie.
HEAD = (
    "GET /index.html HTTP/1.1\r\nHost: {name}:{port}\r\nUser-Agent: bench\r\nAccept: */*\r\n"
    "Accept-Language: en\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
    "Cookie: session=" + "0123456789abcdef" * 20 + "\r\n\r\n"
)


def measure(bed: Bed, seconds: float, rounds: int) -> list[Figure]:
    """Rounds with the check and without it in turn."""
    found = []
    try:
        for number in range(rounds):
            values: dict[str, float] = {}
            for state in ("off", "on") if number % 2 else ("on", "off"):
                _switch(bed, is_on=state == "on")
                values |= dict(_round(bed, state, seconds))
            found.append(values)
    finally:
        _switch(bed, is_on=True)
    return list(_figures(medians(found)))


def _switch(bed: Bed, *, is_on: bool) -> None:
    """For the connections that are made from now on."""
    config = tomllib.loads(bed.vnet.config.read_text())
    config["security"] = {"http_check": is_on}
    bed.vnet.config.write_text(toml(config))
    order(bed.vnet.directory / "run", Reload())


def _round(bed: Bed, state: str, seconds: float) -> Iterator[tuple[str, float]]:
    taken = list(_repeat(seconds, _ping))
    yield f"{state} connect p50", percentile(taken, 50) * 1e3
    taken = list(_repeat(seconds, _get))
    yield f"{state} request p50", percentile(taken, 50) * 1e3
    yield f"{state} request p99", percentile(taken, 99) * 1e3
    with _connection("page") as connection:
        began = time.monotonic()
        count = sum(1 for _ in _repeat(seconds, lambda: _ask(connection)))
        yield f"{state} requests", count / (time.monotonic() - began)
    for direction, app in DIRECTIONS.items():
        address = f"TCP:{name_of(app)}:{BACKENDS[app]},nodelay"
        moved = move(address, direction, 1, seconds, dict)
        yield f"{state} {direction}", moved.gbits


def _repeat(seconds: float, work: Callable[[], None]) -> Iterator[float]:
    """How long each took."""
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        work()
        yield time.monotonic() - began


def _connection(app: str) -> socket.socket:
    address = socket.gethostbyname(name_of(app))
    return socket.create_connection((address, BACKENDS[app]), TIMEOUT_SECONDS)


def _ping() -> None:
    with _connection("redis") as connection:
        ping(connection)


def _get() -> None:
    with _connection("page") as connection:
        _ask(connection)


def _ask(connection: socket.socket) -> None:
    connection.sendall(HEAD.format(name=name_of("page"), port=BACKENDS["page"]).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\nok"):
        more = connection.recv(1000)
        if not more:
            raise RuntimeError(f"the web server answers {answer!r}")
        answer += more


def _figures(found: dict[str, float]) -> Iterator[Figure]:
    for key, name, unit, aim in (
        ("connect p50", "connect and first byte p50, no HTTP, checked", "ms", None),
        ("up", "one stream up, no HTTP, checked", "Gbit/s", None),
        ("down", "one stream down, no HTTP, checked", "Gbit/s", None),
        ("request p50", "connect and HTTP request p50, checked", "ms", REQUEST_AIM),
        ("request p99", "connect and HTTP request p99, checked", "ms", None),
        ("requests", "HTTP requests in one connection, checked", "1/s", None),
    ):
        yield Figure(name, unit, found[f"on {key}"], found[f"off {key}"], "without the check", aim)

"""Proxies behind a load balancer that ends TLS, proxies without TLS routing, and with both."""

import contextlib
import hashlib
import re
import socket
from collections.abc import Iterator

import pytest
from cluster_ways import (
    MUCH,
    PING_SECONDS,
    WAYS,
    WEB_PORT,
    app,
    assert_is_web_port,
    clusters,
    exchange,
    leaf_app,
    never_asked,
    resolves,
    states,
)
from demo_bed import demo_bed
from far_bed import listens
from private_bed import AT_ONCE_SECONDS, Bed, read_all, read_exactly, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

PINGS = 8
# So much is nobody's but a test's: connections to auth services are made at any time.
MARK = MUCH[:40_000]
# The least that a ping takes on the wire: a TLS record, and in it 4 bytes with the ping protocols,
# or a WebSocket's 2.
RECORD_BYTES = 22
PING_BYTES, WEBSOCKET_PING_BYTES = RECORD_BYTES + 4, RECORD_BYTES + 2


# The connection to the auth service of a leaf is closed when nobody has used it for a minute.
WITHOUT_LEAF = f"""
[[clusters]]
name = "quiet.test"
proxy_addr = "teleport.quiet.test:{WEB_PORT}"
ping_interval_seconds = {PING_SECONDS}
conn_upgrade_required = true
"""


@pytest.fixture(scope="module")
def demo() -> Iterator[Bed]:
    """One demo with a cluster for each way; tests leave it as they found it."""
    with demo_bed(clusters(WAYS) + WITHOUT_LEAF) as bed:
        yield bed


@pytest.fixture
def bed(demo) -> Bed:
    demo.wait_for_health("healthy")
    return demo


def proxy_address(bed: Bed, way: str) -> str:
    """Where the proxy listens: the resolver of the demo knows."""
    return bed.resolve(f"teleport.{way}.test", server="127.0.0.54")[0]


def connections_to(bed: Bed, proxy: str) -> dict[int, int]:
    """Bytes received so far by local port, of each connection to this proxy's web port."""
    options = ["-HOtin", "state", "established", "dst", f"{proxy}:{WEB_PORT}"]
    found = {}
    for line in bed.output("ss", *options).splitlines():
        port = int(line.split()[2].rpartition(":")[2])
        received = re.search(r"bytes_received:(\d+)", line)
        found[port] = int(received[1]) if received else 0
    return found


@contextlib.contextmanager
def carried_connection(bed: Bed, way: str) -> Iterator[tuple[socket.socket, str, int]]:
    """A connection to echo, and address and local port of the one to the proxy that carries it."""
    address, proxy = bed.resolve(app(way))[0], proxy_address(bed, way)
    before = connections_to(bed, proxy)
    with bed.connect(address, 7) as end:
        end.sendall(MARK)
        assert read_exactly(end, len(MARK)) == MARK
        now = connections_to(bed, proxy)
        [port] = [p for p, received in now.items() if received >= before.get(p, 0) + len(MARK)]
        assert port not in before
        yield end, proxy, port


@pytest.mark.parametrize("way", WAYS)
def test_the_status_of_the_cluster_and_its_leaf_is_ok(bed, way):
    names = {f"{way}.test", f"leaf-of-{way}.test"}
    wait_until(lambda: states(bed, names) == dict.fromkeys(names, "ok"), "both are ok")


@pytest.mark.parametrize("version", ["-4", "-6"])
@pytest.mark.parametrize("way", WAYS)
def test_curl_prints_the_page(bed, way, version):
    url = f"http://{app(way, 'page')}/"
    assert "Hello from VNet" in bed.output("curl", "-sS", version, "--max-time", "20", url)


@pytest.mark.parametrize("way", WAYS)
def test_curl_prints_the_page_of_a_leaf(bed, way):
    url = f"http://{leaf_app(way, 'page')}/"
    assert "Hello from VNet" in bed.output("curl", "-sS", "--max-time", "20", url)


@pytest.mark.parametrize("kind", ["A", "AAAA"])
@pytest.mark.parametrize("way", WAYS)
def test_20_mb_go_both_ways_and_a_half_close_ends_them(bed, way, kind):
    answer = exchange(bed, bed.resolve(app(way), kind)[0], MUCH)
    assert hashlib.sha256(answer).digest() == hashlib.sha256(MUCH).digest()


@pytest.mark.parametrize("way", WAYS)
def test_a_half_close_without_data_is_answered_with_one(bed, way):
    assert exchange(bed, bed.resolve(app(way))[0], b"") == b""


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_is_no_app_leads_to_the_web_port(bed, way):
    assert_is_web_port(bed, bed.resolve(never_asked(way))[0], way)


@pytest.mark.parametrize("way", WAYS)
def test_an_idle_connection_goes_on_over_many_pings(bed, way):
    with carried_connection(bed, way) as (end, proxy, port):
        enough = connections_to(bed, proxy)[port] + PINGS * PING_BYTES
        wait_until(lambda: connections_to(bed, proxy)[port] > enough, "many pings come")
        end.sendall(b"still there?")
        end.shutdown(socket.SHUT_WR)
        assert read_all(end) == b"still there?"


def test_the_idle_connection_to_the_auth_service_goes_on_over_many_websocket_pings(bed):
    proxy = proxy_address(bed, "quiet")
    for _ in range(4):  # each proxy of VNet has one
        bed.resolve(never_asked("quiet"))
    before = connections_to(bed, proxy)
    assert before

    def have_many_come() -> bool:
        now, more = connections_to(bed, proxy), PINGS * WEBSOCKET_PING_BYTES
        return all(now[port] > received + more for port, received in before.items())

    wait_until(have_many_come, "many pings come")
    for _ in range(4):
        bed.resolve(never_asked("quiet"))
    assert connections_to(bed, proxy).keys() >= before.keys()


VANISH = """
table inet vanish {{
  chain output {{
    type filter hook output priority 0
    ip daddr {proxy} tcp sport {port} reject with tcp reset
  }}
}}
"""


def talk(end: socket.socket) -> None:
    """Whichever notices first: VNet's answer to a ping may have been met by the rule before."""
    end.sendall(b"are you there?")
    end.recv(1)


@pytest.mark.parametrize("way", WAYS)
def test_a_far_end_that_vanishes_is_a_reset(bed, way):
    with carried_connection(bed, way) as (end, proxy, port):
        # What a machine answers that knows nothing of the connection, because it started anew.
        bed.output("nft", "-f", "-", stdin=VANISH.format(proxy=proxy, port=port).encode())
        try:
            with pytest.raises(ConnectionResetError):
                talk(end)
        finally:
            bed.output("nft", "delete", "table", "inet", "vanish")
    assert exchange(bed, bed.resolve(app(way))[0]) == b"hello"


def test_auth_services_that_go_down_and_come_back_disturb_no_known_app(bed):
    addresses = {way: bed.resolve(app(way))[0] for way in WAYS}
    for address in addresses.values():
        assert exchange(bed, address) == b"hello"
    with bed.faults("auth_down"):
        for way in WAYS:
            wait_until(lambda way=way: not resolves(bed, never_asked(way)), "it is down")
        roots = {f"{way}.test" for way in WAYS}
        wait_until(lambda: set(states(bed, roots).values()) == {"unreachable"}, "the status tells")
        assert len(bed.status()["reasons"]) >= len(WAYS)
        for address in addresses.values():
            assert exchange(bed, address) == b"hello"
    for way in WAYS:
        wait_until(lambda way=way: resolves(bed, never_asked(way)), "it is up")
    bed.wait_for_health("healthy")


def test_after_a_restart_of_the_proxies_new_connections_work_at_once(bed):
    addresses = {way: bed.resolve(app(way))[0] for way in WAYS}
    proxies = {way: proxy_address(bed, way) for way in WAYS}
    open_ones = {way: bed.connect(address, 7) for way, address in addresses.items()}
    with bed.faults("proxy_down"):
        for way, proxy in proxies.items():
            wait_until(lambda proxy=proxy: not listens(bed, proxy, WEB_PORT), "the proxy is down")
            assert bed.seconds_until_refused(addresses[way], 7) < AT_ONCE_SECONDS
            with open_ones[way] as end, contextlib.suppress(ConnectionResetError):
                assert end.recv(1) == b""
    for way, proxy in proxies.items():
        wait_until(lambda proxy=proxy: listens(bed, proxy, WEB_PORT), "the proxy is up")
        assert exchange(bed, addresses[way]) == b"hello"
        assert resolves(bed, never_asked(way))
        assert exchange(bed, bed.resolve(leaf_app(way))[0]) == b"hello"

"""Real programs that know nothing of VNet reach apps by their names."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest
from database_servers import POSTGRES, postgres_in
from private_bed import AT_ONCE_SECONDS, Bed, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ROWS = 400_000


def is_listening(bed: Bed, port: int) -> bool:
    """Whether somebody listens, without a connection that would have to be served."""
    return bool(bed.output("ss", "-Htln", f"sport = :{port}"))


@pytest.fixture(scope="module")
def postgres(session_bed) -> Iterator[Bed]:
    """A PostgreSQL server on the loopback interface."""
    with postgres_in(session_bed):
        yield session_bed


@pytest.fixture(scope="module")
def redis(session_bed) -> Iterator[Bed]:
    """A Redis server on the loopback interface."""
    bed = session_bed
    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", "/"]
    with bed.running("redis-server", *options, user="nobody"):
        wait_until(lambda: is_listening(bed, 6379), "Redis listens")
        yield bed


def test_curl_prints_the_page(bed):
    page = bed.output("curl", "-sS", "--max-time", "20", "http://page.teleport.e2e.test/some/path")
    assert "Hello from VNet" in page
    assert "page.teleport.e2e.test, /some/path" in page


def test_curl_prints_the_page_of_an_app_in_a_custom_zone(bed):
    page = bed.output("curl", "-sS", "--max-time", "20", "http://page.corp.example.test/")
    assert "Hello from VNet" in page


@pytest.mark.parametrize("version", ["-4", "-6"])
def test_curl_works_over_each_ip_version(bed, version):
    page = bed.output("curl", "-sS", version, "--max-time", "20", "http://page.corp.example.test/")
    assert "Hello from VNet" in page


def test_getent_finds_both_addresses_of_an_app(bed):
    lines = bed.output("getent", "ahosts", "echo.teleport.e2e.test").splitlines()
    found = {line.split()[0] for line in lines}
    ipv4, ipv6 = (bed.resolve("echo.teleport.e2e.test", kind)[0] for kind in ("A", "AAAA"))
    assert found == {ipv4, ipv6}
    assert bed.output("getent", "hosts", "echo.teleport.e2e.test").split()[0] in found


def test_getent_finds_the_name_behind_an_address(bed):
    address = bed.resolve("echo.teleport.e2e.test")[0]
    assert bed.output("getent", "hosts", address).split() == [address, "echo.teleport.e2e.test"]


def psql(bed: Bed, *commands: str, stdin: bytes = b"") -> str:
    options = [word for command in commands for word in ("-c", command)]
    return bed.output(
        *("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres"),
        *("-h", "pg.corp.example.test", "-d", "postgres", *options),
        stdin=stdin,
        timeout=90,
    )


def test_psql_queries_a_real_server(postgres):
    version = psql(postgres, "show server_version").split(".")[0]
    assert version == POSTGRES.parent.name
    assert psql(postgres, "select 6 * 7").strip() == "42"


def test_psql_copies_much_to_the_server(postgres):
    rows = "".join(f"{number}\t{number * 7919}\n" for number in range(ROWS)).encode()
    copied = psql(
        postgres,
        "create temporary table copied (a bigint, b bigint)",
        "copy copied from stdin",
        "select count(*), sum(b - a * 7919), max(b) from copied",
        stdin=rows,
    )
    assert copied.strip() == f"{ROWS}|0|{(ROWS - 1) * 7919}"


def test_psql_copies_much_from_the_server(postgres):
    query = f"select n, n * 7919 from generate_series(0::bigint, {ROWS - 1}) n"
    copied = psql(postgres, f"copy ({query}) to stdout")
    expected = "".join(f"{number}\t{number * 7919}\n" for number in range(ROWS))
    assert hashlib.sha256(copied.encode()).digest() == hashlib.sha256(expected.encode()).digest()


def redis_cli(bed: Bed, *words: str, stdin: bytes = b"") -> str:
    return bed.output("redis-cli", "-h", "redis.teleport.e2e.test", *words, stdin=stdin).strip()


def test_redis_cli_talks_to_a_real_server(redis):
    assert redis_cli(redis, "PING") == "PONG"
    assert redis_cli(redis, "SET", "colour", "blue") == "OK"
    assert redis_cli(redis, "GET", "colour") == "blue"


def test_redis_cli_stores_and_reads_a_large_value(redis):
    value = ("0123456789abcdef" * 65536).encode()
    assert redis_cli(redis, "-x", "SET", "large", stdin=value) == "OK"
    assert redis_cli(redis, "GET", "large").encode() == value


def test_redis_benchmark_finds_no_error_with_20_clients(redis):
    options = ["-c", "20", "-n", "2000", "-t", "get,set", "--csv"]
    table = redis.output("redis-benchmark", "-h", "redis.teleport.e2e.test", *options)
    assert [line.split(",")[0] for line in table.splitlines()[1:]] == ['"SET"', '"GET"']


def iperf3(bed: Bed, *options: str) -> dict[str, dict[str, float]]:
    """One test, with a server of its own: one that serves several does not listen between them."""
    server = ["--server", "--one-off", "--bind", "127.0.0.1"]
    arguments = ["--client", "iperf.teleport.e2e.test", "--json", *options]
    with bed.running("iperf3", *server, log_name="iperf3-server") as process:
        wait_until(lambda: is_listening(bed, 5201), "iperf3 listens")
        report = json.loads(bed.output("iperf3", *arguments, timeout=90))
        process.wait(30)
    return dict(report["end"])


@pytest.mark.parametrize("direction", [[], ["--reverse"]], ids=["up", "down"])
@pytest.mark.parametrize("streams", [1, 8])
def test_iperf3_moves_a_bounded_amount_both_ways(bed, direction, streams):
    amount = 64 << 20
    counter = "bytes_received" if direction else "bytes_sent"
    before = bed.status()["connections"][counter]
    end = iperf3(bed, "--bytes", str(amount), "--parallel", str(streams), *direction)
    assert end["sum_sent"]["bytes"] >= amount
    # The server counts until it is told that the test is over; what is on its way then is not in.
    received = end["sum_received"]["bytes"]
    assert 0 < received <= end["sum_sent"]["bytes"]
    wait_until(
        lambda: bed.status()["connections"][counter] - before >= received,
        "VNet has counted what it carried",
    )


@pytest.mark.skipif(
    shutil.which("ping") is None and os.environ.get("VNET_REQUIRE_E2E") != "1",
    reason="no ping: install iputils-ping",
)
def test_ping_is_answered_by_an_assigned_address(bed):
    for address in bed.resolve("echo.teleport.e2e.test") + bed.resolve(
        "echo.teleport.e2e.test", "AAAA"
    ):
        for _ in range(3):
            # One at a time: once it has an answer, ping waits for the others no longer than that took.
            report = bed.output("ping", "-n", "-c", "1", "-W", "20", address)
            assert " 0% packet loss" in report


def test_udp_to_a_virtual_address_is_refused_at_once(bed):
    for kind, family in (("A", socket.AF_INET), ("AAAA", socket.AF_INET6)):
        address = bed.resolve("echo.teleport.e2e.test", kind)[0]
        with bed.open_socket(family, socket.SOCK_DGRAM, timeout=10) as end:
            end.connect((address, 9999))
            began = time.monotonic()
            end.send(b"anybody there?")
            with pytest.raises(ConnectionRefusedError):
                end.recv(100)
            assert time.monotonic() - began < AT_ONCE_SECONDS


FIREWALL = """
table inet host {
  chain input {
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state established,related accept
    counter
  }
}
"""


# Makes the kernel keep track of connections. Of those that it has not seen begin, it would not know
# that their last packets are solicited.
TRACKING = """
table inet tracking {
  chain input {
    type filter hook input priority 0
    ct state new accept
  }
}
"""


def has_open_connections(bed: Bed) -> bool:
    """Whether a program is connected through VNet, or its kernel is still about to end that."""
    rows = bed.output("ss", "-Htan", "state", "connected", "exclude", "time-wait").splitlines()
    peers = [row.split()[4] for row in rows]
    return any(not peer.startswith(("127.", "[::1]", "[::ffff:127.")) for peer in peers)


@pytest.fixture
def firewalled(bed) -> Iterator[Bed]:
    """A host firewall that drops every unsolicited packet, as distributions set them up."""
    bed.output("nft", "-f", "-", stdin=TRACKING.encode())
    try:
        # The kernel forgets a half-closed end that nobody has after tcp_fin_timeout, 60 s.
        wait_until(lambda: not has_open_connections(bed), "the tests before have ended theirs", 70)
        bed.wait_for_counters()
        wait_until(lambda: bed.status()["connections"]["active"] == 0, "nor are there any in VNet")
        bed.output("nft", "-f", "-", stdin=FIREWALL.encode())
        yield bed
    finally:
        bed.output("nft", "flush", "ruleset")


def test_a_firewall_that_drops_unsolicited_input_disturbs_nothing(firewalled):
    bed = firewalled
    for version in ("-4", "-6"):
        assert "Hello" in bed.output("curl", "-sS", version, "http://page.corp.example.test/")
    assert bed.output("dig", "+short", "+tcp", "page.corp.example.test").strip()
    for direction in ([], ["--reverse"]):
        end = iperf3(bed, "--bytes", str(16 << 20), *direction)
        assert end["sum_sent"]["bytes"] >= 16 << 20
    assert bed.seconds_until_refused("ports.teleport.e2e.test", 9000) < AT_ONCE_SECONDS
    rules = bed.output("nft", "list", "ruleset")
    assert re.search(r"counter packets 0 ", rules), f"something was dropped: {rules}"


def test_firewall_rules_of_the_demo_are_its_own(firewalled):
    outside = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True)
    assert b"table inet host" not in outside.stdout

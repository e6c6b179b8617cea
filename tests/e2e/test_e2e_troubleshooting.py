"""Problems that docs/troubleshooting.md describes, made on purpose.

The status has the right kind, and the command to check with tells trouble from health.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from demo_bed import demo_bed
from private_bed import Bed, read_all, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

GUIDE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
CLUSTER = """
[[clusters]]
name = "demo.test"
proxy_addr = "teleport.demo.test:443"
custom_dns_zones = ["demo.test"]
user = "alice"

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal"
public_addr = "echo.demo.test"
tcp_ports = [{ port = 7 }]

[[clusters.apps]]
name = "mfa"
uri = "tcp://echo.backend.internal:7"
public_addr = "mfa.demo.test"
session_mfa = true
"""
CONFIG = "[teleport]\nmfa_seconds = 5\n"
# Long enough for a busy machine, short enough to wait for it in vain.
PROBE = "dig +short +time=5 +tries=1 @100.64.0.2 vnet-diag-1.test"


@pytest.fixture(scope="module")
def running() -> Iterator[Bed]:
    with demo_bed(CLUSTER, CONFIG) as bed:
        yield bed


@pytest.fixture
def bed(running) -> Iterator[Bed]:
    running.wait_for_health("healthy")
    yield running
    running.wait_for_health("healthy")


def section(heading: str) -> str:
    """What the guide says below a heading."""
    return GUIDE.split(f"\n### {heading}\n")[1].split("\n### ")[0].split("\n## ")[0]


def printed(bed: Bed, command: str) -> str:
    done = bed.run(*command.split())
    return (done.stdout + done.stderr).decode()


def kinds_of(status: dict[str, Any]) -> list[str]:
    assert len(status["reason_ids"]) == len(status["reasons"])
    return list(status["reason_ids"])


def kinds(bed: Bed) -> list[str]:
    return kinds_of(bed.status())


# -- what stands in the way --


@contextlib.contextmanager
def other_interface(bed: Bed) -> Iterator[None]:
    bed.output("ip", "tuntap", "add", "other0", "mode", "tun")
    bed.output("ip", "link", "set", "other0", "up")
    bed.output("ip", "address", "add", "100.64.0.99/24", "dev", "other0")
    try:
        yield
    finally:
        bed.output("ip", "link", "delete", "other0")


@contextlib.contextmanager
def stray_route(bed: Bed) -> Iterator[None]:
    bed.output("ip", "route", "add", "10.99.0.0/16", "dev", "vnet0")
    try:
        yield
    finally:
        bed.run("ip", "route", "delete", "10.99.0.0/16", "dev", "vnet0")  # mostly gone already


@contextlib.contextmanager
def firewall(bed: Bed) -> Iterator[None]:
    bed.output("nft", "add table inet other")
    bed.output("nft", "add chain inet other out { type filter hook output priority 0; }")
    bed.output("nft", "add rule inet other out oifname vnet0 drop")
    try:
        yield
    finally:
        bed.output("nft", "delete table inet other")


def fault(line: str) -> Callable[[Bed], contextlib.AbstractContextManager[None]]:
    return lambda bed: bed.faults(line)


@dataclass(frozen=True)
class Case:
    """`check` is the command of the section, with names and times of the demo; it prints `well` or not."""

    kind: str
    make: Callable[[Bed], contextlib.AbstractContextManager[None]]
    shown: str  # of the command, as the section has it
    check: str
    well: str


CASES = [
    Case(
        "range-in-use",
        other_interface,
        "ip route get ADDRESS",
        "ip route get 100.64.0.100",
        "dev vnet0",
    ),
    Case(
        "firewall",
        firewall,
        "dig +short @100.64.0.2 vnet-diag-1.test",
        PROBE,
        "100.64.0.2\n",
    ),
    Case("login-expired", fault("expire_login"), "vnet status", "vnet status", "  ok  "),
    Case("no-profile", fault("logout"), "vnet ls", "vnet ls", "echo.demo.test"),
    Case(
        "cluster-unreachable",
        fault("proxy_down"),
        "curl -sS https://teleport.example.com/webapi/ping",
        "curl -sS --cacert {home}/web-ca.pem https://teleport.demo.test/webapi/ping",
        '"cluster_name"',
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_problem_has_its_kind_and_the_command_tells_trouble_from_health(bed, case):
    assert case.shown in section(case.kind)
    check = case.check.format(home=bed.environment["TELEPORT_HOME"])
    assert case.well in printed(bed, check)
    bed.connect("echo.demo.test", 7).close()  # so that each certificate is there already
    with case.make(bed):
        # Something that nobody asks for is noticed with the next connection.
        bed.run("curl", "-sS", "--max-time", "1", "telnet://echo.demo.test:7")
        wait_until(lambda: case.kind in kinds(bed), f"the status tells of {case.kind}")
        assert case.well not in printed(bed, check)
        shown = bed.run("vnet", "status").stdout.decode()
        assert "docs/troubleshooting.md" in shown
        assert case.kind in shown

    def is_over() -> bool:
        status = bed.status()
        assert (status["health"] == "healthy") is not bool(kinds_of(status))
        return not kinds_of(status)

    wait_until(is_over, "the status has forgotten it")
    assert case.well in printed(bed, check)


def test_stray_route_is_removed_with_the_command_in_the_sentence(bed):
    with stray_route(bed):
        wait_until(lambda: kinds(bed) == ["stray-route"], "the route is told")
        assert "10.99.0.0/16" in printed(bed, "ip route show dev vnet0")
        [reason] = bed.status()["reasons"]
        command = reason.split("(")[1].split(")")[0]
        assert command.startswith("ip route del ")
        bed.output(*command.split())
        bed.wait_for_health("healthy")
        assert "10.99.0.0/16" not in printed(bed, "ip route show dev vnet0")


@pytest.mark.parametrize(
    ("word", "name", "port"),
    [
        ("unknown_address", "100.64.77.77", 7),
        ("unknown_app", "nothing.demo.test", 7),
        ("port_not_allowed", "echo.demo.test", 8),
        ("mfa_required", "mfa.demo.test", 7),
    ],
)
def test_refusal_is_found_in_the_list_of_connections_by_its_word(bed, word, name, port):
    section(word)
    bed.seconds_until_refused(name, port)
    assert f"  {word}: " in printed(bed, "vnet connections")
    wait_until(lambda: f"refused ({word}): " in bed.log(), "the log tells of it")


def test_refusal_of_another_user_is_found_by_its_word(bed):
    assert "security.allow_users" in section("user_not_allowed")
    address = bed.resolve("echo.demo.test")[0]
    done = bed.run("bash", "-c", f"exec 3<>/dev/tcp/{address}/7", user="daemon")
    assert b"Connection refused" in done.stderr
    assert "  user_not_allowed: " in printed(bed, "vnet connections")
    told = "refused (user_not_allowed): only root and those in security.allow_users"
    wait_until(lambda: told in bed.log(), "the log tells of it")


def test_refused_request_is_found_by_its_word(bed):
    assert "421: the Host is not the app's name." in " ".join(section("http_refused").split())
    with bed.connect("echo.demo.test", 7) as end:
        end.sendall(b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n")
        assert read_all(end).startswith(b"HTTP/1.1 421 ")
    wait_until(
        lambda: "  http_refused: Host 'evil.test': " in printed(bed, "vnet connections"),
        "the list tells of it",
    )
    told = "HTTP request for Host 'evil.test' at echo.demo.test refused: "
    wait_until(lambda: told in bed.log(), "the log tells of it")


def test_names_are_found_step_by_step_as_the_guide_says(bed):
    assert printed(bed, PROBE) == "100.64.0.2\n"
    assert "echo.demo.test" in printed(bed, "vnet ls")
    answer = printed(bed, "dig @100.64.0.2 echo.demo.test")
    assert "status: NOERROR" in answer
    assert "\t100." in answer
    assert printed(bed, "getent hosts echo.demo.test").startswith("fd")
    assert "No problem was found." in printed(bed, "vnet diag")

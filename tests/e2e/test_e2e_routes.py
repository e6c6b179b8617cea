"""What other programs do to routes, addresses and interfaces, before VNet starts and while it runs."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from demo_bed import SUPERVISOR, demo_bed, stop
from private_bed import Bed, read_exactly, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

CLUSTER = """
[[clusters]]
name = "plain.test"
proxy_addr = "teleport.plain.test:443"

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"

[[clusters]]
name = "ranged.test"
proxy_addr = "teleport.ranged.test:443"
ipv4_cidr_range = "10.5.0.0/16"

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"
"""
PLAIN, RANGED = "echo.teleport.plain.test", "echo.teleport.ranged.test"
# What was taken away is put back within a tenth of this on a machine that is not busy. Without a word of the
# kernel's it would take three times as long, or nearly: one test of several may have luck then, not all.
BACK_SECONDS = 5.0
# Within a few seconds a conflict that is over is noticed, and that is believed.
OVER_SECONDS = 10.0
# A default route into VNet's own interface holds up everything that goes out, names included.
STRAY = ("default", "dev", "vnet0", "metric", "5")


@contextlib.contextmanager
def link(bed: Bed, name: str, *addresses: str) -> Iterator[None]:
    """An interface of another program, up."""
    bed.output("ip", "tuntap", "add", name, "mode", "tun")
    try:
        bed.output("ip", "link", "set", name, "up")
        for address in addresses:
            bed.output("ip", "address", "add", address, "dev", name)
        yield
    finally:
        bed.output("ip", "link", "delete", name)


@contextlib.contextmanager
def tailscale(bed: Bed, routed: str = "100.64.0.0/10") -> Iterator[None]:
    """Addresses, table and rules as Tailscale has them."""
    marked = ("fwmark", "0x80000/0xff0000")
    rules = [
        ("pref", "5210", *marked, "lookup", "main"),
        ("pref", "5250", *marked, "unreachable"),
        ("pref", "5270", "lookup", "52"),
    ]
    with link(bed, "tailscale0", "100.70.1.2/32"):
        bed.output("ip", "route", "add", routed, "dev", "tailscale0", "table", "52")
        bed.output("ip", "route", "add", "throw", "127.0.0.0/8", "table", "52")
        for rule in rules:
            bed.output("ip", "rule", "add", *rule)
        try:
            yield
        finally:
            for rule in rules:
                bed.output("ip", "rule", "delete", *rule)
            bed.output("ip", "route", "flush", "table", "52")


def require_echo(bed: Bed, name: str, *, ranges: tuple[str, ...]) -> str:
    """The app answers, and its address is in one of these ranges."""
    address = bed.resolve(name)[0]
    assert any(ip_address(address) in ip_network(text) for text in ranges), address
    with bed.connect(address, 7) as end:
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"
    return address


def wait_until_in_range(bed: Bed) -> None:
    """Workers are told of a range that is routed; until then the app's address is one of VNet's own."""
    wait_until(lambda: bed.resolve(RANGED)[0].startswith("10.5."), "the range has the app")


def reasons(bed: Bed) -> str:
    return "\n".join(bed.status()["reasons"])


def ranges(bed: Bed) -> list[str]:
    return list(bed.status()["network"]["ipv4_cidr_ranges"])


def wait_for_reason(bed: Bed, *words: str) -> None:
    def is_told() -> bool:
        status = bed.status()
        text = "\n".join(status["reasons"])
        return status["health"] == "degraded" and all(word in text for word in words)

    try:
        wait_until(is_told, f"the reason names {words}", OVER_SECONDS)
    except AssertionError as error:
        raise AssertionError(f"{error}; reasons: {reasons(bed)}") from error


# -- while VNet runs --


@pytest.fixture(scope="module")
def running() -> Iterator[Bed]:
    with demo_bed(CLUSTER) as bed:
        bed.wait_for_health("healthy")
        wait_until(lambda: len(ranges(bed)) == 2, "the cluster's range is routed")
        wait_until_in_range(bed)
        yield bed


@pytest.fixture
def bed(running) -> Iterator[Bed]:
    running.wait_for_health("healthy", OVER_SECONDS)
    yield running
    running.wait_for_health("healthy", OVER_SECONDS)


def test_tailscale_that_comes_later_is_named_until_it_is_gone(bed):
    require_echo(bed, PLAIN, ranges=("100.64.0.0/10",))
    with tailscale(bed):
        wait_for_reason(bed, "100.64.0.0/10", "tailscale0 has the route", "restart VNet")
        assert ranges(bed) == ["100.64.0.0/10", "10.5.0.0/16"]
    bed.wait_for_health("healthy", OVER_SECONDS)
    require_echo(bed, PLAIN, ranges=("100.64.0.0/10",))


def test_bridge_inside_a_routed_range_is_named_and_the_rest_of_the_range_works(bed):
    before = require_echo(bed, RANGED, ranges=("10.5.0.0/16",))
    taken = ip_network(f"{before}/32").supernet(new_prefix=24)
    other = "10.5.7.0/24" if str(taken) != "10.5.7.0/24" else "10.5.8.0/24"
    with link(bed, "docker0", other.replace(".0/24", ".1/24")):
        wait_for_reason(bed, "10.5.0.0/16", f"docker0 has the route {other}")
        assert require_echo(bed, RANGED, ranges=("10.5.0.0/16",)) == before
    bed.wait_for_health("healthy", OVER_SECONDS)


def test_policy_rule_that_leads_all_packets_away_is_noticed(bed):
    with link(bed, "wg0", "10.200.0.2/32"):
        bed.output("ip", "route", "add", "default", "dev", "wg0", "table", "200")
        bed.output("ip", "rule", "add", "pref", "100", "lookup", "200")
        try:
            wait_for_reason(bed, "wg0 has the default route (table 200)")
        finally:
            bed.output("ip", "rule", "delete", "pref", "100", "lookup", "200")


def test_full_tunnels_of_others_are_no_conflict(bed):
    with link(bed, "wg0", "10.200.0.2/32"):
        for half in ("0.0.0.0/1", "128.0.0.0/1"):
            bed.output("ip", "route", "add", half, "dev", "wg0")
        bed.output("ip", "route", "add", "default", "dev", "wg0", "table", "51820")
        rules = [
            ("pref", "200", "lookup", "main", "suppress_prefixlength", "0"),
            ("pref", "201", "not", "fwmark", "51820", "lookup", "51820"),
        ]
        for rule in rules:
            bed.output("ip", "rule", "add", *rule)
        try:
            # After what is looked at once the rules have settled.
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                assert bed.status()["reasons"] == []
                require_echo(bed, PLAIN, ranges=("100.64.0.0/10",))
        finally:
            for rule in rules:
                bed.output("ip", "rule", "delete", *rule)


@pytest.mark.parametrize(
    ("command", "shown", "sign"),
    [
        (("route", "delete", "100.64.0.0/10"), ("route", "show", "dev", "vnet0"), "100.64.0.0/10"),
        (("route", "delete", "10.5.0.0/16"), ("route", "show", "dev", "vnet0"), "10.5.0.0/16"),
        (
            ("address", "flush", "dev", "vnet0"),
            ("address", "show", "dev", "vnet0"),
            "100.64.0.1/32",
        ),
        (
            ("-6", "route", "flush", "proto", "static", "dev", "vnet0"),
            ("-6", "route", "show", "dev", "vnet0"),
            "::/64",
        ),
        (("link", "set", "vnet0", "down"), ("link", "show", "dev", "vnet0"), ",UP"),
    ],
    ids=["own range", "range of a cluster", "addresses", "IPv6 route", "interface down"],
)
def test_what_is_taken_from_the_interface_is_put_back(bed, command, shown, sign):
    everything = [("address", "show"), ("route", "show"), ("-6", "route", "show")]
    before = [bed.output("ip", *what, "dev", "vnet0") for what in everything]
    assert sign in bed.output("ip", *shown)
    began = time.monotonic()
    bed.output("ip", *command)
    wait_until(lambda: sign in bed.output("ip", *shown), f"{sign} is back")
    assert time.monotonic() - began < BACK_SECONDS
    wait_until(
        lambda: [bed.output("ip", *what, "dev", "vnet0") for what in everything] == before,
        "everything is as before",
    )
    require_echo(bed, PLAIN, ranges=("100.64.0.0/10",))
    require_echo(bed, RANGED, ranges=("10.5.0.0/16",))
    assert bed.status()["reasons"] == []


def test_ipv6_may_be_switched_off_and_on_on_the_interface(bed):
    assert bed.resolve(PLAIN, "AAAA")
    setting = "net.ipv6.conf.vnet0.disable_ipv6"
    bed.output("sysctl", "-w", f"{setting}=1")
    try:
        wait_until(lambda: not bed.ask(PLAIN, "AAAA").rr, "AAAA has no answers")
        assert bed.ask(PLAIN, "AAAA").header.rcode == 0
        require_echo(bed, PLAIN, ranges=("100.64.0.0/10",))
        status = bed.status()
        assert (status["health"], status["reasons"]) == ("healthy", [])
        assert status["network"]["ipv6_prefix"] is None
        assert status["network"]["dns_addresses"] == ["100.64.0.2"]
    finally:
        bed.output("sysctl", "-w", f"{setting}=0")
    wait_until(lambda: bed.ask(PLAIN, "AAAA").rr, "AAAA has answers again")
    with bed.connect(bed.resolve(PLAIN, "AAAA")[0], 7) as end:
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"


def test_default_route_into_vnet_is_named_and_nothing_goes_in_circles(bed):
    bed.output("ip", "route", "add", *STRAY)
    try:
        wait_for_reason(bed, "Another program routes 0.0.0.0/0 into vnet0")
        require_echo(bed, PLAIN, ranges=("100.64.0.0/10",))
        counters = Path("/proc") / str(bed.init) / "net/dev"
        before = received_bytes(counters)
        with bed.open_socket(timeout=1) as end, pytest.raises(OSError):
            end.connect(("192.0.2.77", 443))
        assert received_bytes(counters) - before < 100_000
    finally:
        bed.output("ip", "route", "delete", *STRAY)


def received_bytes(counters: Path) -> int:
    lines = counters.read_text().splitlines()
    line = next(line for line in lines if line.strip().startswith("vnet0:"))
    return int(line.split(":")[1].split()[0])


# -- before VNet starts --


@pytest.fixture
def stopped() -> Iterator[Bed]:
    """A demo whose own VNet has ended."""
    with demo_bed(CLUSTER) as bed:
        bed.wait_for_health("healthy")
        bed.output("vnet", "stop")
        bed.wait_until_ended()
        wait_until(
            lambda: (
                not bed.path("/sys/class/net/vnet0").exists()
                and "vnet0" not in bed.output("ip", "link")
            ),
            "its interface is gone",
        )
        yield bed


def arguments(bed: Bed, config: str = "") -> list[str]:
    directory = Path(bed.environment["VNET_RUN_DIR"]).parent
    path = f"{directory}/vnet.toml"
    if config:
        text = bed.path(path).read_text() + config
        path = str(bed.directory / "other.toml")
        Path(path).write_text(text)
    options = ["--config", path, "--user", "root"]
    return [*options, "--run-dir", f"{directory}/run", "--state-dir", f"{directory}/state"]


@contextlib.contextmanager
def started(bed: Bed) -> Iterator[subprocess.Popen[bytes]]:
    bed.logs.append(bed.directory / "again.log")
    # As it is left when VNet ends: the address of its DNS server may be another one now.
    resolv_conf = bed.path("/etc/resolv.conf")
    resolv_conf.write_text("nameserver 127.0.0.54\n")
    with bed.running(SUPERVISOR, *arguments(bed), log_name="again") as process:
        try:
            wait_until(lambda: bed.health() in ("healthy", "degraded"), "VNet has started")
            dns = bed.status()["network"]["dns_addresses"][0]
            resolv_conf.write_text(f"nameserver {dns}\n")
            yield process
        finally:
            stop(process)


def test_free_part_is_taken_and_kept(stopped):
    bed = stopped
    kept = bed.path(Path(bed.environment["VNET_RUN_DIR"]).parent / "state/ipv4-range")
    assert kept.read_text() == "100.64.0.0/10\n"
    with link(bed, "cgnat0", "100.70.1.2/11"), started(bed):
        bed.wait_for_health("healthy")
        assert ranges(bed)[0] == "100.96.0.0/11"
        address = require_echo(bed, PLAIN, ranges=("100.96.0.0/11",))
        assert bed.status()["network"]["dns_addresses"][0] == "100.96.0.2"
    with started(bed):
        bed.wait_for_health("healthy")
        assert ranges(bed)[0] == "100.96.0.0/11"
        assert require_echo(bed, PLAIN, ranges=("100.96.0.0/11",)) == address


def test_beside_tailscale_with_its_firewall_apps_work(stopped):
    bed = stopped
    rules = """
    table ip filter {
      chain INPUT {
        type filter hook input priority 0; policy accept;
        iifname != "tailscale0" ip saddr 100.115.92.0/23 return
        iifname != "tailscale0" ip saddr 100.64.0.0/10 drop
      }
    }
    """
    bed.output("nft", "-f", "-", stdin=rules.encode())
    with tailscale(bed, routed="100.101.1.1/32"), started(bed):
        bed.wait_for_health("healthy")
        assert ranges(bed)[0] == "100.115.92.0/23"
        require_echo(bed, PLAIN, ranges=("100.115.92.0/23",))


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        ("", "no part of 100.64.0.0/10 is free: vpn0 has the route 100.64.0.0/10"),
        (
            'network.ipv4_cidr_range = "100.80.0.0/16"\n',
            "the range 100.80.0.0/16 is used by something else: vpn0 has the route 100.80.1.0/24",
        ),
    ],
    ids=["auto", "configured"],
)
def test_conflict_at_the_start_is_said_and_nothing_is_left(stopped, config, taken):
    bed = stopped
    directory = Path(bed.environment["VNET_RUN_DIR"]).parent
    path = bed.path(directory / "vnet.toml")
    path.write_text(config + path.read_text())
    with link(bed, "vpn0", "10.200.0.2/32"):
        bed.output("ip", "route", "add", taken.rpartition(" ")[2], "dev", "vpn0")
        done = bed.run(SUPERVISOR, *arguments(bed), timeout=20)
        assert done.returncode == 6
        assert taken in done.stderr.decode()
        assert "set network.ipv4_cidr_range" in done.stderr.decode().splitlines()[-1]
        assert "vnet0" not in bed.output("ip", "link")


@contextlib.contextmanager
def service(bed: Bed) -> Iterator[Path]:
    """VNet as a service manager starts it; the path is the manager's record."""
    record = bed.directory / "manager.json"
    bed.logs.append(bed.directory / "service.log")
    script = str(Path(__file__).with_name("service_manager.py"))
    program = [sys.executable, script, str(record), SUPERVISOR, *arguments(bed)]
    with bed.running(*program, log_name="service") as process:
        try:
            yield record
        finally:
            stop(process)


def test_service_waits_for_its_range_and_goes_on_once_it_is_free(stopped):
    bed = stopped
    with link(bed, "vpn0", "10.200.0.2/32"):
        bed.output("ip", "route", "add", "100.64.0.0/10", "dev", "vpn0")
        with service(bed) as record:
            wait_until(lambda: bed.health() == "degraded", "it has started, and says what is wrong")
            assert "vpn0 has the route 100.64.0.0/10" in reasons(bed)
            wait_until(lambda: '"READY=1"' in record.read_text(), "it counts as started")
            assert "vnet0" not in bed.output("ip", "link")
            # Another VNet does not wait: that this one ends is nothing that happens by itself.
            done = bed.run(SUPERVISOR, *arguments(bed), timeout=20)
            assert done.returncode == 6
            assert b"VNet runs already" in done.stderr
            bed.output("ip", "route", "delete", "100.64.0.0/10", "dev", "vpn0")
            bed.wait_for_health("healthy")
            dns = bed.status()["network"]["dns_addresses"][0]
            bed.path("/etc/resolv.conf").write_text(f"nameserver {dns}\n")
            require_echo(bed, PLAIN, ranges=("100.64.0.0/10",))
        # Once more, and stopped while it waits.
        bed.output("ip", "route", "add", "100.64.0.0/10", "dev", "vpn0")
        with service(bed) as record:
            wait_until(lambda: bed.health() == "degraded", "it waits")
    ended = [line for line in record.read_text().splitlines() if "ended" in line]
    assert ended == ['{"ended": 0}', '{"ended": 0}']
    assert bed.health() == "none"


def test_range_of_a_cluster_waits_until_it_is_free(stopped):
    bed = stopped
    with link(bed, "docker0", "10.5.3.1/24"), started(bed):
        wait_for_reason(bed, "10.5.0.0/16", "ranged.test", "docker0 has the route 10.5.3.0/24")
        assert ranges(bed) == ["100.64.0.0/10"]
        require_echo(bed, RANGED, ranges=("100.64.0.0/10",))
        bed.output("ip", "address", "flush", "dev", "docker0")
        bed.wait_for_health("healthy", OVER_SECONDS)
        assert ranges(bed) == ["100.64.0.0/10", "10.5.0.0/16"]
        wait_until_in_range(bed)
        require_echo(bed, RANGED, ranges=("10.5.0.0/16",))


def test_vnet_ends_with_a_clear_line_when_its_interface_is_deleted(stopped):
    bed = stopped
    with started(bed) as process:
        bed.wait_for_health("healthy")
        bed.output("ip", "link", "delete", "vnet0")
        assert process.wait(10) == 5
        assert "the interface vnet0 was deleted or renamed" in bed.log()
    with started(bed):
        bed.wait_for_health("healthy")
        require_echo(bed, PLAIN, ranges=("100.64.0.0/10",))

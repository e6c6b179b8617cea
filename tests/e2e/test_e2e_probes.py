"""The supervisor's probes in a whole VNet, with a firewall in between."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from demo_bed import demo_bed
from private_bed import Bed, wait_until
from shared_cluster import CLUSTER, CONFIG

from ipc.probe_ports import probe_port

pytestmark = [
    pytest.mark.root,
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft"),
]

# Probes go out, and counters come, with each heartbeat.
HEARTBEAT_SECONDS = 0.25
HANG_SECONDS = 2.0
# Every way has answered its present workers, and what they have counted is known.
SETTLED_SECONDS = 4 * HEARTBEAT_SECONDS
# Long enough for a probe to go through a busy machine, far less than anything waits in vain.
ROUND_TRIP_SECONDS = 0.25


@pytest.fixture(scope="module")
def probed_bed() -> Iterator[Bed]:
    """A demo that is quick to find who hangs."""
    times = f"heartbeat_seconds = {HEARTBEAT_SECONDS}\nhang_seconds = {HANG_SECONDS}\n"
    with demo_bed(CLUSTER, f"{CONFIG}\n{times}") as bed:
        yield bed


@pytest.fixture
def probed(probed_bed) -> Bed:
    """The same, healthy again and for a while."""
    probed_bed.wait_for_health("healthy")
    # On a busy machine as well: whoever has got no processor yet is waited for.
    probed_bed.wait_for_counters()
    time.sleep(SETTLED_SECONDS)
    return probed_bed


def processes(bed: Bed) -> dict[str, int]:
    return bed.pids()


@contextmanager
def rule(bed: Bed, hook: str, *words: str, enter: tuple[str, ...] = ()) -> Iterator[None]:
    """Drops what the words say while the block lasts. `enter` leads into another namespace."""
    nft = (*enter, "nft")
    bed.output(*nft, "add table inet probed")
    chain = f"{{ type filter hook {hook} priority 0; }}"
    bed.output(*nft, f"add chain inet probed drops {chain}")
    bed.output(*nft, f"add rule inet probed drops {' '.join(words)} drop")
    try:
        yield
    finally:
        bed.output(*nft, "delete table inet probed")


def inner_namespace(bed: Bed) -> tuple[str, ...]:
    """A command line that leads to where the DNS server's sockets are."""
    pid = bed.status()["supervisor"]["pid"]
    listing = bed.output("ls", "-l", f"/proc/{pid}/fd")
    own = re.search(r"net:\[\d+\]", bed.output("readlink", f"/proc/{pid}/ns/net"))[0]
    found = re.findall(r"(\d+) -> (net:\[\d+\])", listing)
    number = next(number for number, name in found if name != own)
    return ("nsenter", f"--net=/proc/{pid}/fd/{number}")


@pytest.mark.parametrize("name", ["vnet-diag-0123456789abcdef.test", "VNET-diag-1.any.zone"])
def test_diagnostic_names_are_answered_without_anybody_else(probed, name):
    addresses = probed.status()["network"]["dns_addresses"]
    for kind, address in zip(("A", "AAAA"), addresses, strict=True):
        (record,) = probed.ask(name, kind).rr
        assert (str(record.rdata), record.ttl) == (address, 0)
    answer = probed.ask(name, "MX")
    assert (answer.header.rcode, answer.rr) == (0, [])


def test_each_proxy_refuses_its_probe_at_once_and_it_is_no_failed_connection(probed):
    failed = probed.status()["connections"]["failed"]
    for slot in processes(probed).keys() - {"tun", "dns"}:
        times = [
            probed.seconds_until_refused(probed.dns_server, probe_port(slot)) for _ in range(5)
        ]
        assert min(times) < ROUND_TRIP_SECONDS
    time.sleep(SETTLED_SECONDS)
    assert probed.status()["connections"]["failed"] == failed
    assert "(probe)" not in probed.log()


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("output", "oifname vnet0"),
        ("input", "iifname vnet0"),
        ("output", "oifname vnet0 udp dport 53"),
        ("input", "iifname vnet0 udp sport 53"),
        ("output", "oifname vnet0 tcp dport > 1023"),
        ("input", "iifname vnet0 tcp sport > 1023"),
    ],
)
def test_firewall_costs_no_worker_and_is_told(probed, hook, words):
    assert probed.status()["network"]["interface"] == "vnet0"
    before = processes(probed)
    with rule(probed, hook, words):
        probed.wait_for_health("degraded")
        assert any("firewall" in reason for reason in probed.status()["reasons"])
        time.sleep(HANG_SECONDS)  # more time in which somebody could be killed
        assert any("firewall" in reason for reason in probed.status()["reasons"])
        assert processes(probed) == before
    probed.wait_for_health("healthy")
    assert processes(probed) == before


def test_dns_that_beats_and_does_not_answer_is_replaced_once_with_its_stack_in_the_log(probed):
    before = processes(probed)
    logged = len(probed.log())
    with rule(probed, "input", "udp dport 53", enter=inner_namespace(probed)):
        probed.wait_for_successor("dns", before["dns"])
        log = probed.log()[logged:]
        assert re.search(r"dns hangs, .*no probe", log)
        assert "most recent call first" in log
        successor = processes(probed)
        # The successor is as deaf; to replace it as well would go on for ever.
        wait_until(
            lambda: any("DNS server" in reason for reason in probed.status()["reasons"]),
            "the reason is told",
        )
        time.sleep(HANG_SECONDS)
        assert processes(probed) == successor == before | {"dns": successor["dns"]}
    probed.wait_for_health("healthy")

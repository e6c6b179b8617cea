"""Names of VNet's are for those who may connect; what others know of the world goes on."""

import os
import socket

import dnslib
import pytest
from container_bed import list_networks
from demo_bed import demo_bed
from private_bed import Bed, wait_until
from shared_cluster import CLUSTER, CONFIG

from supervisor.namespace import inside

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ECHO, MISSING = "echo.teleport.e2e.test", "missing.teleport.e2e.test"
FOREIGN = "www.example.test"
# A user whom every system has; here nobody else is it.
OTHER = "nobody"
REFUSED = dnslib.RCODE.REFUSED


@pytest.fixture(scope="module")
def running():
    with demo_bed(CLUSTER, CONFIG) as bed:
        yield bed


@pytest.fixture
def bed(running) -> Bed:
    list_networks(running, [])
    running.wait_for_health("healthy")
    return running


def ask_as(bed: Bed, uid: int, name: str, kind: str = "A", *, over_tcp: bool = False) -> int:
    """The response code that a user gets."""
    with inside(bed._namespace):
        os.seteuid(uid)
        try:
            end = socket.socket(type=socket.SOCK_STREAM if over_tcp else socket.SOCK_DGRAM)
        finally:
            os.seteuid(0)
    query = dnslib.DNSRecord.question(name, kind).pack()
    with end:
        end.settimeout(10)
        end.connect((bed.status()["network"]["dns_addresses"][0], 53))
        end.send(len(query).to_bytes(2) + query if over_tcp else query)
        answer = end.recv(65535)
    return int(dnslib.DNSRecord.parse(answer[2:] if over_tcp else answer).header.rcode)


@pytest.mark.parametrize("over_tcp", [False, True], ids=["udp", "tcp"])
def test_another_user_is_told_nothing_of_our_names(bed, over_tcp):
    ours = [(ECHO, "A"), (ECHO, "AAAA"), (ECHO, "TXT"), (MISSING, "A")]
    reverse = ".".join(reversed(bed.resolve(ECHO)[0].split("."))) + ".in-addr.arpa"
    before = [ask_as(bed, 0, name, kind, over_tcp=over_tcp) for name, kind in ours]
    for name, kind in (*ours, (reverse, "PTR")):
        for _ in range(2):
            assert ask_as(bed, 65534, name, kind, over_tcp=over_tcp) == REFUSED, name
    assert before == [ask_as(bed, 0, name, kind, over_tcp=over_tcp) for name, kind in ours]
    for name in ("vnet-diag-0123456789abcdef.test", FOREIGN):
        rcode = ask_as(bed, 0, name, over_tcp=over_tcp)
        assert ask_as(bed, 65534, name, over_tcp=over_tcp) == rcode != REFUSED
    wait_until(lambda: "uid 65534; only root" in bed.log(), "it is told")


def test_programs_of_another_user_do_not_find_our_names_until_they_may(bed):
    def finds(user: str) -> bool:
        return bed.run("getent", "ahosts", ECHO, user=user).returncode == 0

    assert finds("root")
    assert not finds(OTHER)
    list_networks(bed, [], f"allow_users = ['{OTHER}']")
    assert finds(OTHER)
    bed.output("vnet", "restart", "dns", "--drain")
    assert finds(OTHER)
    list_networks(bed, [])
    assert not finds(OTHER)
    bed.output("vnet", "restart", "dns", "--drain")
    assert not finds(OTHER)
    assert finds("root")

"""What `dig` sees of VNet's DNS server, beside a real upstream server."""

import re
import socket
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import dnslib
import pytest
from private_bed import Bed

pytestmark = [pytest.mark.root, pytest.mark.e2e]

APP = "page.corp.example.test"
PROXY = "teleport.e2e.test"
UPSTREAM = "127.0.0.54"


@dataclass(frozen=True)
class Dig:
    """What dig printed, taken apart."""

    status: str
    flags: list[str]
    answers: list[list[str]]
    authority: list[list[str]]
    text: str


def dig(bed: Bed, *arguments: str) -> Dig:
    text = bed.output("dig", "+tries=1", "+time=10", *arguments)
    header = re.search(r"status: (\w+)", text)
    flags = re.search(r";; flags: ([a-z ]*);", text)
    assert header is not None, text
    assert flags is not None, text

    def section(name: str) -> list[list[str]]:
        found = re.search(rf";; {name} SECTION:\n((?:[^;\n].*\n)*)", text)
        return [line.split() for line in found[1].splitlines()] if found else []

    return Dig(header[1], flags[1].split(), section("ANSWER"), section("AUTHORITY"), text)


def raw(bed: Bed, name: str, server: str = "") -> bytes:
    """The answer's bytes, for a query whose id is always the same."""
    query = dnslib.DNSRecord.question(name)
    query.header.id = 4711
    with bed.open_socket(kind=socket.SOCK_DGRAM, timeout=10) as end:
        end.connect((server or bed.dns_server, 53))
        end.send(query.pack())
        return end.recv(65535)


def test_an_app_has_an_address_in_the_virtual_range(bed):
    answer = dig(bed, APP, "A")
    assert answer.status == "NOERROR"
    assert {"qr", "aa", "rd", "ra"} == set(answer.flags)
    [[owner, ttl, kind, rtype, address]] = answer.answers
    assert [owner, ttl, kind, rtype] == [f"{APP}.", "10", "IN", "A"]
    assert ip_address(address) in ip_network(bed.status()["network"]["ipv4_cidr_ranges"][0])


def test_the_ipv6_address_of_an_app_ends_with_its_ipv4_address(bed):
    ipv4, ipv6 = (dig(bed, APP, kind).answers[0][4] for kind in ("A", "AAAA"))
    prefix = bed.status()["network"]["ipv6_prefix"]
    assert ip_address(ipv6).packed == ip_address(prefix).packed[:12] + ip_address(ipv4).packed


@pytest.mark.parametrize("kind", ["TXT", "MX", "HTTPS", "SVCB", "NS", "CNAME", "SRV"])
def test_other_types_of_an_app_are_nodata_with_soa(bed, kind):
    answer = dig(bed, APP, kind)
    assert answer.status == "NOERROR"
    assert "aa" in answer.flags
    assert answer.answers == []
    assert [record[3] for record in answer.authority] == ["SOA"]


@pytest.mark.parametrize("kind", ["A", "AAAA"])
def test_an_address_leads_back_to_the_name(bed, kind):
    address = dig(bed, APP, kind).answers[0][4]
    answer = dig(bed, "-x", address)
    assert [record[3:] for record in answer.answers] == [["PTR", f"{APP}."]]
    assert "aa" in answer.flags


def test_an_unassigned_address_has_no_name(bed):
    answer = dig(bed, "-x", "100.127.254.253")
    assert answer.status == "NXDOMAIN"
    assert [record[3] for record in answer.authority] == ["SOA"]


@pytest.mark.parametrize("name", [PROXY, "web.teleport.e2e.test"])
def test_names_of_the_proxy_and_of_web_apps_are_forwarded(bed, name):
    answer = dig(bed, name, "A")
    assert answer.status == "NOERROR"
    assert answer.answers[0][4] == "127.0.1.1"
    assert raw(bed, name) == raw(bed, name, UPSTREAM)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("corp.example.test", "NXDOMAIN"),  # a zone's apex, which upstream does not know
        ("e2e.test", "NOERROR"),  # exists upstream as a name above another
        ("nothing.corp.example.test", "NXDOMAIN"),
        ("a.b.corp.example.test", "NXDOMAIN"),
        ("example.org", "NXDOMAIN"),
        ("localhost", "NXDOMAIN"),
        (".", "NXDOMAIN"),
    ],
)
def test_what_is_no_tcp_app_is_answered_by_the_upstream_server(bed, name, status):
    answer = dig(bed, name, "A")
    assert answer.status == status
    assert answer.answers == answer.authority == []
    assert raw(bed, name) == raw(bed, name, UPSTREAM)


def test_a_database_name_that_nothing_has_does_not_exist(bed):
    for kind in ("A", "AAAA"):
        answer = dig(bed, "orders.db.teleport.e2e.test", kind)
        assert (answer.status, answer.answers) == ("NXDOMAIN", [])
        assert [record[0] for record in answer.authority] == ["db.teleport.e2e.test."]


@pytest.mark.parametrize(
    "name", ["vnet-diag-1.corp.example.test", "vnet-diag-xyz.teleport.e2e.test"]
)
def test_a_diagnostic_name_has_the_addresses_of_the_dns_server(bed, name):
    found = [dig(bed, name, kind).answers[0][4] for kind in ("A", "AAAA")]
    assert found == bed.status()["network"]["dns_addresses"]


@pytest.mark.parametrize("name", [APP, PROXY, "nothing.corp.example.test"])
def test_tcp_gives_the_same_answer_as_udp(bed, name):
    over_udp, over_tcp = dig(bed, name, "A"), dig(bed, "+tcp", name, "A")
    assert "(TCP)" in over_tcp.text
    assert (over_udp.status, over_udp.answers) == (over_tcp.status, over_tcp.answers)


def test_the_dns_server_answers_on_its_ipv6_address_too(bed):
    server = bed.status()["network"]["dns_addresses"][1]
    for option in ("+notcp", "+tcp"):
        assert dig(bed, f"@{server}", option, APP, "A").answers == dig(bed, APP, "A").answers


def test_the_case_of_a_name_does_not_matter_and_is_repeated(bed):
    answer = dig(bed, "pAgE.CoRp.eXaMpLe.TeSt", "A")
    assert answer.answers[0][0] == "pAgE.CoRp.eXaMpLe.TeSt."
    assert answer.answers[0][4] == dig(bed, APP, "A").answers[0][4]
    assert dig(bed, "TeLePoRt.e2E.test", "A").answers[0][0].rstrip(".") == "TeLePoRt.e2E.test"


def test_recursion_desired_is_copied(bed):
    assert "rd" not in dig(bed, "+norecurse", APP, "A").flags
    assert "rd" in dig(bed, "+recurse", APP, "A").flags


def test_edns_is_answered_with_edns_and_only_then(bed):
    assert re.search(r"EDNS: version: 0, .*udp: \d+", dig(bed, "+bufsize=4096", APP, "A").text)
    assert "OPT PSEUDOSECTION" not in dig(bed, "+noedns", APP, "A").text


def test_an_unknown_edns_version_is_badvers(bed):
    answer = dig(bed, "+edns=1", "+noednsnegotiation", APP, "A")
    assert answer.status == "BADVERS"
    assert answer.answers == []


def test_an_unknown_opcode_is_not_implemented(bed):
    assert dig(bed, "+opcode=status", APP, "A").status == "NOTIMP"


def test_a_question_that_is_cut_off_is_a_format_error(bed):
    query = dnslib.DNSRecord.question(APP).pack()
    with bed.open_socket(kind=socket.SOCK_DGRAM, timeout=10) as end:
        end.connect((bed.dns_server, 53))
        end.send(query[:-3])
        answer = end.recv(600)
    assert answer[:2] == query[:2]
    assert answer[3] & 0x0F == 1


def test_an_address_stays_the_same(bed):
    first = dig(bed, APP, "A").answers[0][4]
    assert {dig(bed, APP, "A").answers[0][4] for _ in range(3)} == {first}


def test_each_app_has_an_address_of_its_own(bed):
    names = [f"{app}.{PROXY}" for app in ("page", "echo", "ports", "redis", "own")]
    assert len({bed.resolve(name)[0] for name in names}) == len(names)

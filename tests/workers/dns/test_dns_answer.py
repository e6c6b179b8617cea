"""Answers with records, read back with dnslib."""

import pytest
from dns_fakes import make_query, packed
from dnslib import QTYPE, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from workers.dns.answer import AnswerError, addresses, nodata, nxdomain, pointer
from workers.dns.message import Query, parse

IPV4 = packed("100.64.0.7")
IPV6 = packed("fd60:67ec:4325::6440:7")
TTL = 10


def answered(name: str, qtype: str, ipv6: bytes | None = IPV6, **more: object) -> DNSRecord:
    return DNSRecord.parse(addresses(parse(make_query(name, qtype, **more)), IPV4, ipv6, TTL))


@pytest.mark.parametrize(
    ("qtype", "ipv6", "expected"),
    [
        ("A", IPV6, ["100.64.0.7"]),
        ("AAAA", IPV6, ["fd60:67ec:4325::6440:7"]),
        ("AAAA", None, []),
        ("ANY", IPV6, ["100.64.0.7", "fd60:67ec:4325::6440:7"]),
        ("ANY", None, ["100.64.0.7"]),
        ("HTTPS", IPV6, []),
        ("MX", IPV6, []),
        ("TXT", IPV6, []),
        ("SOA", IPV6, []),
    ],
)
def test_name_has_addresses_and_nothing_else(
    qtype: str, ipv6: bytes | None, expected: list[str]
) -> None:
    record = answered("pg.example.test", qtype, ipv6)
    assert [str(rr.rdata) for rr in record.rr] == expected
    assert all(rr.ttl == TTL for rr in record.rr)
    assert record.header.rcode == 0
    assert [QTYPE[rr.rtype] for rr in record.auth] == ([] if expected else ["SOA"])


def test_header_is_that_of_an_authoritative_resolver() -> None:
    header = answered("pg.example.test", "A", id_=99).header
    assert (header.id, header.qr, header.aa, header.tc, header.rd, header.ra) == (99, 1, 1, 0, 1, 1)
    query = make_query("pg.example.test")
    silent = DNSRecord.parse(addresses(parse(query[:2] + b"\0\0" + query[4:]), IPV4, None, TTL))
    assert silent.header.rd == 0


def test_spelling_of_the_question_is_repeated() -> None:
    record = answered("pG.eXample.TEST", "A")
    assert record.q.qname.label == (b"pG", b"eXample", b"TEST")
    assert record.rr[0].rname.label == (b"pG", b"eXample", b"TEST")


def test_opt_is_returned_only_when_it_came() -> None:
    assert answered("a.test", "A").ar == []
    (opt,) = answered("a.test", "A", edns=4096, flags="do").ar
    assert (opt.rtype, opt.edns_len, opt.edns_do, opt.edns_ver) == (41, 1232, 1, 0)


def test_no_data_is_cacheable_for_the_ttl() -> None:
    (soa,) = DNSRecord.parse(nodata(parse(make_query("a.b.test", "MX")), 3, TTL)).auth
    assert str(soa.rname) == "a.b.test."
    assert (soa.ttl, soa.rdata.times[4]) == (TTL, TTL)


def test_missing_reverse_name_is_nxdomain_of_its_zone() -> None:
    query = parse(make_query("9.0.64.100.in-addr.arpa", "PTR"))
    record = DNSRecord.parse(nxdomain(query, 4, TTL))
    assert record.header.rcode == 3
    assert record.header.aa == 1
    assert str(record.auth[0].rname) == "64.100.in-addr.arpa."


def test_pointer_gives_the_name() -> None:
    query = parse(make_query("7.0.64.100.in-addr.arpa", "PTR"))
    (rr,) = DNSRecord.parse(pointer(query, "pg.example.test", 4, TTL)).rr
    assert (QTYPE[rr.rtype], str(rr.rdata), rr.ttl) == ("PTR", "pg.example.test.", TTL)
    other = parse(make_query("7.0.64.100.in-addr.arpa", "TXT"))
    assert not DNSRecord.parse(pointer(other, "pg.example.test", 4, TTL)).rr


@pytest.mark.parametrize("name", ["a" * 64 + ".test", "a." * 130 + "test"])
def test_impossible_name_is_our_own_error(name: str) -> None:
    with pytest.raises(AnswerError):
        pointer(parse(make_query("7.0.64.100.in-addr.arpa", "PTR")), name, 4, TTL)


@st.composite
def queries(draw: st.DrawFn) -> Query:
    """Any well-formed query: odd bytes, longest names, all types."""
    labels = draw(st.lists(st.binary(min_size=1, max_size=63), min_size=1, max_size=4))
    name = b"".join(bytes([len(label)]) + label for label in labels)[:254]
    rest = name
    while rest and len(rest) > rest[0]:
        rest = rest[rest[0] + 1 :]
    name = name[: len(name) - len(rest)] or b"\1a"
    qtype = draw(st.sampled_from([1, 12, 28, 255, 16, 65, 6]))
    has_edns = draw(st.booleans())
    head = b"\0\1\1\0\0\1\0\0\0\0\0" + bytes([has_edns])
    opt = b"\0\0\x29\x02\0\0\0\0\0\0\0" if has_edns else b""
    return parse(head + name + b"\0" + qtype.to_bytes(2) + b"\0\1" + opt)


@given(queries(), st.booleans())
def test_every_answer_fits_in_512_bytes_and_begins_with_the_question(
    query: Query, has_ipv6: bool
) -> None:
    data = addresses(query, IPV4, IPV6 if has_ipv6 else None, TTL)
    assert len(data) <= 512
    assert data[12 : query.question_end] == query.question

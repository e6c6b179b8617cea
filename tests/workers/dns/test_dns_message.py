"""Reading queries: the table, and whatever bytes a stranger may send."""

import struct

import pytest
from dns_fakes import make_network, make_query
from dnslib import DNSRecord, EDNSOption
from hypothesis import example, given
from hypothesis import strategies as st

from workers.dns.message import (
    MalformedQueryError,
    NotAQueryError,
    Query,
    QueryError,
    Rcode,
    UnsupportedOpcodeError,
    is_answer_to,
    parse,
    refuse,
    refuse_unread,
    truncate,
)
from workers.dns.zones import Zones

HEADER = struct.pack(">6H", 1, 0x0100, 1, 0, 0, 0)
QUESTION = b"\x03www\x07example\x00\x00\x01\x00\x01"
OPT = b"\0" + struct.pack(">HHIH", 41, 1232, 0, 0)


def with_counts(*counts: int, flags: int = 0x0100) -> bytes:
    return struct.pack(">6H", 1, flags, *counts)


def test_question_is_read_as_typed() -> None:
    query = parse(make_query("wWw.Example.TEST", "AAAA", id_=77))
    assert query.labels == (b"wWw", b"Example", b"TEST")
    assert (query.id, query.qtype, query.qclass, query.edns) == (77, 28, 1, None)
    assert query.spelling == "wWw.Example.TEST"
    assert query.text == "wWw.Example.TEST."


def test_edns_is_read() -> None:
    query = parse(make_query("a.test", edns=1400, flags="do", version=1))
    assert query.edns is not None
    assert query.edns.payload_bytes == 1400
    assert query.edns.version == 1
    assert query.edns.dnssec_ok
    assert not query.edns.has_options
    cookie = parse(make_query("a.test", edns=1400, opts=[EDNSOption(10, b"12345678")]))
    assert cookie.edns is not None
    assert cookie.edns.has_options


@pytest.mark.parametrize(("said", "limit"), [(None, 512), (0, 512), (511, 512), (4000, 4000)])
def test_payload_limit_is_never_below_512(said: int | None, limit: int) -> None:
    assert parse(make_query("a.test", edns=said)).payload_limit == limit


MALFORMED = {
    "header cut off": HEADER[:11],
    "only id and flags": HEADER[:4],
    "no question": with_counts(0, 0, 0, 0),
    "two questions": with_counts(2, 0, 0, 0) + QUESTION + QUESTION,
    "question missing": HEADER,
    "name cut off": HEADER + QUESTION[:6],
    "type cut off": HEADER + QUESTION[:-3],
    "pointer in the question": HEADER + b"\xc0\x0c\x00\x01\x00\x01",
    "unknown label type": HEADER + b"\x41a\x00\x00\x01\x00\x01",
    "name of 256 bytes": HEADER + b"\x3f" + b"a" * 63 + (b"\x3f" + b"a" * 63) * 3 + b"\0\0\1\0\1",
    "bytes behind the question": HEADER + QUESTION + b"\0",
    "record missing": with_counts(1, 0, 0, 1) + QUESTION,
    "record cut off": with_counts(1, 0, 0, 1) + QUESTION + OPT[:-1],
    "record data cut off": with_counts(1, 0, 0, 1) + QUESTION + OPT[:-1] + b"\5",
    "two OPT": with_counts(1, 0, 0, 2) + QUESTION + OPT + OPT,
    "OPT among the answers": with_counts(1, 1, 0, 0) + QUESTION + OPT,
    "OPT not owned by the root": with_counts(1, 0, 0, 1) + QUESTION + b"\1a" + OPT,
    "option cut off": with_counts(1, 0, 0, 1) + QUESTION + OPT[:-1] + b"\5\0\x0a\0\2a",
    "option header cut off": with_counts(1, 0, 0, 1) + QUESTION + OPT[:-1] + b"\3\0\x0a\0",
    "too long": HEADER + QUESTION + bytes(5000),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_query_is_told_so_with_its_id(data: bytes) -> None:
    with pytest.raises(MalformedQueryError):
        parse(data)
    answer = DNSRecord.parse(refuse_unread(data, Rcode.FORMERR))
    assert (answer.header.id, answer.header.qr, answer.header.rcode) == (1, 1, Rcode.FORMERR)
    assert answer.header.rd == 1
    assert not answer.questions


def test_longest_name_is_accepted() -> None:
    name = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"b" * 61 + b"\0"
    assert len(name) == 255
    query = parse(HEADER + name + b"\0\1\0\1")
    assert query.spelling is not None
    assert len(query.spelling) == 253


@pytest.mark.parametrize("opcode", [1, 2, 4, 5, 15])
def test_other_opcode_is_not_implemented(opcode: int) -> None:
    data = with_counts(1, 0, 0, 0, flags=opcode << 11) + QUESTION
    with pytest.raises(UnsupportedOpcodeError):
        parse(data)
    answer = refuse_unread(data, Rcode.NOTIMP)
    assert int.from_bytes(answer[2:4]) == 0x8080 | opcode << 11 | Rcode.NOTIMP


@pytest.mark.parametrize(
    "data", [b"", b"\1", b"\0\1\1", with_counts(1, 0, 0, 0, flags=0x8180) + QUESTION]
)
def test_response_and_stump_are_no_queries(data: bytes) -> None:
    with pytest.raises(NotAQueryError):
        parse(data)


@pytest.mark.parametrize("label", [b"a.b", b"a b", b"a\\b", b"\xff", b"\0"])
def test_name_no_host_can_have_is_not_given_to_a_proxy(label: bytes) -> None:
    data = HEADER + bytes([len(label)]) + label + b"\4test\0\0\1\0\1"
    query = parse(data)
    assert query.spelling is None
    assert query.text.isprintable()


def test_refusal_repeats_the_question_and_answers_edns_with_edns() -> None:
    data = make_query("a.Test", edns=4096, flags="do", version=3)
    answer = DNSRecord.parse(refuse(parse(data), Rcode.BADVERS))
    assert answer.header.rcode == 0
    assert answer.ar[0].edns_rcode == 1
    assert answer.ar[0].edns_ver == 0
    assert answer.ar[0].edns_do == 1
    assert str(answer.q.qname) == "a.Test."
    plain = DNSRecord.parse(refuse(parse(make_query("a.test")), Rcode.SERVFAIL))
    assert plain.header.rcode == Rcode.SERVFAIL
    assert plain.header.ra == 1
    assert not plain.ar


def test_truncated_answer_keeps_the_question_and_says_tc() -> None:
    query = parse(make_query("a.test", edns=600))
    long_answer = refuse(query, Rcode.NOERROR) + bytes(700)
    answer = DNSRecord.parse(truncate(query, long_answer))
    assert answer.header.tc == 1
    assert str(answer.q.qname) == "a.test."
    assert answer.ar[0].rtype == 41


SENT = make_query("a.test", id_=5)
GOOD = refuse(parse(SENT), Rcode.NXDOMAIN)


@pytest.mark.parametrize(
    ("answer", "belongs"),
    [
        (GOOD, True),
        (GOOD.replace(b"\1a\4test", b"\1A\4TEST"), True),
        (b"\0\6" + GOOD[2:], False),
        (SENT, False),
        (GOOD.replace(b"\1a\4test", b"\1b\4test"), False),
        (GOOD[:-4] + b"\0\x1c\0\1", False),
        (GOOD[:11], False),
        (GOOD[:2] + b"\xa8" + GOOD[3:], False),
        (refuse_unread(SENT, Rcode.FORMERR), True),
        (refuse_unread(SENT, Rcode.NOERROR), False),
        (GOOD[:20], False),
    ],
)
def test_only_an_answer_to_what_was_sent_is_taken(answer: bytes, belongs: bool) -> None:
    assert is_answer_to(answer, SENT, parse(SENT).question_end) is belongs


@given(st.binary(max_size=600))
@example(with_counts(1, 65535, 65535, 65535) + QUESTION + b"\xc0" * 500)
def test_parse_raises_only_its_own_error(data: bytes) -> None:
    try:
        query = parse(data)
    except QueryError:
        return
    assert isinstance(query, Query)


@given(st.lists(st.binary(min_size=1, max_size=63), min_size=1, max_size=3), st.binary(max_size=9))
def test_any_labels_make_a_round_trip(labels: list[bytes], more: bytes) -> None:
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    query = parse(HEADER + name + b"\0\1\0\1")
    assert list(query.labels) == labels
    assert query.question == name + b"\0\1\0\1"
    Zones(make_network()).route(query)

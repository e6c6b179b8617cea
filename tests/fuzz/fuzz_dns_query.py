"""A datagram that may be a DNS query: reading it, refusing it, answering it, beside dnslib.

Byte 0 says what VNet would have to say to the name, byte 1 the length of a PTR target.
"""

from typing import NamedTuple

from byte_choices import Choices
from dnslib import DNSError, DNSRecord
from dnslib.bimap import BimapError

from workers.dns import answer
from workers.dns.message import (
    HEADER_BYTES,
    MIN_PAYLOAD_BYTES,
    Query,
    QueryError,
    Rcode,
    Type,
    is_answer_to,
    is_truncated,
    parse,
    rcode_of,
    refuse,
    refuse_unread,
    truncate,
)

IPV4, IPV6 = b"\x64\x40\0\7", b"\xfd" + bytes(11) + b"\x64\x40\0\7"
TTL = 10


def check(data: bytes) -> None:
    choices = Choices(data)
    kind, target_length = choices.below(5), choices.byte()
    message = choices.rest()
    check_as_answer(message)
    try:
        query = parse(message)
    except QueryError as error:
        if error.rcode is not None:
            refusal = refuse_unread(message, error.rcode)
            assert len(refusal) == HEADER_BYTES
            assert refusal[:2] == message[:2]
            assert refusal[2] & 0x80
            assert refusal[4:] == bytes(8)
        return
    check_query(query, message)
    compare_with_dnslib(query, message)
    check_refusals(query, message)
    check_answer(query, message, kind, target_length)


def check_as_answer(message: bytes) -> None:
    """The same bytes from an upstream server."""
    sent = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\1a\0\0\1\0\1"
    if is_answer_to(message, sent, len(sent)):
        assert message[:2] == sent[:2]
        rcode_of(message)
        is_truncated(message)


def check_query(query: Query, message: bytes) -> None:
    assert query.data == message
    assert query.text.isprintable()
    assert query.payload_limit >= MIN_PAYLOAD_BYTES
    assert HEADER_BYTES + 5 <= query.question_end <= len(message)
    assert all(1 <= len(label) <= 63 for label in query.labels)
    assert sum(map(len, query.labels)) + len(query.labels) + 1 <= 255
    if query.spelling is not None:
        assert query.spelling.isprintable()
        assert query.spelling.isascii()
        assert tuple(query.spelling.encode().split(b".")) == query.labels


def compare_with_dnslib(query: Query, message: bytes) -> None:
    try:
        record = DNSRecord.parse(message)
    except (DNSError, BimapError, ValueError, KeyError, IndexError, TypeError):
        return  # it reads the contents of records too, and fails in its own ways
    assert record.header.id == query.id
    assert record.q.qname.label == query.labels
    assert (record.q.qtype, record.q.qclass) == (query.qtype, query.qclass)
    opts = [r for r in record.ar if r.rtype == Type.OPT]
    assert bool(opts) == (query.edns is not None)
    if query.edns is not None:
        assert opts[0].rclass == query.edns.payload_bytes
        assert opts[0].ttl >> 16 & 0xFF == query.edns.version


def check_refusals(query: Query, message: bytes) -> None:
    for rcode in (Rcode.SERVFAIL, Rcode.BADVERS):
        refusal = refuse(query, rcode)
        assert len(refusal) <= MIN_PAYLOAD_BYTES
        assert is_answer_to(refusal, message, query.question_end)
        assert rcode_of(refusal) == rcode & 15
        shortened = truncate(query, refusal)
        assert is_truncated(shortened)
        assert is_answer_to(shortened, message, query.question_end)


def check_answer(query: Query, message: bytes, kind: int, target_length: int) -> None:
    zone_labels = max(1, len(query.labels) - 1)
    try:
        if kind == 0:
            data = answer.addresses(query, IPV4, IPV6, TTL)
        elif kind == 1:
            data = answer.addresses(query, IPV4, None, TTL)
        elif kind == 2:
            data = answer.pointer(query, target(target_length), zone_labels, TTL)
        elif kind == 3:
            data = answer.nodata(query, zone_labels, TTL)
        else:
            data = answer.nxdomain(query, zone_labels, TTL)
    except answer.AnswerError:
        return
    assert is_answer_to(data, message, query.question_end)
    assert data[HEADER_BYTES : query.question_end] == query.question
    if kind != 2:
        assert len(data) <= MIN_PAYLOAD_BYTES
    answers, authorities, additionals = slow_records(data)
    assert len(additionals) == (query.edns is not None)
    assert all(record.ttl == TTL for record in (*answers, *authorities))
    assert bool(answers) != bool(authorities), "records, or why there are none"
    assert rcode_of(data) == (Rcode.NXDOMAIN if kind == 4 else Rcode.NOERROR)
    zone = query.labels if kind < 2 else query.labels[-zone_labels:]
    assert all(record.owner == zone for record in authorities)
    for record in answers:
        assert record.owner == query.labels
    if kind < 2:
        assert {r.contents for r in answers} <= ({IPV4, IPV6} if kind == 0 else {IPV4})
        assert bool(answers) == answer.has_address(query, IPV6 if kind == 0 else None)


class Record(NamedTuple):
    """A resource record; `contents` as it stands there."""

    owner: tuple[bytes, ...]
    ttl: int
    contents: bytes


def slow_records(data: bytes) -> list[list[Record]]:
    """The three sections of an answer with one question; dnslib refuses odd bytes in names."""
    position = read_name(data, HEADER_BYTES)[1] + 4
    sections: list[list[Record]] = []
    for number in range(3):
        count = int.from_bytes(data[6 + 2 * number : 8 + 2 * number])
        sections.append([])
        for _ in range(count):
            owner, position = read_name(data, position)
            ttl = int.from_bytes(data[position + 4 : position + 8])
            end = position + 10 + int.from_bytes(data[position + 8 : position + 10])
            sections[-1].append(Record(owner, ttl, data[position + 10 : end]))
            position = end
    assert position == len(data), "the counts and the records agree"
    return sections


def read_name(data: bytes, position: int) -> tuple[tuple[bytes, ...], int]:
    """The labels of a name and the offset behind it; pointers lead backwards."""
    labels: list[bytes] = []
    while data[position]:
        if data[position] >= 0xC0:
            target = int.from_bytes(data[position : position + 2]) & 0x3FFF
            assert target < position
            return (*labels, *read_name(data, target)[0]), position + 2
        labels.append(data[position + 1 : position + 1 + data[position]])
        position += 1 + data[position]
    return tuple(labels), position + 1


def target(length: int) -> str:
    """A host name of about so many characters."""
    return ("a" * 60 + ".") * (length // 61) + "b" * max(1, length % 61)

"""DNS messages as bytes: reading queries, refusing them, telling an upstream answer from a forged one.

The hot path of the worker, so it works on the bytes themselves. `parse` raises nothing but
`QueryError`, whatever the input. Building answers with records is the job of `answer`. Pure.

     header (RFC 1035 section 4.1.1)                 question (section 4.1.2)
    | id | flags | QD | AN | NS | AR |  12 bytes    | name | type | class |

    flags:  QR  Opcode:4  AA  TC  RD  RA  Z  AD  CD  RCODE:4
"""

import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

HEADER_BYTES: Final = 12
# RFC 1035 section 4.2.1: what every UDP client takes without saying so.
MIN_PAYLOAD_BYTES: Final = 512
# What we say we take (RFC 6891 section 6.2.5): the size that is fragmented nowhere, as resolvers
# agreed on DNS Flag Day 2020.
OUR_PAYLOAD_BYTES: Final = 1232
# A name has 255 bytes, padding (RFC 8467) rounds up to 128; the rest is room for signatures.
MAX_QUERY_BYTES: Final = 4096

QR: Final = 0x8000
OPCODE_MASK: Final = 0x7800
AA: Final = 0x0400
TC: Final = 0x0200
RD: Final = 0x0100
RA: Final = 0x0080
CD: Final = 0x0010
RCODE_MASK: Final = 0x000F
DNSSEC_OK: Final = 0x8000  # in the low 16 bits of the TTL field of OPT, RFC 3225 section 3

_HEADER: Final = struct.Struct(">6H")
_FLAGS: Final = struct.Struct(">H")
_RECORD: Final = struct.Struct(">HHIH")  # type, class, TTL, rdlength: what follows an owner name
_OPT: Final = struct.Struct(">BHHIH")  # the root as owner, then as above
_PAIR: Final = struct.Struct(">HH")
# What a host name may hold and the name of an app could: printable, no dot, no backslash.
_PLAIN_LABEL: Final = re.compile(rb"[!-\-/-\[\]-~]+")


class Rcode(IntEnum):
    """RFC 1035 section 4.1.1; BADVERS from RFC 6891 section 9, its high bits travel in OPT."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


class Type(IntEnum):
    """Record and query types that are treated by name."""

    A = 1
    SOA = 6
    PTR = 12
    AAAA = 28
    OPT = 41
    IXFR = 251
    AXFR = 252
    ANY = 255


CLASS_IN: Final = 1


class QueryError(Exception):
    """The datagram is no query we answer with records. `rcode` is None when it gets no answer."""

    rcode: ClassVar[Rcode | None] = None


class NotAQueryError(QueryError):
    """A response, or too short for an id: answering it could start a loop between two servers."""


class MalformedQueryError(QueryError):
    """Broken bytes, or not exactly one question (RFC 9619)."""

    rcode = Rcode.FORMERR


class UnsupportedOpcodeError(QueryError):
    """Not a standard query."""

    rcode = Rcode.NOTIMP


@dataclass(frozen=True, slots=True)
class Edns:
    """The OPT record of a query, RFC 6891 section 6.1."""

    payload_bytes: int
    version: int
    dnssec_ok: bool
    has_options: bool


@dataclass(frozen=True, slots=True)
class Query:
    """A well-formed query with one question.

    `labels` are as typed; `question_end` is the offset behind the question in `data`.
    """

    data: bytes
    labels: tuple[bytes, ...]
    qtype: int
    qclass: int
    question_end: int
    edns: Edns | None

    @property
    def id(self) -> int:
        return int.from_bytes(self.data[:2])

    @property
    def flags(self) -> int:
        return int.from_bytes(self.data[2:4])

    @property
    def question(self) -> bytes:
        return self.data[HEADER_BYTES : self.question_end]

    @property
    def payload_limit(self) -> int:
        """The largest answer the client takes over UDP, in bytes (RFC 6891 section 6.2.3)."""
        if self.edns is None:
            return MIN_PAYLOAD_BYTES
        return max(MIN_PAYLOAD_BYTES, self.edns.payload_bytes)

    @property
    def spelling(self) -> str | None:
        """The name as typed, without the last dot; None when it cannot be the name of a host."""
        if not self.labels or not all(map(_PLAIN_LABEL.fullmatch, self.labels)):
            return None
        return b".".join(self.labels).decode("ascii")

    @property
    def text(self) -> str:
        """The name for a log line, odd bytes escaped as in RFC 4343 section 2.1."""
        return ".".join(map(_escape, self.labels)) + "."


def parse(data: bytes) -> Query:
    """The query in `data`.

    Raises:
        QueryError: one of its leaves; nothing else, for any input.
    """
    if len(data) < 4:
        raise NotAQueryError(f"{len(data)} bytes")
    (flags,) = _FLAGS.unpack_from(data, 2)
    if flags & QR:
        raise NotAQueryError("a response")
    if flags & OPCODE_MASK:
        raise UnsupportedOpcodeError(f"opcode {(flags & OPCODE_MASK) >> 11}")
    if not HEADER_BYTES <= len(data) <= MAX_QUERY_BYTES:
        raise MalformedQueryError(f"{len(data)} bytes")
    _, _, questions, answers, authorities, additionals = _HEADER.unpack_from(data)
    if questions != 1:
        raise MalformedQueryError(f"{questions} questions")
    labels, end = _read_question_name(data)
    if end + 4 > len(data):
        raise MalformedQueryError("the question is cut off")
    qtype, qclass = _PAIR.unpack_from(data, end)
    edns = _read_records(data, end + 4, answers + authorities, additionals)
    return Query(data, labels, qtype, qclass, end + 4, edns)


def _read_question_name(data: bytes) -> tuple[tuple[bytes, ...], int]:
    # A pointer is no use here: nothing before the question could hold a name.
    labels: list[bytes] = []
    offset = HEADER_BYTES
    while True:
        if offset >= len(data):
            raise MalformedQueryError("the name is cut off")
        length = data[offset]
        offset += 1
        if length == 0:
            return tuple(labels), offset
        if length > 63:
            raise MalformedQueryError("a pointer or unknown label type in the question")
        labels.append(data[offset : offset + length])
        offset += length
        # RFC 1035 section 2.3.4: 255 bytes with the closing zero.
        if offset - HEADER_BYTES > 254 or offset > len(data):
            raise MalformedQueryError("the name is too long or cut off")


def _skip_name(data: bytes, offset: int) -> int:
    while offset < len(data):
        length = data[offset]
        if length == 0:
            return offset + 1
        if length >= 0xC0:
            return offset + 2
        if length > 63:
            break
        offset += 1 + length
    raise MalformedQueryError("an owner name is broken")


def _read_records(data: bytes, offset: int, others: int, additionals: int) -> Edns | None:
    """Walks over all records to the exact end; each takes at least 11 bytes, so it ends soon."""
    edns: Edns | None = None
    for index in range(others + additionals):
        start = offset
        offset = _skip_name(data, offset)
        if offset + _RECORD.size > len(data):
            raise MalformedQueryError("a record is cut off")
        rtype, rclass, ttl, length = _RECORD.unpack_from(data, offset)
        offset += _RECORD.size
        if offset + length > len(data):
            raise MalformedQueryError("a record's data is cut off")
        if rtype == Type.OPT:
            # RFC 6891 section 6.1.1: one OPT, owned by the root, in the additional section.
            if edns is not None or index < others or data[start] != 0:
                raise MalformedQueryError("an OPT record out of place")
            _check_options(data[offset : offset + length])
            edns = Edns(rclass, ttl >> 16 & 0xFF, bool(ttl & DNSSEC_OK), length > 0)
        offset += length
    if offset != len(data):
        raise MalformedQueryError(f"{len(data) - offset} bytes behind the last record")
    return edns


def _check_options(options: bytes) -> None:
    offset = 0
    while offset < len(options):
        if offset + 4 > len(options):
            raise MalformedQueryError("an EDNS option is cut off")
        offset += 4 + _PAIR.unpack_from(options, offset)[1]
    if offset != len(options):
        raise MalformedQueryError("an EDNS option is cut off")


def _escape(label: bytes) -> str:
    return "".join(
        chr(byte) if 0x21 <= byte <= 0x7E and byte not in b".\\" else f"\\{byte:03}"
        for byte in label
    )


def header(
    query: Query,
    rcode: Rcode,
    *,
    authoritative: bool = False,
    answers: int = 0,
    authorities: int = 0,
) -> bytes:
    """The header of an answer to `query`: RD and CD copied, RA set, OPT counted when due."""
    flags = QR | RA | query.flags & (RD | CD) | rcode & RCODE_MASK | (AA if authoritative else 0)
    additionals = 0 if query.edns is None else 1
    return _HEADER.pack(query.id, flags, 1, answers, authorities, additionals)


def opt(query: Query, rcode: Rcode = Rcode.NOERROR) -> bytes:
    """Our OPT record, or nothing when the query had none (RFC 6891 section 7)."""
    if query.edns is None:
        return b""
    flags = DNSSEC_OK if query.edns.dnssec_ok else 0
    return _OPT.pack(0, Type.OPT, OUR_PAYLOAD_BYTES, (rcode >> 4) << 24 | flags, 0)


def refuse(query: Query, rcode: Rcode) -> bytes:
    """An answer without records: the question, and what is wrong."""
    return header(query, rcode) + query.question + opt(query, rcode)


def refuse_unread(data: bytes, rcode: Rcode) -> bytes:
    """The answer to bytes that could not be read (at least 4): a bare header."""
    flags = _FLAGS.unpack_from(data, 2)[0] & (OPCODE_MASK | RD | CD) | QR | RA | rcode
    return data[:2] + _HEADER.pack(0, flags, 0, 0, 0, 0)[2:]


def truncate(query: Query, answer: bytes) -> bytes:
    """`answer` without its records and with TC set: the client asks again over TCP."""
    flags = _FLAGS.unpack_from(answer, 2)[0] | TC
    additionals = 0 if query.edns is None else 1
    head = _HEADER.pack(query.id, flags, 1, 0, 0, additionals)
    return head + query.question + opt(query)


def rcode_of(answer: bytes) -> int:
    """The low four bits of the response code; enough to tell good from bad."""
    return answer[3] & RCODE_MASK


def is_truncated(answer: bytes) -> bool:
    """Whether TC is set."""
    return bool(answer[2] & TC >> 8)


def is_answer_to(answer: bytes, sent: bytes, question_end: int) -> bool:
    """Whether `answer` belongs to the query `sent`: id, opcode and question (RFC 5452 section 4.2).

    The name is compared without case, because some servers fold it. A server that could not read
    the question may leave it out.
    """
    if len(answer) < HEADER_BYTES or answer[:2] != sent[:2]:
        return False
    _, flags, questions, *_ = _HEADER.unpack_from(answer)
    if not flags & QR or flags & OPCODE_MASK:
        return False
    if questions == 0:
        return flags & RCODE_MASK in (Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED)
    name_end = question_end - 4
    return (
        questions == 1
        and answer[name_end:question_end] == sent[name_end:question_end]
        and answer[HEADER_BYTES:name_end].lower() == sent[HEADER_BYTES:name_end].lower()
    )

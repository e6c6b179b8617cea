"""Answers with records: addresses, names, and "there is none" with its SOA. Pure.

Every answer repeats the question as it was typed, and is authoritative. All of them fit in 512
bytes, so none is ever truncated: the longest is a PTR answer with two names of 255 bytes that
share nothing, and reverse names are short.

A name of VNet is a zone of its own: its SOA (RFC 2308 section 3, to make "there is none"
cacheable) is owned by the name itself, because only the cluster knows where its zones are cut. That
of a name which does not exist is owned by the parent, as a zone cannot miss its own name. The
contents of the SOA are those of an empty zone in RFC 6303 section 3.
"""

from collections.abc import Sequence

from dnslib import AAAA, PTR, RR, SOA, A, DNSBuffer, DNSError, DNSLabel
from dnslib.buffer import BufferError as DNSBufferError
from dnslib.label import DNSLabelError

from workers.dns.message import MIN_PAYLOAD_BYTES, Query, Rcode, Type, header, opt

_RESPONSIBLE = DNSLabel((b"nobody", b"invalid"))
_SERIAL, _REFRESH, _RETRY, _EXPIRE = 1, 3600, 1200, 604800


class AnswerError(Exception):
    """The records cannot be put into a message; a fault of who gave them."""


def has_address(query: Query, ipv6: bytes | None) -> bool:
    """Whether a name with an IPv4 address and `ipv6` has a record of the type asked for."""
    return query.qtype in (Type.A, Type.ANY) or (query.qtype == Type.AAAA and ipv6 is not None)


def addresses(query: Query, ipv4: bytes, ipv6: bytes | None, ttl: int) -> bytes:
    """The addresses of the type asked for; "no data" for other types and for AAAA without IPv6.

    ANY gets what there is (RFC 8482 section 4.1).
    """
    owner = DNSLabel(query.labels)
    records = []
    if query.qtype in (Type.A, Type.ANY):
        records.append(RR(owner, Type.A, ttl=ttl, rdata=A(tuple(ipv4))))
    if query.qtype in (Type.AAAA, Type.ANY) and ipv6 is not None:
        records.append(RR(owner, Type.AAAA, ttl=ttl, rdata=AAAA(tuple(ipv6))))
    if not records:
        return nodata(query, len(query.labels), ttl)
    return _pack(query, Rcode.NOERROR, records, [])


def pointer(query: Query, name: str, zone_labels: int, ttl: int) -> bytes:
    """The name behind an address (RFC 1035 section 3.3.12); "no data" for other types."""
    if query.qtype not in (Type.PTR, Type.ANY):
        return nodata(query, zone_labels, ttl)
    # Labels, not text: dnslib would read escapes and IDNA into text.
    target = DNSLabel(tuple(name.encode().split(b".")))
    record = RR(DNSLabel(query.labels), Type.PTR, ttl=ttl, rdata=PTR(target))
    return _pack(query, Rcode.NOERROR, [record], [])


def nodata(query: Query, zone_labels: int, ttl: int) -> bytes:
    """The name exists, a record of this type does not (RFC 2308 section 2.2)."""
    return _pack(query, Rcode.NOERROR, [], [_soa(query, zone_labels, ttl)])


def nxdomain(query: Query, zone_labels: int, ttl: int) -> bytes:
    """The name does not exist (RFC 2308 section 2.1)."""
    return _pack(query, Rcode.NXDOMAIN, [], [_soa(query, zone_labels, ttl)])


def _soa(query: Query, zone_labels: int, ttl: int) -> RR:
    zone = DNSLabel(query.labels[-zone_labels:])
    times = (_SERIAL, _REFRESH, _RETRY, _EXPIRE, ttl)
    return RR(zone, Type.SOA, ttl=ttl, rdata=SOA(zone, _RESPONSIBLE, times))


def _pack(query: Query, rcode: Rcode, answers: Sequence[RR], authorities: Sequence[RR]) -> bytes:
    buffer = DNSBuffer()
    try:
        buffer.append(
            header(
                query,
                rcode,
                authoritative=True,
                answers=len(answers),
                authorities=len(authorities),
            )
        )
        # Through the buffer, so that the owner names become pointers to it.
        buffer.encode_name(DNSLabel(query.labels))
        buffer.append(query.question[-4:])
        for record in (*answers, *authorities):
            record.pack(buffer)
        buffer.append(opt(query))
    except (DNSError, DNSLabelError, DNSBufferError, UnicodeError) as error:
        raise AnswerError(f"answer to {query.text}: {error}") from error
    packed = bytes(buffer.data)
    if len(packed) > MIN_PAYLOAD_BYTES:
        raise AnswerError(f"answer to {query.text} has {len(packed)} bytes")
    return packed

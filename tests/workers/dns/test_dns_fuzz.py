"""A hundred thousand hostile messages through everything that needs no waiting."""

import random
import struct

from dns_fakes import FakeNames, FakeUpstreams, everybody, make_network, make_query, packed
from dnslib import DNSRecord, EDNSOption

from workers.dns.message import Query, Rcode, is_answer_to, refuse, truncate
from workers.dns.service import DnsService
from workers.dns.tally import Tally

MESSAGES = 100_000


def make_seeds() -> list[bytes]:
    return [
        make_query("www.example.test"),
        make_query("Pg.Root.Example.Test", "AAAA", edns=1232),
        make_query("vnet-diag-0123456789abcdef.test", "ANY", edns=4096, flags="do"),
        make_query("7.0.64.100.in-addr.arpa", "PTR"),
        make_query(".".join("4700000000000000000052343ce76006df"[::-1][:32]) + ".ip6.arpa", "PTR"),
        make_query("a.test", edns=512, opts=[EDNSOption(10, b"12345678"), EDNSOption(12, b"")]),
        bytes(DNSRecord.question("example.test", "HTTPS").pack()),
        struct.pack(">6H", 1, 0x0100, 1, 0, 0, 2)
        + b"\3www\7example\0\0\1\0\1"
        + b"\0"
        + struct.pack(">HHIH", 41, 1232, 0, 0)
        + b"\1k\0"
        + struct.pack(">HHIH", 250, 255, 0, 4)
        + b"sign",
    ]


def mutate(data: bytes, source: random.Random) -> bytes:
    """Flips, cuts, doubles or inserts at a few places."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(changed) + 1)
        kind = source.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] = source.randrange(256)
        elif kind == 1 and place < len(changed):
            changed[place] ^= 1 << source.randrange(8)
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            changed[place:place] = source.randbytes(source.randint(1, 12))
        else:
            changed[place:place] = changed[:place]
    return bytes(changed)


def test_no_message_raises_and_every_answer_belongs_to_its_question() -> None:
    source = random.Random(20260101)
    service = DnsService(make_network(), 10, FakeNames(), FakeUpstreams(), Tally({}))
    seeds = make_seeds()
    answered = waiting = dropped = 0
    for number in range(MESSAGES):
        if number % 5 == 0:
            data = source.randbytes(source.randint(0, 120))
        else:
            data = mutate(source.choice(seeds), source)
        reply = service.at_once(data, now=float(number), may_know=everybody)
        if isinstance(reply, bytes):
            answered += 1
            assert reply[:2] == data[:2]
            assert reply[2] & 0x80
            assert len(reply) <= 512
        elif isinstance(reply, Query):
            waiting += 1
            assert reply.text.isprintable()
            assert is_answer_to(refuse(reply, Rcode.SERVFAIL), data, reply.question_end)
            assert len(truncate(reply, refuse(reply, Rcode.NOERROR))) <= 512
        else:
            dropped += 1
            assert len(data) < 4 or data[2] & 0x80
    # Each of the three ways was taken often enough to mean something.
    assert min(answered, waiting, dropped) > 1000


def test_no_answer_from_upstream_raises() -> None:
    source = random.Random(20260102)
    sent = make_query("www.example.test")
    good = bytes(DNSRecord.parse(sent).reply().pack())
    for _ in range(10_000):
        is_answer_to(mutate(good, source), sent, len(sent))
        is_answer_to(source.randbytes(source.randint(0, 60)), sent, len(sent))


def test_own_names_survive_mutation_too() -> None:
    """With a name of ours remembered, the record-building path is taken for its variants."""
    source = random.Random(20260103)
    names = FakeNames()
    names.give("pg.root.example.test", "100.64.0.7")
    service = DnsService(make_network(), 10, names, FakeUpstreams(), Tally({}))
    resolved = names.names["pg.root.example.test"]
    assert resolved is not None
    service._state.own.put("pg.root.example.test", (resolved, 1e9), 1e9)
    seed = make_query("Pg.Root.Example.Test", "AAAA", edns=1232)
    at_address = 0
    for _ in range(10_000):
        reply = service.at_once(mutate(seed, source), now=1.0, may_know=everybody)
        at_address += isinstance(reply, bytes) and packed("100.64.0.7") in reply
    assert at_address > 100

"""The answer table, through the service with fake proxies and upstream servers."""

import asyncio
from collections.abc import Callable

import pytest
from dns_fakes import (
    FakeNames,
    FakeUpstreams,
    everybody,
    forwarded_answer,
    make_network,
    make_query,
    packed,
    run,
    wait_until,
)
from dnslib import QTYPE, DNSRecord, EDNSOption

from ipc.messages import NameOutcome, Network
from workers.dns.message import Query
from workers.dns.resolver import OverloadedError
from workers.dns.service import DnsService, Limits
from workers.dns.tally import Tally

NAME = "pg.root.example.test"
MISSING = "orders.db.root.example.test"
REVERSE = "7.0.64.100.in-addr.arpa"


class Setup:
    """A service with everything around it."""

    def __init__(self, network: Network | None = None, limits: Limits | None = None) -> None:
        self.names = FakeNames()
        self.names.give(NAME, "100.64.0.7")
        self.upstreams = FakeUpstreams()
        self.counters: dict[str, int] = {}
        self.now = 1000.0
        self.service = DnsService(
            network or make_network(), 10, self.names, self.upstreams, Tally(self.counters), limits
        )

    async def ask(self, data: bytes, *, over_tcp: bool = False) -> bytes:
        reply = self.service.at_once(data, self.now, everybody)
        assert reply is not None
        if isinstance(reply, bytes):
            return reply
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.service.begin(reply, everybody, done.set_result, over_tcp=over_tcp)
        return await done

    async def record(self, name: str, qtype: str = "A", **more: object) -> DNSRecord:
        return DNSRecord.parse(await self.ask(make_query(name, qtype, **more)))


def shape(record: DNSRecord) -> tuple[int, list[str], list[str]]:
    return (
        record.header.rcode,
        [f"{QTYPE[rr.rtype]} {rr.rdata}" for rr in record.rr],
        [f"{QTYPE[rr.rtype]} {rr.rname}" for rr in record.auth],
    )


V6 = "fd60:67ec:4325::6440:7"
DNS_V6 = "fd60:67ec:4325::2"
TABLE = [
    (NAME, "A", (0, ["A 100.64.0.7"], [])),
    (NAME, "AAAA", (0, [f"AAAA {V6}"], [])),
    (NAME.upper(), "A", (0, ["A 100.64.0.7"], [])),
    (NAME, "HTTPS", (0, [], [f"SOA {NAME}."])),
    (NAME, "TXT", (0, [], [f"SOA {NAME}."])),
    (NAME, "AXFR", (5, [], [])),
    (REVERSE, "PTR", (0, [f"PTR {NAME}."], [])),
    (REVERSE, "TXT", (0, [], ["SOA 64.100.in-addr.arpa."])),
    ("8.0.64.100.in-addr.arpa", "PTR", (3, [], ["SOA 64.100.in-addr.arpa."])),
    ("64.100.in-addr.arpa", "SOA", (0, [], ["SOA 64.100.in-addr.arpa."])),
    ("vnet-diag-0123.example.test", "A", (0, ["A 100.64.0.2"], [])),
    ("vnet-diag-0123.example.test", "AAAA", (0, [f"AAAA {DNS_V6}"], [])),
    ("VNET-DIAG-0123.test", "MX", (0, [], ["SOA VNET-DIAG-0123.test."])),
    ("www.example.test", "A", (0, ["A 192.0.2.7"], [])),
    ("7.2.0.192.in-addr.arpa", "PTR", (0, ["A 192.0.2.7"], [])),
]


@pytest.mark.parametrize(("name", "qtype", "expected"), TABLE)
def test_question_gets_its_answer_first_and_again(
    name: str, qtype: str, expected: tuple[int, list[str], list[str]]
) -> None:
    async def main() -> None:
        setup = Setup()
        for id_ in (1, 2):
            record = await setup.record(name, qtype, id_=id_)
            assert shape(record) == expected
            assert record.header.id == id_
            assert str(record.q.qname) == name + "."

    run(main())


def test_diagnostic_answers_are_for_one_use_and_counted_apart() -> None:
    async def main() -> None:
        setup = Setup()
        for qtype in ("A", "AAAA", "TXT", "A"):
            record = await setup.record("vNet-Diag-1.test", qtype)
            assert {rr.ttl for rr in (*record.rr, *record.auth)} == {0}
        assert setup.counters["answers_diagnostic"] == 4
        assert setup.counters["answers_own"] == setup.counters["answers_nodata"] == 0
        assert setup.counters["cache_hits"] == 0
        assert setup.names.asked == setup.upstreams.asked == []

    run(main())


def test_aaaa_is_no_data_while_ipv6_is_off() -> None:
    async def main() -> None:
        setup = Setup(make_network(ipv6=False))
        assert shape(await setup.record(NAME, "AAAA")) == (0, [], [f"SOA {NAME}."])
        name = "vnet-diag-1.test"
        assert shape(await setup.record(name, "AAAA")) == (0, [], [f"SOA {name}."])

    run(main())


@pytest.mark.parametrize("outcome", [NameOutcome.FAILED, NameOutcome.RANGE_FULL])
def test_name_that_cannot_be_found_out_is_servfail(outcome: NameOutcome) -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.set_outcome(NAME, outcome)
        assert shape(await setup.record(NAME)) == (2, [], [])
        setup.names.give(NAME, "100.64.0.9")
        assert shape(await setup.record(NAME)) == (0, ["A 100.64.0.9"], [])

    run(main())


@pytest.mark.parametrize("qtype", ["A", "AAAA", "HTTPS", "ANY"])
def test_name_of_ours_that_nothing_has_is_nxdomain_with_the_soa_of_its_parent(qtype: str) -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.set_outcome(MISSING, NameOutcome.NO_SUCH_NAME, valid_seconds=60)
        for id_ in (1, 2):
            record = await setup.record(MISSING, qtype, id_=id_)
            assert shape(record) == (3, [], ["SOA db.root.example.test."])
            assert (record.header.aa, record.header.id) == (1, id_)
        assert setup.upstreams.asked == []
        assert setup.counters["answers_nxdomain"] == 2

    run(main())


def test_missing_name_is_asked_once_per_spelling_until_its_time_is_over() -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.set_outcome(MISSING, NameOutcome.NO_SUCH_NAME, valid_seconds=60)
        for qtype in ("A", "AAAA", "HTTPS", "A"):
            await setup.ask(make_query(MISSING, qtype))
        assert setup.names.asked == [MISSING]
        # A database whose name has capitals is found by that spelling alone.
        setup.names.give(MISSING, "100.64.0.9")
        assert shape(await setup.record(MISSING.title()))[1] == ["A 100.64.0.9"]
        later = asyncio.get_running_loop().time() + 1e6
        assert isinstance(setup.service.at_once(make_query(MISSING), later, everybody), Query)

    run(main())


def test_missing_name_that_is_valid_for_no_time_is_asked_each_time() -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.set_outcome(MISSING, NameOutcome.NO_SUCH_NAME)
        assert shape(await setup.record(MISSING))[0] == 3
        setup.names.give(MISSING, "100.64.0.9")
        assert shape(await setup.record(MISSING))[1] == ["A 100.64.0.9"]

    run(main())


def test_silent_proxies_and_silent_upstreams_are_servfail() -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.names[NAME] = None
        setup.names.address_answers = False
        setup.upstreams.respond = lambda _: None
        for name, qtype in ((NAME, "A"), (REVERSE, "PTR"), ("www.example.test", "A")):
            assert shape(await setup.record(name, qtype)) == (2, [], [])
        assert setup.counters["answers_servfail"] == 3

    run(main())


def test_bug_in_the_middle_is_servfail(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        setup = Setup()
        setup.upstreams.respond = lambda _: {}[1]  # type: ignore[index]
        assert shape(await setup.record("www.example.test")) == (2, [], [])
        assert "failed" in caplog.text
        assert setup.counters["in_flight_now"] <= 1
        await wait_until(lambda: setup.counters["in_flight_now"] == 0)

    run(main())


def test_name_of_a_proxy_that_cannot_be_packed_is_servfail() -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.addresses[packed("100.64.0.7")] = "a" * 70
        assert shape(await setup.record(REVERSE, "PTR")) == (2, [], [])

    run(main())


def test_repeated_question_is_answered_from_packed_bytes() -> None:
    async def main() -> None:
        setup = Setup()
        first = await setup.ask(make_query(NAME, id_=1))
        second = setup.service.at_once(make_query(NAME, id_=2), setup.now, everybody)
        assert second == b"\0\2" + first[2:]
        assert setup.counters["cache_hits"] == 1
        assert setup.counters["answers_own"] == 2
        other_case = setup.service.at_once(make_query(NAME.title(), id_=3), setup.now, everybody)
        assert isinstance(other_case, bytes)
        assert DNSRecord.parse(other_case).q.qname.label[0] == b"Pg"
        assert setup.names.asked == [NAME]

    run(main())


def test_expired_name_is_asked_again() -> None:
    async def main() -> None:
        setup = Setup()
        await setup.ask(make_query(NAME))
        later = asyncio.get_running_loop().time() + 1e6
        assert isinstance(setup.service.at_once(make_query(NAME), later, everybody), Query)
        assert isinstance(setup.service.at_once(make_query(NAME, "MX"), later, everybody), Query)

    run(main())


def test_answer_that_is_valid_for_no_time_is_not_kept() -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.give(NAME, "100.64.0.7", valid_seconds=0)
        await setup.ask(make_query(NAME))
        await setup.ask(make_query(NAME))
        assert len(setup.names.asked) == 2

    run(main())


def test_foreign_name_costs_the_proxies_one_question() -> None:
    async def main() -> None:
        setup = Setup()
        for qtype in ("A", "AAAA", "HTTPS", "A"):
            await setup.ask(make_query("www.example.test", qtype))
        assert setup.names.asked == ["www.example.test"]
        assert len(setup.upstreams.asked) == 4
        assert setup.counters["answers_forwarded"] == 4

    run(main())


def test_changed_network_is_answered_from_at_once() -> None:
    async def main() -> None:
        setup = Setup()
        await setup.ask(make_query(NAME, "AAAA"))
        reverse = "7.0.0.10.in-addr.arpa"
        await setup.ask(make_query(reverse, "PTR"))
        assert len(setup.upstreams.asked) == 1
        setup.service.change_network(make_network("100.64.0.0/10", "10.0.0.0/8", ipv6=False))
        assert shape(await setup.record(NAME, "AAAA"))[1] == []
        assert shape(await setup.record(reverse, "PTR"))[0] == 3

    run(main())


def test_answer_that_was_under_way_when_the_network_changed_is_not_kept() -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.gate = asyncio.Event()
        task = asyncio.ensure_future(setup.ask(make_query(NAME)))
        await wait_until(lambda: bool(setup.names.asked))
        setup.service.forget()
        setup.names.gate.set()
        await task
        assert isinstance(setup.service.at_once(make_query(NAME), setup.now, everybody), Query)

    run(main())


def test_query_with_a_cookie_is_answered_but_not_kept_packed() -> None:
    async def main() -> None:
        setup = Setup()
        data = make_query(NAME, edns=1232, opts=[EDNSOption(10, b"12345678")])
        await setup.ask(data)
        assert isinstance(setup.service.at_once(data, setup.now, everybody), bytes)
        assert setup.counters["cache_hits"] == 0
        assert setup.names.asked == [NAME]

    run(main())


@pytest.mark.parametrize("name", [NAME, "www.example.test"])
def test_other_edns_version_is_badvers(name: str) -> None:
    async def main() -> None:
        record = await Setup().record(name, edns=1232, version=1)
        assert record.ar[0].edns_rcode == 1
        assert record.header.rcode == 0

    run(main())


@pytest.mark.parametrize(
    ("mangle", "rcode", "counter"),
    [
        (lambda data: data[:-1], 1, "answers_formerr"),
        (lambda data: data[:5] + b"\0" + data[6:], 1, "answers_formerr"),
        (lambda data: data[:5] + b"\2" + data[6:], 1, "answers_formerr"),
        (lambda data: data[:2] + b"\x11" + data[3:], 4, "answers_notimp"),
    ],
)
def test_broken_query_is_refused_and_counted(
    mangle: Callable[[bytes], bytes], rcode: int, counter: str
) -> None:
    setup = Setup()
    reply = setup.service.at_once(mangle(make_query(NAME, id_=258)), 0.0, everybody)
    assert isinstance(reply, bytes)
    assert (reply[:2], reply[3] & 15) == (b"\1\2", rcode)
    assert setup.counters[counter] == 1


def test_response_is_dropped_and_counted() -> None:
    setup = Setup()
    assert setup.service.at_once(forwarded_answer(make_query(NAME)), 0.0, everybody) is None
    assert setup.counters["answers_dropped"] == 1


def test_long_upstream_answer_is_cut_for_udp_only() -> None:
    async def main() -> None:
        setup = Setup()
        setup.upstreams.respond = lambda data: forwarded_answer(data) + bytes(600)
        data = make_query("www.example.test", edns=600)
        assert DNSRecord.parse(await setup.ask(data)).header.tc == 1
        assert len(await setup.ask(data, over_tcp=True)) > 600
        assert len(await setup.ask(make_query("www.example.test", edns=1232))) > 600

    run(main())


def test_full_service_says_servfail_at_once() -> None:
    async def main() -> None:
        setup = Setup(limits=Limits(in_flight=2))
        setup.names.gate = asyncio.Event()
        waiting = [asyncio.ensure_future(setup.ask(make_query(f"{n}.test"))) for n in range(2)]
        await wait_until(lambda: len(setup.names.asked) == 2)
        assert setup.counters["in_flight_now"] == 2
        assert shape(await setup.record("3.test")) == (2, [], [])
        assert setup.counters["overloads"] == 1
        setup.names.gate.set()
        await asyncio.gather(*waiting)
        await wait_until(lambda: setup.counters["in_flight_now"] == 0)

    run(main())


def test_overloaded_resolver_is_servfail() -> None:
    async def main() -> None:
        setup = Setup()

        async def refuse_all(_name: str) -> None:
            raise OverloadedError("full")

        setup.service._names.resolve_name = refuse_all  # type: ignore[method-assign]
        assert shape(await setup.record("www.example.test")) == (2, [], [])
        assert setup.counters["overloads"] == 1

    run(main())


def test_flood_of_foreign_names_leaves_our_own_in_place() -> None:
    async def main() -> None:
        setup = Setup(limits=Limits(packed_answers=4, own_names=4, foreign_names=4))
        await setup.ask(make_query(NAME))
        for number in range(50):
            await setup.ask(make_query(f"n{number}.test"))
        assert isinstance(setup.service.at_once(make_query(NAME), setup.now, everybody), bytes)
        assert setup.counters["cache_hits"] == 1

    run(main())


def test_flood_of_missing_names_leaves_our_own_in_place() -> None:
    async def main() -> None:
        setup = Setup(limits=Limits(packed_answers=2, own_names=2, missing_names=2))
        await setup.ask(make_query(NAME))
        for number in range(5):
            name = f"{number}.db.root.example.test"
            setup.names.set_outcome(name, NameOutcome.NO_SUCH_NAME, valid_seconds=60)
            assert shape(await setup.record(name))[0] == 3
        asked = len(setup.names.asked)
        assert shape(await setup.record(NAME)) == (0, ["A 100.64.0.7"], [])
        assert len(setup.names.asked) == asked

    run(main())


def test_close_ends_what_is_under_way() -> None:
    async def main() -> None:
        setup = Setup()
        setup.names.gate = asyncio.Event()
        query = setup.service.at_once(make_query("www.example.test"), 0.0, everybody)
        assert isinstance(query, Query)
        answers: list[bytes] = []
        setup.service.begin(query, everybody, answers.append, over_tcp=False)
        await wait_until(lambda: bool(setup.names.asked))
        setup.service.close()
        await wait_until(lambda: setup.counters["in_flight_now"] == 0)
        assert answers == []

    run(main())


def test_histogram_is_cumulative() -> None:
    counters: dict[str, int] = {}
    tally = Tally(counters)
    tally.observe(0.0004, answers=3)
    tally.observe(0.015)
    tally.observe(30.0)
    assert counters["latency_le_1ms"] == 3
    assert counters["latency_le_10ms"] == 3
    assert counters["latency_le_20ms"] == 4
    assert counters["latency_le_5000ms"] == 4
    assert counters["latency_count"] == 5
    assert all(len(name) <= 64 for name in counters)

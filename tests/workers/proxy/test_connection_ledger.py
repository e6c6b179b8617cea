"""What is kept of connections, and for how long."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.connection_id import connection_id
from ipc.connection_list import (
    LIVE,
    MAX_LINE_BYTES,
    ConnectionState,
    ConnectionTold,
    TargetKind,
    TargetTold,
    decode_from_proxy,
    encode,
)
from ipc.messages import DialRequest, Refusal
from workers.proxy.connections import Ledger, Target
from workers.proxy.relay import RelayEnd, RelayOutcome

PG = Target(TargetKind.APP, "teleport.test", "", "pg.test")


@dataclasses.dataclass
class Link:
    bytes_up: int = 0
    bytes_down: int = 0


class Bed:
    """A ledger whose time a test sets; connections are numbered."""

    def __init__(self, **limits) -> None:
        self.now = 100.0
        self.ledger = Ledger(clock=lambda: self.now, wall=lambda: 1e9 + self.now, **limits)
        self.flows = 0

    def begin(self, target: Target | None = PG):
        self.flows += 1
        request = DialRequest(
            flow_id=self.flows,
            source=b"\x64\x40\0\1",
            source_port=40_000,
            destination=b"\x64\x40\0\x09",
            destination_port=5432,
        )
        record = self.ledger.begins(request)
        if target is not None:
            self.ledger.leads_to(record, target)
        return record

    def open(self, target: Target = PG, **count: int):
        record, link = self.begin(target), Link(**count)
        self.ledger.accepted(record, link)
        return record, link

    def end(self, record, up: int = 0, down: int = 0, error: str = "") -> None:
        self.ledger.ended(record, RelayOutcome(RelayEnd.PROGRAM_CLOSED, up, down, error))

    @property
    def connections(self) -> list[ConnectionTold]:
        return [line for line in self.ledger.lines() if isinstance(line, ConnectionTold)]

    @property
    def targets(self) -> dict[str, TargetTold]:
        lines = self.ledger.lines()
        return {line.name: line for line in lines if isinstance(line, TargetTold)}

    def one(self) -> ConnectionTold:
        [found] = self.connections
        return found


def test_a_connection_from_its_begin_to_its_end():
    bed = Bed()
    record = bed.begin(None)
    told = bed.one()
    assert (told.state, told.kind, told.name) == ("dialling", "unknown", "")
    assert told.id == connection_id(1)
    assert (told.address, told.port) == ("100.64.0.9", 5432)
    assert (told.client_address, told.client_port) == ("100.64.0.1", 40_000)
    assert told.started == 1e9 + 100
    bed.ledger.leads_to(record, PG)
    assert (bed.one().kind, bed.one().name, bed.one().profile) == (
        "app",
        "pg.test",
        "teleport.test",
    )
    link = Link()
    bed.now += 2
    bed.ledger.accepted(record, link)
    link.bytes_up, link.bytes_down = 10, 20
    told = bed.one()
    assert (told.state, told.bytes_sent, told.bytes_received) == ("active", 10, 20)
    assert told.ended is None
    assert told.duration_seconds == 2
    bed.now += 3
    bed.end(record, 11, 22, "the node is gone")
    link.bytes_up = 99
    bed.now += 100
    told = bed.one()
    assert (told.state, told.end, told.error) == ("done", "program_closed", "the node is gone")
    assert (told.bytes_sent, told.bytes_received) == (11, 22)
    assert (told.ended, told.duration_seconds) == (1e9 + 105, 5)
    target = bed.targets["pg.test"]
    assert (target.ok, target.failed, target.active, target.dialling) == (1, 0, 0, 0)
    assert (target.bytes_sent, target.bytes_received) == (11, 22)


def test_a_refused_one_says_why_and_counts_as_failed():
    bed = Bed()
    bed.ledger.refused(bed.begin(), Refusal.PORT_NOT_ALLOWED, "ports 1-2\n\x1b[2Jare " + "x" * 999)
    told = bed.one()
    assert (told.state, told.refusal) == ("failed", "port_not_allowed")
    assert told.error.startswith("ports 1-2 [2Jare xxx")
    assert len(told.error) <= 500
    target = bed.targets["pg.test"]
    assert (target.ok, target.failed, target.dialling) == (0, 1, 0)


def test_one_refused_before_its_name_was_known_is_there_as_well():
    bed = Bed()
    bed.ledger.refused(bed.begin(None), Refusal.TOO_MANY, "10 connections are open")
    assert (bed.one().kind, bed.one().refusal) == ("unknown", "too_many")
    assert bed.targets[""].failed == 1


def test_a_cancelled_one_counts_as_neither():
    bed = Bed()
    bed.ledger.cancelled(bed.begin(), "the program went away")
    assert (bed.one().state, bed.one().error) == ("cancelled", "the program went away")
    target = bed.targets["pg.test"]
    assert (target.ok, target.failed, target.dialling) == (0, 0, 0)


@pytest.mark.parametrize("first", ["refused", "cancelled", "ended"])
def test_only_the_first_end_counts(first):
    bed = Bed()
    record = bed.begin()
    if first == "refused":
        bed.ledger.refused(record, Refusal.INTERNAL, "first")
    elif first == "cancelled":
        bed.ledger.cancelled(record, "first")
    else:
        bed.ledger.accepted(record, Link())
        bed.end(record, error="first")
    before = bed.one(), bed.targets
    bed.ledger.refused(record, Refusal.TIMED_OUT, "second")
    bed.ledger.cancelled(record, "second")
    bed.end(record, 5, 5, "second")
    bed.ledger.accepted(record, Link(7, 7))
    bed.ledger.leads_to(record, PG._replace(name="other.test"))
    assert (bed.one(), bed.targets) == before


def test_a_target_that_nothing_came_of_is_not_there():
    bed = Bed()
    record = bed.begin(PG)
    bed.ledger.leads_to(record, PG._replace(port=8000))
    [target] = bed.targets.values()
    assert (target.port, target.dialling) == (8000, 1)


def test_a_target_whose_attempts_were_all_cancelled_goes_with_the_last():
    bed = Bed(in_all=1)
    bed.ledger.cancelled(bed.begin(), "")
    assert set(bed.targets) == {"pg.test"}
    bed.begin(PG._replace(name="other.test"))
    assert set(bed.targets) == {"other.test"}


def test_of_what_has_ended_the_oldest_makes_room_in_its_target():
    bed = Bed(of_target=3, in_all=100)
    active, _ = bed.open()
    other = bed.begin(PG._replace(name="other.test"))
    bed.ledger.cancelled(other, "")
    records = [bed.open()[0] for _ in range(4)]
    for record in records:
        bed.end(record)
    ids = {connection_id(record.request.flow_id) for record in (active, other, *records[-2:])}
    assert {told.id for told in bed.connections} == ids
    assert bed.targets["pg.test"].ok == 5


def test_of_what_has_ended_the_oldest_makes_room_in_all():
    bed = Bed(of_target=3, in_all=4)
    for number in range(6):
        bed.ledger.refused(bed.begin(PG._replace(name=f"{number}.test")), Refusal.INTERNAL, "")
    assert [told.name for told in bed.connections] == ["2.test", "3.test", "4.test", "5.test"]
    # Totals stay.
    assert len(bed.targets) == 6


def test_what_goes_on_is_never_dropped():
    bed = Bed(of_target=2, in_all=3, max_targets=2)
    for number in range(10):
        bed.open(PG._replace(name=f"{number % 5}.test"))
        bed.begin(PG._replace(name=f"{number % 5}.test"))
    bed.ledger.refused(bed.begin(PG), Refusal.INTERNAL, "")
    assert Counter(told.state for told in bed.connections) == {"active": 10, "dialling": 10}
    assert len(bed.targets) == 5


def test_a_target_that_was_not_used_for_long_makes_room():
    bed = Bed(max_targets=2)
    for name in ("a", "b", "a", "c"):
        bed.end(bed.open(PG._replace(name=name))[0])
    assert set(bed.targets) == {"a", "c"}
    assert {told.name for told in bed.connections} == {"a", "c"}


def rates(told):
    return told.sent_per_second, told.received_per_second


def test_rates_are_those_between_two_looks():
    bed = Bed()
    _, link = bed.open(bytes_up=1000)
    bed.ledger.sample()
    assert rates(bed.one()) == (None, None)
    link.bytes_up, link.bytes_down = 3000, 500
    bed.now += 1
    late, _ = bed.open(bytes_up=40)
    bed.ledger.sample()
    first, second = bed.connections
    assert (rates(first), rates(second)) == ((2000, 500), (40, 0))
    assert rates(bed.targets["pg.test"]) == (2040, 500)
    # Too early for others: the same again.
    link.bytes_up = 9000
    bed.now += 0.5
    bed.ledger.sample()
    assert rates(bed.connections[0]) == (2000, 500)
    # What has ended in between counts for the target.
    bed.end(late, 100, 0)
    bed.now += 0.5
    bed.ledger.sample()
    assert rates(bed.targets["pg.test"]) == (6060, 0)
    assert [rates(told) for told in bed.connections] == [(6000, 0), (0, 0)]


def test_nobody_has_looked_for_long():
    bed = Bed()
    _, link = bed.open()
    bed.ledger.sample()
    bed.now += 60
    link.bytes_up = 60_000
    bed.ledger.sample()
    assert rates(bed.one()) == (None, None)
    bed.now += 1
    bed.ledger.sample()
    assert rates(bed.one()) == (0, 0)


def test_the_revision_changes_with_what_is_told():
    bed = Bed()
    seen = []

    def is_new() -> bool:
        bed.now += 1
        bed.ledger.sample()
        seen.append(bed.ledger.revision)
        return seen[-1] != seen[-2]

    seen.append(bed.ledger.revision)
    record, link = bed.open()
    assert is_new()
    is_new()  # there are rates now
    assert not is_new()
    link.bytes_down = 1
    assert is_new()
    assert is_new()  # the rate is zero again
    assert not is_new()
    bed.end(record, 0, 1)
    assert is_new()
    assert not is_new()
    bed.ledger.leads_to(bed.begin(None), PG)
    assert is_new()


def test_the_longest_line_is_one():
    bed = Bed()
    long = "\U0001f600" * 600
    target = Target(TargetKind.DATABASE, long, long, long, 65535)
    record, _ = bed.open(target, bytes_up=2**62, bytes_down=2**62)
    bed.ledger.sample()
    bed.now += 1
    bed.ledger.sample()
    bed.end(record, 2**62, 2**62, '"' * 600 + long)
    for line in bed.ledger.lines():
        data = encode(line)
        assert len(data) < MAX_LINE_BYTES
        assert decode_from_proxy(data) == line


NAMES = st.sampled_from([PG._replace(name=name) for name in "abcde"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.none() | NAMES),
        st.tuples(st.just("lead"), NAMES),
        st.tuples(st.sampled_from(["accept", "refuse", "cancel", "end", "look"]), st.none()),
    ).flatmap(lambda step: st.tuples(st.just(step), st.integers(0, 1000))),
    max_size=60,
)


@settings(max_examples=300)
@given(STEPS, st.integers(1, 4), st.integers(1, 6), st.integers(1, 4))
def test_limits_hold_whatever_happens(steps, of_target, in_all, max_targets):
    bed = Bed(of_target=of_target, in_all=in_all, max_targets=max_targets)
    records = []
    state = {}
    for (action, target), index in steps:
        bed.now += 0.4
        if action == "begin":
            records.append(bed.begin(target))
            state[records[-1]] = ConnectionState.DIALLING
            continue
        if not records:
            continue
        record = records[index % len(records)]
        before = state[record]
        match action:
            case "lead":
                bed.ledger.leads_to(record, target)
            case "accept":
                bed.ledger.accepted(record, Link(index, index))
                if before is ConnectionState.DIALLING:
                    state[record] = ConnectionState.ACTIVE
            case "refuse":
                bed.ledger.refused(record, Refusal.INTERNAL, "")
                if before is ConnectionState.DIALLING:
                    state[record] = ConnectionState.FAILED
            case "cancel":
                bed.ledger.cancelled(record, "")
                if before is ConnectionState.DIALLING:
                    state[record] = ConnectionState.CANCELLED
            case "end":
                bed.end(record, index, index)
                if before is ConnectionState.ACTIVE:
                    state[record] = ConnectionState.DONE
            case _:
                bed.ledger.sample()
        check(bed, state, of_target, in_all, max_targets)


def check(bed, state, of_target, in_all, max_targets):
    told = {line.id: line for line in bed.connections}
    assert len(told) == len(bed.connections)
    for record, expected in state.items():
        line = told.get(connection_id(record.request.flow_id))
        if line is None:
            assert expected not in LIVE
        else:
            assert line.state == expected
    live = Counter(line.name for line in told.values() if line.state in LIVE)
    whole = Counter(line.name for line in told.values())
    for name, count in whole.items():
        assert count <= max(of_target, live[name])
    assert len(told) <= max(in_all, live.total())
    targets = bed.targets
    assert len(targets) <= max(max_targets, len(live))
    assert set(whole) <= set(targets)
    for name, target in targets.items():
        assert target.active + target.dialling == live[name]
        is_noted = target.ok or target.failed or whole[name]
        assert is_noted, "a row about nothing"
    # Nothing is kept twice, or beside what is told.
    ledger = bed.ledger
    assert len(ledger._live) == live.total()
    assert len(ledger._finished) == len(told) - live.total()
    assert sum(len(s.finished) for s in ledger._statistics.values()) == len(ledger._finished)
    assert set(ledger._resting) == {s for s in ledger._statistics.values() if not s.live}

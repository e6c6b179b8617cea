"""Who wins among the upstream servers."""

import pytest
from dns_fakes import make_query
from hypothesis import given
from hypothesis import strategies as st

from workers.dns.message import Rcode, parse, refuse
from workers.dns.race import Outcome, Patience, Race

PATIENCE = Patience(total_seconds=5.0, retry_seconds=1.0, grace_seconds=1.5)
QUERY = parse(make_query("a.test"))
GOOD = refuse(QUERY, Rcode.NXDOMAIN)
BAD = refuse(QUERY, Rcode.SERVFAIL)
REFUSED = refuse(QUERY, Rcode.REFUSED)


def start(servers: int) -> Race:
    race = Race(servers, PATIENCE, 0.0)
    assert race.servers_due(0.0) == list(range(servers))
    return race


def test_first_good_answer_wins() -> None:
    race = start(3)
    race.answered(2, GOOD, 0.1)
    race.answered(0, GOOD, 0.2)
    assert race.outcome(0.2) == Outcome(GOOD, 2)


@pytest.mark.parametrize("rcode", [Rcode.SERVFAIL, Rcode.REFUSED, Rcode.FORMERR, Rcode.NOTIMP])
def test_bad_answer_does_not_win_over_a_later_good_one(rcode: Rcode) -> None:
    race = start(2)
    race.answered(0, refuse(QUERY, rcode), 0.1)
    assert race.outcome(0.1) is None
    race.answered(1, GOOD, 0.2)
    assert race.outcome(0.2) == Outcome(GOOD, 1)


def test_bad_answer_wins_when_all_are_bad() -> None:
    race = start(2)
    race.answered(1, REFUSED, 0.1)
    race.answered(0, BAD, 0.2)
    assert race.outcome(0.2) == Outcome(REFUSED, 1)


def test_bad_answer_is_held_back_no_longer_than_the_grace() -> None:
    race = start(2)
    race.answered(0, BAD, 0.1)
    assert race.servers_due(1.0) == [1]
    assert race.outcome(1.59) is None
    assert race.next_look() == pytest.approx(1.6)
    assert race.outcome(1.6) == Outcome(BAD, 0)


def test_silent_servers_are_asked_once_more() -> None:
    race = start(2)
    assert race.next_look() == 1.0
    assert race.servers_due(0.99) == []
    assert race.servers_due(1.0) == [0, 1]
    assert race.servers_due(4.0) == []
    assert race.next_look() == 5.0
    assert race.outcome(4.99) is None
    assert race.outcome(5.0) == Outcome(None, None)


def test_late_answer_to_the_first_try_counts() -> None:
    race = start(1)
    race.servers_due(1.0)
    race.answered(0, GOOD, 1.1)
    assert race.outcome(1.1) == Outcome(GOOD, 0)


def test_failed_tries_are_retried_and_then_end_it_early() -> None:
    race = start(1)
    race.failed(0)
    assert race.outcome(0.1) is None
    assert race.servers_due(1.0) == [0]
    race.failed(0)
    assert race.outcome(1.0) == Outcome(None, None)


def test_failed_server_leaves_the_bad_answer_of_the_other() -> None:
    race = start(2)
    race.failed(1)
    race.answered(0, BAD, 0.2)
    race.servers_due(1.0)
    race.failed(1)
    assert race.outcome(1.0) == Outcome(BAD, 0)


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["good", "bad", "fail", "wait"]))),
)
def test_race_always_ends_in_time_and_never_prefers_a_bad_answer(
    servers: int, events: list[tuple[int, str]]
) -> None:
    race = start(servers)
    now, tries, good = 0.0, [1] * servers, False
    for server, event in events:
        if race.outcome(now) is not None:
            break
        now += 0.3
        for due in race.servers_due(now):
            tries[due] += 1
        if server >= servers or not tries[server] or event == "wait":
            continue
        tries[server] -= 1
        if event == "fail":
            race.failed(server)
        else:
            good = good or event == "good"
            race.answered(server, GOOD if event == "good" else BAD, now)
        outcome = race.outcome(now)
        assert outcome is None or not good or outcome.answer == GOOD
        assert outcome is not None or race.next_look() <= 5.0
    assert race.outcome(5.0) is not None

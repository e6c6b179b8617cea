"""The chaos run's own judgement: what happens when, what explains what, which aims are met."""

import itertools
import random

import chaos_traffic
import pytest
from chaos_accounts import (
    Answer,
    Cause,
    Connection,
    Lag,
    Names,
    Outcome,
    Question,
    Window,
    settle,
    why_cut,
    why_unanswered,
    window_of,
)
from chaos_pattern import PERIOD, Pattern, Request
from chaos_processes import Process, strays
from chaos_report import Aim, Times, missed, table
from chaos_schedule import CRASHES, LASTING, MAX_CRASHES, Event, Kind, Step, first_allowed, steps

WORKERS = ("tun", "dns", "proxy-0", "proxy-1", "ssh")


def events_of(seed: int, count: int, without=()) -> list[Event]:
    coming = (event for step in steps(seed, WORKERS, without) for event in step.events)
    return list(itertools.islice(coming, count))


def connection(outcome: Outcome, began: float, ended: float, owner: str = "proxy-0", **more):
    return Connection(
        way="down", app="app", owner=owner, began=began, ended=ended, outcome=outcome, **more
    )


def question(answer: Answer, names: Names, began: float, ended: float) -> Question:
    return Question(
        way="udp", names=names, name="app", began=began, ended=ended, answer=answer, tries=1
    )


def window(kind: str, target: str, began: float, ended: float) -> Window:
    found = window_of(kind, target, began, ended)
    assert found is not None
    return found


# -- pattern --


def test_every_wrong_byte_is_counted_at_any_place():
    chance = random.Random(1)
    pattern = Pattern(PERIOD - 7)
    for offset in (0, 5, PERIOD - 1, 10 * PERIOD + 3):
        good = b"".join(pattern.piece(offset + n, 50_000) for n in range(0, 200_000, 50_000))
        assert pattern.wrong_bytes(offset, good) == 0
        bad = bytearray(good)
        for place in chance.sample(range(len(bad)), 9):
            bad[place] ^= 1
        assert pattern.wrong_bytes(offset, bytes(bad)) == 9


def test_bytes_of_another_transfer_or_place_are_wrong():
    pattern = Pattern(1000)
    assert pattern.wrong_bytes(0, Pattern(1001).piece(0, 1000)) > 900
    assert pattern.wrong_bytes(1 << 16, pattern.piece(0, 1000)) > 900


def test_request_comes_back_from_its_bytes():
    request = Request("down", Pattern(123_456))
    assert Request.decode(request.encode()) == request


# -- schedule --


def test_a_seed_gives_the_same_events_again_and_another_others():
    assert events_of(5, 200) == events_of(5, 200)
    assert events_of(5, 200) != events_of(6, 200)


@pytest.mark.parametrize("seed", range(20))
def test_a_short_run_meets_every_sort_of_event(seed):
    found = events_of(seed, 13)
    kinds = {event.kind for event in found}
    assert {event.target for event in found if event.kind is Kind.KILL} >= {"tun", "dns"}
    assert kinds >= {Kind.KILL, Kind.STOP, Kind.SLOW, Kind.DISK_FULL}
    for sort in (
        {Kind.FLOOD_SYN, Kind.FLOOD_DNS, Kind.FLOOD_GARBAGE},
        {Kind.PROXY_DOWN, Kind.AUTH_DOWN, Kind.CLOSE_APPS},
        {Kind.REWRITE, Kind.LOGOUT},
        {Kind.DRAIN, Kind.UPGRADE},
    ):
        assert kinds & sort


def test_a_long_run_does_everything_to_every_worker():
    found = set(events_of(1, 200))
    for kind in (Kind.KILL, Kind.STOP, Kind.SLOW, Kind.DRAIN):
        assert {event.target for event in found if event.kind is kind} == set(WORKERS)
    assert {event.kind for event in found} == set(Kind)


def test_what_is_left_out_does_not_happen():
    found = events_of(1, 200, without={Kind.DRAIN, Kind.UPGRADE})
    assert not {Kind.DRAIN, Kind.UPGRADE} & {event.kind for event in found}


def test_only_kills_come_in_the_middle_of_what_lasts():
    pairs = [step for step in itertools.islice(steps(1, WORKERS), 400) if len(step.events) == 2]
    assert pairs
    for first, second in (pair.events for pair in pairs):
        assert first.kind in LASTING
        assert second.kind is Kind.KILL


def test_no_worker_crashes_more_often_than_is_allowed_in_any_window():
    """Played as fast as it goes, with every event taking one second."""
    now, window_seconds = 0.0, 30.0
    crashes: dict[str, list[float]] = {worker: [] for worker in WORKERS}
    coming, waiting = steps(3, WORKERS), []
    for _ in range(300):
        waiting += [next(coming) for _ in range(8 - len(waiting))]
        while (index := first_allowed(waiting, crashes, now, window_seconds)) is None:
            now += 0.1
        for worker in waiting.pop(index).crashes:
            crashes[worker].append(now)
        now += 1.0
    for times in crashes.values():
        assert len(times) > 10
        for first, later in zip(times, times[MAX_CRASHES:], strict=False):
            assert later - first > window_seconds


def test_an_order_is_kept_where_nothing_forbids_it():
    waiting = [Step((Event(kind, "tun"),)) for kind in (Kind.KILL, Kind.SLOW)]
    assert first_allowed(waiting, {}, 0.0, 30.0) == 0
    busy = {"tun": [0.0] * MAX_CRASHES}
    assert first_allowed(waiting, busy, 0.0, 30.0) == 1
    assert first_allowed(waiting[:1], busy, 0.0, 30.0) is None
    assert {Kind.KILL, Kind.STOP} == CRASHES


# -- accounts --


@pytest.mark.parametrize("outcome", [Outcome.RESET, Outcome.ENDED_EARLY])
def test_a_killed_proxy_explains_only_cuts_of_its_own_at_that_time(outcome):
    windows = [window("kill", "proxy-0", 10, 12)]
    assert why_cut(connection(outcome, 1, 11), windows) is Cause.KILLED_PROXY
    assert why_cut(connection(outcome, 1, 11, "proxy-1"), windows) is Cause.OTHER
    # Open while the proxy died, cut later.
    assert why_cut(connection(outcome, 1, 12.5), windows) is Cause.OTHER
    assert why_cut(connection(outcome, 1, 9), windows) is Cause.OTHER


@pytest.mark.parametrize(
    ("kind", "cause"), [("kill", Cause.KILLED_SSH), ("stop", Cause.STOPPED_SSH)]
)
def test_the_end_of_ssh_explains_cuts_of_ssh_and_of_no_app(kind, cause):
    windows = [window(kind, "ssh", 10, 12)]
    assert why_cut(connection(Outcome.RESET, 1, 11, "ssh"), windows) is cause
    assert why_cut(connection(Outcome.RESET, 1, 11, "proxy-0"), windows) is Cause.OTHER
    assert why_cut(connection(Outcome.REFUSED, 11, 11.5, "ssh"), windows) is Cause.OTHER
    assert window_of("slow", "ssh", 10, 12) is None
    assert window_of("drain", "ssh", 10, 12) is None


def test_a_killed_proxy_explains_no_cut_of_ssh():
    windows = [window("kill", "proxy-0", 10, 12)]
    assert why_cut(connection(Outcome.RESET, 1, 11, "ssh"), windows) is Cause.OTHER


def test_a_killed_proxy_explains_no_refusal():
    windows = [window("kill", "proxy-0", 10, 12)]
    assert why_cut(connection(Outcome.REFUSED, 11, 11.5), windows) is Cause.OTHER


@pytest.mark.parametrize("kind", ["logout", "proxy_down", "auth_down", "close_apps", "flood_syn"])
def test_without_login_cluster_or_room_connections_are_refused_also_late(kind):
    windows = [window(kind, "", 10, 12)]
    assert why_cut(connection(Outcome.REFUSED, 11, 30), windows) is not Cause.OTHER
    assert why_cut(connection(Outcome.REFUSED, 12.5, 30), windows) is Cause.OTHER


def test_auth_services_that_are_away_explain_no_cut():
    windows = [window("auth_down", "", 10, 12)]
    assert why_cut(connection(Outcome.RESET, 1, 11), windows) is Cause.OTHER


def test_nothing_explains_a_connection_that_hangs():
    kinds = [kind for kind in Kind if window_of(kind, "", 0, 100) is not None]
    windows = [window(kind, "", 0, 100) for kind in kinds]
    assert why_cut(connection(Outcome.HUNG, 1, 46), windows) is Cause.OTHER


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("kill", "tun"),
        ("kill", "dns"),
        ("slow", "tun"),
        ("slow", "proxy-0"),
        ("flood_garbage", ""),
        ("drain", "proxy-0"),
        ("upgrade", ""),
        ("rewrite", ""),
    ],
)
def test_these_events_explain_nothing(kind, target):
    assert window_of(kind, target, 0, 1) is None


def test_the_latest_event_that_can_explain_a_cut_does():
    windows = [window("proxy_down", "", 5, 12), window("logout", "", 10, 12)]
    assert why_cut(connection(Outcome.RESET, 1, 11), windows) is Cause.LOGOUT
    assert why_cut(connection(Outcome.RESET, 1, 6), windows) is Cause.CLUSTER_DROPPED


@pytest.mark.parametrize(
    ("kind", "names", "cause"),
    [
        ("logout", Names.KNOWN, Cause.LOGOUT),
        ("logout", Names.FOREIGN, Cause.OTHER),
        ("disk_full", Names.FRESH, Cause.DISK_FULL),
        ("disk_full", Names.KNOWN, Cause.OTHER),
        ("kill", Names.KNOWN, Cause.OTHER),
        ("stop", Names.FOREIGN, Cause.STOPPED_OTHER),
        ("flood_dns", Names.FOREIGN, Cause.FLOODED),
        ("flood_garbage", Names.FOREIGN, Cause.OTHER),
    ],
)
def test_which_questions_an_event_explains(kind, names, cause):
    target = {"kill": "proxy-0", "stop": "tun"}.get(kind, "")
    found = window_of(kind, target, 10, 12)
    windows = [] if found is None else [found]
    assert why_unanswered(question(Answer.NO_ANSWER, names, 11, 21), windows) is cause
    # A wrong answer has no excuse.
    assert why_unanswered(question(Answer.WRONG, names, 11, 12), windows) is Cause.OTHER


def test_accounts_of_a_run():
    records = [
        connection(Outcome.COMPLETED, 1, 9, bytes=100, gaps=[(2.0, 3.0), (5.0, 9.0)]),
        connection(Outcome.RESET, 1, 11, bytes=50, wrong=3),
        connection(Outcome.RESET, 1, 11, "proxy-1"),
        question(Answer.RIGHT, Names.KNOWN, 1, 2),
        question(Answer.FAILED, Names.FOREIGN, 1, 2),
        Lag(began=1.0, ended=1.5),
    ]
    found = settle(records, [window("kill", "proxy-0", 10, 12)], [(6.0, 8.0)])
    assert found.connections == {"down": 3, "opened": 3, "completed": 1}
    assert found.cut == {"reset": {"killed proxy": 1, "other": 1}}
    assert (found.bytes, found.wrong_bytes, found.cut_by_other) == (150, 3, 1)
    assert found.unanswered == {"other": 1}
    assert (found.longest_stall, found.longest_stall_while_stopped) == (1.0, 4.0)
    assert found.lag == 0.5
    assert [one["type"] for one in found.unexplained] == ["connection", "question"]


def test_records_come_back_from_their_file(tmp_path):
    path = tmp_path / "records"
    records = [connection(Outcome.RESET, 1, 2, gaps=[(1.0, 1.5)]), Lag(began=1.0, ended=2.0)]
    encode = chaos_traffic.msgspec.json.encode
    path.write_bytes(b"".join(encode(record) + b"\n" for record in records) + b'{"type":"conn')
    assert chaos_traffic.read(path) == records


@pytest.mark.parametrize(
    ("status", "complaint", "is_whole", "outcome"),
    [
        (0, "", True, Outcome.COMPLETED),
        (0, "", False, Outcome.ENDED_EARLY),
        (255, "ssh: connect to host h port 22: Connection refused", True, Outcome.REFUSED),
        (255, "VNet: no login alice@h: Permission denied (publickey).", True, Outcome.REFUSED),
        (255, "ssh: connect to host h port 22: Connection timed out", True, Outcome.HUNG),
        (255, "kex_exchange_identification: read: Connection reset by peer", True, Outcome.RESET),
        (255, "Connection to h closed by remote host.", False, Outcome.RESET),
        (-9, "", False, Outcome.RESET),
    ],
)
def test_how_an_ssh_session_went_is_taken_from_its_client(status, complaint, is_whole, outcome):
    record = connection(Outcome.COMPLETED, 1, 2, "ssh")
    chaos_traffic.judge_client(record, status, complaint, is_whole=is_whole)
    assert (record.outcome, record.wrong) == (outcome, 0)


def test_a_node_that_seems_to_be_another_one_counts_as_a_wrong_byte():
    """No event explains those."""
    record = connection(Outcome.COMPLETED, 1, 2, "ssh")
    complaint = f"{'@' * 300} Host key verification failed."
    chaos_traffic.judge_client(record, 255, complaint, is_whole=True)
    assert record.wrong == 1
    assert record.detail.endswith("verification failed.")


# -- processes and report --


def test_processes_that_nobody_has_are_found():
    found = [
        Process(1, 0, "S", "chaos"),
        Process(5, 1, "S", "cluster"),
        Process(6, 1, "S", "vnet-supervisor"),
        Process(7, 6, "S", "tun"),
        Process(8, 6, "S", "an old dns"),
        Process(9, 1, "Z", "an orphan"),
    ]
    left = strays(found, 1, own=[5, 6], workers=[7])
    assert [text.split()[0] for text in left] == ["8", "9"]


def test_percentile_of_times_knows_what_never_came():
    times = Times([0.1, None, 0.2])
    assert times.percentile(50) == 0.2
    assert times.percentile(99) is None
    assert Times().as_json() == {"count": 0, "p50": None, "p99": None}


def test_only_hard_aims_fail_a_run_and_what_was_not_measured_meets_none():
    aims = [
        Aim("good", 0, 0, is_hard=True),
        Aim("slow", 3, 2, is_hard=False),
        Aim("bad", 1, 0, is_hard=True),
        Aim("unknown", None, 0, is_hard=True),
    ]
    assert [aim.name for aim in missed(aims)] == ["bad", "unknown"]
    assert [line.split()[-1] for line in table(aims).splitlines()] == [
        "met",
        "met",
        "MISSED",
        "MISSED",
    ]
    assert table(aims).splitlines()[1].endswith("not met")

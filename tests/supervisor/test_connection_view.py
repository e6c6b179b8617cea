"""The tables of `vnet connections`, and how they are put together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.connection_list import (
    MAX_CONNECTIONS,
    ConnectionState,
    ConnectionTold,
    TargetKind,
    TargetTold,
)
from ipc.messages import Refusal
from supervisor.cli import connection_view as view
from supervisor.cli.connection_report import Told, merge
from supervisor.cli.socket_owners import SocketOwner
from supervisor.cli.text import columns

NOW = 1_800_000_000.0


def target(name="pg.teleport.example.com", **changes):
    values = {
        "kind": TargetKind.APP,
        "profile": "teleport.example.com",
        "leaf": "",
        "name": name,
        "port": None,
        "dialling": 0,
        "active": 1,
        "ok": 12,
        "failed": 3,
        "bytes_sent": 1234,
        "bytes_received": 56_700_000,
        "sent_per_second": 0.0,
        "received_per_second": 1_250_000.0,
    }
    return TargetTold(**values | changes)


def connection(number=1, name="pg.teleport.example.com", **changes):
    values = {
        "id": f"caaaaaaa{number}",
        "kind": TargetKind.APP,
        "profile": "teleport.example.com",
        "leaf": "",
        "name": name,
        "address": "100.64.0.9",
        "port": 5432,
        "client_address": "100.64.0.1",
        "client_port": 40_000 + number,
        "state": ConnectionState.ACTIVE,
        "started": NOW - number,
        "ended": None,
        "duration_seconds": 1.0,
        "bytes_sent": 1234,
        "bytes_received": 56_700_000,
        "sent_per_second": 0.0,
        "received_per_second": 1_250_000.0,
        "refusal": None,
        "end": "",
        "error": "",
    }
    return ConnectionTold(**values | changes)


def failed(number=2, **changes):
    values = {
        "state": ConnectionState.FAILED,
        "ended": NOW,
        "duration_seconds": 0.25,
        "bytes_sent": 0,
        "bytes_received": 0,
        "sent_per_second": 0.0,
        "received_per_second": 0.0,
        "refusal": Refusal.PORT_NOT_ALLOWED,
        "error": "the app has the ports 5432, 6000-6010",
    }
    return connection(number, **values | changes)


def report(targets=(), connections=(), owners=(), problems=()):
    return merge([Told("proxy-0", targets, connections)], dict(owners), problems)


def lines(found, width=80, *, has_colour=False):
    return view.lines(found, width, NOW, has_colour=has_colour)


PSQL = SocketOwner(1000, 4711, "/usr/lib/postgresql/15/bin/psql")


def test_nothing_yet():
    assert lines(report()) == ["no connections yet"]


def test_at_80_columns():
    found = report(
        [target(), target("ports.teleport.example.com", port=8000, active=0, ok=0)],
        [connection(), failed(), connection(3, "", state=ConnectionState.DIALLING)],
        [("caaaaaaa1", PSQL)],
    )
    assert lines(found) == [
        "TARGET                     KIND  ACTIVE  OK  FAILED  SENT   RECV  SENT/S  RECV/S",
        "pg.teleport.example.com    app        1  12       3  1.2k  56.7M       0    1.2M",
        "ports.teleport.exam…:8000  app        0   0       3  1.2k  56.7M       -    1.2M",
        "",
        "STATE     TARGET                        CLIENT     TIME  SENT   RECV  ID",
        "active    pg.teleport.example.com:5432  psql 4711    1s  1.2k  56.7M  caaaaaaa1",
        "dialling  100.64.0.9:5432               -            3s     -      -  caaaaaaa3",
        "failed    pg.teleport.example.com:5432  -            0s     -      -  caaaaaaa2",
        "  port_not_allowed: the app has the ports 5432, 6000-6010",
    ]


def test_wide_terminals_show_all():
    found = report([target()], [connection()], [("caaaaaaa1", PSQL)])
    titles = lines(found, 200)
    assert " ".join(titles[0].split()) == "TARGET KIND ACTIVE OK FAILED SENT RECV SENT/S RECV/S"
    assert " ".join(titles[3].split()) == (
        "STATE TARGET CLIENT SINCE TIME SENT RECV SENT/S RECV/S ID"
    )
    assert lines(found, None)[4].split()[:4] == [
        "active",
        "pg.teleport.example.com:5432",
        "psql",
        "4711",
    ]


def test_reason_stands_below_its_line_and_is_wrapped():
    found = report(
        [],
        [
            failed(error="a long sentence " * 30),
            connection(3, state=ConnectionState.DONE, ended=NOW, end="program_closed"),
            connection(4, state=ConnectionState.DONE, ended=NOW, end="broken", error="it broke"),
            failed(5, state=ConnectionState.CANCELLED, refusal=None, error="the program went away"),
        ],
    )
    shown = lines(found)
    text = "\n".join(shown)
    assert "  port_not_allowed: a long sentence a long" in text
    assert shown[6].endswith(" ...")
    # In order is no reason.
    assert "program_closed" not in text
    assert "  broken: it broke" in text
    assert "  the program went away" in text
    assert all(len(line) <= 80 for line in shown)
    whole = lines(found, None)
    assert f"  port_not_allowed: {'a long sentence ' * 30}" in whole


def test_client_is_the_program_else_the_user():
    owners = [("caaaaaaa1", PSQL), ("caaaaaaa2", SocketOwner(1001, None, None))]
    found = report([], [connection(1), connection(2), connection(3)], owners)
    shown = [line.split() for line in lines(found, 120)[3:]]
    assert shown[0][2:4] == ["psql", "4711"]
    assert shown[1][2:4] == ["user", "1001"]
    assert shown[2][2] == "-"


def test_what_a_name_could_do_to_a_terminal_it_does_not():
    evil = "\x1b[2J\n\x9b"
    owner = SocketOwner(0, 1, f"/tmp/{evil}")
    found = report([target(evil)], [failed(1, name=evil, error=evil)], [("caaaaaaa1", owner)])
    for width in (None, 80):
        for line in lines(found, width):
            assert line.isprintable()


def test_colours_are_for_terminals_that_want_them():
    found = report([target()], [failed()])
    assert "\x1b[31mfailed" in "".join(lines(found, has_colour=True))
    assert "\x1b" not in "".join(lines(found))


TEXTS = st.text(max_size=300)
NUMBERS = st.integers(0, 2**62)
TARGETS = st.lists(
    st.builds(
        target,
        name=TEXTS,
        active=NUMBERS,
        ok=NUMBERS,
        failed=NUMBERS,
        bytes_sent=NUMBERS,
        port=st.none() | st.just(65535),
    )
)
CONNECTIONS = st.lists(
    st.builds(
        connection,
        number=st.integers(0, 10**9),
        name=TEXTS,
        error=TEXTS,
        state=st.sampled_from(ConnectionState),
        bytes_received=NUMBERS,
        started=st.floats(0, NOW),
    ),
    max_size=5,
)


@given(TARGETS, CONNECTIONS, st.integers(80, 200))
def test_no_line_is_wider_than_the_terminal(targets, connections, width):
    owners = {told.id: PSQL for told in connections}
    for line in lines(report(targets, connections, owners.items()), width):
        assert columns(line) <= width


@pytest.mark.parametrize("width", [1, 40, 60])
def test_narrow_terminals_keep_what_says_most(width):
    shown = lines(report([target()], [connection(), failed()], [("caaaaaaa1", PSQL)]), width)
    titles = shown[3].split()
    assert titles[:2] == ["STATE", "TARGET"]
    assert titles[-1] == "ID"
    if width >= 40:
        assert all(len(line) <= max(width, 50) for line in shown)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.0k"),
        (99_949, "99.9k"),
        (99_951, "100k"),
        (999_600, "1.0M"),
        (5.5e12, "5.5T"),
        (2**62, "999P+"),
    ],
)
def test_amounts(count, shown):
    assert view.amount(count) == shown


def test_live_ones_come_first_and_then_the_newest():
    told = [
        failed(1),
        connection(9),
        failed(2),
        connection(5),
        connection(7, state=ConnectionState.DIALLING),
    ]
    assert [row.id[-1] for row in report([], told).connections] == ["5", "7", "9", "1", "2"]


def test_all_proxies_together_show_a_thousand_and_every_live_one():
    proxies = [
        Told("proxy-0", (), [failed(number) for number in range(2, 800)]),
        Told("proxy-1", (), [failed(number) for number in range(2, 800)]),
        Told("ssh", (), [connection(100_000 + number) for number in range(20)]),
    ]
    rows = merge(proxies, {}, ()).connections
    assert len(rows) == MAX_CONNECTIONS
    assert sum(row.state == "active" for row in rows) == 20
    many = Told("ssh", (), [connection(number) for number in range(1500)])
    rows = merge([*proxies, many], {}, ()).connections
    assert len(rows) == 1520


def test_a_target_of_two_processes_is_one_row():
    old = Told("proxy-0", [target(), target("a", active=0)], ())
    new = Told("proxy-0", [target(sent_per_second=None)], ())
    first, second = merge([old, new], {}, ()).targets
    assert (first.ok, first.failed, first.active, first.bytes_sent) == (24, 6, 2, 2468)
    assert (first.sent_per_second, first.received_per_second) == (None, 2_500_000)
    assert second.name == "a"


def test_times_are_those_of_the_log():
    [row] = report([], [failed(started=1_700_000_000.25, ended=1_700_000_001.0)]).connections
    assert row.started == "2023-11-14T22:13:20.250Z"
    assert row.ended == "2023-11-14T22:13:21.000Z"

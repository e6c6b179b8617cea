"""The table of `vnet ls`, without clusters."""

import asyncio

import pytest

from supervisor.cli import ls, text
from supervisor.cli.teleport_access import CommandError, find_access, run
from workers.proxy.resource_rows import Kind, Row


def row(name="pg", address="pg.demo.test", kind=Kind.APP, **changes):
    values = {
        "kind": kind,
        "name": name,
        "address": address,
        "cluster": "demo.test",
        "profile": "teleport.demo.test",
        "ports": "any",
        "protocol": "tcp",
        "through_vnet": not changes.get("note"),
    }
    return Row(**(values | changes))


def lines(rows, width=None):
    return list(ls.table(rows, width, has_colour=False))


def test_columns_are_as_wide_as_needed():
    rows = [
        row(ports="8000-8010"),
        row("wiki", "https://wiki.demo.test", protocol="web", ports="", note="a web app"),
        row("orders", "orders.db.teleport.demo.test", Kind.DATABASE, protocol="postgres"),
        row("cache", "", Kind.DATABASE, protocol="redis", ports="", note="not carried"),
        row("node1", "node1.demo.test", Kind.NODE, protocol="ssh", ports="22"),
        row("far", "far.other.test", note="in no zone"),
    ]
    assert lines(rows) == [
        "KIND         NAME    ADDRESS                       PORTS      CLUSTER",
        "app          pg      pg.demo.test                  8000-8010  demo.test",
        "app web      wiki    https://wiki.demo.test        -          demo.test",
        "db postgres  orders  orders.db.teleport.demo.test  any        demo.test",
        "db redis     cache   -                             -          demo.test",
        "node         node1   node1.demo.test               22         demo.test",
        # What cannot be used is not shown as if it could.
        "app          far     -                             -          demo.test",
    ]


def test_profiles_are_shown_where_there_are_several():
    assert "PROFILE" not in lines([row()])[0]
    shown = lines([row(), row(profile="other.test")])
    assert shown[0].endswith("PROFILE")
    assert shown[2].endswith("other.test")


def test_nothing_found_is_said_to_people_only():
    assert lines([], 80) == ["nothing found"]
    assert lines([]) == []


LONG = "a-rather-long-name-of-an-app"


@pytest.mark.parametrize("width", [80, 70, 60])
def test_it_fits_the_terminal_and_no_address_is_cut(width):
    rows = [
        row(LONG, f"{LONG}.demo.test", ports="8000-8010, 9000, 9443, 10000-10100"),
        row(cluster="a-leaf-with-a-long-name.demo.test"),
    ]
    shown = lines(rows, width)
    assert max(map(len, shown)) <= width
    assert f"{LONG}.demo.test" in shown[1]
    assert max(map(len, lines(rows))) > 100


def test_only_what_is_too_much_is_cut_or_left_out():
    rows = [row(ports="1, " * 40), row(LONG)]
    assert f"  {LONG}  " in lines(rows, 100)[2]
    assert "…" in lines(rows, 100)[1]
    assert lines([row(LONG, f"{LONG}.{LONG}.{LONG}")], 80)[0].split() == [
        "KIND",
        "NAME",
        "ADDRESS",
    ]


def test_one_long_address_does_not_push_the_others_away():
    rows = [row(address="x" * 100), row()]
    shown = lines(rows, 60)
    assert "x" * 100 in shown[1]
    assert len(shown[2]) <= 60


def test_colour_is_for_terminals_that_take_it():
    coloured = list(ls.table([row()], 80, has_colour=True))
    assert coloured[0].startswith("\x1b[1m")
    assert coloured[0].endswith("\x1b[0m")
    assert text.wants_colour({"TERM": "xterm"})
    assert not text.wants_colour({"TERM": "xterm", "NO_COLOR": "1"})
    assert text.wants_colour({"TERM": "xterm", "NO_COLOR": ""})
    assert not text.wants_colour({"TERM": "dumb"})


def test_notes_name_what_they_are_about():
    rows = [row(f"app{index}", note="why") for index in range(7)]
    assert list(ls.notes([row(), *rows, row("x", note="because")], 80)) == [
        "",
        "app0, app1, app2, app3, app4 and 2 more: why",
        "x: because",
    ]
    assert list(ls.notes([row()], 80)) == []
    assert max(map(len, ls.notes([row(note="some words " * 20)], 60))) <= 60


@pytest.fixture
def no_default(monkeypatch, tmp_path):
    default = tmp_path / "default.toml"
    monkeypatch.setattr("supervisor.config.DEFAULT_PATH", default)
    return default


def test_the_home_of_the_environment_comes_before_that_of_the_configuration(no_default, tmp_path):
    config = tmp_path / "vnet.toml"
    config.write_text('teleport_home = "/srv/tsh"\n[teleport]\ninsecure = true\n')
    access = find_access(config, {})
    assert (str(access.home), access.insecure) == ("/srv/tsh", True)
    assert str(find_access(config, {"TELEPORT_HOME": "/tmp/tsh"}).home) == "/tmp/tsh"
    assert find_access(None, {}).home.name == ".tsh"
    no_default.write_text('[teleport]\nca_file = "~/ca.pem"\n')
    assert find_access(None, {}).ca_file == str(find_access(None, {}).home.parent / "ca.pem")


def test_a_default_configuration_of_somebody_else_is_no_obstacle(no_default, monkeypatch):
    no_default.write_text("not ours to read")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert find_access(None, {}).ca_file == ""


def test_a_wrong_configuration_is_one_line(tmp_path):
    config = tmp_path / "vnet.toml"
    for written in (None, "colour = 1"):
        if written is not None:
            config.write_text(written)
        with pytest.raises(CommandError) as caught:
            find_access(config, {})
        assert caught.value.status == 2


def test_a_fault_of_ours_is_one_line_that_names_it():
    async def fail():
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(int, "x"))

    with pytest.raises(CommandError, match="internal error: ValueError: invalid literal") as caught:
        run(fail)
    assert caught.value.status == 5

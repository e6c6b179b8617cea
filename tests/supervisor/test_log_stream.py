import json
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import logs


def record(text: str, **extra: object) -> logging.LogRecord:
    values = {"created": 0.1234, "levelno": 30, "levelname": "WARNING", "name": "a.b", "msg": text}
    return logging.makeLogRecord(values | extra)


def test_line_for_people():
    formatter = logs.TextFormatter()
    assert formatter.format(record("hello")) == "1970-01-01T00:00:00.123Z WARNING supervisor: hello"
    assert formatter.format(record("x", worker="dns")).endswith("Z WARNING dns: x")


def test_line_for_machines():
    found = json.loads(logs.JsonFormatter().format(record("a\nb\x1b", worker="dns")))
    assert found == {
        "time": "1970-01-01T00:00:00.123Z",
        "level": "warning",
        "worker": "dns",
        "logger": "a.b",
        "message": "a\nb\x1b",
    }


def test_stack_is_indented():
    try:
        {}["key"]
    except KeyError as error:
        text = logs.TextFormatter().format(
            record("it failed", exc_info=(type(error), error, error.__traceback__))
        )
    first, *rest = text.split("\n")
    assert first.endswith("it failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-1] == "    KeyError: 'key'"


@given(st.text())
def test_message_cannot_look_like_a_record_of_its_own(text):
    line = logs.TextFormatter().format(record(text))
    for following in line.splitlines()[1:]:
        assert following.startswith("    ")
    assert all(
        character.isprintable() or ord(character) >= 160 or character in "\t\n"
        for character in line
    )


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_file_name_that_is_no_utf8_is_no_obstacle(formatter):
    assert "caf?" in formatter.format(record(os.fsdecode(b"caf\xe9")))


def test_closed_standard_error_loses_the_line_and_nothing_else():
    handler = logs.StandardErrorHandler()
    handler.setFormatter(logs.TextFormatter())
    pid = os.fork()
    if pid == 0:
        os.close(2)
        handler.emit(record("x"))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_chatter_of_libraries_is_left_out_but_not_their_warnings(capfd):
    handler = logs.StandardErrorHandler()
    handler.setFormatter(logs.TextFormatter())
    handler.emit(record("step", name="pyroute2.netlink", levelno=10))
    handler.emit(record("trouble", name="pyroute2.netlink"))
    error = capfd.readouterr().err
    assert "step" not in error
    assert "trouble" in error

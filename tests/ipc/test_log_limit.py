"""The limit per message, and the ids of connections."""

import logging
import re

from hypothesis import given
from hypothesis import strategies as st

from ipc.connection_id import about, connection_id
from ipc.log_limit import UNLIMITED, Kind, LimitFilter, MessageLimit, tell_suppressed


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Kept(logging.Handler):
    """A handler with a limit before it, and a clock that the test moves."""

    def __init__(self, **limits: int) -> None:
        super().__init__()
        self.clock = Clock()
        self.records: list[logging.LogRecord] = []
        self.addFilter(LimitFilter(self.emit, MessageLimit(**limits), self.clock))

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]


def logger(handler: Kept, name: str = "workers.dns") -> logging.Logger:
    made = logging.Logger(name)  # noqa: LOG001  # one that nobody else has
    made.addHandler(handler)
    return made


def test_repetitions_become_a_number():
    kept = Kept()
    log = logger(kept)
    for number in range(260):
        log.warning("%s does not answer: %d", "server", number)
    assert kept.texts == [f"server does not answer: {number}" for number in range(20)]
    kept.clock.now += 10
    log.info("something else")
    *_, summary, last = kept.records
    assert summary.getMessage() == "server does not answer: 20 ... 240 more like this in 10 s"
    assert (summary.levelname, summary.name) == ("WARNING", "workers.dns")
    assert last.getMessage() == "something else"
    log.warning("%s does not answer: %d", "server", 1)
    assert kept.texts[-1] == "server does not answer: 1"


def test_message_is_the_same_by_logger_level_and_template():
    kept = Kept(max_repeats=1)
    for name in ("a", "b"):
        log = logger(kept, name)
        for level in (logging.INFO, logging.ERROR):
            for template in ("x %s", "y %s"):
                for argument in ("1", "2"):
                    log.log(level, template, argument)
    assert len(kept.texts) == 8


def test_debug_lines_and_those_with_a_limit_of_their_own_pass():
    kept = Kept()
    log = logger(kept)
    for number in range(500):
        log.debug("connection %d", number)
        log.info("refused %d", number, extra=UNLIMITED)
    assert len(kept.texts) == 1000


def test_number_is_told_in_silence_too():
    kept = Kept()
    log, root = logger(kept), logging.getLogger()
    for _ in range(21):
        log.error("again")
    root.addHandler(kept)
    try:
        tell_suppressed()
        assert len(kept.texts) == 20
        kept.clock.now += 10
        tell_suppressed()
        tell_suppressed()
    finally:
        root.removeHandler(kept)
    assert kept.texts[20:] == ["again ... 1 more like this in 10 s"]


def test_messages_that_are_all_different_share_one_limit():
    kept = Kept(max_kinds=100)
    log = logger(kept)
    for number in range(10_000):
        log.error(f"made up {number}")  # noqa: G004  # what this is about
    assert len(kept.texts) == 100 + 20
    kept.clock.now += 10
    log.info("x")
    assert kept.texts[-2] == "made up 120 ... 9880 lines of other kinds in 10 s"


def test_text_that_cannot_be_made_and_one_without_end_do_no_harm():
    kept = Kept(max_repeats=0)
    log = logger(kept)
    log.error("%d", "no number")
    endless = "x" * 100_000
    log.error(f"{endless}\nand more")  # noqa: G004
    kept.clock.now += 10
    log.error("%d", "no number")
    assert kept.texts[0] == "%d ... 1 more like this in 10 s"
    assert len(kept.texts[1]) < 1000


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 5)), max_size=200))
def test_every_line_is_told_or_counted_once(steps):
    limit = MessageLimit(max_repeats=2, max_kinds=10)
    now, told, counted = 0.0, 0, 0
    for number, later in steps:
        now += later
        counted += sum(found.number for found in limit.due(now))
        told += limit.note(Kind("x", 20, str(number)), str, now)
        assert len(limit._windows) <= 11
    counted += sum(found.number for found in limit.due(now + 100))
    assert told + counted == len(steps)
    assert not limit._windows


@given(st.integers(0, 2**63 - 1))
def test_connection_id_has_one_form(flow_id):
    assert re.fullmatch("c[a-z2-7]{8}", connection_id(flow_id))
    assert about(flow_id) == {"connection": connection_id(flow_id)}


def test_connections_of_one_tun_have_different_ids():
    first = 2**62 - 100
    assert len({connection_id(first + number) for number in range(100_000)}) == 100_000

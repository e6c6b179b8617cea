"""A worker's standard error: any bytes at any times become texts of bounded size, and none is lost untold.

Each event is a byte for what happens, then the time that passes or a piece of what is written.
"""

from byte_choices import Choices

from supervisor.error_output import (
    LONGEST_SECONDS,
    MAX_ENTRY_BYTES,
    MAX_LINE,
    QUIET_SECONDS,
    Bursts,
)

MAX_EVENTS = 200
WAITS = [0.0, 0.01, QUIET_SECONDS, LONGEST_SECONDS, 30.0]
FACTORS = [1, 1, 1, 500, 6000]


def check(data: bytes) -> None:
    choices = Choices(data)
    now, written = 100.0, b""
    bursts, texts = Bursts(now), []
    for _ in range(MAX_EVENTS):
        if not choices:
            break
        before = bursts.cut_bytes
        match choices.below(4):
            case 0:
                now += choices.pick(WAITS)
                continue
            case 1:
                left = bursts.seconds_left(now)
                assert left is None or 0 <= left <= LONGEST_SECONDS
                found = bursts.due(now)
                assert bool(left == 0) or not found
                if left == 0:
                    assert not bursts.unread
            case _:
                piece = choices.take(choices.below(32)) * choices.pick(FACTORS)
                found = bursts.feed(piece, now)
                is_cut = bursts.cut_bytes > before
                assert bursts.cut_bytes - before == (len(piece) if is_cut else 0)
                written += b"" if is_cut else piece
        texts += found
        assert len(bursts.unread) < MAX_ENTRY_BYTES
    texts += bursts.flush()
    assert not bursts.unread
    for text in texts:
        assert text
        assert len(text) <= MAX_ENTRY_BYTES
        assert all(len(line) <= MAX_LINE for line in text.split("\n"))
    # Lines that were shortened and bytes that are no UTF-8 aside, all of it comes out, in its order.
    if written.isascii() and all(len(line) <= MAX_LINE for line in written.split(b"\n")):
        check_nothing_lost(written.decode(), texts)


def check_nothing_lost(written: str, texts: list[str]) -> None:
    position = 0
    for text in texts:
        begin = written.index(text, position)
        assert not written[position:begin].strip("\n"), "something between two texts is lost"
        position = begin + len(text)
    assert not written[position:].strip("\n"), "something at the end is lost"

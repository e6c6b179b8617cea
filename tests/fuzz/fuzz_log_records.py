"""A worker's log pipe: any bytes in any pieces end in records, or in the end of that log.

Byte 0 says whether the stream is raw or made of records that nearly fit (`typed_values`); then see
`byte_choices.pieces_of`. What comes out goes through the supervisor's lines for people and machines.
"""

import logging
import os
from queue import Empty

import msgspec
from byte_choices import Choices, pieces_of
from typed_values import build

from ipc import logpipe
from ipc.logpipe import MAX_RECORD_BYTES, LogLine, PipeReader
from supervisor.logs import entry_of, json_line, text_line

MAX_PIECES = 40
# The stream stays below the rate at which lines are cut.
MAX_RECORDS = 40

_own_log = logging.getLogger(logpipe.__name__)
_own_log.addHandler(logging.NullHandler())
_own_log.propagate = False


def check(data: bytes) -> None:
    choices = Choices(data)
    is_built = choices.below(2)
    stream, pieces = pieces_of(choices)
    if is_built:
        stream = b"".join(built(Choices(stream)))
        length = max(1, len(pieces[0]) if pieces else 1)
        pieces = [stream[at : at + length] for at in range(0, len(stream), length)]
    # A write of more would block: pipes have 64 KiB.
    stream = stream[:32768]
    # Each piece costs a few system calls.
    last = stream[sum(map(len, pieces[:MAX_PIECES])) :]
    pieces = [*pieces[:MAX_PIECES], *([last] if last else [])]
    whole, cut = reading([stream] if stream else []), reading(pieces)
    assert whole == cut, "the pieces make a difference"
    assert whole == slow_reading(stream)


def built(choices: Choices):
    for _ in range(MAX_RECORDS):
        if not choices:
            return
        body = msgspec.msgpack.encode(build(LogLine, choices))
        length = len(body) + choices.pick([0, 0, 0, 0, 0, 0, 0, 1])
        yield min(length, 65535).to_bytes(2) + body


def reading(pieces: list[bytes]) -> tuple[list[tuple], bool]:
    """(what the records say, whether the log was ended for what it holds)."""
    read_end, write_end = os.pipe()
    reader = PipeReader(read_end, "dns")
    records = []
    try:
        for piece in pieces:
            os.write(write_end, piece)
            try:
                while True:
                    records.append(described(reader.get(0.0)))
            except Empty:
                assert reader.qsize() < MAX_RECORD_BYTES
        os.close(write_end)
        write_end = -1
        try:
            reader.get(0.0)
        except EOFError:
            return records, False
        raise AssertionError("a record out of nothing")
    except EOFError:
        return records, True
    finally:
        if write_end >= 0:
            os.close(write_end)
        reader.close()


def described(record: logging.LogRecord) -> tuple:
    assert 0 <= record.levelno <= 50
    assert record.worker == "dns"
    assert not record.args
    assert record.exc_info is None
    entry = entry_of(record)
    text, line = text_line(entry), json_line(entry)
    assert "\n" not in line
    assert msgspec.json.decode(line)["message"] == entry.message
    assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text)
    # Every line after the first is indented: it cannot be taken for a record.
    assert all(each.startswith("    ") for each in text.split("\n")[1:])
    return record.created, record.levelno, record.name, record.getMessage()


def slow_reading(stream: bytes) -> tuple[list[tuple], bool]:
    records = []
    while len(stream) >= 2:
        length = int.from_bytes(stream[:2])
        if length > MAX_RECORD_BYTES - 2:
            return records, True
        if len(stream) < 2 + length:
            return records, False
        body, stream = stream[2 : 2 + length], stream[2 + length :]
        try:
            line = msgspec.msgpack.decode(body, type=LogLine)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return records, True
        records.append((line.created, line.level, line.logger, line.text))
    return records, False

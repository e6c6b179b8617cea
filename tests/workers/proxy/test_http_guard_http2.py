"""Which requests of HTTP/2 pass. `h2` reads what passed and what is answered."""

import h2.config
import h2.connection
import h2.events
import pytest
from hpack import Encoder
from http2_frames import (
    CONTINUATION,
    DATA,
    GOAWAY,
    HEADERS,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)
from http_guard_bed import NAME, OTHER_NAME, RIGHT_SITE, Clock, bytewise, generous, given, rules

from workers.proxy.http_guard.guard import HEAD_SECONDS, Guard
from workers.proxy.http_guard.http2 import MAX_BLOCK_BYTES, MAX_FRAGMENTS, MAX_TABLE_BYTES, PREFACE

END_STREAM, END_HEADERS, PADDED, PRIORITISED = 1, 4, 8, 32
OPENING = PREFACE + frame(SETTINGS, 0, 0)
BASE = ((":method", "POST"), (":scheme", "http"), (":path", "/pkg.Service/Call"))
RIGHT = (*BASE, (":authority", NAME), ("te", "trailers"))
WRONG = (*BASE, (":authority", "evil.test"))


def block(*fields) -> bytes:
    return Encoder().encode(list(fields))


def headers(*fields, stream=1, flags=END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream, block(*fields))


def methodless(*fields):
    return (*BASE[1:], *fields)


REQUESTS = [
    # Each fields with its status and the reason.
    (RIGHT, 0, "the name"),
    ((*BASE, (":authority", "APP.demo.test.:8080")), 0, "as in HTTP/1"),
    ((*BASE, (":authority", OTHER_NAME)), 0, "http_hosts has it"),
    ((*BASE, ("host", NAME)), 0, "host instead of :authority"),
    ((*BASE, (":authority", NAME), ("host", NAME)), 0, "both, and they agree"),
    ((*BASE, (":authority", NAME), ("host", "evil.test")), 421, "one of them"),
    ((*BASE, (":authority", "evil.test"), ("host", NAME)), 421, "one of them"),
    ((*BASE, (":authority", NAME), ("host", OTHER_NAME)), 400, "both right, not the same"),
    ((*BASE, (":authority", NAME), ("host", NAME), ("host", NAME)), 400, "host twice"),
    ((*BASE, (":authority", NAME), (":authority", NAME)), 400, "twice"),
    (BASE, 421, "neither"),
    ((*BASE, (":authority", "")), 421, "empty"),
    (WRONG, 421, "another name"),
    ((*BASE, (":authority", "u@" + NAME)), 421, "user information"),
    ((*BASE, (":authority", "100.64.0.5")), 421, "an address"),
    ((*RIGHT, ("origin", "http://evil.test")), 403, "another site"),
    ((*RIGHT, ("origin", f"http://{NAME}")), 0, "its own page"),
    ((*RIGHT, ("origin", RIGHT_SITE)), 0, "http_origins has it"),
    ((*RIGHT, ("sec-fetch-site", "cross-site")), 403, "another site"),
    (((":method", "GET"), *methodless((":authority", NAME), ("x", "y"))), 0, "GET"),
    (((":method", "G T"), *methodless((":authority", NAME))), 400, "no token"),
    (methodless((":authority", NAME)), 400, "no method"),
    (((":method", "GET"), (":scheme", "http"), (":authority", NAME)), 400, "no path"),
    (((":method", "GET"), (":path", "x"), (":authority", NAME)), 400, "no path"),
    (((":method", "GET"), (":path", "http://evil.test/"), (":authority", NAME)), 400, "no path"),
    (((":method", "OPTIONS"), (":path", "*"), (":authority", NAME)), 0, "asterisk-form"),
    (((":method", "CONNECT"), (":authority", NAME)), 0, "to itself"),
    (((":method", "CONNECT"), (":authority", "evil.test:1")), 421, "to another"),
    (((":method", "CONNECT"), (":protocol", "websocket"), *methodless((":authority", NAME))), 0, "WebSocket (RFC 8441)"),
    (((":method", "CONNECT"), (":protocol", "websocket"), (":authority", NAME)), 400, "no path"),
    ((*RIGHT, (":path", "/x")), 400, "a pseudo-header field behind others"),
    (((":method", "GET"), ("te", "trailers"), (":path", "/"), (":authority", NAME)), 400, "likewise"),
    ((*RIGHT, ("Host", NAME)), 400, "capitals"),
    ((*RIGHT, ("x:", "y")), 400, "no token"),
    ((*RIGHT, (":status", "200")), 400, "of answers"),
    ((*RIGHT, ("", "y")), 400, "no name"),
    ((*RIGHT, ("x", "y\r\nhost: evil.test")), 400, "a line end, for what turns it into HTTP/1"),
    ((*RIGHT, ("x", "y\0")), 400, "NUL"),
    (((":method", "GET"), (":path", "/ HTTP/1.1\r\nHost: evil.test"), (":authority", NAME)), 400, "a line end"),
    ((*RIGHT, ("transfer-encoding", "chunked")), 400, "of HTTP/1"),
    ((*RIGHT, ("connection", "upgrade")), 400, "of HTTP/1"),
    ((*RIGHT, ("x", "y" * MAX_BLOCK_BYTES)), 431, "too large"),
    ((*RIGHT, *[("x", "")] * 2000), 431, "too many: each counts 32 bytes more (RFC 9113 section 6.5.2)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "status", "why"), REQUESTS, ids=[str(row[0])[:90] for row in REQUESTS]
)
def test_request(fields, status, why):
    sent = headers(*fields)
    outcome = given(OPENING + sent, chosen=generous())
    assert outcome.status == status, why
    assert outcome.passed == (OPENING if status else OPENING + sent)
    if len(sent) < 1000:
        again = given(*bytewise(OPENING + sent), chosen=generous())
        assert (again.status, again.passed) == (outcome.status, outcome.passed)


FRAMES = [
    # (what follows SETTINGS, is right, why)
    (headers(*RIGHT), True, "a request"),
    (frame(SETTINGS, 0, 0, bytes(5)), False, "no settings of six bytes"),
    (frame(SETTINGS, 0, 0, bytes(6)), True, "later settings"),
    (frame(SETTINGS, 1, 0), True, "settings seen"),
    (frame(SETTINGS, 1, 0, bytes(6)), False, "seen, with content"),
    (frame(SETTINGS, 0, 1), False, "settings of a stream"),
    (frame(PING, 0, 0, bytes(8)), True, "a ping"),
    (frame(PING, 0, 0, bytes(7)), False, "of another size"),
    (frame(PING, 0, 1, bytes(8)), False, "of a stream"),
    (frame(WINDOW_UPDATE, 0, 0, bytes(4)), True, "of the connection"),
    (frame(WINDOW_UPDATE, 0, 9, bytes(4)), True, "of a stream"),
    (frame(WINDOW_UPDATE, 0, 0, bytes(3)), False, "of another size"),
    (frame(RST_STREAM, 0, 1, bytes(4)), True, "a stream ends"),
    (frame(RST_STREAM, 0, 0, bytes(4)), False, "which?"),
    (frame(RST_STREAM, 0, 1, bytes(5)), False, "of another size"),
    (frame(PRIORITY, 0, 3, bytes(5)), True, "of a stream to come"),
    (frame(PRIORITY, 0, 3, bytes(4)), False, "of another size"),
    (frame(GOAWAY, 0, 0, bytes(8)), True, "the client ends"),
    (frame(GOAWAY, 0, 0, bytes(7)), False, "too short"),
    (frame(GOAWAY, 0, 1, bytes(8)), False, "of a stream"),
    (frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), False, "a client makes no promises"),
    (frame(DATA, 0, 0, b"x"), False, "content of no stream"),
    (frame(DATA, 0, 1, b""), True, "empty content"),
    (frame(DATA, PADDED, 1, b""), False, "padding without a length"),
    (frame(0x10, 0, 0, b"\0\0\0\1u=1"), True, "PRIORITY_UPDATE, which browsers send"),
    (frame(0xFA, 0xFF, 2**31 + 7, b"xyz"), True, "unknown: an extension"),
    (frame(0xFA, 0, 1, headers(*WRONG)), True, "whatever is in it"),
    (frame(CONTINUATION, END_HEADERS, 1, block(*RIGHT)), False, "it continues nothing"),
    (headers(*RIGHT, stream=0), False, "no stream"),
    (headers(*RIGHT, stream=2), False, "a stream of the server"),
    (headers(*RIGHT, stream=2**31 + 1), True, "the first bit means nothing"),
    (headers(*RIGHT, flags=0) + frame(DATA, 0, 1, b"x"), False, "broken off"),
    (headers(*RIGHT, flags=0) + frame(0xFA, 0, 1, b"x"), False, "broken off, by an extension too"),
    (headers(*RIGHT, flags=0) + headers(*RIGHT, stream=3), False, "broken off"),
    (headers(*RIGHT, flags=0) + frame(CONTINUATION, END_HEADERS, 3, b""), False, "another stream"),
    (headers(*RIGHT, flags=0) + frame(CONTINUATION, END_HEADERS, 1, b""), True, "continued"),
    (headers(*RIGHT, flags=0) + frame(CONTINUATION, 4, 2**31 + 1, b""), True, "the same stream"),
    (frame(HEADERS, END_HEADERS | PADDED, 1, b""), False, "padding without a length"),
    (frame(HEADERS, END_HEADERS | PADDED, 1, b"\3" + block(*RIGHT) + bytes(3)), True, "padded"),
    (frame(HEADERS, END_HEADERS | PADDED, 1, b"\5abcd"), False, "more padding than fits"),
    (frame(HEADERS, END_HEADERS | PRIORITISED, 1, bytes(5) + block(*RIGHT)), True, "priority"),
    (frame(HEADERS, END_HEADERS | PRIORITISED, 1, bytes(4)), False, "half a priority"),
    (frame(HEADERS, 44, 1, b"\2" + bytes(5) + block(*RIGHT) + bytes(2)), True, "both"),
    (frame(HEADERS, 44, 1, b"\2" + bytes(5) + b"\0"), False, "both, and too short"),
    (frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"), False, "no HPACK"),
    (frame(HEADERS, END_HEADERS, 1, b"\xbe"), False, "an index that is empty"),
    (frame(HEADERS, END_HEADERS, 1, b"\x40\x0axx"), False, "cut off"),
    (frame(HEADERS, END_HEADERS, 1, b""), False, "empty"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sent", "is_right", "why"), FRAMES, ids=[row[2] + repr(row[0])[:40] for row in FRAMES]
)
def test_frame(sent, is_right, why):
    for pieces in ([OPENING + sent], bytewise(OPENING + sent)):
        outcome = given(*pieces)
        assert bool(outcome.refusal) != is_right, why
        assert outcome.passed == (OPENING + sent if is_right else OPENING)


@pytest.mark.parametrize(
    "first",
    [headers(*RIGHT), frame(PING, 0, 0, bytes(8)), frame(SETTINGS, 1, 0), frame(0xFA), b"GET / HT"],
)
def test_the_first_frame_is_settings(first):
    outcome = given(PREFACE + first + frame(SETTINGS, 0, 0))
    assert (outcome.status, outcome.passed) == (400, PREFACE)


def test_every_request_of_a_connection_is_checked():
    encoder = Encoder()
    right = b"".join(
        frame(HEADERS, END_HEADERS, stream, encoder.encode(list(RIGHT))) + frame(DATA, 0, stream, b"x" * 99)
        for stream in (1, 3, 5, 101)
    )  # fmt: skip
    wrong = frame(HEADERS, END_HEADERS, 103, encoder.encode(list(WRONG)))
    for pieces in ([OPENING + right + wrong + right], bytewise(OPENING + right + wrong)):
        outcome = given(*pieces)
        assert (outcome.passed, outcome.status) == (OPENING + right, 421)
        assert outcome.refusal.host == "evil.test"
        assert outcome.refusal.response == b""


def test_a_name_from_the_table_is_seen():
    encoder = Encoder()
    encoder.encode(list(RIGHT))
    first = headers(*RIGHT, ("x-name", "evil.test"))
    # :authority (1) with the value written out, entered; then by its index alone.
    entered = b"\x41\x09evil.test"
    again = frame(HEADERS, END_HEADERS, 3, block(*BASE) + b"\xbe")
    outcome = given(OPENING + frame(HEADERS, END_HEADERS, 1, block(*BASE) + entered), first)
    assert outcome.status == 421
    chosen = rules(hosts={NAME: ["evil.test"]})
    opened = OPENING + frame(HEADERS, END_HEADERS, 1, b"\x83\x86\x84" + entered)
    repeated = frame(HEADERS, END_HEADERS, 3, b"\x83\x86\x84\xbe")
    assert given(opened, repeated, chosen=chosen).passed == opened + repeated
    assert given(opened, again, chosen=rules()).status == 421


def test_trailers():
    opened = OPENING + headers(*RIGHT)
    right = headers(("grpc-status", "0"), flags=5)
    assert given(opened + right).passed == opened + right
    for fields in (
        RIGHT,
        WRONG,
        [("host", "evil.test")],
        [("origin", "x")],
        [("X", "y")],
        [("x", "\n")],
    ):
        outcome = given(opened + headers(*fields, flags=5))
        assert (outcome.status, outcome.passed) == (400, opened)
    # On a stream below the highest nothing can begin.
    assert given(OPENING + headers(*RIGHT, stream=5) + headers(*RIGHT, stream=3)).status == 400


def test_size_of_the_table():
    """The client says in its blocks what it uses; the app's leave is not seen here."""
    for size, is_right in (
        (0, True),
        (4096, True),
        (MAX_TABLE_BYTES, True),
        (MAX_TABLE_BYTES + 1, False),
    ):
        encoder = Encoder()
        encoder.header_table_size = 1
        encoder.header_table_size = size
        fields = [*RIGHT, *[(f"x-{n}", "y" * 1000) for n in range(20)]]
        sent = b"".join(
            frame(HEADERS, END_HEADERS, stream, encoder.encode(fields)) for stream in (1, 3, 5)
        )
        assert bool(given(OPENING + sent).refusal) != is_right


def test_continuation_flood():
    first = headers(*RIGHT, flags=0)
    empty = frame(CONTINUATION, 0, 1, b"")
    guard = Guard(rules(), Clock())
    assert not given(OPENING, first, *[empty] * (MAX_FRAGMENTS - 1), guard=guard).refusal
    assert guard.from_program(empty).refusal.status == 431


def test_large_blocks_are_refused_by_their_size_alone():
    for length in (MAX_BLOCK_BYTES + 1, 2**24 - 1):
        head = length.to_bytes(3) + bytes([HEADERS, 0]) + (1).to_bytes(4)
        assert given(OPENING + head).status == 431
    half = frame(HEADERS, 0, 1, bytes(40_000))
    head = (40_000).to_bytes(3) + bytes([CONTINUATION, 0]) + (1).to_bytes(4)
    assert given(OPENING + half + head).status == 431


def test_what_is_held_is_bounded():
    guard = Guard(rules(), Clock())
    given(OPENING, guard=guard)
    sent = frame(HEADERS, 0, 1, bytes(60_000)) + frame(CONTINUATION, 0, 1, bytes(5_000))
    for position in range(0, len(sent), 999):
        assert not guard.from_program(sent[position : position + 999]).refusal
        assert len(guard._held) <= MAX_BLOCK_BYTES + 9 * MAX_FRAGMENTS


def test_content_passes_without_a_copy():
    guard = Guard(rules(), Clock())
    given(OPENING + headers(*RIGHT), guard=guard)
    data = memoryview(frame(DATA, 0, 1, bytes(16_384)) * 4)
    assert guard.from_program(data).send is data
    guard.from_program((2**24 - 1).to_bytes(3) + bytes([DATA, 0]) + (1).to_bytes(4))
    for _ in range(100):
        assert guard.from_program(data).send is data


def test_preface_in_pieces():
    for split in range(1, len(OPENING)):
        outcome = given(OPENING[:split], OPENING[split:])
        assert (outcome.passed, outcome.refusal) == (OPENING, None)


def test_half_a_block_has_a_deadline():
    clock = Clock()
    guard = Guard(rules(), clock)
    outcome = given(OPENING + headers(*RIGHT, flags=0), guard=guard)
    assert outcome.deadline_seconds == HEAD_SECONDS
    clock.now += 9
    assert guard.from_program(frame(CONTINUATION, 0, 1, b"")).deadline_seconds == 1
    step = guard.timed_out()
    assert (step.refusal.status, step.send) == (408, b"")


def test_connections_with_nothing_half_done_have_no_deadline():
    assert given(OPENING + headers(*RIGHT) + frame(DATA, 0, 1, b"x")[:-1]).deadline_seconds is None


def read_answer(response: bytes):
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    client.initiate_connection()
    client.send_headers(1, list(RIGHT))
    return client.receive_data(response)


def test_response_to_a_first_request():
    for pieces in ([OPENING + headers(*WRONG)], [OPENING, headers(*WRONG)]):
        events = read_answer(given(*pieces).refusal.response)
        (answer,) = [e for e in events if isinstance(e, h2.events.ResponseReceived)]
        assert (":status", "421") in answer.headers
        (content,) = [e for e in events if isinstance(e, h2.events.DataReceived)]
        assert b"security.http_hosts" in content.data
        (end,) = [e for e in events if isinstance(e, h2.events.ConnectionTerminated)]
        assert (end.error_code, end.last_stream_id) == (0, 1)


def test_response_to_no_http2():
    events = read_answer(given(OPENING + frame(PUSH_PROMISE, 4, 1, bytes(4))).refusal.response)
    (end,) = [e for e in events if isinstance(e, h2.events.ConnectionTerminated)]
    assert (end.error_code, end.last_stream_id) == (1, 0)


def test_upgrade_from_http1():
    asked = f"GET / HTTP/1.1\r\nHost: {NAME}\r\nUpgrade: h2c\r\n\r\n".encode()
    switching = b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + frame(SETTINGS, 0, 0)
    right = OPENING + headers(*RIGHT, stream=3)
    for pieces in ([right], bytewise(right)):
        outcome = given(asked, *pieces, headers(*WRONG, stream=5), answers=[switching])
        assert (outcome.passed, outcome.status) == (asked + right, 421)
        assert outcome.refusal.response == b""
    assert given(asked, right, answers=[b"HTTP/1.1 200 OK\r\n"]).status == 400
    assert given(asked.replace(b"Upgrade", b"Up"), right).status == 400

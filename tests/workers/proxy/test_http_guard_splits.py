"""Whatever is sent, and however it is cut: the same decision, and no foreign request at the app."""

import itertools

from hpack import Encoder
from http2_frames import CONTINUATION, DATA, HEADERS, PING, SETTINGS, frame
from http_guard_bed import NAME, Clock, bytewise, generous, given, request
from http_oracles import hosts_in_http1, hosts_in_http2
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from workers.proxy.http_guard.guard import Guard
from workers.proxy.http_guard.http2 import PREFACE

POST = "POST / HTTP/1.1"
CHUNKED = "Transfer-Encoding: chunked"
SWITCHING = b"HTTP/1.1 101 x\r\n\r\n"
RIGHT_NAMES = {NAME, "alias.corp.test"}

PARTS = [
    request(),
    request(host=f"{NAME.upper()}.:80"),
    request("Content-Length: 5", line=POST, body=b"hello"),
    request("Content-Length: 50", line=POST),
    request(CHUNKED, line=POST, body=b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n"),
    request(CHUNKED, line=POST),
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"0\r\nX: y\r\n\r\n",
    request("Upgrade: websocket"),
    request(line=f"CONNECT {NAME}:80 HTTP/1.1"),
    request(line="OPTIONS * HTTP/1.1"),
    request(host="evil.test"),
    request("Host: evil.test"),
    request(CHUNKED, "Content-Length: 60", line=POST),
    request(" folded", "X : y"),
    b"GET / HTTP/1.1\r\nHost: app.demo.test\nHost: evil.test\r\n\r\n",
    b"GET / HTTP/1.1\nHost: evil.test\n\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET /\r\n",
    b"PING\r\n",
    b"\r\n",
    b"\n",
    b"\r",
    b"GET ",
    b"/ HTTP/1.1\r\n",
    b"Host: app.demo.test\r\n",
    b"Host: evil.test\r\n",
    b"\x81\x80abcd",
    b"\0",
    PREFACE,
    frame(SETTINGS, 0, 0),
]


@st.composite
def altered(draw, parts):
    """Some of the parts, with some bytes changed, cut out or put in."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(parts), min_size=1, max_size=5))))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(data)))
        removed = draw(st.sampled_from([0, 1, 1, 2, 20]))
        added = draw(
            st.sampled_from([b"", b" ", b"\r", b"\n", b"\r\n", b"\t", b"\0", b":", b"0", b"5"])
        )
        data[place : place + removed] = added
    return bytes(data)


def cut(sent: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(sent) + 1) for place in places}), len(sent)]
    return [sent[begin:end] for begin, end in itertools.pairwise(edges)]


PLACES = st.lists(st.integers(0, 10_000), max_size=8)


def outcomes_of(sent: bytes, places: list[int], answers: list[bytes]):
    ways = ([sent], cut(sent, places), bytewise(sent))
    return [given(*pieces, chosen=generous(), answers=answers) for pieces in ways]


def check_alike(sent: bytes, outcomes) -> None:
    whole = outcomes[0]
    for outcome in outcomes:
        assert sent.startswith(outcome.passed)
        assert (outcome.passed, outcome.status, outcome.is_done) == (
            whole.passed,
            whole.status,
            whole.is_done,
        )
    if whole.refusal:
        # What passed was right by itself.
        assert not given(whole.passed, chosen=generous()).refusal


@settings(max_examples=300)
@examples(altered(PARTS), PLACES)
def test_http1(sent, places):
    outcomes = outcomes_of(sent, places, [])
    check_alike(sent, outcomes)
    if not outcomes[0].is_done:
        for host in hosts_in_http1(outcomes[0].passed):
            assert host is not None
            assert host.split(":")[0].rstrip(".").lower() in RIGHT_NAMES


@settings(max_examples=150)
@examples(altered(PARTS), PLACES, st.sampled_from([[SWITCHING], [b"HTTP/1.1 200 OK\r\n"]]))
def test_behind_upgrade(sent, places, answers):
    sent = request("Upgrade: x") + sent
    outcomes = outcomes_of(sent, places, answers)
    whole = outcomes[0]
    for outcome in outcomes:
        assert (outcome.passed, outcome.status, outcome.is_done) == (
            whole.passed,
            whole.status,
            whole.is_done,
        )


def fields(*more, authority=NAME):
    base = [(":method", "POST"), (":scheme", "http"), (":path", "/a")]
    return Encoder().encode([*base, *([(":authority", authority)] if authority else []), *more])


FRAMES = [
    frame(HEADERS, 4, 1, fields()),
    frame(HEADERS, 5, 3, fields(("origin", f"http://{NAME}"))),
    frame(HEADERS, 0, 5, fields()[:10]) + frame(CONTINUATION, 4, 5, fields()[10:]),
    frame(HEADERS, 44, 7, b"\2" + bytes(5) + fields() + bytes(2)),
    frame(HEADERS, 4, 9, b"\x83\x86\x84\xbe"),
    frame(HEADERS, 4, 11, b"\x20" + fields()),
    frame(HEADERS, 5, 1, Encoder().encode([("x", "y")])),
    frame(HEADERS, 4, 13, fields(authority="evil.test")),
    frame(HEADERS, 4, 15, fields(("host", "evil.test"))),
    frame(HEADERS, 4, 17, fields(authority="")),
    frame(HEADERS, 4, 19, fields(("host", NAME), authority="")),
    frame(HEADERS, 0, 21, fields()),
    frame(CONTINUATION, 4, 21, b""),
    frame(CONTINUATION, 4, 21, b"\x0f\x17\x09evil.test"),
    frame(DATA, 0, 1, frame(HEADERS, 4, 23, fields(authority="evil.test"))),
    frame(DATA, 9, 1, b"\3abc" + bytes(3)),
    frame(PING, 0, 0, bytes(8)),
    frame(SETTINGS, 1, 0),
    frame(0x10, 0, 0, b"xyz"),
]


@settings(max_examples=300)
@examples(altered(FRAMES), PLACES)
def test_http2(sent, places):
    sent = PREFACE + frame(SETTINGS, 0, 0) + sent
    outcomes = outcomes_of(sent, places, [])
    check_alike(sent, outcomes)
    for host in hosts_in_http2(outcomes[0].passed):
        assert host.split(":")[0].rstrip(".").lower() in RIGHT_NAMES


TCHARS = "!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
URL_CHARS = "".join(chr(c) for c in range(0x21, 0x7F))
VALUES = st.text("".join(chr(c) for c in range(0x20, 0x100) if c != 0x7F), max_size=20)


@examples(
    st.text(TCHARS, min_size=1, max_size=20),
    st.text(URL_CHARS, max_size=30),
    st.lists(st.tuples(st.text(TCHARS, min_size=1, max_size=10), VALUES), max_size=4),
    st.binary(max_size=100) | st.sampled_from([request(), PREFACE, SWITCHING]),
    PLACES,
)
def test_no_byte_of_what_a_rebinding_page_can_send_passes(method, path, more, body, places):
    """It chooses the method, the path, fields and the body, and nothing about Host."""
    lines = [f"{name}: {value}" for name, value in more]
    line = f"{method} /{path} HTTP/1.1"
    sent = request(
        f"Content-Length: {len(body)}", *lines, line=line, host="evil.test:8080", body=body
    )
    for pieces in ([sent], cut(sent, places), bytewise(sent)):
        outcome = given(*pieces, chosen=generous())
        assert outcome.refusal
        assert outcome.passed == b""


@examples(altered(PARTS), PLACES)
def test_time_lets_only_beginnings_pass(sent, places):
    """With a deadline that passes behind every piece nothing that a server would serve gets by."""
    guard = Guard(generous(), Clock())
    passed = b""
    for piece in cut(sent, places):
        step = guard.from_program(piece)
        passed += bytes(step.send)
        if step.deadline_seconds is not None:
            step = guard.timed_out()
            passed += bytes(step.send)
        assert sent.startswith(passed)
        if step.refusal:
            break
        if step.is_done:
            return
    for host in hosts_in_http1(passed):
        assert host is not None
        assert host.split(":")[0].rstrip(".").lower() in RIGHT_NAMES

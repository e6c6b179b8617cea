"""Bodies, pipelines, and requests to change the protocol."""

import pytest
from http_guard_bed import NAME, Clock, bytewise, given, request, rules

from workers.proxy.http_guard.body import MAX_CHUNK_LINE_BYTES, MAX_TRAILER_BYTES
from workers.proxy.http_guard.guard import MAX_WAITING_BYTES, Guard
from workers.proxy.http_guard.http2 import PREFACE

WRONG = request(host="evil.test")
CHUNKED = request("Transfer-Encoding: chunked", line="POST / HTTP/1.1")


def test_pipelined_requests_are_each_checked():
    right = request(), request("Content-Length: 5", body=b"hello"), CHUNKED + b"0\r\n\r\n"
    whole = b"".join(right)
    for pieces in (right, [whole], bytewise(whole)):
        assert given(*pieces).passed == whole
        outcome = given(*pieces, WRONG, whole)
        assert (outcome.passed, outcome.status) == (whole, 421)
    outcome = given(whole + WRONG + whole)
    assert (outcome.passed, outcome.status) == (whole, 421)


def test_a_body_is_not_looked_at():
    sent = request(f"Content-Length: {len(WRONG)}", body=WRONG)
    for pieces in ([sent], bytewise(sent)):
        assert given(*pieces).passed == sent
        outcome = given(*pieces, WRONG)
        assert (outcome.passed, outcome.status) == (sent, 421)


def test_a_body_passes_without_a_copy():
    guard = Guard(rules())
    data = memoryview(request(f"Content-Length: {3 << 40}") + b"x" * 1000)
    assert guard.from_program(data).send is data
    for _ in range(3):
        assert guard.from_program(data).send is data
    data = memoryview(request() + request(host="evil.test"))
    step = Guard(rules()).from_program(data)
    assert step.send.obj is data.obj


def test_the_end_of_a_body_is_found_in_the_middle_of_a_read():
    guard = Guard(rules())
    guard.from_program(request("Content-Length: 5"))
    step = guard.from_program(b"hello" + WRONG)
    assert step.send == b"hello"
    assert step.refusal.status == 421


CHUNKS = [
    (b"5\r\nhello\r\n0\r\n\r\n", True, "one chunk"),
    (b"0\r\n\r\n", True, "none"),
    (b"000\r\n\r\n", True, "any number of zeros (RFC 9112 section 7.1)"),
    (b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", True, "hexadecimal, no case"),
    (b"05;x=y\r\nhello\r\n0;z\r\n\r\n", True, "extensions"),
    (b'5;x="a;b"\r\nhello\r\n0\r\n\r\n', True, "a quoted extension"),
    (b"5;" + b"x" * (MAX_CHUNK_LINE_BYTES - 4) + b"\r\nhello\r\n0\r\n\r\n", True, "a long one"),
    (b"0\r\nX-Sum: 5\r\nY: z\r\n\r\n", True, "trailers"),
    (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", True, "line ends as content"),
    (b"5;" + b"x" * (MAX_CHUNK_LINE_BYTES - 3) + b"\r\nhello\r\n0\r\n\r\n", False, "too long"),
    (b"\r\n", False, "no size"),
    (b"5\nhello\r\n0\r\n\r\n", False, "bare LF"),
    (b"5\rhello\r\n0\r\n\r\n", False, "bare CR"),
    (b"5 \r\nhello\r\n0\r\n\r\n", False, "space behind the size"),
    (b" 5\r\nhello\r\n0\r\n\r\n", False, "space before the size"),
    (b"0x5\r\nhello\r\n0\r\n\r\n", False, "a prefix"),
    (b"+5\r\nhello\r\n0\r\n\r\n", False, "a sign"),
    (b"-1\r\nhello\r\n0\r\n\r\n", False, "a sign"),
    (b"5_0\r\nhello\r\n0\r\n\r\n", False, "a number for Python only"),
    (b"g\r\n", False, "no digit"),
    (b"5,5\r\nhello\r\n0\r\n\r\n", False, "a list"),
    (b"10000000000000005\r\nhello\r\n0\r\n\r\n", False, "overflows to five"),
    (b"5;x\ny\r\nhello\r\n0\r\n\r\n", False, "bare LF in an extension"),
    (b"5;x\ry\r\nhello\r\n0\r\n\r\n", False, "bare CR in an extension"),
    (b"5;\0\r\nhello\r\n0\r\n\r\n", False, "NUL in an extension"),
    (b"5\r\nhello0\r\n\r\n", False, "no line end behind the content"),
    (b"5\r\nhelloxx0\r\n\r\n", False, "no line end behind the content"),
    (b"5\r\nhello\n0\r\n\r\n", False, "half a line end behind the content"),
    (b"4\r\nhello\r\n0\r\n\r\n", False, "a longer chunk than it says"),
    (b"0\r\nX\r\n\r\n", False, "a trailer without a colon"),
    (b"0\r\nX : y\r\n\r\n", False, "space before a colon"),
    (b"0\r\nX: y\r\n z\r\n\r\n", False, "a folded trailer"),
    (b"0\r\nX: y\nZ: x\r\n\r\n", False, "bare LF in trailers"),
    (b"0\r\nX: y\rZ: x\r\n\r\n", False, "bare CR in trailers"),
    (b"0\r\nHost: evil.test\r\n\r\n", False, "a trailer that some join to the head"),
    (b"0\r\ncontent-length: 5\r\n\r\n", False, "likewise"),
    (b"0\r\nTransfer-Encoding: chunked\r\n\r\n", False, "likewise"),
    (b"0\r\nX: " + b"y" * MAX_TRAILER_BYTES + b"\r\n\r\n", False, "too large"),
]


@pytest.mark.parametrize(
    ("body", "is_right", "why"), CHUNKS, ids=[repr(row[0])[:60] for row in CHUNKS]
)
def test_chunks(body, is_right, why):
    sent = CHUNKED + body
    outcomes = [
        given(*pieces, request(), WRONG) for pieces in ([sent], [CHUNKED, body], bytewise(sent))
    ]
    for outcome in outcomes:
        if is_right:
            assert (outcome.passed, outcome.status) == (sent + request(), 421), why
        else:
            assert outcome.status in (400, 431), why
            assert sent.startswith(outcome.passed)
            assert len(outcome.passed) < len(sent)
            assert outcome.passed == outcomes[0].passed


def test_what_is_held_of_chunks_is_bounded():
    for begun in (b"5;", b"0\r\nX: "):
        guard = Guard(rules())
        guard.from_program(CHUNKED + begun)
        while not guard.from_program(b"x" * 100).refusal:
            assert len(guard._held) <= max(MAX_CHUNK_LINE_BYTES, MAX_TRAILER_BYTES)


# Upgrade and CONNECT.

UPGRADE = request("Connection: Upgrade", "Upgrade: websocket", f"Origin: http://{NAME}")
H2C = request("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
CONNECT = request(line=f"CONNECT {NAME}:80 HTTP/1.1")
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
MASKED_TEXT = b"\x81\x85\x01\x02\x03\x04" + b"igomn"


@pytest.mark.parametrize("asked", [UPGRADE, H2C, CONNECT])
def test_what_follows_is_held_until_the_answer(asked):
    guard = Guard(rules(), Clock())
    assert not guard.wants_answers
    step = guard.from_program(asked)
    assert (step.send, guard.wants_answers) == (asked, True)
    step = guard.from_program(MASKED_TEXT)
    assert (step.send, step.deadline_seconds) == (b"", None)  # an answer may take its time
    agreed = ESTABLISHED if asked is CONNECT else SWITCHING
    step = guard.from_app(agreed + b"more")
    assert (step.send, step.is_done, step.refusal) == (MASKED_TEXT, True, None)
    assert not guard.wants_answers


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        (UPGRADE, [b"HTTP/1.1 200 OK\r\n\r\n"]),
        (UPGRADE, [b"HTTP/1.1 426 Upgrade Required\r\n\r\n"]),
        (UPGRADE, [b"HTTP/2 101\r\n\r\n"]),
        (UPGRADE, [b"101 "]),
        (UPGRADE, [b"HTTP/1.1 1010 x\r\n\r\n" + SWITCHING]),
        (UPGRADE, [b"x" + SWITCHING]),
        (CONNECT, [b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"]),
        (CONNECT, [SWITCHING, b"HTTP/1.1 404 x\r\n"]),
    ],
)
def test_without_agreement_http_goes_on(asked, answers):
    for behind, status in ((request(), 0), (WRONG, 421), (MASKED_TEXT, 400)):
        outcome = given(asked, behind, answers=answers)
        assert outcome.status == status
        assert outcome.passed == (asked if status else asked + behind)


def test_answers_in_pieces_and_behind_interim_ones():
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    for answers in ([interim + SWITCHING], bytewise(interim + SWITCHING)):
        assert given(UPGRADE, answers=answers).steps[-1].refusal is None
        guard = Guard(rules(), Clock())
        guard.from_program(UPGRADE)
        guard.from_program(b"\x81\x80")
        sent = [bytes(guard.from_app(piece).send) for piece in answers if guard.wants_answers]
        assert b"".join(sent) == b"\x81\x80"
        assert not guard.wants_answers


def test_endless_interim_answers_are_no_agreement():
    guard = Guard(rules(), Clock())
    guard.from_program(UPGRADE)
    for _ in range(100):
        if guard.wants_answers:
            guard.from_app(b"HTTP/1.1 102 Processing\r\nX: " + b"x" * 1000)
    assert not guard.wants_answers
    assert guard.from_program(b"\x81\x80").refusal


def test_what_waits_for_an_answer_is_bounded():
    guard = Guard(rules(), Clock())
    guard.from_program(UPGRADE)
    assert not guard.from_program(bytes(MAX_WAITING_BYTES)).refusal
    step = guard.from_program(b"\0")
    assert (step.refusal.status, step.refusal.response, step.send) == (400, b"", b"")


def test_after_an_agreement_the_connection_is_looked_at_anew():
    """A server that agrees to anything gains nothing for a page."""
    for wrong in (WRONG, PREFACE + b"\0\0\0\1\4\0\0\0\1"):
        outcome = given(UPGRADE, wrong, answers=[SWITCHING])
        assert outcome.status in (400, 421)
        assert WRONG not in outcome.passed
    assert given(UPGRADE, MASKED_TEXT, WRONG, answers=[SWITCHING]).passed.endswith(WRONG)


def test_upgrade_with_a_body():
    posted = request("Upgrade: h2c", "Content-Length: 5", line="POST / HTTP/1.1")
    chunked = CHUNKED[:-2] + b"Upgrade: h2c\r\n\r\n"
    for head, body in ((posted, b"hello"), (chunked, b"5\r\nhello\r\n0\r\n\r\n")):
        early = given(head, body, MASKED_TEXT, answers=[SWITCHING])
        assert early.passed == head + body + MASKED_TEXT
        guard = Guard(rules(), Clock())
        assert given(head, body, MASKED_TEXT, guard=guard).passed == head + body
        assert guard.from_app(SWITCHING).send == MASKED_TEXT
        refused = given(head, body, WRONG, answers=[b"HTTP/1.1 413 x\r\n\r\n"])
        assert (refused.passed, refused.status) == (head + body, 421)


def test_upgrade_without_the_connection_field_is_waited_for_too():
    assert given(request("Upgrade: websocket"), WRONG).status == 0


@pytest.mark.parametrize("origin", ["http://evil.test", "null"])
def test_websocket_of_another_site(origin):
    asked = request("Connection: Upgrade", "Upgrade: websocket", f"Origin: {origin}")
    outcome = given(asked)
    assert (outcome.status, outcome.passed) == (403, b"")

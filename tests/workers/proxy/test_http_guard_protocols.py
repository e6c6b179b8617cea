"""What is no HTTP: it passes at once, and the guard is done with it."""

import pytest
from http_guard_bed import NAME, Clock, bytewise, given, request, rules

from workers.proxy.http_guard.guard import HEAD_SECONDS, UNDECIDED_SECONDS, Guard
from workers.proxy.http_guard.head import MAX_HEAD_BYTES

AT_ONCE = [
    # (what a program sends first, why it is no request)
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS: no token"),
    (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", "PostgreSQL asks for TLS"),
    (b"\x00\x00\x00\x29\x00\x03\x00\x00user\0demo\0", "PostgreSQL"),
    (b"\x10\x2f\x00\x04MQTT\x04\x02", "MQTT"),
    (b"0\x0c\x02\x01\x01`\x07\x02\x01\x03\x04\x00\x80\x00", "LDAP: 0x30 is a digit"),
    (b"AMQP\x00\x00\x09\x01", "AMQP: NUL behind the token"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH: CR behind the token"),
    (b"SSH-2.0-OpenSSH_9.6 Debian-3\r\n", "SSH with a comment: CR in the target"),
    (b"EHLO client.example.test\r\n", "SMTP"),
    (b"HELO x\r\n", "SMTP"),
    (b"MAIL FROM:<a@b.test> SIZE=10\r\n", "SMTP"),
    (b"a001 CAPABILITY\r\n", "IMAP"),
    (b"a001 LOGIN user secret\r\n", "IMAP: the third word is no version"),
    (b"USER demo\r\n", "FTP, POP3"),
    (b"NICK demo\r\nUSER demo 0 * :Demo\r\n", "IRC"),
    (b"CAP LS 302\r\n", "IRC: 3 begins no version"),
    (b"CONNECT {}\r\nPING\r\n", "NATS: { is no version and CR ends the line"),
    (b'CONNECT {"verbose":false,"name":"HTTP/1.1"}\r\n', "NATS: no space before it"),
    (b"PUB a.b 5\r\nhello\r\n", "NATS"),
    (b"get key\r\n", "memcached: HTTP/0.9 looks alike, and no browser sends it"),
    (b"GET /\r\n", "HTTP/0.9 itself"),
    (b"GET key\r\n", "Redis, in one line"),
    (b"set key 0 60 5\r\nhello\r\n", "memcached"),
    (b"*1\r\n$4\r\nPING\r\n", "Redis: * is a token, CR behind it"),
    (b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n", "Redis"),
    (b"PING\r\n", "Redis, in one line"),
    (b"SET key value\r\n", "Redis, in one line"),
    (b"SET key HTTP\r\n", "a value that begins like a version"),
    (b"SET key HTTP:/1.1\r\n", "a value that begins like a version"),
    (b"OPTIONS sip:demo@b.test SIP/2.0\r\nVia: SIP/2.0/TCP a\r\n", "SIP"),
    (b"REGISTER sip:b.test SIP/2.0\r\n", "SIP"),
    (b"OPTIONS rtsp://cam.test/stream RTSP/1.0\r\nCSeq: 1\r\n\r\n", "RTSP"),
    (b"DESCRIBE rtsp://cam.test/stream RTSP/1.0\r\nCSeq: 2\r\n\r\n", "RTSP"),
    (b"REQMOD icap://icap.test/x ICAP/1.0\r\nHost: icap.test\r\n", "ICAP"),
    (b"SOURCE /radio ICE/1.0\r\n", "Icecast"),
    (b"0032git-upload-pack /project.git\0host=git.test\0", "git daemon: NUL in the target"),
    (b"CONNECT\naccept-version:1.2\nhost:b.test\n\n\0", "STOMP"),
    (b"STOMP\r\naccept-version:1.2\r\n\r\n\0", "STOMP"),
    (b"SEND\ndestination:/queue/a\n\nhello\0", "STOMP"),
    (b"/W demo\r\n", "finger: / is no token"),
    (b"demo\r\n", "finger"),
    (b"example.test\r\n", "whois"),
    (b"-T dn example.test\r\n", "whois"),
    (b"/docs\r\n", "gopher"),
    (b"docs\tquery\r\n", "gopher"),
    (b'{"jsonrpc":"2.0"}\n', "JSON in lines"),
    (b"<?xml version='1.0'?><stream:stream>", "XMPP"),
    (b"gemini://a.test/\r\n", "Gemini without TLS: / is no token"),
    (b"cpu.load 1.5 1700000000\n", "Graphite"),
    (b"put cpu.load 1700000000 1.5 host=a\n", "OpenTSDB"),
    (b"<34>Oct 11 22:14:15 host su: x\n", "syslog"),
    (b"83 <34>1 2024-10-11T22:14:15Z host su - - - x", "syslog with lengths"),
    (b"RFB 003.008\n", "VNC"),
    (b"JRMI\0\x02K", "Java RMI"),
    (b"GIOP\x01\x02", "CORBA"),
    (b"l\0\x0b\0\0\0", "X11"),
    (b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f", "ZeroMQ"),
    (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", "PROXY protocol: no browser is behind it"),
    (b"GET / a b HTTP/1.1\r\n", "four words: browsers encode spaces"),
    (b"GET\t/ HTTP/1.1\r\n", "a tab: browsers send none"),
    (b"GET /\tHTTP/1.1\r\n", "a tab: browsers send none"),
    (b"GET /\0 HTTP/1.1\r\n", "NUL: browsers send none"),
    (b" GET / HTTP/1.1\r\n", "a space first: browsers send none"),
    (b"\xc3\xbcGET / HTTP/1.1\r\n", "8-bit in the method: browsers send none"),
    (b"HTTP/1.1 200 OK\r\n", "an answer: / is no token"),
]


@pytest.mark.parametrize(("sent", "why"), AT_ONCE, ids=[repr(row[0]) for row in AT_ONCE])
def test_other_protocols_pass_at_once(sent, why):
    outcome = given(sent)
    assert (outcome.passed, outcome.is_done, outcome.refusal) == (sent, True, None), why
    assert outcome.deadline_seconds is None
    assert given(*bytewise(sent), b"\0").passed == sent + b"\0"


@pytest.mark.parametrize("sent", [b"\r\n", b"\n", b"\r", b"\r\n\r\n\n"])
def test_empty_lines_pass_at_once_and_prove_nothing(sent):
    """They are a question to finger and gopher, and nothing in front of a request."""
    for wrong in (request(host="evil.test"), request(host=None)):
        outcome = given(sent, wrong)
        assert outcome.steps[0].send == sent
        assert outcome.steps[0].deadline_seconds is None
        assert outcome.passed == sent
        assert outcome.status == 421
        assert given(sent + wrong).passed == sent
    assert given(sent + request()).passed == sent + request()


def test_what_passes_at_once_is_not_copied():
    data = memoryview(b"\x16" + bytes(1000))
    assert Guard(rules()).from_program(data).send is data


# What may become a request is held, and for how long.


HELD = [
    # (first bytes, seconds, what passes then)
    (b"G", UNDECIDED_SECONDS, b"G"),
    (b"JDWP-Handshake", UNDECIDED_SECONDS, b"JDWP-Handshake"),
    (b"HELLO ", UNDECIDED_SECONDS, b"HELLO "),
    (b"HELLO wor", UNDECIDED_SECONDS, b"HELLO wor"),
    (b"HELLO world ", UNDECIDED_SECONDS, b"HELLO world "),
    (b"HELLO world HTTP", UNDECIDED_SECONDS, b"HELLO world HTTP"),
    (b"GET http://app", UNDECIDED_SECONDS, b"GET http://app"),
    (b"GET /", HEAD_SECONDS, None),
    (b"OPTIONS *", HEAD_SECONDS, None),
    (b"GET / HT", HEAD_SECONDS, None),
    (b"HELLO world HTTP/", HEAD_SECONDS, None),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\n", HEAD_SECONDS, None),
]


@pytest.mark.parametrize(("sent", "seconds", "passes"), HELD, ids=[repr(row[0]) for row in HELD])
def test_beginnings_are_held_for_a_time(sent, seconds, passes):
    clock = Clock()
    guard = Guard(rules(), clock)
    outcome = given(sent, guard=guard)
    assert outcome.passed == b""
    assert outcome.deadline_seconds == pytest.approx(seconds)
    clock.now += seconds
    step = guard.timed_out()
    if passes is None:
        assert step.refusal.status == 408
        assert step.refusal.response.startswith(b"HTTP/1.1 408 ")
        assert not step.send
    else:
        assert (step.send, step.refusal, step.deadline_seconds) == (passes, None, None)
        assert not step.is_done


@pytest.mark.parametrize(("sent", "seconds", "passes"), HELD, ids=[repr(row[0]) for row in HELD])
def test_end_of_the_program_decides_about_a_beginning(sent, seconds, passes):
    guard = Guard(rules(), Clock())
    given(sent, guard=guard)
    step = guard.ended()
    if passes is None:
        assert step.refusal.status == 400
        assert "ended" in step.refusal.reason
        assert step.refusal.response.startswith(b"HTTP/1.1 400 ")
        assert not step.send
    else:
        assert (step.send, step.refusal) == (passes, None)


@pytest.mark.parametrize(
    "sent", [b"", b"\0", request(), request("Content-Length: 5") + b"hel", request() + b"\r\n"]
)
def test_end_of_the_program_between_heads_is_nothing_to_the_guard(sent):
    guard = Guard(rules(), Clock())
    guard.from_program(sent)
    assert guard.ended() == (b"", None, False, None)


def test_end_of_the_program_within_a_later_head_is_refused_without_a_place():
    guard = Guard(rules(), Clock())
    given(request(), request()[:9], guard=guard)
    step = guard.ended()
    assert (step.send, step.refusal.status, step.refusal.response) == (b"", 400, b"")


def test_the_time_does_not_begin_anew_with_each_byte():
    clock = Clock()
    guard = Guard(rules(), clock)
    for seconds in (UNDECIDED_SECONDS, UNDECIDED_SECONDS - 0.1):
        assert guard.from_program(b"x").deadline_seconds == pytest.approx(seconds)
        clock.now += 0.1
    guard = Guard(rules(), clock)
    for byte in bytewise(b"GET / HTTP/1.1\r\n"):
        step = guard.from_program(byte)
        clock.now += 1
    assert step.deadline_seconds == 0


def test_each_head_has_its_own_time():
    clock = Clock()
    guard = Guard(rules(), clock)
    first, second = request()[:30], request()[30:] + request()[:30]
    assert guard.from_program(first).deadline_seconds == HEAD_SECONDS
    clock.now += 9
    assert guard.from_program(second).deadline_seconds == HEAD_SECONDS


def test_a_program_that_types_passes_with_one_delay():
    clock = Clock()
    guard = Guard(rules(), clock)
    guard.from_program(b"h")
    assert guard.timed_out().send == b"h"
    for byte in bytewise(b"ello world "):
        step = guard.from_program(byte)
        assert (step.send, step.deadline_seconds) == (byte, None)
    step = guard.from_program(b"again\r\n")
    assert (step.send, step.is_done) == (b"again\r\n", True)


def test_a_request_that_was_typed():
    """What passed ahead is part of what is checked."""
    for host, status in ((NAME, 0), ("evil.test", 421)):
        clock = Clock()
        guard = Guard(rules(), clock)
        guard.from_program(b"GE")
        clock.now += 0.2
        assert guard.timed_out().send == b"GE"
        clock.now += 60
        assert guard.from_program(b"T").send == b"T"
        step = guard.from_program(b" /")
        assert step.send == b" "
        assert step.deadline_seconds == HEAD_SECONDS  # since now, not since the first byte
        step = guard.from_program(request(host=host)[5:])
        if status:
            assert (step.send, step.refusal.status) == (b"", status)
            assert step.refusal.response == b""  # the app has something, and may say something
        else:
            assert step.send == request()[4:]


def test_only_the_method_of_a_wrong_request_passes_ahead():
    for split in range(1, len(request(host="evil.test"))):
        sent = request(host="evil.test")
        guard = Guard(rules(), Clock())
        passed = given(sent[:split], guard=guard).passed
        step = guard.timed_out()
        passed += bytes(step.send)
        if not step.refusal:
            outcome = given(sent[split:], guard=guard)
            passed += outcome.passed
            assert outcome.status == 421
        assert passed in (b"", b"G", b"GE", b"GET", b"GET ")


def test_endless_words_pass_and_are_not_remembered():
    word = b"0123456789abcdef" * 8192  # 128 KB
    for pieces in ([word], [word[i : i + 1000] for i in range(0, len(word), 1000)]):
        guard = Guard(rules(), Clock())
        outcome = given(*pieces, guard=guard)
        assert outcome.passed == word
        assert not guard._held
        assert guard.from_program(b"x\n").is_done


@pytest.mark.parametrize("size", [MAX_HEAD_BYTES - 1, MAX_HEAD_BYTES, 2 * MAX_HEAD_BYTES])
def test_an_endless_method_is_refused_behind_it(size):
    method = b"x" * size
    for pieces in ([method + b" / HTTP/1.1\r\n"], [method, b" / HTTP/1.1\r\n"]):
        outcome = given(*pieces)
        assert outcome.status == 431
        assert outcome.passed in (b"", method, method + b" ")


# Behind the first request everything must be HTTP.


@pytest.mark.parametrize(
    "rest", [b"\x16\x03\x01", b"PING\r\n", b"GET /\r\n", b"GET x y\r\n", b"\0"]
)
def test_other_protocols_do_not_pass_behind_a_request(rest):
    for pieces in ([request(), rest], [request() + rest], bytewise(request() + rest)):
        outcome = given(*pieces)
        assert outcome.status == 400
        assert outcome.passed == request()


def test_behind_a_request_words_are_held_until_they_are_a_head():
    clock = Clock()
    guard = Guard(rules(), clock)
    assert not given(request(), b"G", guard=guard).refusal
    clock.now += HEAD_SECONDS
    step = guard.timed_out()
    assert (step.send, step.refusal.status, step.refusal.response) == (b"", 408, b"")


def test_an_idle_connection_has_no_deadline():
    outcome = given(request(), request("Content-Length: 5"), b"hello", b"\r\n")
    assert [step.deadline_seconds for step in outcome.steps] == [None] * 4
    assert not outcome.is_done


def test_no_bytes_change_nothing():
    guard = Guard(rules(), Clock())
    assert guard.from_program(b"G").deadline_seconds == pytest.approx(UNDECIDED_SECONDS)
    assert guard.from_program(b"").deadline_seconds == pytest.approx(UNDECIDED_SECONDS)


def test_a_deadline_that_was_taken_away_does_nothing():
    guard = Guard(rules(), Clock())
    for sent in (b"GE", request()[2:]):
        guard.from_program(sent)
    assert guard.timed_out() == (b"", None, False, None)

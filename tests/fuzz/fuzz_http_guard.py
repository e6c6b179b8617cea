"""What a program sends to an app, in any pieces, before the HTTP guard.

The first byte chooses what comes first: nothing, a right request, one to change the protocol and the
app's answer, the beginning of HTTP/2, or (with the bytes as its parts) a request that a page may
make under another name. The second says whether time passes between the pieces; then the layout of
`byte_choices.pieces_of`.
"""

from byte_choices import Choices, pieces_of
from error_texts import check_text

from ipc.messages import HttpRules
from workers.proxy.http_guard.guard import MAX_WAITING_BYTES, Guard
from workers.proxy.http_guard.head import MAX_HEAD_BYTES
from workers.proxy.http_guard.http2 import MAX_BLOCK_BYTES, MAX_FRAGMENTS, PREFACE
from workers.proxy.http_guard.refusal import Refused
from workers.proxy.http_guard.rules import rules_for

NAME = "app.demo.test"
RULES = rules_for(NAME, HttpRules(origins={NAME: ["http://b.test"]}))
RIGHT = f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()
UPGRADE = f"GET / HTTP/1.1\r\nHost: {NAME}\r\nUpgrade: h2c\r\n\r\n".encode()
CONNECT = f"CONNECT {NAME}:1 HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()
OPENING = PREFACE + b"\0\0\0\4\0\0\0\0\0"
SWITCHING = b"HTTP/1.1 101 x\r\n\r\n"
BEGINNINGS = [
    (b"", b""),
    (RIGHT, b""),
    (UPGRADE, SWITCHING),
    (UPGRADE, b"HTTP/1.1 200 x\r\n\r\n"),
    (CONNECT, b"HTTP/1.1 200 x\r\n\r\n"),
    (OPENING, b""),
]
MAX_HELD_BYTES = max(MAX_HEAD_BYTES, MAX_WAITING_BYTES, MAX_BLOCK_BYTES + 9 * MAX_FRAGMENTS)
TCHARS = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def check(data: bytes) -> None:
    choices = Choices(data)
    kind = choices.below(len(BEGINNINGS) + 1)
    has_time = choices.below(2) == 1
    if kind == len(BEGINNINGS):
        check_page(choices)
        return
    beginning, answer = BEGINNINGS[kind]
    stream, pieces = pieces_of(choices)
    if has_time:
        read(beginning, answer, pieces, has_time=True)
        return
    whole = read(beginning, answer, [stream])
    assert whole == read(beginning, answer, pieces)
    passed, refusal, is_done = whole
    if refusal is not None:
        # What passed is right by itself, so nothing of what was wrong is in it.
        alone = read(beginning, answer, [passed[len(beginning) :]])
        assert alone == (passed, None, is_done)


def check_page(choices: Choices) -> None:
    method = word(choices, TCHARS) or b"GET"
    path = word(choices, bytes(range(0x21, 0x7F)))
    name = word(choices, TCHARS) or b"X"
    value = word(choices, bytes(range(0x20, 0x7F)))
    body = choices.take(choices.byte())
    head = b"%s /%s HTTP/1.1\r\nHost: evil.test\r\n%s: %s\r\n\r\n" % (method, path, name, value)
    stream = head + body
    size = 1 + choices.byte()
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    for cut in ([stream], pieces):
        passed, refusal, _ = read(b"", b"", cut)
        assert refusal is not None
        assert passed == b""


def word(choices: Choices, alphabet: bytes) -> bytes:
    return bytes(alphabet[byte % len(alphabet)] for byte in choices.take(choices.byte()))


def read(
    beginning: bytes, answer: bytes, pieces: list[bytes], *, has_time: bool = False
) -> tuple[bytes, Refused | None, bool]:
    """(what reached the app, the refusal, whether the guard is done)."""
    guard = Guard(RULES, lambda: 0.0)
    passed, sent, is_done = b"", b"", False
    for number, piece in enumerate([beginning, *pieces]):
        sent += piece
        if is_done:
            passed += piece
            continue
        steps = [guard.from_program(memoryview(piece))]
        if number == 0 and guard.wants_answers:
            steps.append(guard.from_app(answer))
            assert not guard.wants_answers
        if has_time and steps[-1].deadline_seconds is not None:
            steps.append(guard.timed_out())
        for step in steps:
            passed += bytes(step.send)
            assert sent.startswith(passed)
            if step.refusal is not None:
                check_refusal(step.refusal)
                assert guard.from_program(b"x").send == b""
                return passed, step.refusal, False
            assert len(guard._held) <= MAX_HELD_BYTES
            is_done = step.is_done
        assert steps[-1].deadline_seconds is None or (guard._held and not is_done)
    assert is_done or len(sent) - len(passed) <= len(guard._held)
    last = guard.ended()
    if last.refusal is not None:
        check_refusal(last.refusal)
    assert sent.startswith(passed + bytes(last.send))
    return passed, None, is_done


def check_refusal(refusal: Refused) -> None:
    assert refusal.status in (400, 403, 408, 421, 431)
    check_text(Exception(refusal.reason))
    check_text(Exception(refusal.host))
    if refusal.response:
        assert refusal.response.startswith((b"HTTP/1.1 ", b"\0\0\0\4\0\0\0\0\0"))

"""HTTP requests to apps: by their names they pass, by others not one byte of them, in every version of HTTP."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from demo_bed import VNET, demo_bed
from http_peers import CountingServer, H2cServer, lines_about, refused_requests, reload
from private_bed import Bed, read_all, read_exactly, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

APP_PORT, H2C_PORT, LETTERS_PORT, OTHER_PORT = 7001, 7002, 7003, 7004
APP, H2C = "app.teleport.guard.test", "h2c.teleport.guard.test"
OTHER = "other.teleport.guard.test"
LETTERS, PORTS, ECHO = (f"{name}.teleport.guard.test" for name in ("letters", "ports", "echo"))
CLUSTER = f"""
[[clusters]]
name = "guard.test"
proxy_addr = "teleport.guard.test:3080"
apps = [
  {{ name = "app", uri = "tcp://127.0.0.1:{APP_PORT}" }},
  {{ name = "h2c", uri = "tcp://127.0.0.1:{H2C_PORT}" }},
  {{ name = "letters", uri = "tcp://127.0.0.1:{LETTERS_PORT}" }},
  {{ name = "other", uri = "tcp://127.0.0.1:{OTHER_PORT}" }},
  {{ name = "echo", uri = "tcp://echo.backend.internal:7" }},
  {{ name = "ports", uri = "tcp://ports.backend.internal", tcp_ports = [{{ port = 8000 }}] }},
]
"""
GET = f"GET / HTTP/1.1\r\nHost: {APP}\r\n\r\n".encode()
WRONG = b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n"
WEBSOCKET = (
    f"GET /ws HTTP/1.1\r\nHost: {APP}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
FRAME = b"\x81\x85\0\0\0\0hello"  # RFC 6455, section 5.2
PREFLIGHT = (
    f"OPTIONS / HTTP/1.1\r\nHost: {APP}\r\nAccess-Control-Request-Method: PUT\r\n"
    "Origin: https://evil.test\r\n\r\n"
).encode()


@pytest.fixture(scope="module")
def app() -> CountingServer:
    """An HTTP/1.1 app."""
    return CountingServer({"/": "the page"})


@pytest.fixture(scope="module")
def other() -> CountingServer:
    """An app of which nobody cares what reaches it later."""
    return CountingServer({"/": "the page"})


@pytest.fixture(scope="module")
def h2c() -> H2cServer:
    """An app that speaks HTTP/2 without TLS."""
    return H2cServer()


@pytest.fixture(scope="module")
def guarded(app, other, h2c) -> Iterator[Bed]:
    """A demo with all of them."""

    def say_letters(connection: socket.socket) -> None:
        """Answers each read with what it was."""
        while data := connection.recv(1000):
            connection.sendall(b"<" + data + b">")

    with (
        demo_bed(CLUSTER) as bed,
        bed.listening(APP_PORT, app.serve),
        bed.listening(OTHER_PORT, other.serve),
        bed.listening(H2C_PORT, h2c.serve),
        bed.listening(LETTERS_PORT, say_letters),
    ):
        yield bed


@contextlib.contextmanager
def one_refusal(bed: Bed, app: CountingServer) -> Iterator[None]:
    """What the block does is refused, and the app gets not one byte of it."""
    app.forget()
    with counted(bed):
        yield
    assert app.received == b""


@contextlib.contextmanager
def counted(bed: Bed) -> Iterator[None]:
    """A request is refused in the block. Counters come late, perhaps with others of before."""
    before = refused_requests(bed)
    yield
    wait_until(lambda: refused_requests(bed) > before, "it is counted")


def ask(bed: Bed, request: bytes, host: str = APP) -> bytes:
    """Everything that is answered to these bytes."""
    with bed.connect(host, 80) as end:
        end.sendall(request)
        return read_all(end)


def read_page(end: socket.socket) -> None:
    """Returns when the app has answered."""
    answer = b""
    while not answer.endswith(b"the page"):
        piece = end.recv(1000)
        assert piece, answer
        answer += piece


def curl(bed: Bed, *arguments: str) -> str:
    """What curl prints, with the status in the last line."""
    options = ("-sS", "--max-time", "20", "-w", "\n%{http_version} %{http_code}\n")
    return bed.output("curl", *options, *arguments)


def test_by_its_name_the_app_answers(guarded, app):
    assert curl(guarded, f"http://{APP}/") == "the page\n1.1 200\n"
    assert curl(guarded, f"http://{APP.upper()}.:8080/") == "the page\n1.1 200\n"
    body = "x" * 5_000_000
    path = guarded.directory / "body"
    path.write_text(body)
    posted = curl(guarded, "-T", str(path), "-X", "POST", f"http://{APP}/form")
    assert posted.startswith(body)


def test_by_its_name_the_app_answers_over_ipv6(guarded, app):
    [address] = guarded.resolve(APP, "AAAA")
    assert ask_once(guarded, address, GET).endswith(b"the page")
    with one_refusal(guarded, app):
        assert ask(guarded, WRONG, address).startswith(b"HTTP/1.1 421 ")


def ask_once(bed: Bed, host: str, request: bytes) -> bytes:
    with bed.connect(host, 80) as end:
        end.sendall(request)
        end.shutdown(socket.SHUT_WR)
        return read_all(end)


def test_by_another_name_it_is_refused_in_plain_sight(guarded, app):
    address = guarded.resolve(APP)[0]
    # No other test has it: repeated lines become a number, in a line of its own after a while.
    name = "seen.evil.test"
    with one_refusal(guarded, app):
        page = curl(guarded, "--resolve", f"{name}:80:{address}", f"http://{name}/")
    text, _, status = page.strip().rpartition("\n")
    assert status == "1.1 421"
    assert "security.http_hosts" in text
    refused = f"HTTP request for Host '{name}' at {APP} refused: "
    [line] = wait_until(lambda: lines_about(guarded, refused), "the log tells of it")
    assert len(line) > len(refused) + 5

    def look() -> dict[str, Any] | None:
        rows = json.loads(guarded.output(VNET, "connections", "--json"))["connections"]
        ends = (row for row in rows if row["end"] == "http_refused")
        return next((row for row in ends if row["error"].startswith(f"Host '{name}': ")), None)

    shown = wait_until(look, "it is in the list")
    assert (shown["name"], shown["state"], shown["bytes_sent"]) == (APP, "done", 0)
    assert f"http_refused: Host '{name}': " in guarded.output(VNET, "connections")


def test_by_its_address_it_is_refused(guarded, app):
    address = guarded.resolve(APP)[0]
    with one_refusal(guarded, app):
        assert curl(guarded, f"http://{address}/").endswith("\n1.1 421\n")


@pytest.mark.parametrize("second", [WRONG, PREFLIGHT, b"GET / HTTP/1.1\nHost: evil.test\n\n"])
def test_later_wrong_request_resets_and_does_not_reach_the_app(guarded, app, second):
    app.forget()
    with counted(guarded), guarded.connect(APP, 80) as end:
        end.sendall(GET)
        read_page(end)
        end.sendall(second)
        with pytest.raises(ConnectionResetError):
            read_all(end)
    assert app.received == GET


def test_pipelined_wrong_request_does_not_reach_the_app(guarded, other):
    right = GET.replace(APP.encode(), OTHER.encode())
    with counted(guarded), guarded.connect(OTHER, 80) as end:
        end.sendall(right + WRONG)
        with pytest.raises(ConnectionResetError):
            read_all(end)
    # The right one may or may not reach it, perhaps later.
    assert right.startswith(other.received)


def test_websocket_opens_for_the_apps_own_pages_alone(guarded, app):
    for origin in ("", f"Origin: http://{APP}\r\n", f"Origin: https://{APP}:8443\r\n"):
        with guarded.connect(APP, 80) as end:
            end.sendall(f"{WEBSOCKET}{origin}\r\n".encode())
            answer = b""
            while not answer.endswith(b"\x81\x05hello"):
                answer += end.recv(1000)
            assert answer.startswith(b"HTTP/1.1 101 ")
            app.forget()
            end.sendall(FRAME)
            wait_until(lambda: app.received == FRAME, "it passes")
    for origin in ("https://evil.test", "null"):
        with one_refusal(guarded, app):
            request = f"{WEBSOCKET}Origin: {origin}\r\n\r\n".encode()
            assert ask(guarded, request).startswith(b"HTTP/1.1 403 ")


def test_preflight_of_another_site_is_refused_unless_it_is_allowed(guarded, app):
    with one_refusal(guarded, app):
        assert ask(guarded, PREFLIGHT).startswith(b"HTTP/1.1 403 ")
    reload(guarded, security={"http_origins": {APP: ["https://evil.test"]}})
    try:
        assert ask_once(guarded, APP, PREFLIGHT).startswith(b"HTTP/1.1 200 ")
        other = PREFLIGHT.replace(b"evil.test", b"more-evil.test")
        with one_refusal(guarded, app):
            assert ask(guarded, other).startswith(b"HTTP/1.1 403 ")
    finally:
        reload(guarded, security={"http_origins": {}})


def test_head_that_never_ends_is_refused(guarded, app):
    with one_refusal(guarded, app):
        began = time.monotonic()
        assert ask(guarded, GET[:-2]).startswith(b"HTTP/1.1 408 ")
        assert 8 < time.monotonic() - began < 15


def test_head_of_a_megabyte_is_refused_and_the_answer_arrives(guarded, app):
    head = GET[:-2] + b"X-Long: " + b"x" * 1_000_000 + b"\r\n\r\n"
    with one_refusal(guarded, app):
        assert ask(guarded, head).startswith(b"HTTP/1.1 431 ")


def test_bytes_one_by_one_are_judged_as_one(guarded, app):
    app.forget()
    request = GET + f"POST / HTTP/1.1\r\nHost: {APP}\r\nContent-Length: 2\r\n\r\nhi".encode()
    with guarded.connect(APP, 80) as end:
        send_slowly(end, request)
        end.shutdown(socket.SHUT_WR)
        assert read_all(end).endswith(b"hi")
    assert app.received == request
    with one_refusal(guarded, app), guarded.connect(APP, 80) as end:
        # In one piece: the word of a program that stops in the middle of it passes ahead.
        end.sendall(WRONG[: len(b"GET /")])
        send_slowly(end, WRONG[len(b"GET /") :])
        assert read_all(end).startswith(b"HTTP/1.1 421 ")


def send_slowly(end: socket.socket, data: bytes) -> None:
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(len(data)):
        end.sendall(data[start : start + 1])


@pytest.mark.parametrize("option", ["--http2-prior-knowledge", "--http2"])
def test_http2_without_tls(guarded, h2c, option):
    assert curl(guarded, option, f"http://{H2C}/") == "hello\n2 200\n"
    address = guarded.resolve(H2C)[0]
    h2c.requests.clear()
    with counted(guarded):
        wrong = curl(guarded, option, "--resolve", f"evil.test:80:{address}", "http://evil.test/")
    text, _, status = wrong.strip().rpartition("\n")
    assert status in ("2 421", "1.1 421")
    assert "security.http_hosts" in text
    assert not h2c.requests


def test_later_stream_of_http2_with_another_authority_resets(guarded, h2c):
    h2c.requests.clear()
    both = [
        "--http2-prior-knowledge",
        f"http://{H2C}/one",
        "--next",
        "-sS",
        "--http2-prior-knowledge",
    ]
    done = guarded.run(
        "curl", "-sS", "--max-time", "20", *both, "-H", "Host: evil.test", f"http://{H2C}/two"
    )
    assert done.returncode != 0
    assert done.stdout == b"hello"
    assert h2c.requests == [f"{H2C}/one"]


def test_app_that_does_not_know_http2_answers_an_upgrade_as_before(guarded, app):
    """The server of this test takes no h2c: it goes on in HTTP/1.1, and so does the check."""
    app.forget()
    assert curl(guarded, "--http2", f"http://{APP}/") == "the page\n1.1 200\n"


def test_other_protocols_are_left_alone(guarded):
    with guarded.connect(PORTS, 8000) as end:
        assert read_exactly(end, 5) == b"8000\n"
        end.sendall(b"\x00\r\n")
        assert read_exactly(end, 3) == b"\x00\r\n"
    with guarded.connect(ECHO, 7) as end:
        for piece in (b"\x16\x03\x01", b"HELO there\r\n", WRONG):
            end.sendall(piece)
            assert read_exactly(end, len(piece)) == piece
    with guarded.connect(LETTERS, 80) as end:
        for word in (b"PING", b"PONG", b"QUIT"):  # no line end: may become a request
            began = time.monotonic()
            end.sendall(word)
            assert read_exactly(end, len(word) + 2) == b"<" + word + b">"
            # Sooner than a request is given up, after 10 s.
            assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "security",
    [{"http_hosts": {APP: ["*"]}}, {"http_hosts": {APP: ["evil.test"]}}, {"http_check": False}],
)
def test_check_can_be_switched_off_by_reload_for_new_connections(guarded, app, security):
    with guarded.connect(APP, 80) as before:
        # The answer shows that VNet has taken it: to the program it is connected a moment earlier.
        before.sendall(GET)
        read_page(before)
        reload(guarded, security=security)
        try:
            assert b"\r\n\r\nthe page" in ask_once(guarded, APP, WRONG)
            status = guarded.status()["security"]
            assert status["http_check"] == ("off" if "http_check" in security else "on")
            is_unchecked = security.get("http_hosts") == {APP: ["*"]}
            assert status["http_unchecked"] == ([APP] if is_unchecked else [])
            # A connection keeps the rules that it began with.
            before.sendall(WRONG)
            with pytest.raises(ConnectionResetError):
                read_all(before)
        finally:
            reload(guarded, security={"http_check": True, "http_hosts": {}})
    with one_refusal(guarded, app):
        assert ask(guarded, WRONG).startswith(b"HTTP/1.1 421 ")


def test_refused_requests_are_told_once_and_counted(guarded, app):
    name = "often.evil.test"
    request = f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()
    before = refused_requests(guarded)
    for _ in range(30):
        assert ask(guarded, request).startswith(b"HTTP/1.1 421 ")
    wait_until(lambda: refused_requests(guarded) >= before + 30, "all are counted")
    assert len(lines_about(guarded, f"for Host '{name}' at {APP} refused")) == 1

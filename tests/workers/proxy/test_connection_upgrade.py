"""The HTTP part of a connection upgrade."""

import base64
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.proxy.connection_upgrade import ALPN_PING, ConnectionUpgrade, UpgradeError
from workers.proxy.http_head import MAX_HEAD_BYTES

# RFC 6455 section 1.3 has this pair as its example.
KEY = base64.b64decode("dGhlIHNhbXBsZSBub25jZQ==")
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def upgrade(protocol: str = "alpn") -> ConnectionUpgrade:
    return ConnectionUpgrade("teleport.example.test", 443, protocol=protocol, key=KEY)


def answer(status: str = "101 Switching Protocols", **changed: str | None) -> bytes:
    fields = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": ACCEPT,
        "Sec-WebSocket-Protocol": "alpn",
    }
    fields |= {name.replace("_", "-"): value for name, value in changed.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def test_the_request_is_a_websocket_handshake():
    line, *fields = upgrade(ALPN_PING).request.decode().removesuffix("\r\n\r\n").split("\r\n")
    assert line == "GET /webapi/connectionupgrade HTTP/1.1"
    assert dict(field.split(": ") for field in fields) == {
        "Host": "teleport.example.test:443",
        "User-Agent": "vnet",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol": "alpn-ping",
    }


def test_each_request_has_a_key_of_its_own():
    keys = set()
    for _ in range(10):
        request = ConnectionUpgrade("::1", 3080).request.decode()
        assert "Host: [::1]:3080\r\n" in request
        key = request.partition("Sec-WebSocket-Key: ")[2].partition("\r\n")[0]
        assert len(base64.b64decode(key)) == 16
        keys.add(key)
    assert len(keys) == 10


@settings(deadline=None)
@given(st.binary(max_size=20), st.lists(st.integers(1, 60), max_size=20))
def test_an_answer_may_come_in_any_pieces_and_what_follows_is_kept(rest, sizes):
    talk, stream, result = upgrade(), answer() + rest, None
    while result is None:
        size = sizes.pop() if sizes else len(stream)
        result = talk.feed(memoryview(stream[:size]))
        stream = stream[size:]
    assert result + stream == rest


def test_field_names_and_the_upgrade_are_compared_without_case():
    head = answer(Upgrade="WebSocket").replace(b"Sec-WebSocket-Accept", b"sec-websocket-accept")
    assert upgrade().feed(head) == b""


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (answer("404 Not Found"), "too old"),
        (answer("403 Forbidden"), "403 Forbidden"),
        (answer("799 \x1b[31mred"), "answered 799 to"),
        (answer(Upgrade="alpn"), "something else"),
        (answer(Upgrade=None), "something else"),
        (answer(Sec_WebSocket_Accept="s3pPLMBiTxaQ9kYGzzhZRbK+xOa="), "not to this request"),
        (answer(Sec_WebSocket_Accept=None), "not to this request"),
        (answer(Sec_WebSocket_Protocol="alpn-ping"), "another protocol"),
        (answer(Sec_WebSocket_Protocol=None), "another protocol"),
        (b"HTTP/2 101\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 1\r\n\r\n", "no HTTP"),
        (b"\r\n\r\n", "no HTTP"),
        (b"SSH-2.0-Teleport\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * MAX_HEAD_BYTES, "more than"),
    ],
)
def test_every_other_answer_is_refused_in_plain_words(head, why):
    with pytest.raises(UpgradeError, match=why) as caught:
        upgrade().feed(head)
    assert "\x1b" not in str(caught.value)


def test_a_head_without_end_is_given_up():
    talk = upgrade()
    assert talk.feed(b"HTTP/1.1 101 Switching Protocols\r\n" + bytes(MAX_HEAD_BYTES // 2)) is None
    with pytest.raises(UpgradeError, match="more than"):
        talk.feed(bytes(MAX_HEAD_BYTES // 2))


def test_a_host_that_would_break_the_request_is_refused():
    with pytest.raises(UpgradeError, match="host name"):
        ConnectionUpgrade("example.test\r\nX-Other: 1", 443)


def test_the_accept_value_is_made_as_the_rfc_says():
    digest = hashlib.sha1(base64.b64encode(KEY) + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    assert base64.b64encode(digest).decode() == ACCEPT

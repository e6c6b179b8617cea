"""Layers inside layers, all in memory, with input cut anywhere and one shared TlsMemory."""

import contextlib
import os
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tls_peers import SERVER_NAME, client_context, server_context
from tunnel_peers import accept_upgrade, balancer_context, chunks, frame, web_context

from workers.proxy.connection_upgrade import ConnectionUpgrade, UpgradeError
from workers.proxy.http_proxy import ForwardProxyError, ProxyConnect
from workers.proxy.layers import Layer, LayerError, Plain
from workers.proxy.tls import TlsConnection, TlsMemory
from workers.proxy.tunnel import Tunnel, TunnelClosedError, Unframed
from workers.proxy.websocket import WebSocketClient

CONTEXT = client_context()


class TlsServer:
    """Bytes in, plaintext out, and back."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.is_done = self.is_ended = False

    def feed(self, records: bytes) -> bytes:
        self.incoming.write(records)
        plaintext = b""
        try:
            if not self.is_done:
                self.ssl.do_handshake()
                self.is_done = True
            while data := self.ssl.read(1 << 20):
                plaintext += data
            self.is_ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.is_ended = True
        return plaintext

    def take(self) -> bytes:
        return self.outgoing.read()

    def seal(self, data: bytes) -> bytes:
        self.ssl.write(data)
        return self.take()

    def close_notify(self) -> bytes:
        with contextlib.suppress(ssl.SSLWantReadError):
            self.ssl.unwrap()
        return self.take()


class MemoryProxy:
    """A Teleport proxy behind a balancer: the far end of a tunnel."""

    def __init__(self, frame_bytes: int = 700) -> None:
        self.outer = TlsServer(balancer_context())
        self.inner = TlsServer(server_context())
        self.received = b""
        self.pongs: list[bytes] = []
        self.is_closed = False
        self._frame_bytes = frame_bytes
        self._head = b""
        self._frames = b""
        self._is_upgraded = False
        self._answer = b""

    # Called by `accept_upgrade`.
    def send_raw(self, data: bytes) -> None:
        self._answer += data

    def feed(self, records: bytes) -> bytes:
        """What goes back on the wire."""
        data = self.outer.feed(records)
        back = self.outer.take()
        if not self._is_upgraded:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return back
            accept_upgrade(self, (head + end).decode())
            back += self.outer.seal(self._answer)
            self._is_upgraded = True
        self._frames += data
        while payload := self._next_frame():
            self.received += self.inner.feed(payload)
            if replies := self.inner.take():
                back += self.wrap(replies)
        return back

    def wrap(self, data: bytes) -> bytes:
        sizes = [self._frame_bytes] * (len(data) // self._frame_bytes)
        return self.outer.seal(b"".join(frame(0x2, piece) for piece in chunks(data, sizes)))

    def send(self, data: bytes) -> bytes:
        return self.wrap(self.inner.seal(data))

    def close_notify(self) -> bytes:
        return self.wrap(self.inner.close_notify())

    def _next_frame(self) -> bytes:
        """The payload of the next data frame; empty if there is none yet."""
        while len(self._frames) >= 6:
            length, offset = self._frames[1] & 0x7F, 2
            if length >= 126:
                offset = 4 if length == 126 else 10
                length = int.from_bytes(self._frames[2:offset], "big")
            offset += 4
            if len(self._frames) < offset + length:
                break
            opcode, payload = self._frames[0] & 0x0F, self._frames[offset : offset + length]
            self._frames = self._frames[offset + length :]
            if opcode == 0x2:
                return payload
            self.is_closed |= opcode == 0x8
            if opcode == 0xA:
                self.pongs.append(payload)
        return b""


class MemoryForwardProxy:
    """TLS, CONNECT, and then whatever `behind` makes of the bytes."""

    def __init__(self, behind) -> None:
        self.outer = TlsServer(balancer_context())
        self.behind = behind
        self.head = b""
        self._is_connected = False

    def feed(self, records: bytes) -> bytes:
        data = self.outer.feed(records)
        back = self.outer.take()
        if not self._is_connected:
            self.head += data
            self.head, end, data = self.head.partition(b"\r\n\r\n")
            if not end:
                return back
            back += self.outer.seal(b"HTTP/1.1 200 OK\r\n\r\n")
            self._is_connected = True
        if answer := data and self.behind.feed(data):
            back += self.outer.seal(answer)
        return back

    def send(self, data: bytes) -> bytes:
        return self.outer.seal(self.behind.send(data))

    @property
    def received(self) -> bytes:
        return self.behind.received


def upgraded(memory: TlsMemory) -> Tunnel:
    outer = TlsConnection(web_context(), SERVER_NAME, memory)
    inner = TlsConnection(CONTEXT, SERVER_NAME, memory)
    request = ConnectionUpgrade(SERVER_NAME, 443)
    return Tunnel("connection upgrade", outer, request, WebSocketClient(), inner)


def proxied(memory: TlsMemory, inner: Layer) -> Tunnel:
    outer = TlsConnection(web_context(), SERVER_NAME, memory)
    return Tunnel("forward proxy", outer, ProxyConnect(SERVER_NAME, 443), Unframed(), inner)


def assert_clean(memory: TlsMemory) -> None:
    assert not memory.incoming.pending
    assert not memory.outgoing.pending


def shake_hands(layer: Layer, far, memory: TlsMemory, sizes: list[int]) -> bytes:
    """All handshakes; returns what `decrypt` gave behind them."""
    is_done, early = layer.handshake(b""), b""
    back = far.feed(layer.take_records())
    for _ in range(30):
        records, back = back, b""
        for piece in chunks(records, sizes):
            if is_done:
                early += bytes(layer.decrypt(piece))
            elif is_done := layer.handshake(piece):
                back += far.feed(layer.take_records())
                early += bytes(layer.decrypt(b""))
            back += far.feed(layer.take_records())
            assert_clean(memory)
    assert is_done
    return early


SIZES = st.lists(st.integers(1, 2000), max_size=40)


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, st.integers(0, 60_000), st.integers(1, 70_000))
def test_input_may_be_cut_anywhere(handshake_sizes, sizes, length, frame_bytes):
    memory = TlsMemory()
    tunnel, far = upgraded(memory), MemoryProxy(frame_bytes)
    shake_hands(tunnel, far, memory, handshake_sizes)
    assert tunnel.alpn == "teleport-tcp"
    data = os.urandom(length)
    if data:
        far.feed(tunnel.encrypt(memoryview(data)))
        assert far.received == data
        records = far.send(data)
        assert b"".join(bytes(tunnel.decrypt(piece)) for piece in chunks(records, sizes)) == data
    assert_clean(memory)
    for piece in chunks(far.close_notify(), sizes):
        assert not tunnel.decrypt(piece)
    assert tunnel.is_receive_ended


def test_a_full_read_with_small_frames_fits():
    """Each layer may hold a record back; three layers have the most plaintext at once."""
    memory = TlsMemory()
    layer, far = proxied(memory, upgraded(memory)), MemoryForwardProxy(MemoryProxy())
    shake_hands(layer, far, memory, [])
    data = os.urandom(len(memory.read_buffer) * 3)
    records = far.send(data)
    size = len(memory.read_buffer)
    sizes = [40_000, *[size] * (len(records) // size)]
    assert b"".join(bytes(layer.decrypt(piece)) for piece in chunks(records, sizes)) == data
    far.feed(layer.encrypt(memoryview(data)))
    assert far.received == data
    assert_clean(memory)


def test_tunnels_in_turn_do_not_mix():
    memory = TlsMemory()
    pairs = [(upgraded(memory), MemoryProxy()) for _ in range(3)]
    pairs += [
        (proxied(memory, upgraded(memory)), MemoryForwardProxy(MemoryProxy())) for _ in range(2)
    ]
    for layer, far in pairs:
        shake_hands(layer, far, memory, [100] * 50)
    messages = [os.urandom(50_000) for _ in pairs]
    records = [far.send(data) for (_, far), data in zip(pairs, messages, strict=True)]
    received = [b""] * len(pairs)
    for begin in range(0, max(map(len, records)), 777):
        for index, (layer, _) in enumerate(pairs):
            received[index] += bytes(layer.decrypt(records[index][begin : begin + 777]))
            assert_clean(memory)
    assert received == messages


def test_our_end_leaves_the_far_direction_open_and_then_closes_everything():
    memory = TlsMemory()
    tunnel, far = upgraded(memory), MemoryProxy()
    shake_hands(tunnel, far, memory, [])
    records = far.send(b"late " * 10_000)
    tunnel.decrypt(records[:20_000])  # a part of a record waits in each layer
    far.feed(tunnel.close_notify())
    assert far.inner.is_ended
    assert not far.is_closed
    tunnel.decrypt(records[20_000:])
    assert bytes(tunnel.decrypt(far.send(b"later"))) == b"later"
    assert not tunnel.is_receive_ended
    tunnel.decrypt(far.close_notify())
    far.feed(tunnel.take_records())
    assert tunnel.is_receive_ended
    assert far.is_closed
    assert far.outer.is_ended
    assert_clean(memory)


def test_the_far_end_may_end_first():
    memory = TlsMemory()
    tunnel, far = upgraded(memory), MemoryProxy()
    shake_hands(tunnel, far, memory, [])
    assert bytes(tunnel.decrypt(far.send(b"last") + far.close_notify())) == b"last"
    assert tunnel.is_receive_ended
    far.feed(tunnel.encrypt(memoryview(b"still here")))
    assert far.received == b"still here"
    assert not far.is_closed
    far.feed(tunnel.close_notify())
    assert far.is_closed
    assert far.outer.is_ended
    assert_clean(memory)


class Echo:
    """What a forward proxy leads to without TLS."""

    def __init__(self, greeting: bytes = b"") -> None:
        self.received = b""

    def feed(self, data: bytes) -> bytes:
        self.received += data
        return b""

    def send(self, data: bytes) -> bytes:
        return data


def test_bare_bytes_inside_tls_end_with_it():
    memory = TlsMemory()
    layer, far = proxied(memory, Plain()), MemoryForwardProxy(Echo())
    assert shake_hands(layer, far, memory, [3] * 100) == b""
    assert far.head.startswith(b"CONNECT proxy.example.test:443 HTTP/1.1\r\n")
    far.feed(layer.encrypt(memoryview(b"up")))
    assert far.received == b"up"
    assert not layer.ends_with_fin
    far.feed(layer.close_notify())
    assert far.outer.is_ended
    assert bytes(layer.decrypt(far.send(b"down"))) == b"down"
    assert not layer.is_receive_ended
    assert not layer.decrypt(far.outer.close_notify())
    assert layer.is_receive_ended
    assert_clean(memory)


class Refusing(MemoryForwardProxy):
    """Answers something else, and perhaps leaves."""

    def __init__(self, answer: bytes, *, ends: bool = False) -> None:
        super().__init__(None)
        self.answer = answer
        self.ends = ends

    def feed(self, records: bytes) -> bytes:
        data = self.outer.feed(records)
        back = self.outer.take()
        if data:
            back += self.outer.seal(self.answer) if self.answer else b""
            back += self.outer.close_notify() if self.ends else b""
        return back


@pytest.mark.parametrize(
    ("make", "far", "error", "why"),
    [
        (upgraded, Refusing(b"HTTP/1.1 404 \r\n\r\n"), UpgradeError, "too old"),
        (upgraded, Refusing(b"", ends=True), TunnelClosedError, "without an answer"),
        (
            lambda memory: proxied(memory, Plain()),
            Refusing(b"HTTP/1.1 407 \r\n\r\n"),
            ForwardProxyError,
            "password",
        ),
        (
            lambda memory: proxied(memory, TlsConnection(CONTEXT, SERVER_NAME, memory)),
            Refusing(b"HTTP/1.1 200 \r\n\r\n", ends=True),
            TunnelClosedError,
            "handshake",
        ),
    ],
)
def test_who_does_not_agree_is_told_apart(make, far, error, why):
    memory = TlsMemory()
    with pytest.raises(error, match=why):
        shake_hands(make(memory), far, memory, [])
    assert_clean(memory)


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=200), st.integers(0, 10_000), st.integers(1, 255))
def test_hostile_bytes_raise_only_our_error_and_leave_the_memory_clean(noise, position, flip):
    memory = TlsMemory()
    tunnel, far = upgraded(memory), MemoryProxy()
    shake_hands(tunnel, far, memory, [])
    records = bytearray(far.inner.seal(b"x" * 300))
    records[position % len(records)] ^= flip
    for data in (far.wrap(bytes(records)), far.outer.seal(noise), noise):
        with contextlib.suppress(LayerError):
            tunnel.decrypt(data)
        assert_clean(memory)

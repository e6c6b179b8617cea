"""Our TLS machine against OpenSSL's server, both in memory."""

import contextlib
import os
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tls_peers import SERVER_NAME, client_context, server_context, stranger

from workers.proxy.tls import (
    AlertReceivedError,
    PeerUntrustedError,
    TlsConnection,
    TlsError,
    TlsMemory,
)

CONTEXT = client_context()
VERSIONS = ["TLSv1_2", "TLSv1_3"]


class Server:
    """The other side of the wire."""

    def __init__(self, version: str = "TLSv1_3", alpn: str = "teleport-tcp") -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = server_context(alpn, version)
        self.ssl = context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def shake(self, records: bytes) -> bytes:
        self.incoming.write(records)
        with contextlib.suppress(ssl.SSLError):
            self.ssl.do_handshake()
        return self.outgoing.read()

    def take(self, records: bytes) -> bytes:
        self.incoming.write(records)
        data = b""
        try:
            while piece := self.ssl.read(1 << 20):
                data += piece
        except ssl.SSLWantReadError:
            pass
        return data

    def send(self, data: bytes) -> bytes:
        self.ssl.write(data)
        return self.outgoing.read()

    def close_notify(self) -> bytes:
        with pytest.raises(ssl.SSLWantReadError):
            self.ssl.unwrap()
        return self.outgoing.read()


def shake_hands(client: TlsConnection, server: Server) -> None:
    records, is_done = b"", False
    for _ in range(5):
        if not is_done and (is_done := client.handshake(records)):
            client.decrypt(b"")
        elif is_done:
            client.decrypt(records)
        records = server.shake(client.take_records())
    assert is_done


def established(version: str = "TLSv1_3", memory: TlsMemory | None = None):
    memory = memory or TlsMemory()
    client = TlsConnection(CONTEXT, SERVER_NAME, memory)
    server = Server(version)
    shake_hands(client, server)
    return client, server, memory


def assert_clean(memory: TlsMemory) -> None:
    assert not memory.incoming.pending
    assert not memory.outgoing.pending


@pytest.mark.parametrize("version", VERSIONS)
def test_data_passes_both_ways(version):
    client, server, memory = established(version)
    data = os.urandom(100_000)
    assert server.take(client.encrypt(memoryview(data))) == data
    assert bytes(client.decrypt(server.send(data))) == data
    assert client.alpn == "teleport-tcp"
    assert_clean(memory)


def test_records_may_come_byte_by_byte():
    client, server, _ = established()
    records = server.send(b"hello")
    assert b"".join(bytes(client.decrypt(bytes([byte]))) for byte in records) == b"hello"


def test_a_full_read_on_top_of_a_waiting_record_fits():
    client, server, memory = established()
    data = os.urandom(len(memory.read_buffer) + 16384)
    records = server.send(data)
    first = bytes(client.decrypt(records[:16000]))
    rest = b""
    for begin in range(16000, len(records), len(memory.read_buffer)):
        rest += bytes(client.decrypt(records[begin : begin + len(memory.read_buffer)]))
    assert first + rest == data


@pytest.mark.parametrize("version", VERSIONS)
def test_our_end_leaves_the_peers_direction_open(version):
    client, server, memory = established(version)
    records = server.send(b"late " * 10_000)
    client.decrypt(records[:20_000])  # a part of a record waits inside while we end
    server.take(client.close_notify())
    client.decrypt(records[20_000:])
    assert bytes(client.decrypt(server.send(b"later"))) == b"later"
    assert not client.is_receive_ended
    server.ssl.unwrap()
    assert not client.decrypt(server.outgoing.read())
    assert client.is_receive_ended
    assert_clean(memory)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_peers_end_leaves_our_direction_open(version):
    client, server, memory = established(version)
    assert bytes(client.decrypt(server.send(b"last") + server.close_notify())) == b"last"
    assert client.is_receive_ended
    assert server.take(client.encrypt(memoryview(b"still here"))) == b"still here"
    client.close_notify()
    assert_clean(memory)


def test_connections_share_memory_without_mixing():
    memory = TlsMemory()
    pairs = [established(memory=memory)[:2] for _ in range(5)]
    messages = [os.urandom(50_000) for _ in pairs]
    records = [server.send(data) for (_, server), data in zip(pairs, messages, strict=True)]
    received = [b""] * len(pairs)
    for begin in range(0, max(map(len, records)), 777):
        for index, (client, _) in enumerate(pairs):
            received[index] += bytes(client.decrypt(records[index][begin : begin + 777]))
            assert_clean(memory)
    assert received == messages


def test_a_broken_connection_leaves_the_memory_clean():
    memory = TlsMemory()
    good_client, good_server, _ = established(memory=memory)
    bad_client, bad_server, _ = established(memory=memory)
    records = bytearray(bad_server.send(b"x" * 40_000))
    records[100] ^= 1
    with pytest.raises(TlsError, match="TLS failed"):
        bad_client.decrypt(records)
    assert_clean(memory)
    with pytest.raises(TlsError):
        bad_client.encrypt(memoryview(b"no more"))
    assert_clean(memory)
    assert bytes(good_client.decrypt(good_server.send(b"fine"))) == b"fine"


def test_an_untrusted_certificate_is_told_apart():
    context = ssl.create_default_context(cadata=stranger().pem)
    client, server = TlsConnection(context, SERVER_NAME, TlsMemory()), Server()
    client.handshake(b"")
    with pytest.raises(PeerUntrustedError, match="not trusted"):
        client.handshake(server.shake(client.take_records()))
    assert client.take_records()  # the alert that tells the peer


def test_a_certificate_for_another_name_is_not_trusted():
    client, server = TlsConnection(client_context(), "other.test", TlsMemory()), Server()
    client.handshake(b"")
    with pytest.raises(PeerUntrustedError, match=r"other\.test"):
        client.handshake(server.shake(client.take_records()))


def test_an_alert_is_told_apart():
    """A TLS 1.3 server refuses our certificate after our handshake is over."""
    memory = TlsMemory()
    client = TlsConnection(client_context(issuer=stranger()), SERVER_NAME, memory)
    server = Server()
    client.handshake(b"")
    assert client.handshake(server.shake(client.take_records()))
    with pytest.raises(AlertReceivedError, match="refused"):
        client.decrypt(server.shake(client.take_records()))
    assert_clean(memory)


def test_noise_in_place_of_a_handshake_is_an_error_of_ours():
    client = TlsConnection(client_context(), SERVER_NAME, TlsMemory())
    client.handshake(b"")
    with pytest.raises(TlsError):
        client.handshake(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n" * 10)


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=1, max_size=200), st.integers(0, 400), st.integers(1, 255))
def test_hostile_records_raise_only_our_error_and_leave_the_memory_clean(noise, position, flip):
    client, server, memory = established()
    records = bytearray(server.send(b"x" * 300))
    records[position % len(records)] ^= flip
    for data in (records, noise, noise):
        with contextlib.suppress(TlsError):
            client.decrypt(data)
        assert_clean(memory)


@given(st.binary(min_size=1, max_size=200))
def test_hostile_handshakes_raise_only_our_error(noise):
    memory = TlsMemory(4096)
    client = TlsConnection(CONTEXT, SERVER_NAME, memory)
    client.handshake(b"")
    client.take_records()
    with contextlib.suppress(TlsError):
        client.handshake(noise)
    client.take_records()
    assert_clean(memory)

"""The packet codec beside paramiko's Packetizer, which has a socket where ours has bytes."""

import hashlib
import hmac
import os
import struct

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from paramiko.message import Message
from paramiko.packet import Packetizer

from workers.proxy.ssh.codec import (
    MAX_EARLY_PACKET_BYTES,
    MAX_OVERHEAD_BYTES,
    MAX_PACKET_BYTES,
    PLAIN_BYTES,
    CodecError,
    CtrAndMac,
    CtrThenMac,
    Gcm,
    PacketReader,
    PacketWriter,
)

KEY, IV, MAC_KEY = bytes(range(32)), bytes(range(100, 116)), b"m" * 64
CIPHERS = ["none", "gcm128", "gcm256", "etm256", "etm512", "mac256", "mac512"]
PAYLOADS = st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=8)


class Wire:
    """A socket for paramiko: what it sends is kept, what it reads was put there."""

    def __init__(self):
        self.sent = b""
        self.waiting = b""

    def send(self, data):
        self.sent += bytes(data)
        return len(data)

    def recv(self, count):
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken


def counter_mode():
    return Cipher(algorithms.AES(KEY[:16]), modes.CTR(IV))


def ours(name, *, is_sealer):
    """One half of a cipher of the codec."""
    if name.startswith("gcm"):
        return Gcm(AESGCM(KEY[: int(name[3:]) // 8]), IV[:12])
    cipher = counter_mode().encryptor() if is_sealer else counter_mode().decryptor()
    size = int(name[3:]) // 8
    mac = hmac.new(MAC_KEY[:size], digestmod=f"sha{size * 8}")
    return (CtrThenMac if name.startswith("etm") else CtrAndMac)(cipher, mac, size)


def writer_for(name):
    writer = PacketWriter()
    if name != "none":
        writer.use(ours(name, is_sealer=True))
    return writer


def reader_for(name):
    reader = PacketReader()
    if name != "none":
        reader.use(ours(name, is_sealer=False))
    return reader


def paramiko_for(name, wire):
    packetizer = Packetizer(wire)
    if name == "none":
        return packetizer
    if name.startswith("gcm"):
        engine = AESGCM(KEY[: int(name[3:]) // 8])
        figures = (engine, 16, None, 16, None)
        packetizer.set_outbound_cipher(*figures, aead=True, iv_out=IV[:12])
        packetizer.set_inbound_cipher(*figures, aead=True, iv_in=IV[:12])
        return packetizer
    size = int(name[3:]) // 8
    figures = (16, getattr(hashlib, f"sha{size * 8}"), size, MAC_KEY[:size])
    is_etm = name.startswith("etm")
    encryptor, decryptor = counter_mode().encryptor(), counter_mode().decryptor()
    packetizer.set_outbound_cipher(encryptor, *figures, sdctr=True, etm=is_etm)
    packetizer.set_inbound_cipher(decryptor, *figures, etm=is_etm)
    return packetizer


def read_all(reader, pieces):
    """Payloads of a stream in pieces; each piece is overwritten once it was read."""
    plain = memoryview(bytearray(PLAIN_BYTES))
    payloads = []
    for piece in pieces:
        buffer = bytearray(piece)
        reader.feed(memoryview(buffer))
        while (payload_bytes := reader.next(plain)) >= 0:
            payloads.append(bytes(plain[1 : 1 + payload_bytes]))
        reader.keep()
        buffer[:] = bytes(len(buffer))
    return payloads


@pytest.mark.parametrize("name", CIPHERS)
@given(payloads=PAYLOADS)
def test_paramiko_reads_what_we_write(name, payloads):
    wire, writer = Wire(), writer_for(name)
    packetizer = paramiko_for(name, wire)
    plain, packet = memoryview(bytearray(PLAIN_BYTES)), memoryview(bytearray(1000))
    for number, payload in enumerate(payloads):
        if number % 2:
            wire.waiting += writer.pack(payload)
        else:
            plain[1 : 1 + len(payload)] = payload
            wire.waiting += packet[: writer.seal(plain, len(payload), packet)]
    for number, payload in enumerate(payloads):
        kind, message = packetizer.read_message()
        assert bytes([kind]) + message.asbytes() == payload
        assert message.seqno == number
    assert not wire.waiting
    assert writer.sealed_packets == writer.sequence == len(payloads)


@pytest.mark.parametrize("name", CIPHERS)
@given(payloads=PAYLOADS, lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_we_read_what_paramiko_writes_in_whatever_pieces(name, payloads, lengths):
    wire = Wire()
    packetizer = paramiko_for(name, wire)
    for payload in payloads:
        packetizer.send_message(Message(payload))
    pieces, position = [], 0
    while position < len(wire.sent):
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(wire.sent[position : position + length])
        position += length
    reader = reader_for(name)
    assert read_all(reader, pieces) == payloads
    assert reader.kept_bytes == 0
    assert reader.opened_packets == reader.sequence == len(payloads)


@pytest.mark.parametrize("name", CIPHERS)
@given(
    payloads=PAYLOADS,
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    pauses=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_packets_that_are_left_for_later_are_kept(name, payloads, lengths, pauses):
    """As when a leg is halted, and still more comes."""
    writer, reader = writer_for(name), reader_for(name)
    stream = b"".join(writer.pack(payload) for payload in payloads)
    plain = memoryview(bytearray(PLAIN_BYTES))
    seen, position, turn = [], 0, 0
    while position < len(stream):
        buffer = bytearray(stream[position : position + lengths[turn % len(lengths)]])
        reader.feed(memoryview(buffer))
        position += len(buffer)
        while not pauses[turn % len(pauses)] and (payload_bytes := reader.next(plain)) >= 0:
            seen.append(bytes(plain[1 : 1 + payload_bytes]))
            turn += 1
        reader.keep()
        buffer[:] = bytes(len(buffer))
        turn += 1
    while (payload_bytes := reader.next(plain)) >= 0:
        seen.append(bytes(plain[1 : 1 + payload_bytes]))
    assert seen == payloads


@pytest.mark.parametrize("name", CIPHERS[1:])
@given(data=st.data())
def test_no_changed_bit_gets_through(name, data):
    payload = data.draw(st.binary(min_size=1, max_size=100))
    packets = bytearray(writer_for(name).pack(payload))
    place = data.draw(st.integers(0, len(packets) * 8 - 1))
    packets[place // 8] ^= 1 << place % 8
    reader = reader_for(name)
    try:
        found = read_all(reader, [bytes(packets)])
    except CodecError:
        return
    # A greater length is awaited, and fails then.
    assert found == []
    with pytest.raises(CodecError):
        read_all(reader, [bytes(MAX_PACKET_BYTES)])


@pytest.mark.parametrize("name", CIPHERS[1:])
def test_packets_do_not_change_places(name):
    writer = writer_for(name)
    first, second = writer.pack(b"first"), writer.pack(b"other")
    with pytest.raises(CodecError, match=r"altered|bytes"):
        read_all(reader_for(name), [second + first])


def test_keys_and_numbers_change_between_two_packets():
    writer, reader = PacketWriter(), PacketReader()
    stream = writer.pack(b"clear")
    for name in CIPHERS[1:]:
        writer.use(ours(name, is_sealer=True))
        writer.sequence = 0
        stream += writer.pack(name.encode())
    plain = memoryview(bytearray(PLAIN_BYTES))
    reader.feed(memoryview(stream))
    seen = []
    for name in [*CIPHERS[1:], None]:
        payload_bytes = reader.next(plain)
        seen.append(bytes(plain[1 : 1 + payload_bytes]).decode())
        if name is not None:
            reader.use(ours(name, is_sealer=False))
            reader.sequence = 0
    assert seen == ["clear", *CIPHERS[1:]]
    assert reader.opened_packets == 1


def test_the_largest_packets():
    for name in CIPHERS:
        payload = os.urandom(MAX_PACKET_BYTES - 40)
        reader = reader_for(name)
        reader.max_packet_bytes = MAX_PACKET_BYTES
        packet = writer_for(name).pack(payload)
        assert len(packet) <= len(payload) + MAX_OVERHEAD_BYTES
        assert read_all(reader, [packet[:5], packet[5:]]) == [payload]


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0, "0 bytes, which no"),
        (4, "4 bytes, which no"),
        (13, "13 bytes, which no"),  # no multiple of 8 with the length's own bytes
        (MAX_EARLY_PACKET_BYTES + 1, f"of {MAX_EARLY_PACKET_BYTES + 1} bytes"),
        (2**32 - 4, "4294967292"),
    ],
)
def test_lengths_that_no_packet_has(length, text):
    with pytest.raises(CodecError, match=text):
        read_all(PacketReader(), [struct.pack(">I", length)])


@pytest.mark.parametrize("padding", [0, 3, 11, 12, 255])
def test_paddings_that_no_packet_has(padding):
    """Too short, and so long that there is no payload: 12 = 1 + payload + padding."""
    with pytest.raises(CodecError, match="padding"):
        read_all(PacketReader(), [struct.pack(">IB", 12, padding) + bytes(11)])


def test_an_endless_stream_of_single_bytes_keeps_no_more_than_a_packet():
    reader = PacketReader()
    read_all(reader, [struct.pack(">I", 32 * 1024 + 4)])
    read_all(reader, [b"x"] * 32 * 1024)
    assert reader.kept_bytes == 32 * 1024 + 4

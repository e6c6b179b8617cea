r"""SSH packets (RFC 4253 section 6) in and out of bytes. Pure; nothing here knows what they say.

          4             1                                          mac
    +----------+----------------+---------+---------+     +-----------------+
    |  length  | padding length | payload | padding |     | tag or HMAC     |
    +----------+----------------+---------+---------+     +-----------------+
                \__ "plain": `length` bytes ______/

    AES-GCM        length in the clear, plain encrypted       RFC 5647, aes*-gcm@openssh.com
    CTR, HMAC-EtM  length in the clear, HMAC over the rest    OpenSSH, hmac-*-etm@openssh.com
    CTR, HMAC      length encrypted too, HMAC over the plain  RFC 4253 section 6.4, RFC 4344
    none           before the first key exchange

Plain bytes are read into, and sealed from, one buffer of the caller's: a packet that is passed on
is decrypted there, its padding is replaced, and it is encrypted from there, without a copy. All
methods raise CodecError for what no peer that keeps to the rules sends; nothing can be read after.
"""

import hmac
import os
import struct
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import CipherContext
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from workers.proxy.layers import LayerError

# RFC 4253 section 6.1: what every implementation takes. Enough before the login.
MAX_EARLY_PACKET_BYTES = 35000
# What OpenSSH takes; channels may agree on more than RFC 4253 wants.
MAX_PACKET_BYTES = 256 * 1024
# A sealed packet is so much larger than its payload at most: length, padding length, padding, HMAC.
MAX_OVERHEAD_BYTES = 4 + 1 + 20 + 64
# Room for the plain bytes of any packet, with the padding of any cipher.
PLAIN_BYTES = MAX_PACKET_BYTES + MAX_OVERHEAD_BYTES

_LENGTH_BYTES = 4
_MIN_PADDING_BYTES = 4
_TAG_BYTES = 16
_SEQUENCES = 2**32
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class CodecError(LayerError):
    """The bytes are no SSH packets, or were altered. The text is safe to log and show."""


class Mac(Protocol):
    """As much of an `hmac.HMAC` without data as is used."""

    def copy(self) -> "hmac.HMAC": ...


class Opener(Protocol):
    """The receiving half of a cipher with its MAC."""

    header_bytes: int  # how much is needed before the length is known
    mac_bytes: int
    block_bytes: int
    is_length_apart: bool  # whether the length is no part of what is encrypted

    def length(self, header: memoryview) -> int:
        """The packet's length field; asked once per packet."""

    def open(self, packet: memoryview, length: int, sequence: int, plain: memoryview) -> None:
        """Writes the `length` plain bytes of a whole packet."""


class Sealer(Protocol):
    """The sending half."""

    mac_bytes: int
    block_bytes: int
    is_length_apart: bool

    def seal(self, plain: memoryview, length: int, sequence: int, packet: memoryview) -> None:
        """Writes a whole packet with the first `length` bytes of `plain`."""


class NoCipher:
    """Neither encrypted nor authenticated; both halves."""

    __slots__ = ()

    header_bytes = _LENGTH_BYTES
    mac_bytes = 0
    block_bytes = 8
    is_length_apart = False

    def length(self, header: memoryview) -> int:
        (length,) = _U32.unpack_from(header)
        return int(length)

    def open(self, packet: memoryview, length: int, sequence: int, plain: memoryview) -> None:
        del sequence
        plain[:length] = packet[_LENGTH_BYTES : _LENGTH_BYTES + length]

    def seal(self, plain: memoryview, length: int, sequence: int, packet: memoryview) -> None:
        del sequence
        _U32.pack_into(packet, 0, length)
        packet[_LENGTH_BYTES : _LENGTH_BYTES + length] = plain[:length]


class Gcm:
    """AES-GCM, one direction; both halves."""

    __slots__ = ("_aead", "_counter", "_nonce")

    header_bytes = _LENGTH_BYTES
    mac_bytes = _TAG_BYTES
    block_bytes = 16
    is_length_apart = True

    def __init__(self, aead: AESGCM, iv: bytes) -> None:
        """`iv`: 12 bytes, of which the last 8 count packets (RFC 5647 section 7.1)."""
        self._aead = aead
        self._nonce = bytearray(iv)
        (self._counter,) = _U64.unpack_from(self._nonce, 4)

    def length(self, header: memoryview) -> int:
        (length,) = _U32.unpack_from(header)
        return int(length)

    def open(self, packet: memoryview, length: int, sequence: int, plain: memoryview) -> None:
        del sequence
        end = _LENGTH_BYTES + length + _TAG_BYTES
        sealed, header = packet[_LENGTH_BYTES:end], packet[:_LENGTH_BYTES]
        try:
            self._aead.decrypt_into(self._nonce, sealed, header, plain[:length])
        except InvalidTag:
            raise _altered() from None
        self._count()

    def seal(self, plain: memoryview, length: int, sequence: int, packet: memoryview) -> None:
        del sequence
        _U32.pack_into(packet, 0, length)
        end = _LENGTH_BYTES + length + _TAG_BYTES
        header, sealed = packet[:_LENGTH_BYTES], packet[_LENGTH_BYTES:end]
        self._aead.encrypt_into(self._nonce, plain[:length], header, sealed)
        self._count()

    def _count(self) -> None:
        self._counter = (self._counter + 1) & 0xFFFFFFFFFFFFFFFF
        _U64.pack_into(self._nonce, 4, self._counter)


class CtrThenMac:
    """AES-CTR with an HMAC over what was encrypted, one direction; both halves."""

    __slots__ = ("_cipher", "_mac", "mac_bytes")

    header_bytes = _LENGTH_BYTES
    block_bytes = 16
    is_length_apart = True

    def __init__(self, cipher: CipherContext, mac: Mac, mac_bytes: int) -> None:
        self._cipher = cipher
        self._mac = mac
        self.mac_bytes = mac_bytes

    def length(self, header: memoryview) -> int:
        (length,) = _U32.unpack_from(header)
        return int(length)

    def open(self, packet: memoryview, length: int, sequence: int, plain: memoryview) -> None:
        end = _LENGTH_BYTES + length
        _check(self._digest(packet[:end], sequence), packet[end : end + self.mac_bytes])
        self._cipher.update_into(packet[_LENGTH_BYTES:end], plain[:length])

    def seal(self, plain: memoryview, length: int, sequence: int, packet: memoryview) -> None:
        _U32.pack_into(packet, 0, length)
        end = _LENGTH_BYTES + length
        self._cipher.update_into(plain[:length], packet[_LENGTH_BYTES:end])
        packet[end : end + self.mac_bytes] = self._digest(packet[:end], sequence)

    def _digest(self, data: memoryview, sequence: int) -> bytes:
        mac = self._mac.copy()
        mac.update(_U32.pack(sequence))
        mac.update(data)
        return mac.digest()


class CtrAndMac:
    """AES-CTR with an HMAC over the plain bytes, one direction; both halves."""

    __slots__ = ("_cipher", "_first", "_mac", "mac_bytes")

    header_bytes = 16
    block_bytes = 16
    is_length_apart = False

    def __init__(self, cipher: CipherContext, mac: Mac, mac_bytes: int) -> None:
        self._cipher = cipher
        self._mac = mac
        self._first = bytearray(self.block_bytes)  # the first block of the present packet
        self.mac_bytes = mac_bytes

    def length(self, header: memoryview) -> int:
        self._cipher.update_into(header[: self.block_bytes], self._first)
        (length,) = _U32.unpack_from(self._first)
        return int(length)

    def open(self, packet: memoryview, length: int, sequence: int, plain: memoryview) -> None:
        begun = self.block_bytes - _LENGTH_BYTES
        end = _LENGTH_BYTES + length
        plain[:begun] = self._first[_LENGTH_BYTES:]
        if length > begun:
            self._cipher.update_into(packet[self.block_bytes : end], plain[begun:length])
        digest = self._digest(plain[:length], length, sequence)
        _check(digest, packet[end : end + self.mac_bytes])

    def seal(self, plain: memoryview, length: int, sequence: int, packet: memoryview) -> None:
        end = _LENGTH_BYTES + length
        digest = self._digest(plain[:length], length, sequence)
        self._cipher.update_into(_U32.pack(length), packet[:_LENGTH_BYTES])
        self._cipher.update_into(plain[:length], packet[_LENGTH_BYTES:end])
        packet[end : end + self.mac_bytes] = digest

    def _digest(self, plain: memoryview, length: int, sequence: int) -> bytes:
        mac = self._mac.copy()
        mac.update(struct.pack(">II", sequence, length))
        mac.update(plain)
        return mac.digest()


class PacketReader:
    """Packets out of the bytes of one direction, in whatever pieces they come.

    Call `feed` with what was received, `next` until it says -1, and `keep` before the bytes that
    were fed are overwritten.
    """

    __slots__ = (
        "_data",
        "_length",
        "_opener",
        "_part",
        "_position",
        "max_packet_bytes",
        "opened_bytes",
        "opened_packets",
        "sequence",
    )

    def __init__(self) -> None:
        self._opener: Opener = NoCipher()
        self._data = _NOTHING
        self._position = 0
        self._part: bytearray | None = None  # of a packet whose beginning came earlier
        self._length = -1  # of the present packet, once it is known
        self.max_packet_bytes = MAX_EARLY_PACKET_BYTES
        self.sequence = 0  # of the next packet (RFC 4253 section 6.4)
        self.opened_bytes = 0  # since the keys were last changed
        self.opened_packets = 0

    @property
    def kept_bytes(self) -> int:
        """Received and not yet taken by `next`."""
        return len(self._data) - self._position + len(self._part or b"")

    def use(self, opener: Opener) -> None:
        """Decrypts with new keys from the next packet on."""
        self._opener = opener
        self.opened_bytes = self.opened_packets = 0

    def feed(self, data: memoryview) -> None:
        """More bytes. What `next` has not taken of earlier ones is copied in front of them."""
        if self._position < len(self._data):
            data = memoryview(b"".join((self._data[self._position :], data)))
        self._data = data
        self._position = 0

    def keep(self) -> None:
        """Copies what is left of the bytes that were fed, so that these may be overwritten."""
        rest = len(self._data) - self._position
        if rest and self._is_begun(rest):
            # Of one packet: the rest of it is appended as it comes.
            if self._part is None:
                self._part = bytearray()
            self._part += self._data[self._position :]
            rest = 0
        self._data = memoryview(bytes(self._data[self._position :])) if rest else _NOTHING
        self._position = 0

    def next(self, plain: memoryview) -> int:
        """Writes the next packet to `plain`; how long its payload is, or -1: it is not complete.

        `plain` has PLAIN_BYTES. The payload, at least one byte, begins at `plain[1]`.
        """
        if self._part is not None:
            packet = self._completed()
        else:
            packet = self._data[self._position :]
            wanted = self._wanted(packet)
            if len(packet) < wanted or self._length < 0:
                return -1
            self._position += wanted
        if packet is None:
            return -1
        opener, length = self._opener, self._length
        opener.open(packet, length, self.sequence, plain)
        self._length = -1
        self.sequence = (self.sequence + 1) % _SEQUENCES
        self.opened_packets += 1
        self.opened_bytes += length
        padding = plain[0]
        payload_bytes = length - 1 - padding
        if padding < _MIN_PADDING_BYTES or payload_bytes < 1:
            raise CodecError("the peer sent a packet with wrong padding")
        return payload_bytes

    def _is_begun(self, rest: int) -> bool:
        """Whether `rest` bytes, behind nothing else, are less than a whole packet."""
        if self._part is not None:
            return False  # `next` has not been asked yet whether it completes that
        return rest < self._opener.header_bytes or (
            self._length >= 0 and rest < _LENGTH_BYTES + self._length + self._opener.mac_bytes
        )

    def _completed(self) -> memoryview | None:
        """The packet that `_part` began, with what has come since."""
        part = self._part
        assert part is not None
        while (missing := self._wanted(part) - len(part)) > 0 or self._length < 0:
            piece = self._data[self._position : self._position + missing]
            if not piece:
                return None
            part += piece
            self._position += len(piece)
        self._part = None
        return memoryview(part)

    def _wanted(self, packet: memoryview | bytearray) -> int:
        """How many bytes the packet has, or, while that is not known, its header has."""
        opener = self._opener
        if self._length < 0:
            if len(packet) < opener.header_bytes:
                return opener.header_bytes
            self._length = opener.length(memoryview(packet))
            self._check_length()
        return _LENGTH_BYTES + self._length + opener.mac_bytes

    def _check_length(self) -> None:
        opener, length = self._opener, self._length
        if length > self.max_packet_bytes:
            raise CodecError(f"the peer sent a packet of {length} bytes")
        aligned = length if opener.is_length_apart else length + _LENGTH_BYTES
        # Every packet has its padding length, a payload and 4 bytes of padding at least.
        if aligned % opener.block_bytes or length < 2 + _MIN_PADDING_BYTES:
            raise CodecError(f"the peer sent a packet of {length} bytes, which no packet has")


class PacketWriter:
    """Packets of one direction into bytes."""

    __slots__ = ("_sealer", "sealed_bytes", "sealed_packets", "sequence")

    def __init__(self) -> None:
        self._sealer: Sealer = NoCipher()
        self.sequence = 0  # of the next packet
        self.sealed_bytes = 0  # since the keys were last changed
        self.sealed_packets = 0

    def use(self, sealer: Sealer) -> None:
        """Encrypts with new keys from the next packet on."""
        self._sealer = sealer
        self.sealed_bytes = self.sealed_packets = 0

    def seal(self, plain: memoryview, payload_bytes: int, packet: memoryview) -> int:
        """Makes a packet of the payload at `plain[1]`; how many bytes of `packet` it takes.

        `plain` has room for the padding behind the payload, which is overwritten, and `packet` for
        `payload_bytes` + MAX_OVERHEAD_BYTES. They are different buffers.
        """
        sealer = self._sealer
        block = sealer.block_bytes
        unpadded = 1 + payload_bytes
        padding = block - (unpadded + (0 if sealer.is_length_apart else _LENGTH_BYTES)) % block
        if padding < _MIN_PADDING_BYTES:
            padding += block
        length = unpadded + padding
        plain[0] = padding
        plain[unpadded:length] = os.urandom(padding)
        sealer.seal(plain, length, self.sequence, packet)
        self.sequence = (self.sequence + 1) % _SEQUENCES
        self.sealed_packets += 1
        self.sealed_bytes += length
        return _LENGTH_BYTES + length + sealer.mac_bytes

    def pack(self, payload: bytes) -> bytes:
        """A packet of its own, for the few messages that are not passed on."""
        plain = memoryview(bytearray(len(payload) + MAX_OVERHEAD_BYTES))
        plain[1 : 1 + len(payload)] = payload
        packet = memoryview(bytearray(len(payload) + MAX_OVERHEAD_BYTES))
        return bytes(packet[: self.seal(plain, len(payload), packet)])


_NOTHING = memoryview(b"")


def _check(digest: bytes, received: memoryview) -> None:
    if not hmac.compare_digest(digest, received):
        raise _altered()


def _altered() -> CodecError:
    return CodecError("a packet was altered on its way")

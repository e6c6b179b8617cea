"""SSH from a peer: versions, packets, messages before the login, host certificates.

Byte 0 says which of these the rest is. For packets see `byte_choices.pieces_of`; messages are built
from the rest, some of them valid at their place; a certificate is the rest itself.
"""

import struct

from byte_choices import Choices, pieces_of
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from error_texts import check_text

from workers.proxy.layers import LayerError
from workers.proxy.ssh import messages
from workers.proxy.ssh.codec import (
    MAX_EARLY_PACKET_BYTES,
    PLAIN_BYTES,
    CodecError,
    PacketReader,
    PacketWriter,
)
from workers.proxy.ssh.host_certificate import HostCertificate, HostCertificateError, key_blob
from workers.proxy.ssh.messages import string
from workers.proxy.ssh.transport import (
    CIPHERS,
    ED25519,
    KEY_EXCHANGES,
    MACS,
    NODE_KEYS,
    ClientTransport,
    ServerTransport,
    ShownKey,
)
from workers.proxy.ssh.version import MAX_BANNER_BYTES, MAX_LINE_BYTES, VersionReader

PLAIN = memoryview(bytearray(PLAIN_BYTES))
HOST_KEY = Ed25519PrivateKey.from_private_bytes(b"h" * 32)
POINT = b"\x09" + bytes(31)  # of Curve25519
TRUSTED = b"trusted"


def check(data: bytes) -> None:
    choices = Choices(data)
    kind = choices.below(6)
    if kind == 0:
        check_version(choices)
    elif kind == 1:
        check_packets(choices)
    elif kind == 2:
        check_shape(choices.rest())
    elif kind == 3:
        check_program(choices)
    elif kind == 4:
        check_node(choices)
    else:
        check_certificate(choices)


def check_version(choices: Choices) -> None:
    is_server = bool(choices.below(2))
    stream, pieces = pieces_of(choices)
    reader = VersionReader(is_server=is_server)
    seen = 0
    for piece in pieces:
        seen += len(piece)
        try:
            found = reader.feed(piece)
        except CodecError as error:
            check_text(error)
            return
        if found is not None:
            version, rest = found
            assert version.startswith("SSH-")
            assert version.isascii()
            assert version.isprintable()
            assert stream[:seen].endswith(rest)
            assert is_server or stream.startswith(version.encode())
            return
        assert len(reader._kept) <= MAX_LINE_BYTES
        assert seen <= MAX_BANNER_BYTES + MAX_LINE_BYTES


def check_packets(choices: Choices) -> None:
    """Clear packets, as a slow reader of the whole reads them."""
    stream, pieces = pieces_of(choices)
    reader, found, failed = PacketReader(), [], False
    try:
        for piece in pieces:
            buffer = bytearray(piece)
            reader.feed(memoryview(buffer))
            while (payload_bytes := reader.next(PLAIN)) >= 0:
                found.append(bytes(PLAIN[1 : 1 + payload_bytes]))
            reader.keep()
            buffer[:] = bytes(len(buffer))
            assert reader.kept_bytes <= MAX_EARLY_PACKET_BYTES + 4
    except CodecError as error:
        check_text(error)
        failed = True
    expected, is_valid = slow_reading(stream)
    assert failed is not is_valid
    assert found == expected
    writer = PacketWriter()
    packets = b"".join(writer.pack(payload) for payload in expected)
    assert slow_reading(packets) == (expected, True)


def slow_reading(stream: bytes) -> tuple[list[bytes], bool]:
    """The payloads, and whether all of it keeps to the rules."""
    payloads = []
    while len(stream) >= 4:
        (length,) = struct.unpack_from(">I", stream)
        if (length + 4) % 8 or not 6 <= length <= MAX_EARLY_PACKET_BYTES:
            return payloads, False
        if len(stream) < 4 + length:
            break
        padding = stream[4]
        if padding < 4 or padding > length - 2:
            return payloads, False
        payloads.append(stream[5 : 4 + length - padding])
        stream = stream[4 + length :]
    return payloads, True


def check_shape(payload: bytes) -> None:
    if not payload:
        return
    PLAIN[1 : 1 + len(payload)] = payload
    PLAIN[1 + len(payload) : 1 + len(payload) + 64] = b"\xff" * 64  # nothing behind it counts
    is_good = messages.is_well_formed(PLAIN, len(payload))
    messages.disconnect_description(payload)
    if is_good and payload[0] == messages.GLOBAL_REQUEST:
        substitute = messages.host_keys_substitute(memoryview(payload))
        is_announced = payload[1:].startswith(string(b"hostkeys-00@openssh.com"))
        assert (substitute is not None) is is_announced


class Owner:
    """Carries nothing anywhere, and judges."""

    def __init__(self) -> None:
        self.reader = PacketReader()
        self.writer = PacketWriter()
        self.sent: list[bytes] = []
        self.verified = 0

    def send_message(self, payload: bytes) -> None:
        self.sent.append(payload)

    def is_trusted(self, blob: bytes) -> bool:
        return blob == TRUSTED

    def on_verified(self, _user: str) -> None:
        self.verified += 1


def check_program(choices: Choices) -> None:
    owner = Owner()
    keys = [ShownKey(ED25519, public_blob(), HOST_KEY)]
    transport = ServerTransport(owner, owner, "fuzz", {}, keys)
    transport.begin("SSH-2.0-x")
    drive(transport, choices)
    # Nobody here can sign; and before the key exchange nothing of a login is even read.
    assert owner.verified == 0
    assert not transport.is_authenticated()
    if not transport.initial_kex_done:
        assert not any(payload[0] in range(50, 80) for payload in owner.sent)


def check_node(choices: Choices) -> None:
    owner, banners = Owner(), []
    transport = ClientTransport(owner, "fuzz", {}, banners.append)
    transport.offer_keys()
    transport.begin("SSH-2.0-x")
    drive(transport, choices)
    # Nobody was asked, nobody could sign for a host.
    assert not transport.is_login_over
    assert not transport.initial_kex_done
    assert not banners


def drive(transport: ServerTransport | ClientTransport, choices: Choices) -> None:
    number = 0
    try:
        while choices and number < 40:
            payload = message(choices)
            if payload:
                transport.receive(payload, number)
            number += 1
    except LayerError as error:
        check_text(error)


def message(choices: Choices) -> bytes:
    """Any message, or one that is right somewhere."""
    kind = choices.below(8)
    if kind == 0:
        return kexinit(choices)
    if kind == 1:
        return b"\x1e" + string(POINT if choices.below(2) else choices.take(choices.byte()))
    if kind == 2:
        return b"\x15"
    if kind == 3:
        return b"\x05" + string(b"ssh-userauth")
    if kind == 4:
        method = choices.pick([b"none", b"password", b"publickey", b"keyboard-interactive", b"x"])
        rest = bytes([choices.below(2)]) + string(choices.pick([b"ssh-ed25519", b"rsa-sha2-512"]))
        rest += string(choices.pick([TRUSTED, public_blob(), b""])) + string(choices.take(80))
        return b"\x32" + string(b"user") + string(b"ssh-connection") + string(method) + rest
    if kind == 5:
        return b"\x07" + choices.take(choices.byte())
    return choices.take(1) + choices.take(choices.byte())


def kexinit(choices: Choices) -> bytes:
    lists = [KEY_EXCHANGES[1:], (ED25519, *NODE_KEYS), CIPHERS, CIPHERS, MACS, MACS]
    names = [",".join(each).encode() for each in lists] + [b"none", b"none", b"", b""]
    changed = choices.below(12)
    if changed < len(names):
        names[changed] = choices.take(choices.byte())
    if choices.below(2):
        names[0] += b",kex-strict-c-v00@openssh.com,kex-strict-s-v00@openssh.com,ext-info-c"
    follows = bytes([choices.below(2)])
    return b"\x14" + bytes(16) + b"".join(map(string, names)) + follows + bytes(4)


def check_certificate(choices: Choices) -> None:
    algorithm = choices.pick(NODE_KEYS)
    blob = choices.rest()
    key_blob(blob)
    try:
        HostCertificate(blob, algorithm).check("node1", [public_line()], 1.8e9)
    except HostCertificateError as error:
        check_text(error)
    else:
        raise AssertionError("an authority that signs nothing has signed this")


def public_line() -> bytes:
    return HOST_KEY.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def public_blob() -> bytes:
    return string(b"ssh-ed25519") + string(HOST_KEY.public_key().public_bytes_raw())

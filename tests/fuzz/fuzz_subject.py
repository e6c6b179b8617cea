"""A user certificate: who it names, beside what the cryptography package reads where it reads it.

Byte 0 says whether the rest is a certificate (DER) or tells what subject to build into one.
"""

import contextlib
from datetime import UTC

from byte_choices import Choices
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from error_texts import check_text

from workers.proxy.teleport.identity import MAX_ATTRIBUTES, Identity, IdentityError, read_identity

ED25519 = bytes.fromhex("300506032b6570")
# Common name, roles, usage, logins, route, Teleport's own of one and of two bytes, one unknown.
KINDS = [
    bytes.fromhex("550403"),
    bytes.fromhex("55040a"),
    bytes.fromhex("55040b"),
    bytes.fromhex("550407"),
    bytes.fromhex("550409"),
    bytes.fromhex("2bce0f0107"),
    bytes.fromhex("2bce0f0208"),
    bytes.fromhex("2bce0f0209"),
    bytes.fromhex("2bce0f01818f7f"),
    b"\x80",
]
UTF8, PRINTABLE, BMP, UNIVERSAL = 0x0C, 0x13, 0x1E, 0x1C
TIMES = [b"260101000000Z", b"491231235959Z", b"560229000000Z", b"000101000060Z", b"2601010000Z"]


def check(data: bytes) -> None:
    choices = Choices(data)
    certificate = build(choices) if choices.below(2) else choices.rest()
    try:
        identity = read_identity(certificate)
    except IdentityError as error:
        check_text(error)
        return
    check_identity(identity, certificate)
    # Its reader is strict: it refuses many that Teleport writes, some only when a part is asked for.
    with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
        compare(identity, x509.load_der_x509_certificate(certificate))


def check_identity(identity: Identity, certificate: bytes) -> None:
    assert identity.user
    assert identity.roles
    assert all((*identity.roles, *identity.usages, *identity.logins, *identity.active_requests))
    assert len(identity.roles) <= MAX_ATTRIBUTES
    assert identity.public_key in certificate
    for moment in (identity.not_before, identity.not_after):
        assert moment.tzinfo is UTC
        assert moment.isoformat()
    texts = "".join((identity.user, *identity.roles, identity.root_cluster))
    assert texts.encode().decode() == texts
    assert len(texts.encode()) <= 3 * len(certificate)


def compare(identity: Identity, other: x509.Certificate) -> None:
    names = other.subject
    dates = other.not_valid_before_utc, other.not_valid_after_utc
    values = [
        [a.value for a in names.get_attributes_for_oid(x509.ObjectIdentifier(oid))]
        for oid in ("2.5.4.3", "2.5.4.10")
    ]
    key = other.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert (identity.not_before, identity.not_after) == dates
    assert identity.user == values[0][0]
    assert identity.roles == tuple(value for value in values[1] if value)
    assert identity.public_key == key


def build(choices: Choices) -> bytes:
    """A certificate around a subject; two attributes are always there unless a byte says no."""
    pairs = [] if choices.below(16) == 15 else [attribute(KINDS[0], UTF8, b"alice")]
    pairs += [] if choices.below(16) == 15 else [attribute(KINDS[1], PRINTABLE, b"access")]
    not_before, not_after = choices.pick(TIMES), choices.pick(TIMES)
    is_one_set = choices.below(2)
    while choices:
        tag = choices.pick([UTF8, UTF8, PRINTABLE, BMP, UNIVERSAL, 0x16, 0x30, 0x1F])
        pairs.append(attribute(choices.pick(KINDS), tag, choices.take(choices.below(40))))
    sets = [b"".join(pairs)] if is_one_set else pairs
    subject = wrap(0x30, b"".join(wrap(0x31, each) for each in sets))
    issuer = wrap(0x30, wrap(0x31, attribute(KINDS[0], UTF8, b"demo.test")))
    validity = wrap(0x30, wrap(0x17, not_before) + wrap(0x17, not_after))
    key = wrap(0x30, ED25519 + wrap(0x03, b"\0" + b"k" * 32))
    serial = wrap(0xA0, wrap(0x02, b"\2")) + wrap(0x02, b"\1")
    signed = wrap(0x30, serial + ED25519 + issuer + validity + subject + key)
    return wrap(0x30, signed + ED25519 + wrap(0x03, bytes(65)))


def attribute(kind: bytes, tag: int, value: bytes) -> bytes:
    return wrap(0x30, wrap(0x06, kind) + wrap(tag, value))


def wrap(tag: int, contents: bytes) -> bytes:
    size = len(contents)
    length = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2)
    if size >= 256 or size < 128:
        return bytes([tag]) + length + contents
    return bytes([tag, 0x81, size]) + contents

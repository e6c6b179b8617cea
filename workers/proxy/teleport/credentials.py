"""Certificates and private keys as tsh stores them: PEM in, values out. Pure.

Source: `api/utils/keys/privatekey.go`, `lib/client/keystore.go`.
"""

import base64
import binascii
import contextlib
import re
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_ssh_private_key,
)

from workers.proxy.teleport.errors import HardwareKeyError
from workers.proxy.teleport.identity import Identity, IdentityError, read_identity

MAX_PEM_BYTES = 1024 * 1024
# tsh makes RSA keys of up to 4096 bits, three kilobytes. To check one takes time with the cube of its
# size: a second for this, a minute for three times as much.
MAX_KEY_BYTES = 16 * 1024

_BOUNDARY = re.compile(rb"-----(BEGIN|END) ([A-Z0-9 ]{1,64})-----", re.ASCII)


# What the cryptography package raises for a key that it cannot read; the last two are not in its
# documentation.
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, NotImplementedError, InternalError)


class CredentialError(ValueError):
    """A file of the tsh home does not hold what it should."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user's TLS certificate and key.

    `key` is unencrypted PKCS#8 PEM, whatever form the file had; it stays out of `repr`.
    """

    certificate: bytes  # PEM, the leaf alone
    key: bytes = field(repr=False)
    identity: Identity
    fingerprint: bytes  # SHA-256 of the DER certificate


def pem_blocks(data: bytes) -> list[tuple[str, bytes]]:
    """The blocks of a PEM file as (label, DER bytes); broken ones are left out.

    Raises:
        CredentialError: the file is larger than MAX_PEM_BYTES.
    """
    if len(data) > MAX_PEM_BYTES:
        raise CredentialError(f"{len(data)} bytes are too many")
    blocks = []
    # One pass, whatever the file holds: a block that never ends costs no search for its end.
    begin: re.Match[bytes] | None = None
    for boundary in _BOUNDARY.finditer(data):
        if boundary[1] == b"BEGIN":
            begin = boundary
        elif begin is not None and begin[2] == boundary[2]:
            with contextlib.suppress(binascii.Error):
                body = base64.b64decode(data[begin.end() : boundary.start()])
                blocks.append((begin[2].decode(), body))
            begin = None
    return blocks


def certificate_pem(certificate: bytes) -> bytes:
    """A DER certificate as PEM (RFC 7468)."""
    body = base64.encodebytes(certificate).replace(b"\n", b"")
    lines = [body[i : i + 64] for i in range(0, len(body), 64)]
    return b"\n".join([b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----", b""])


def parse_authorities(data: bytes) -> tuple[bytes, ...]:
    """The certificates (DER) of a file under `cas/`.

    Raises:
        CredentialError: it holds none.
    """
    found = tuple(body for label, body in pem_blocks(data) if label == "CERTIFICATE")
    if not found:
        raise CredentialError("it holds no certificate")
    return found


def parse_private_key(data: bytes) -> PrivateKeyTypes:
    """The private key in a PEM file.

    Raises:
        HardwareKeyError: the file only points to a key in a hardware token.
        CredentialError: it holds no private key that can be read.
    """
    if not data.strip():
        raise CredentialError("it is empty")  # left by a lock, or a login that was cut off
    if len(data) > MAX_KEY_BYTES:
        raise CredentialError(f"a private key of {len(data)} bytes is too large")
    for label, body in pem_blocks(data):
        if label == "PIV YUBIKEY PRIVATE KEY":
            raise HardwareKeyError("the private key is in a hardware token")
        if not label.endswith("PRIVATE KEY"):
            continue
        try:
            if label == "OPENSSH PRIVATE KEY":
                return load_ssh_private_key(data, password=None)
            # The label is not trusted: this tries PKCS#8, PKCS#1 and SEC1 alike.
            return load_der_private_key(body, password=None)
        except _UNREADABLE as error:
            raise CredentialError("its private key cannot be read") from error
    raise CredentialError("it holds no private key")


def parse_credentials(certificate: bytes, key: bytes) -> Credentials:
    """A user certificate (PEM) with its private key (PEM).

    Raises:
        HardwareKeyError: the key is in a hardware token.
        CredentialError: either cannot be read, or they do not belong together.
    """
    leaf = next((b for label, b in pem_blocks(certificate) if label == "CERTIFICATE"), None)
    if leaf is None:
        raise CredentialError("the certificate file holds no certificate")
    try:
        identity = read_identity(leaf)
    except IdentityError as error:
        raise CredentialError(str(error)) from error
    private = parse_private_key(key)
    public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public != identity.public_key:
        raise CredentialError("certificate and private key do not belong together")
    return Credentials(
        certificate=certificate_pem(leaf),
        key=private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        identity=identity,
        fingerprint=sha256(leaf).digest(),
    )

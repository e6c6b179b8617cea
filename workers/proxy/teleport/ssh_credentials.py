"""What logging in to an SSH host takes, from the files of a tsh home or a cluster's answer. Pure.

    keys/<proxy>/<user>                          private key (until v16 the one key of everything)
    keys/<proxy>/<user>-ssh/<cluster>-cert.pub   certificate, one line
    known_hosts                                  host authorities of all clusters

Source: `api/utils/keypaths/keypaths.go`, `api/utils/sshutils`, `lib/client/keystore.go`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
)

from workers.proxy.teleport.credentials import CredentialError, parse_private_key

MAX_KNOWN_HOSTS_BYTES = 4 * 1024 * 1024
# A user with thousands of roles and traits still fits.
MAX_CERTIFICATE_BYTES = 512 * 1024
# Two at a time while one is rotated; more were forgotten there.
MAX_AUTHORITIES = 32
# What a certificate without end says (PROTOCOL.certkeys of OpenSSH).
FOREVER = 2**64 - 1

SshPrivateKey: TypeAlias = Ed25519PrivateKey | EllipticCurvePrivateKey | RSAPrivateKey

# What the cryptography package raises for a line that it cannot read.
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, NotImplementedError, InternalError)


@dataclass(frozen=True, slots=True)
class SshCredentials:
    """For one login to one host.

    `certificate` is one OpenSSH public-key line for `private_key`; `host_authorities` are lines of
    the same kind, plain keys, of which one must have signed the host's certificate. `host` must be
    among that certificate's principals. `user` is the one to log in as.
    """

    private_key: SshPrivateKey = field(repr=False)
    certificate: bytes
    host_authorities: tuple[bytes, ...]
    host: str
    user: str
    cluster: str


@dataclass(frozen=True, slots=True)
class UserCertificate:
    """A private key and the certificate for it. `not_after` is None for one without end."""

    private_key: SshPrivateKey = field(repr=False)
    line: bytes
    not_after: datetime | None


def parse_ssh_key(data: bytes) -> SshPrivateKey:
    """The private key in a file.

    Raises:
        HardwareKeyError: the file only points to a key in a hardware token.
        CredentialError: it holds no private key that SSH can use.
    """
    key = parse_private_key(data)
    if not isinstance(key, SshPrivateKey):
        raise CredentialError("its private key is of a kind that SSH does not know")
    return key


def public_line(key: SshPrivateKey) -> bytes:
    """The public key as one line."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def user_certificate(key: SshPrivateKey, data: bytes) -> UserCertificate:
    """A private key and the certificate for it.

    Raises:
        CredentialError: this is no user certificate, or not for the key.
    """
    line = data.strip()
    if len(line) > MAX_CERTIFICATE_BYTES:
        raise CredentialError(f"an SSH certificate of {len(line)} bytes is too large")
    if b"\n" in line:
        raise CredentialError("the SSH certificate has more than one line")
    try:
        certificate = load_ssh_public_identity(line)
        holder = (
            certificate.public_key() if isinstance(certificate, SSHCertificate) else certificate
        )
        public = holder.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    except _UNREADABLE as error:
        raise CredentialError("the SSH certificate cannot be read") from error
    if not isinstance(certificate, SSHCertificate):
        raise CredentialError("there is an SSH key in the place of the certificate")
    if certificate.type is not SSHCertificateType.USER:
        raise CredentialError("the SSH certificate is not one of a user")
    if public != public_line(key):
        raise CredentialError("SSH certificate and private key do not belong together")
    return UserCertificate(key, line, _moment(certificate.valid_before))


def _moment(seconds: int) -> datetime | None:
    try:
        return None if seconds == FOREVER else datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None  # beyond the year 9999


def known_authorities(known_hosts: bytes, cluster: str) -> tuple[bytes, ...]:
    """The host authorities of a cluster in a known_hosts file, as key lines without comment.

    The format is OpenSSH's (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT), with the cluster's name among the
    names of the line. What cannot be read is left out.
    """
    wanted = cluster.lower().encode()
    return authorities(
        b" ".join(words[2:4])
        for words in _marked_lines(known_hosts)
        if wanted in words[1].lower().split(b",")
    )


def _marked_lines(known_hosts: bytes) -> Iterator[list[bytes]]:
    for line in known_hosts.splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] == b"@cert-authority":
            yield words


def authorities(lines: Iterable[bytes]) -> tuple[bytes, ...]:
    """Those of the lines that are public keys, each once, without comment."""
    found: dict[bytes, None] = {}
    for line in lines:
        with contextlib.suppress(*_UNREADABLE):
            # A certificate is refused here: an authority is a plain key.
            key = load_ssh_public_identity(b" ".join(line.split()[:2]))
            if not isinstance(key, SSHCertificate):
                found[key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)] = None
        if len(found) == MAX_AUTHORITIES:
            break
    return tuple(found)

"""Who VNet is for the SSH clients of this machine, and whom of them it trusts.

    host authority          new in each run, in memory alone
    host certificate        new for each connection, for the name that was asked for
    plain host key          kept over runs, for clients that know no certificates
    id_vnet.pub             the only key that clients may show

Source: `lib/vnet/ssh_handler.go`, `lib/vnet/opensshconfig.go` of Teleport; PROTOCOL.certkeys of OpenSSH.
"""

import base64
import binascii
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization.ssh import (
    SSHCertificateBuilder,
    SSHCertificateType,
)

from workers.proxy.ssh.config_text import IDENTITY_PUBLIC
from workers.proxy.ssh.files import FileError, HomeFiles

MAX_PUBLIC_KEY_BYTES: Final = 10_000
_SERIAL: Final = 1
_FOR_EVER: Final = 2**64 - 1

# Device, inode, size, times of modification and change.
_Stamp: TypeAlias = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class HostKeys:
    """What one connection shows. `certificate_line` is an OpenSSH public-key line."""

    certificate_line: bytes
    certificate_key: Ed25519PrivateKey
    plain_key: Ed25519PrivateKey


class LocalIdentity:
    """See the module. `plain_key` is a new one until the one that is kept has been read."""

    def __init__(self, home: Path) -> None:
        self.plain_key = Ed25519PrivateKey.generate()
        self._files = HomeFiles(home)
        self._public_path = home / IDENTITY_PUBLIC
        self._authority = Ed25519PrivateKey.generate()
        self._trusted: bytes | None = None
        self._stamp: _Stamp | None = None

    @property
    def authority_line(self) -> bytes:
        """The public half of the host authority."""
        return public_line(self._authority)

    @property
    def plain_line(self) -> bytes:
        """The public half of the plain host key."""
        return public_line(self.plain_key)

    def host_key_for(self, name: str) -> HostKeys:
        """A new host key with a certificate for a DNS name, with and without the trailing dot."""
        bare = name.removesuffix(".").encode()
        key = Ed25519PrivateKey.generate()
        certificate = (
            SSHCertificateBuilder()
            .public_key(key.public_key())
            .serial(_SERIAL)
            .type(SSHCertificateType.HOST)
            .key_id(b"")
            .valid_principals([bare + b".", bare])
            .valid_after(0)
            .valid_before(_FOR_EVER)
            .sign(self._authority)
        )
        return HostKeys(certificate.public_bytes(), key, self.plain_key)

    def is_trusted(self, key_blob: bytes) -> bool:
        """Whether this public key (RFC 4253 section 6.6) is the one of `id_vnet.pub`, as it is now."""
        try:
            found = os.lstat(self._public_path)
            stamp = (
                found.st_dev,
                found.st_ino,
                found.st_size,
                found.st_mtime_ns,
                found.st_ctime_ns,
            )
            if stamp != self._stamp:
                data = self._files.read(IDENTITY_PUBLIC, MAX_PUBLIC_KEY_BYTES)
                self._trusted, self._stamp = parse_public_key(data or b""), stamp
        except (OSError, FileError):
            self._trusted = self._stamp = None
        return self._trusted is not None and key_blob == self._trusted


def public_line(key: Ed25519PrivateKey) -> bytes:
    """`ssh-ed25519 AAAA...` without a comment or an end of line."""
    return key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """The key in the format of OpenSSH, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def parse_private_key(data: bytes) -> Ed25519PrivateKey | None:
    """The Ed25519 key in a file of OpenSSH's format; None if it holds none, or one with a password."""
    try:
        key = serialization.load_ssh_private_key(data, None)
    except Exception:  # noqa: BLE001 - on damaged files the library raises more than it names
        return None
    return key if isinstance(key, Ed25519PrivateKey) else None


def parse_public_key(data: bytes) -> bytes | None:
    """The first public key of an authorized_keys file (sshd(8)), as its blob; None without one."""
    for line in data.splitlines():
        if line.lstrip().startswith(b"#"):
            continue
        words = line.split()
        for kind, encoded in itertools.pairwise(words):
            try:
                blob = base64.b64decode(encoded, validate=True)
            except binascii.Error:
                continue
            if blob.startswith(len(kind).to_bytes(4, "big") + kind):
                return blob
    return None

"""Whether a node is the one that was asked for: its host certificate (OpenSSH, PROTOCOL.certkeys).

There is no trust on first use and no plain host key: a node shows a certificate that one of the
cluster's host authorities has signed for the host that was dialled, or it is not logged in to. Pure.
"""

import base64
import binascii
import itertools
from collections.abc import Sequence

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
)

from workers.proxy.ssh.messages import take_string
from workers.proxy.ssh.signatures import (
    CERTIFICATE_ENDING,
    RSA_ALGORITHMS,
    PublicKey,
    algorithms_of,
)

# Clocks of the cluster and of this machine may differ so much.
MAX_SKEW_SECONDS = 60
MAX_CERTIFICATE_BYTES = 32 * 1024
MIN_RSA_BITS = 2048

_FOR_EVER = 2**64 - 1
# What the cryptography package raises for bytes that it cannot read.
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, NotImplementedError, InternalError)


class HostCertificateError(Exception):
    """The node cannot be trusted. The text says why, in one sentence that may be shown."""


class HostCertificate:
    """A host key as it was shown, read and not yet trusted."""

    __slots__ = ("_certificate", "blob", "key")

    def __init__(self, blob: bytes, algorithm: str) -> None:
        """`algorithm` is the host key algorithm agreed on, of a certificate.

        Raises:
            HostCertificateError: this is no certificate for it.
        """
        if len(blob) > MAX_CERTIFICATE_BYTES:
            raise HostCertificateError("its host certificate is too large")
        try:
            kind, _ = take_string(blob, 0)
            certificate = load_ssh_public_identity(kind + b" " + base64.b64encode(blob))
            if not isinstance(certificate, SSHCertificate):
                raise HostCertificateError("it shows a host key that is not a certificate")
            key = certificate.public_key()
        except _UNREADABLE:
            raise HostCertificateError("its host certificate cannot be read") from None
        if algorithm.removesuffix(CERTIFICATE_ENDING) not in algorithms_of(key):
            raise HostCertificateError("its host certificate is not for the algorithm agreed on")
        if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
            raise HostCertificateError(f"its host key has only {key.key_size} bits")
        self.blob = blob
        self.key: PublicKey = key
        self._certificate = certificate

    def check(self, host: str, authorities: Sequence[bytes], now: float) -> None:
        """Whether it stands for `host`, at `now` (seconds since 1970).

        `authorities` are lines of authorized_keys with plain keys.

        Raises:
            HostCertificateError: it does not.
        """
        certificate = self._certificate
        if certificate.type is not SSHCertificateType.HOST:
            raise HostCertificateError("its certificate is one of a user, not of a host")
        self._check_signature(authorities)
        names = [name.decode(errors="replace").casefold() for name in certificate.valid_principals]
        # No principals at all would mean every host; no cluster issues such a certificate.
        if host.casefold() not in names:
            raise HostCertificateError(f"its host certificate is not for {host}")
        if now + MAX_SKEW_SECONDS < certificate.valid_after:
            raise HostCertificateError(
                "its host certificate is not valid yet; check the clock of this machine"
            )
        # As in OpenSSH the end is no part of the time; a certificate without end says 2**64 - 1.
        if certificate.valid_before != _FOR_EVER and (
            now - MAX_SKEW_SECONDS >= certificate.valid_before
        ):
            raise HostCertificateError("its host certificate has expired")
        if certificate.critical_options:
            raise HostCertificateError("its host certificate has options that VNet does not know")

    def _check_signature(self, authorities: Sequence[bytes]) -> None:
        certificate = self._certificate
        try:
            signer = certificate.signature_key()
            line = signer.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            blob = key_blob(line)
            if blob is None or blob not in {key_blob(authority) for authority in authorities}:
                raise HostCertificateError(
                    "its host certificate is signed by an authority that is not the cluster's"
                )
            if isinstance(signer, RSAPublicKey):
                self._check_hash(signer)
            certificate.verify_cert_signature()
        except (InvalidSignature, *_UNREADABLE):
            raise HostCertificateError("the signature of its host certificate is wrong") from None

    def _check_hash(self, signer: RSAPublicKey) -> None:
        """The cryptography package takes SHA-1 from RSA keys, and does not say what it took.

        A signature ends the certificate: string(string(algorithm) + string(as long as the key)).
        """
        signature_bytes = 4 + (signer.key_size + 7) // 8
        if not self.blob[:-signature_bytes].endswith(tuple(x.encode() for x in RSA_ALGORITHMS)):
            raise HostCertificateError("its host certificate is signed with SHA-1")


def key_blob(line: bytes) -> bytes | None:
    """The key in a line of authorized_keys (sshd(8)), options and comment aside."""
    words = line.split()
    for kind, encoded in itertools.pairwise(words):
        try:
            blob = base64.b64decode(encoded, validate=True)
            if take_string(blob, 0)[0] == kind:
                return blob
        except (binascii.Error, ValueError):
            continue
    return None

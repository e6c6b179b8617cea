"""Certificate authorities of a cluster, and the certificates they issue.

Every cluster has a user CA and a host CA, each with a TLS and an SSH key. One more CA, the web
CA, stands for the system's public CAs: it signs what a proxy shows to browsers and TCP apps.
Keys are made here and never leave the process, but for the logged-in user's own.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from demo.cluster.identity import Attribute, Identity, encode_subject, go_attribute

# Teleport's authorities live ten years.
CA_LIFETIME = timedelta(days=3650)
# Clocks differ: Teleport dates everything back by a minute (lib/tlsca, lib/sshca).
BACKDATE = timedelta(minutes=1)

TlsKey = ec.EllipticCurvePrivateKey
TlsPublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A TLS key with its certificate."""

    key: TlsKey
    certificate: x509.Certificate

    def certificate_pem(self) -> bytes:
        """The certificate as PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """The key as PKCS#8 PEM, as Teleport writes ECDSA keys."""
        return private_key_pem(self.key)


@dataclass(frozen=True, slots=True)
class Authority:
    """One CA: `tls` signs X.509 certificates, `ssh` signs OpenSSH certificates."""

    cluster: str
    tls: KeyPair
    ssh: ed25519.Ed25519PrivateKey

    def ssh_public_line(self) -> bytes:
        """The SSH CA key as an authorized_keys line without comment."""
        return ssh_public_line(self.ssh.public_key())


def private_key_pem(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey,
) -> bytes:
    """A private key as unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def ssh_public_line(key: ed25519.Ed25519PublicKey | rsa.RSAPublicKey) -> bytes:
    """A public key as an authorized_keys line without comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def make_authority(cluster: str, now: datetime) -> Authority:
    """A new CA whose subject is CN=O=`cluster` and a number, as every Teleport CA's.

    The number keeps the CAs of one cluster apart while they are rotated (lib/tlsca).
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            go_attribute(NameOID.ORGANIZATION_NAME, cluster),
            go_attribute(NameOID.COMMON_NAME, cluster),
            go_attribute(NameOID.SERIAL_NUMBER, str(x509.random_serial_number())),
        ]
    )
    builder = _builder(name, name, key.public_key(), now - BACKDATE, now + CA_LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(is_ca=True), critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    tls = KeyPair(key, builder.sign(key, hashes.SHA256()))
    return Authority(cluster, tls, ed25519.Ed25519PrivateKey.generate())


def issue_user_certificate(
    authority: Authority, identity: Identity, public_key: TlsPublicKey, not_before: datetime
) -> bytes:
    """A client certificate (PEM) for `identity`, valid until `identity.expires`."""
    issuer = authority.tls.certificate.subject
    builder = _builder(encode_subject(identity), issuer, public_key, not_before, identity.expires)
    certificate = _sign_leaf(builder, authority)
    return certificate.public_bytes(serialization.Encoding.PEM)


def issue_host_certificate(
    authority: Authority, names: Iterable[str], role: str, now: datetime
) -> KeyPair:
    """A server certificate of a Teleport service: its role in O, its cluster in TeleportCluster."""
    cluster = x509.ObjectIdentifier(Attribute.TELEPORT_CLUSTER.value)
    subject = x509.Name(
        [
            go_attribute(NameOID.ORGANIZATION_NAME, role),
            go_attribute(NameOID.COMMON_NAME, str(uuid.uuid4())),
            go_attribute(cluster, authority.cluster),
        ]
    )
    return _issue_server(authority, subject, names, now)


def issue_web_certificate(authority: Authority, names: Iterable[str], now: datetime) -> KeyPair:
    """A server certificate as a public CA would give it to the proxy's host."""
    names = tuple(names)
    # Clients look at the alternative names; the common name is too short for some hosts.
    subject = x509.Name([go_attribute(NameOID.COMMON_NAME, names[0][:64])])
    return _issue_server(authority, subject, names, now)


def _issue_server(
    authority: Authority, subject: x509.Name, names: Iterable[str], now: datetime
) -> KeyPair:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.tls.certificate.subject
    builder = _builder(subject, issuer, key.public_key(), now - BACKDATE, now + CA_LIFETIME)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([_general_name(name) for name in dict.fromkeys(names)]),
        critical=False,
    )
    return KeyPair(key, _sign_leaf(builder, authority))


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: TlsPublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before.astimezone(UTC))
        .not_valid_after(not_after.astimezone(UTC))
    )


def _sign_leaf(builder: x509.CertificateBuilder, authority: Authority) -> x509.Certificate:
    issuer = authority.tls
    usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    identifier = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier.value),
            critical=False,
        )
        .sign(issuer.key, hashes.SHA256())
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not is_ca,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )

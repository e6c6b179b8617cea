"""SSH keys and certificates of tests, and homes that hold them in every layout of tsh."""

from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
)
from teleport_fakes import CLUSTER, NOW, PROXY, USER_KEY, pem, pem_key, user_certificate, write_home

AUTHORITY_KEY = ed25519.Ed25519PrivateKey.generate()
RSA_KEY = rsa.generate_private_key(65537, 2048)
KINDS = {
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "ecdsa": ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-384": ec.generate_private_key(ec.SECP384R1()),
    "rsa": RSA_KEY,
}
SSH_KEY = KINDS["ed25519"]


def line(key) -> bytes:
    """The public key of a private one."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def certificate(
    public_key,
    *,
    logins=("alice", "root"),
    not_after=NOW + timedelta(hours=12),
    kind=SSHCertificateType.USER,
) -> bytes:
    """One line; `not_after` of None is one without end."""
    builder = (
        SSHCertificateBuilder()
        .public_key(public_key)
        .type(kind)
        .key_id(b"alice")
        .valid_principals([login.encode() for login in logins])
        .valid_after(int((NOW - timedelta(minutes=1)).timestamp()))
        .valid_before(2**64 - 1 if not_after is None else int(not_after.timestamp()))
        .add_extension(b"permit-pty", b"")
    )
    return builder.sign(AUTHORITY_KEY).public_bytes()


def openssh_pem(key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def known_hosts_line(cluster: str, key, hosts: str = "") -> bytes:
    hosts = hosts or f"{PROXY},{cluster},*.{cluster}"
    return f"@cert-authority {hosts} ".encode() + line(key) + b" type=host\n"


HOST_AUTHORITY = ed25519.Ed25519PrivateKey.generate()


def write_ssh(
    home: Path, key=SSH_KEY, *, clusters=(CLUSTER,), user="alice", proxy=PROXY, **options
) -> Path:
    """Adds key, certificates and known_hosts to a home with a login; returns the key's folder."""
    folder = home / "keys" / proxy
    (folder / user).write_bytes(openssh_pem(key))
    (folder / f"{user}-ssh").mkdir(exist_ok=True)
    for cluster in clusters:
        path = folder / f"{user}-ssh" / f"{cluster}-cert.pub"
        path.write_bytes(certificate(key.public_key(), **options) + b"\n")
    (home / "known_hosts").write_bytes(known_hosts_line(CLUSTER, HOST_AUTHORITY))
    return folder


def write_old_home(home: Path) -> Path:
    """A home in the layout of version 16: one key, RSA, for everything."""
    folder = home / "keys" / PROXY
    write_home(home)
    for name in ("alice.crt", "alice.key"):
        (folder / name).unlink()
    (folder / "alice-x509.pem").write_bytes(pem(user_certificate(key=RSA_KEY)))
    write_ssh(home, RSA_KEY)
    (folder / "alice").write_bytes(pem_key(RSA_KEY, PrivateFormat.TraditionalOpenSSL))
    return folder


__all__ = [
    "HOST_AUTHORITY",
    "KINDS",
    "RSA_KEY",
    "SSH_KEY",
    "USER_KEY",
    "certificate",
    "known_hosts_line",
    "line",
    "openssh_pem",
    "write_old_home",
    "write_ssh",
]

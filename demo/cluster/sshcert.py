"""OpenSSH user certificates as lib/sshca makes them."""

import json
from datetime import datetime

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    SSHCertificateBuilder,
    SSHCertificateType,
    load_ssh_public_key,
)

from demo.cluster.authorities import BACKDATE, Authority
from demo.cluster.errors import RequestError
from demo.cluster.identity import Identity

SshPublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


def parse_ssh_public_key(line: bytes) -> SshPublicKey:
    """The key in an authorized_keys line.

    Raises:
        RequestError: it is none, or of a kind that cannot be certified.
    """
    try:
        key = load_ssh_public_key(line.strip())
    except ValueError as error:
        raise RequestError(f"the SSH public key cannot be read: {error}") from error
    if not isinstance(key, SshPublicKey):
        raise RequestError("the SSH public key is of an unsupported kind")
    return key


def issue_ssh_user_certificate(
    authority: Authority, identity: Identity, public_key: SshPublicKey, now: datetime
) -> bytes:
    """A user certificate as an authorized_keys line with a trailing newline."""
    builder = (
        SSHCertificateBuilder()
        .public_key(public_key)
        .serial(0)
        .type(SSHCertificateType.USER)
        .key_id(identity.user.encode())
        .valid_principals([name.encode() for name in identity.principals])
        .valid_after((now - BACKDATE).timestamp())
        .valid_before(identity.expires.timestamp())
    )
    for name, value in sorted(_extensions(identity).items()):
        builder = builder.add_extension(name.encode(), value.encode())
    return builder.sign(authority.ssh).public_bytes() + b"\n"


def private_key_openssh(key: ed25519.Ed25519PrivateKey) -> bytes:
    """A private key in OpenSSH's own format."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def _extensions(identity: Identity) -> dict[str, str]:
    traits = {name: list(values) for name, values in identity.traits.items()}
    found = {
        "permit-pty": "",
        "permit-port-forwarding": "",
        "permit-agent-forwarding": "",
        "login-ip": identity.login_ip,
        "private-key-policy": "none",
        "teleport-roles": json.dumps({"version": "v1", "roles": list(identity.roles)}),
        "teleport-route-to-cluster": identity.route_to_cluster,
        "teleport-traits": json.dumps(traits),
    }
    if identity.access_requests:
        requests = {"access_requests": list(identity.access_requests)}
        found["teleport-active-requests"] = json.dumps(requests)
    if identity.mfa_verified:
        found["mfa-verified"] = identity.mfa_verified
    return {name: value for name, value in found.items() if value or name.startswith("permit-")}

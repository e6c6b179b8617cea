"""Who may log in to an SSH node, and with what certificate a node shows who it is. Pure.

PROTOCOL.certkeys of OpenSSH; which principals, extensions and checks: lib/sshca, lib/srv.
"""

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from ipaddress import ip_address, ip_network

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    SSHCertificateBuilder,
    SSHCertificateType,
    load_ssh_public_identity,
)

from demo.cluster.authorities import BACKDATE, Authority, make_authority, ssh_public_line
from demo.cluster.config import Node
from demo.cluster.errors import AccessError
from demo.cluster.state import ClusterState

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
# How far a certificate with a wrong date is off.
_WRONG_BY = timedelta(days=2)


def user_authorities(state: ClusterState) -> tuple[bytes, ...]:
    """The user CAs that nodes of this cluster trust (authorized_keys lines): a root's users too."""
    clusters = (state, *((state.root,) if state.root else ()))
    return tuple(cluster.user_ca.ssh_public_line() for cluster in clusters)


def check_login(
    state: ClusterState, node: Node, login: str, certificate_line: bytes, client_address: str
) -> None:
    """Decides whether the owner of a user certificate may log in as `login`.

    Raises:
        AccessError: with the reason, which is for the log.
    """
    denied = f"access denied to {login} connecting to {node.hostname}"
    certificate = _parse(certificate_line, denied)
    _check_signature(certificate, user_authorities(state), denied)
    now = state.now().timestamp()
    if not certificate.valid_after <= now < certificate.valid_before:
        raise AccessError(f"{denied}: the certificate has expired or is not valid yet")
    if login.encode() not in certificate.valid_principals:
        raise AccessError(f"{denied}: the certificate does not allow this login")
    _check_critical_options(certificate, client_address, denied)
    roles = json.loads(certificate.extensions.get(b"teleport-roles", b"{}")).get("roles", ())
    if set(node.allowed_roles).isdisjoint(roles):
        raise AccessError(f"{denied}: no role allows it")
    if node.session_mfa and not certificate.extensions.get(b"mfa-verified"):
        raise AccessError(f"{denied}: access to resource requires MFA")


def _parse(line: bytes, denied: str) -> SSHCertificate:
    try:
        certificate = load_ssh_public_identity(line)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise AccessError(f"{denied}: {error}") from error
    if not isinstance(certificate, SSHCertificate):
        raise AccessError(f"{denied}: a key without a certificate")
    if certificate.type is not SSHCertificateType.USER:
        raise AccessError(f"{denied}: the certificate is a host's")
    return certificate


def _check_signature(
    certificate: SSHCertificate, authorities: Iterable[bytes], denied: str
) -> None:
    signer = certificate.signature_key()
    # All authorities of embedded clusters have Ed25519 keys.
    known = isinstance(signer, ed25519.Ed25519PublicKey) and (
        ssh_public_line(signer) in set(authorities)
    )
    try:
        certificate.verify_cert_signature()
    except InvalidSignature as error:
        raise AccessError(f"{denied}: the certificate is forged") from error
    if not known:
        raise AccessError(f"{denied}: the certificate is of an unknown authority")


def _check_critical_options(certificate: SSHCertificate, client_address: str, denied: str) -> None:
    for name, value in certificate.critical_options.items():
        if name != b"source-address":
            raise AccessError(f"{denied}: the critical option {name!r} is unknown")
        networks = [ip_network(text.strip()) for text in value.decode().split(",")]
        if not any(ip_address(client_address) in network for network in networks):
            raise AccessError(f"{denied}: the certificate is not for {client_address}")


def host_principals(state: ClusterState, node: Node) -> tuple[str, ...]:
    """The names of a node in its host certificate."""
    names = (node.uuid, node.hostname)
    return (*(f"{name}.{state.name}" for name in names), *names, *_LOCAL_NAMES)


def issue_host_certificate(state: ClusterState, node: Node, key: ed25519.Ed25519PublicKey) -> bytes:
    """The host certificate of a node (one public-key line), wrong in the way a fault wants it.

    Of the fault `plain_key` it knows nothing: whoever shows the certificate leaves it away.
    """
    now = state.now()
    begins, ends, kind = now - BACKDATE, None, SSHCertificateType.HOST
    principals, authority = host_principals(state, node), state.host_ca
    match state.faults.host_certificate:
        case "expired":
            begins, ends = now - 2 * _WRONG_BY, now - _WRONG_BY
        case "not_yet_valid":
            begins = now + _WRONG_BY
        case "wrong_principal":
            principals = tuple(f"other-{name}" for name in principals)
        case "wrong_ca":
            authority = make_authority(state.name, now)
        case "user_type":
            kind = SSHCertificateType.USER
    return _sign(authority, node, key, kind, principals, begins, ends)


def _sign(
    authority: Authority,
    node: Node,
    key: ed25519.Ed25519PublicKey,
    kind: SSHCertificateType,
    principals: tuple[str, ...],
    begins: datetime,
    ends: datetime | None,
) -> bytes:
    builder = (
        SSHCertificateBuilder()
        .public_key(key)
        .serial(0)
        .type(kind)
        .key_id(node.uuid.encode())
        .valid_principals([name.encode() for name in principals])
        .valid_after(begins.timestamp())
        .valid_before(ends.timestamp() if ends else 2**64 - 1)
    )
    for name, value in (("x-teleport-authority", authority.cluster), ("x-teleport-role", "Node")):
        builder = builder.add_extension(name.encode(), value.encode())
    return builder.sign(authority.ssh).public_bytes()

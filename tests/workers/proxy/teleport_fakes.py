"""A cluster without a network, and tsh homes to log in to it with."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID

from workers.proxy.teleport.pb import auth_pb2, types_pb2, vnet_pb2
from workers.proxy.teleport.session import Settings

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
# Certificates that meet the real clock lie between these.
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
LONG_AFTER = datetime(2099, 1, 1, tzinfo=UTC)
PROXY = "teleport.demo.test"
CLUSTER = "demo.test"
HOSTS = "*.teleport.cluster.local"


def oid(suffix):
    return x509.ObjectIdentifier("1.3.9999." + suffix)


def name(attributes):
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])


USER_SUBJECT = [
    (NameOID.COMMON_NAME, "alice"),
    (NameOID.ORGANIZATION_NAME, "access"),
    (NameOID.ORGANIZATION_NAME, "auditor"),
    (NameOID.LOCALITY_NAME, "root"),
    (NameOID.STREET_ADDRESS, CLUSTER),
    (oid("1.7"), CLUSTER),
    (oid("2.8"), "request-1"),
]


def make_authority(cluster=CLUSTER):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = name([(NameOID.COMMON_NAME, cluster), (NameOID.ORGANIZATION_NAME, cluster)])
    certificate = _issue(subject, subject, key.public_key(), key, LONG_AFTER, True)
    return key, certificate


def _issue(subject, issuer, public_key, signer, not_after, is_authority=False):
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(LONG_AGO)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOSTS)]), critical=False)
        .sign(signer, hashes.SHA256())
    )


AUTHORITY_KEY, AUTHORITY = make_authority()
USER_KEY = ec.generate_private_key(ec.SECP256R1())


def pem_key(key, form=PrivateFormat.PKCS8):
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def user_certificate(
    not_after=NOW + timedelta(hours=12), subject=USER_SUBJECT, key=USER_KEY, authority=None
):
    signer, certificate = authority or (AUTHORITY_KEY, AUTHORITY)
    return _issue(name(subject), certificate.subject, key.public_key(), signer, not_after)


def der(certificate):
    return certificate.public_bytes(Encoding.DER)


def pem(certificate):
    return certificate.public_bytes(Encoding.PEM)


PROFILE = f"""\
web_proxy_addr: {PROXY}:443
ssh_proxy_addr: {PROXY}:443
user: alice
cluster: {CLUSTER}
dir: ""
tls_routing_enabled: true
auth_connector: local
private_key_policy: none
piv_slot: ""
missingclusterdetails: false
ssh_dial_timeout: 30s
"""


def write_home(directory: Path, certificate=None, proxy=PROXY, cluster=CLUSTER):
    """A home in the layout of v17 with one login."""
    certificate = certificate or user_certificate()
    keys = directory / "keys" / proxy
    (keys / "cas").mkdir(parents=True, exist_ok=True)
    (keys / "alice.crt").write_bytes(pem(certificate))
    (keys / "alice.key").write_bytes(pem_key(USER_KEY))
    (keys / "cas" / f"{cluster}.pem").write_bytes(pem(AUTHORITY))
    (directory / f"{proxy}.yaml").write_text(PROFILE.replace(PROXY, proxy))
    return keys


def app_server(app_name="pg", uri="tcp://127.0.0.1:5432", public_addr="", ports=()):
    return types_pb2.AppServerV3(
        Spec=types_pb2.AppServerSpecV3(
            App=types_pb2.AppV3(
                Metadata=types_pb2.Metadata(Name=app_name),
                Spec=types_pb2.AppSpecV3(
                    URI=uri,
                    PublicAddr=public_addr or f"{app_name}.{PROXY}",
                    TCPPorts=[types_pb2.PortRange(Port=p, EndPort=e) for p, e in ports],
                ),
            )
        )
    )


@dataclass
class FakeApi:
    """`AuthApi` with answers from memory. `error` makes every call raise it."""

    apps: list = field(default_factory=lambda: [app_server()])
    zones: list = field(default_factory=list)
    ipv4_range: str = ""
    public_addr: str = f"{PROXY}:443"
    needs_mfa: bool = False
    certificate_seconds: float = 3600
    error: Exception | None = None
    calls: list = field(default_factory=list)
    predicates: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    gate: asyncio.Event | None = None
    is_closed: bool = False

    async def _called(self, method):
        self.calls.append(method)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error

    async def ping(self):
        await self._called("ping")
        return auth_pb2.PingResponse(ClusterName=CLUSTER, ProxyPublicAddr=self.public_addr)

    async def vnet_config(self):
        await self._called("vnet_config")
        zones = [vnet_pb2.CustomDNSZone(suffix=zone) for zone in self.zones]
        return vnet_pb2.VnetConfigSpec(ipv4_cidr_range=self.ipv4_range, custom_dns_zones=zones)

    async def app_servers(self, predicate, limit):
        await self._called("app_servers")
        self.predicates.append(predicate)
        return [a for a in self.apps if f'"{a.Spec.App.Spec.PublicAddr}"' in predicate][:limit]

    async def is_mfa_required(self, request):
        await self._called("is_mfa_required")
        return self.needs_mfa

    async def generate_user_certs(self, request):
        await self._called("generate_user_certs")
        self.requests.append(request)
        key = load_pem_public_key(request.TLSPublicKey)
        subject = [*USER_SUBJECT, (oid("1.4"), f"session-{len(self.requests)}")]
        certificate = _issue(
            name(subject),
            AUTHORITY.subject,
            key,
            AUTHORITY_KEY,
            NOW + timedelta(seconds=self.certificate_seconds),
        )
        return auth_pb2.Certs(TLS=pem(certificate))

    def close(self):
        self.is_closed = True


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.seconds = 1000.0

    def monotonic(self):
        return self.seconds

    def wall(self):
        return NOW + timedelta(seconds=self.seconds - 1000.0)


def settings(api, clock, **changes):
    defaults = {
        "connect": lambda login: api,
        "clock": clock.monotonic,
        "wall_clock": clock.wall,
    }
    return Settings(**(defaults | changes))


async def until(condition, seconds=5.0):
    """Waits until the condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)

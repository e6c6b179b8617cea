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

from demo.cluster.predicate import compile_predicate
from workers.proxy.teleport.databases import database_id
from workers.proxy.teleport.errors import RefusedError
from workers.proxy.teleport.pb import auth_pb2, types_pb2, vnet_pb2
from workers.proxy.teleport.settings import Settings

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


def write_home(directory: Path, certificate=None, proxy=PROXY, cluster=CLUSTER, user="alice"):
    """A home in the layout of v17 with one login."""
    certificate = certificate or user_certificate()
    keys = directory / "keys" / proxy
    (keys / "cas").mkdir(parents=True, exist_ok=True)
    (keys / f"{user}.crt").write_bytes(pem(certificate))
    (keys / f"{user}.key").write_bytes(pem_key(USER_KEY))
    (keys / "cas" / f"{cluster}.pem").write_bytes(pem(AUTHORITY))
    profile = PROFILE.replace(PROXY, proxy).replace("alice", user)
    (directory / f"{proxy}.yaml").write_text(profile)
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


def database_server(database_name="orders", protocol="postgres", host="agent"):
    return types_pb2.DatabaseServerV3(
        Spec=types_pb2.DatabaseServerSpecV3(
            Hostname=host,
            Database=types_pb2.DatabaseV3(
                Metadata=types_pb2.Metadata(Name=database_name),
                Spec=types_pb2.DatabaseSpecV3(Protocol=protocol),
            ),
        )
    )


@dataclass
class FakeApi:
    """`AuthApi` with answers from memory. `error` makes every call raise it.

    `leaves` are the apis of the leaf clusters by name, those in `offline` are not connected.
    """

    apps: list = field(default_factory=lambda: [app_server()])
    databases: list = field(default_factory=list)
    knows_hashes: bool = True
    leaves: dict = field(default_factory=dict)
    offline: set = field(default_factory=set)
    leaves_error: Exception | None = None
    authorities: dict = field(default_factory=dict)
    # Lines of public keys by cluster; an exception in their place is raised.
    ssh_authorities: dict = field(default_factory=dict)
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
    gates: dict = field(default_factory=dict)
    is_closed: bool = False

    async def _called(self, method):
        self.calls.append(method)
        gate = self.gates.get(method, self.gate)
        if gate is not None:
            await gate.wait()
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
        matches = compile_predicate(predicate)
        return [a for a in self.apps if matches(_app_fields(a))][:limit]

    async def database_servers(self, predicate, limit):
        await self._called("database_servers")
        self.predicates.append(predicate)
        if not self.knows_hashes and "vnet_dns_name" in predicate:
            raise RefusedError("resource.status.vnet_dns_name is not defined")
        matches = compile_predicate(predicate)
        return [d for d in self.databases if matches(_database_fields(d))][:limit]

    async def resources(self, kind, *, search=()):
        await self._called("resources")
        assert (kind, search) == ("db_server", ())
        for server in self.databases:
            yield auth_pb2.PaginatedResource(DatabaseServer=server)

    async def remote_clusters(self):
        await self._called("remote_clusters")
        if self.leaves_error is not None:
            raise self.leaves_error
        return [
            types_pb2.RemoteClusterV3(
                Metadata=types_pb2.Metadata(Name=leaf),
                Status=types_pb2.RemoteClusterStatusV3(
                    Connection="offline" if leaf in self.offline else "online"
                ),
            )
            for leaf in self.leaves
        ]

    async def host_authority(self, cluster):
        await self._called("host_authority")
        return self.authorities.get(cluster, (der(AUTHORITY),))

    async def ssh_host_authorities(self, cluster):
        await self._called("ssh_host_authorities")
        found = self.ssh_authorities.get(cluster, ())
        if isinstance(found, Exception):
            raise found
        return found

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


def _app_fields(server):
    app = server.Spec.App
    return {"name": app.Metadata.Name, "resource.spec.public_addr": app.Spec.PublicAddr}


def _database_fields(server):
    name = server.Spec.Database.Metadata.Name
    return {"name": name, "resource.status.vnet_dns_name": database_id(name)}


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
        "connect": lambda _login, cluster, _authorities: api.leaves[cluster] if cluster else api,
        "clock": clock.monotonic,
        "wall_clock": clock.wall,
        "look_up": no_addresses,
    }
    return Settings(**(defaults | changes))


async def no_addresses(_host):
    return []


async def until(condition, seconds=5.0):
    """Waits until the condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)

"""What one running cluster knows: its configuration, authorities, sessions and trusted clusters.

No I/O; the listeners and services share one `ClusterState` per cluster.
"""

import secrets
import ssl
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import msgspec

from demo.cluster.app_lists import generated_apps
from demo.cluster.authorities import Authority, make_authority
from demo.cluster.config import App, Cluster, Database, Node
from demo.cluster.errors import AccessError, NotFoundError
from demo.cluster.faults import NO_FAULTS, Faults
from demo.cluster.identity import USAGE_APPS, USAGE_DATABASES, AppRoute, Identity
from demo.cluster.mfa import SecondFactors
from demo.cluster.webauthn import SecurityKey

SERVER_VERSION = "18.2.0"
# A server accepts clients of its own and the previous major version.
MIN_CLIENT_MAJOR = 17
API_DOMAIN = "teleport.cluster.local"
MAX_SESSIONS = 100_000
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which `ssl` has no name for.
_NO_CHECK_TIME = 0x200000


def encode_cluster_name(name: str) -> str:
    """The DNS name that stands for a cluster in SNI and ALPN."""
    return f"{name.encode().hex()}.{API_DOMAIN}"


def decode_cluster_name(encoded: str) -> str | None:
    """The cluster behind such a name, or None when it is none."""
    label, dot, domain = encoded.partition(".")
    if not dot or domain != API_DOMAIN:
        return None
    try:
        return bytes.fromhex(label).decode()
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class AppSession:
    """What the server remembers of an app certificate it issued."""

    user: str
    expires: datetime


class SessionTable:
    """App sessions by ID. When full, expired ones go first, then the oldest."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        self._sessions: dict[str, AppSession] = {}

    def create(self, session: AppSession, now: datetime) -> str:
        """Stores a session under a new unguessable ID."""
        if len(self._sessions) >= self._limit:
            self._make_room(now)
        session_id = secrets.token_hex(32)
        self._sessions[session_id] = session
        return session_id

    def check(self, identity: Identity, route: AppRoute, now: datetime) -> None:
        """Raises AccessError unless the session exists, is current and is this user's."""
        session = self._sessions.get(route.session_id)
        if session is None:
            raise AccessError(f"app session {route.session_id[:8]}... is unknown")
        if session.user != identity.user:
            raise AccessError(f"app session of {session.user} used by {identity.user}")
        if session.expires <= now:
            raise AccessError(f"app session of {session.user} has expired")

    def _make_room(self, now: datetime) -> None:
        self._sessions = {k: v for k, v in self._sessions.items() if v.expires > now}
        while len(self._sessions) >= self._limit:
            del self._sessions[next(iter(self._sessions))]


class AppTable:
    """The apps of a cluster at one time, found by name or by public address."""

    def __init__(self, apps: Iterable[App]) -> None:
        self.all = tuple(apps)
        # The first of several wins, as in a list that is searched.
        self._by_name = {app.name: app for app in reversed(self.all)}
        self._by_address = {app.public_addr: app for app in reversed(self.all)}

    def with_name(self, name: str) -> App | None:
        """The app with this name."""
        return self._by_name.get(name)

    def with_address(self, public_addr: str) -> App | None:
        """The app with this public address."""
        return self._by_address.get(public_addr)


@dataclass(slots=True)
class ClusterState:
    """One cluster. `root` is None for a root; `leaves` is empty for a leaf.

    `user` is the logged-in one. `old_host_ca` is trusted beside `host_ca` during a rotation.
    `apps` holds the generated apps too, `config.apps` does not.
    """

    config: Cluster
    user_ca: Authority
    host_ca: Authority
    factors: SecondFactors
    user: str
    apps: AppTable
    root: "ClusterState | None" = None
    leaves: dict[str, "ClusterState"] = field(default_factory=dict)
    sessions: SessionTable = field(default_factory=SessionTable)
    faults: Faults = NO_FAULTS
    host_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    old_host_ca: Authority | None = None

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.config.name

    @property
    def proxy(self) -> tuple[str, int]:
        """Host and port of the proxy."""
        return self.config.proxy_host, self.config.proxy_port

    @property
    def host_authorities(self) -> tuple[Authority, ...]:
        """The host authorities clients have to trust: the one in use, then the one before it."""
        return (self.host_ca,) if self.old_host_ca is None else (self.host_ca, self.old_host_ca)

    def now(self) -> datetime:
        """What the cluster's clock shows."""
        return datetime.now(UTC) + timedelta(seconds=self.faults.clock_seconds)

    def tune(self, context: ssl.SSLContext) -> None:
        """Makes a server context leave the judgement of dates to us where our clock is off.

        OpenSSL knows no clock but the machine's.
        """
        flags = int(context.verify_flags) & ~_NO_CHECK_TIME
        if self.faults.clock_seconds:
            flags |= _NO_CHECK_TIME
        context.verify_flags = ssl.VerifyFlags(flags)

    def begin_rotation(self) -> None:
        """Makes a new host authority the one in use; the old one stays trusted.

        Its date is the machine's, whose clock is right: the cluster's own goes wrong only later.
        """
        self.old_host_ca = self.host_ca
        self.host_ca = make_authority(self.name, datetime.now(UTC))

    def end_rotation(self) -> None:
        """Only the host authority in use is trusted from now on."""
        self.old_host_ca = None

    def set_apps(self, apps: tuple[App, ...]) -> None:
        """Replaces the apps of the cluster file; generated ones stay."""
        self.config = msgspec.structs.replace(self.config, apps=apps)
        self.apps = AppTable((*apps, *generated_apps(self.config)))

    def member(self, name: str) -> "ClusterState | None":
        """This cluster or one of its leaves, by name."""
        return self if name == self.name else self.leaves.get(name)

    def is_offline(self, leaf: str) -> bool:
        """Whether a fault keeps this leaf unreachable."""
        return leaf in self.faults.leaf_offline

    def trusted(self) -> "tuple[ClusterState, ...]":
        """Clusters whose authorities this one knows: itself, its leaves, its root."""
        return (self, *self.leaves.values(), *((self.root,) if self.root else ()))

    def find_app(self, public_addr: str) -> App | None:
        """The app with this public address."""
        return self.apps.with_address(public_addr)

    def find_database(self, name: str) -> Database | None:
        """The database service with this name."""
        found = (database for database in self.config.databases if database.name == name)
        return next(found, None)

    def find_node(self, host: str, port: int = 0) -> Node:
        """The SSH server with this host name, UUID or address; port 0 stands for any.

        Raises:
            NotFoundError: there is none, or more than one.
        """
        found = [node for node in self.config.nodes if node.is_called(host, port)]
        if not found:
            raise NotFoundError(f"no matching hosts for {host!r}")
        if len(found) > 1:
            raise NotFoundError(f"{host!r} is ambiguous: {len(found)} hosts match; use a UUID")
        return found[0]

    def roles_with(self, access_requests: Iterable[str]) -> tuple[str, ...]:
        """The user's own roles and those of these access requests.

        Raises:
            NotFoundError: a request does not exist.
        """
        known = {request.id: request.roles for request in self.config.access_requests}
        roles = list(self.config.roles)
        for name in access_requests:
            if name not in known:
                raise NotFoundError(f"access request {name!r} is not found")
            roles += known[name]
        return tuple(dict.fromkeys(roles))

    def login_identity(self, now: datetime) -> Identity:
        """Whom `tsh login` makes out a certificate for, with all access requests active."""
        config = self.config
        requests = tuple(request.id for request in config.access_requests)
        return Identity(
            user=self.user,
            roles=self.roles_with(requests),
            access_requests=requests,
            teleport_cluster=self.name,
            expires=now + timedelta(seconds=config.cert_ttl_seconds),
            principals=(*config.logins, "-teleport-internal-join"),
            route_to_cluster=self.name,
            traits={"logins": config.logins},
            login_ip="127.0.0.1",
        )


def make_state(config: Cluster, totp_secret: str, key: SecurityKey, now: datetime) -> ClusterState:
    """A cluster with new authorities, whose user has these second factors."""
    nodes = (
        msgspec.structs.replace(node, uuid=node.uuid or str(uuid.uuid4())) for node in config.nodes
    )
    return ClusterState(
        config=msgspec.structs.replace(config, nodes=tuple(nodes)),
        user_ca=make_authority(config.name, now),
        host_ca=make_authority(config.name, now),
        factors=SecondFactors(config.mfa_devices, totp_secret, key),
        user=config.user,
        apps=AppTable((*config.apps, *generated_apps(config))),
    )


def may_use(resource: App | Database | Node, identity: Identity) -> bool:
    """Whether one of the user's roles allows the resource."""
    return not set(resource.allowed_roles).isdisjoint(identity.roles)


def authorize_app(state: ClusterState, identity: Identity, now: datetime) -> App:
    """The app that a client certificate leads to, as proxy and agent decide it together.

    `state` is the root cluster, whose proxy was dialled.

    Raises:
        AccessError: whatever is wrong; the client only sees its connection closed.
    """
    route = identity.route_to_app
    if route is None:
        raise AccessError("the certificate leads to no app")
    _check_certificate(identity, USAGE_APPS, now)
    state.sessions.check(identity, route, now)
    owner = state.member(route.cluster_name)
    if owner is None or state.is_offline(route.cluster_name):
        raise AccessError(f"cluster {route.cluster_name!r} is unknown or offline")
    app = owner.find_app(route.public_addr)
    if app is None or not app.is_tcp:
        raise AccessError(f"no TCP app has the address {route.public_addr!r}")
    if not may_use(app, identity):
        raise AccessError(f"no role of {identity.user} allows app {app.name}")
    if app.session_mfa and not identity.mfa_verified:
        raise AccessError(f"app {app.name} requires MFA")
    if not app.allows_port(route.target_port):
        raise AccessError(f"port {route.target_port} is not in TCP ports of app {app.name}")
    return app


def authorize_database(
    state: ClusterState, identity: Identity, protocol: str, now: datetime
) -> Database:
    """The database that a client certificate leads to, as proxy and agent decide it together.

    `state` is the root cluster, whose proxy was dialled; the cluster is the certificate's
    RouteToCluster. `protocol` is the one that the connection speaks.

    Raises:
        NotFoundError: the cluster is unknown or offline, or has no such database; the client only
            sees its connection closed.
        AccessError: the certificate may not be used for it.
    """
    route = identity.route_to_database
    if route is None:
        raise AccessError("the certificate leads to no database")
    _check_certificate(identity, USAGE_DATABASES, now)
    owner = state.member(identity.route_to_cluster)
    if owner is None or state.is_offline(identity.route_to_cluster):
        raise NotFoundError(f"cluster {identity.route_to_cluster!r} is unknown or offline")
    database = owner.find_database(route.service_name)
    if database is None:
        raise NotFoundError(f"database {route.service_name!r} is not found")
    if {route.protocol, protocol} != {database.protocol}:
        raise AccessError(
            f"database {database.name} speaks {database.protocol}, not {protocol!r} as the "
            f"connection or {route.protocol!r} as the certificate"
        )
    if not may_use(database, identity):
        raise AccessError(f"access to database {database.name} is denied for {identity.user}")
    if database.session_mfa and not identity.mfa_verified:
        raise AccessError("access to resource requires MFA")
    return database


def _check_certificate(identity: Identity, usage: str, now: datetime) -> None:
    if not identity.is_current(now):
        raise AccessError("the certificate has expired or is not valid yet")
    if not identity.may_be_used_for(usage):
        raise AccessError(f"the certificate is for {', '.join(identity.usage)}, not {usage}")

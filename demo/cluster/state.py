"""What one running cluster knows: its configuration, authorities, sessions and trusted clusters.

No I/O; the listeners and services share one `ClusterState` per cluster.
"""

import secrets
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from demo.cluster.authorities import Authority, make_authority
from demo.cluster.config import App, Cluster
from demo.cluster.errors import AccessError
from demo.cluster.faults import NO_FAULTS, Faults
from demo.cluster.identity import AppRoute, Identity

SERVER_VERSION = "18.2.0"
# A server accepts clients of its own and the previous major version.
MIN_CLIENT_MAJOR = 17
API_DOMAIN = "teleport.cluster.local"
MAX_SESSIONS = 100_000


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


@dataclass(slots=True)
class ClusterState:
    """One cluster. `root` is None for a root; `leaves` is empty for a leaf."""

    config: Cluster
    user_ca: Authority
    host_ca: Authority
    totp_secret: str
    root: "ClusterState | None" = None
    leaves: dict[str, "ClusterState"] = field(default_factory=dict)
    sessions: SessionTable = field(default_factory=SessionTable)
    faults: Faults = NO_FAULTS
    host_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.config.name

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
        apps = (app for app in self.config.apps if app.public_addr == public_addr)
        return next(apps, None)

    def login_identity(self, now: datetime) -> Identity:
        """Whom `tsh login` makes out a certificate for."""
        config = self.config
        return Identity(
            user=config.user,
            roles=config.roles,
            teleport_cluster=self.name,
            expires=now + timedelta(seconds=config.cert_ttl_seconds),
            principals=(*config.logins, "-teleport-internal-join"),
            route_to_cluster=self.name,
            traits={"logins": config.logins},
            login_ip="127.0.0.1",
        )


def make_state(config: Cluster, totp_secret: str, now: datetime) -> ClusterState:
    """A cluster with new authorities."""
    return ClusterState(
        config=config,
        user_ca=make_authority(config.name, now),
        host_ca=make_authority(config.name, now),
        totp_secret=totp_secret,
    )


def may_use(app: App, identity: Identity) -> bool:
    """Whether one of the user's roles allows the app."""
    return not set(app.allowed_roles).isdisjoint(identity.roles)


def authorize_app(state: ClusterState, identity: Identity, now: datetime) -> App:
    """The app that a client certificate leads to, as proxy and agent decide it together.

    `state` is the root cluster, whose proxy was dialled.

    Raises:
        AccessError: whatever is wrong; the client only sees its connection closed.
    """
    route = identity.route_to_app
    if route is None:
        raise AccessError("the certificate leads to no app")
    if identity.expires <= now:
        raise AccessError("the certificate has expired")
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

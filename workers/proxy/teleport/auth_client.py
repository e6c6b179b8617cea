"""The questions VNet asks a cluster's auth service, over one kept connection.

Source: `api/proto/teleport/legacy/client/proto/authservice.proto` and the services beside it.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Protocol
from weakref import WeakValueDictionary

from google.protobuf.timestamp_pb2 import Timestamp

from workers.proxy.teleport.carriers import DirectCarrier, UpgradeCarrier
from workers.proxy.teleport.channel import AuthChannel, Carrier, Endpoint
from workers.proxy.teleport.contexts import auth_context, cluster_context, upgrade_context
from workers.proxy.teleport.credentials import CredentialError, parse_authorities
from workers.proxy.teleport.errors import (
    LimitExceededError,
    NotFoundError,
    NotImplementedByClusterError,
    UnreachableError,
)
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.pb import (
    auth_grpc,
    auth_pb2,
    presence_grpc,
    presence_pb2,
    trust_grpc,
    trust_pb2,
    types_pb2,
    vnet_grpc,
    vnet_pb2,
)
from workers.proxy.teleport.proxy_cluster import (
    TRANSPORT_ALPN,
    ClusterTransport,
    TransportCarrier,
)
from workers.proxy.teleport.routes import AuthRoute, Way, auth_route
from workers.proxy.teleport.ssh_credentials import authorities as ssh_authorities

# A server refuses clients older than its own previous major version, not newer ones. After the
# first Ping the server's own version is announced.
CLIENT_VERSION = "18.0.0"

# A page of resources; a server sends fewer when it likes. Halved when a page is too large for one
# message, as it is when resources have many labels.
PAGE_SIZE = 500
MAX_PAGES = 1000
MAX_REMOTE_CLUSTERS = 10_000
# Two at a time while one is rotated; more were forgotten there.
MAX_AUTHORITIES = 32
NO_ENVIRONMENT: Mapping[str, str] = MappingProxyType({})


class AuthApi(Protocol):
    """What the rest of this package needs of a cluster. Every method raises `TeleportError`."""

    async def ping(self) -> auth_pb2.PingResponse: ...

    async def vnet_config(self) -> vnet_pb2.VnetConfigSpec:
        """The cluster's `vnet_config`; empty (all defaults) when it has none."""

    async def app_servers(self, predicate: str, limit: int) -> list[types_pb2.AppServerV3]:
        """At most `limit` app servers for which the predicate holds."""

    async def database_servers(
        self, predicate: str, limit: int
    ) -> list[types_pb2.DatabaseServerV3]:
        """At most `limit` database servers for which the predicate holds."""

    async def remote_clusters(self) -> list[types_pb2.RemoteClusterV3]:
        """The leaf clusters. Root cluster only."""

    async def host_authority(self, cluster: str) -> tuple[bytes, ...]:
        """The host authorities (DER) of the root cluster or of a leaf, never none."""

    async def ssh_host_authorities(self, cluster: str) -> tuple[bytes, ...]:
        """The public keys that sign the SSH hosts of the root cluster or of a leaf, as lines."""

    def resources(
        self, kind: str, *, search: Sequence[str] = ()
    ) -> AsyncIterator[auth_pb2.PaginatedResource]:
        """All resources of a kind (app_server, db_server, node) that contain all search words."""

    async def is_mfa_required(self, request: auth_pb2.IsMFARequiredRequest) -> bool: ...

    async def create_challenge(
        self, request: auth_pb2.CreateAuthenticateChallengeRequest
    ) -> auth_pb2.MFAAuthenticateChallenge: ...

    async def generate_user_certs(self, request: auth_pb2.UserCertsRequest) -> auth_pb2.Certs: ...

    def close(self) -> None: ...


class AuthClient:
    """`AuthApi` over the network."""

    def __init__(
        self, endpoint: Endpoint, *, timeout_seconds: float = 10.0, idle_seconds: float = 0.0
    ) -> None:
        """With `idle_seconds`, the connection is closed when there was no call for so long."""
        self._channel = AuthChannel(
            endpoint, timeout_seconds=timeout_seconds, idle_seconds=idle_seconds
        )
        self._version = CLIENT_VERSION
        grpc = self._channel.grpc
        self._auth = auth_grpc.AuthServiceStub(grpc)
        self._vnet = vnet_grpc.VnetConfigServiceStub(grpc)
        self._presence = presence_grpc.PresenceServiceStub(grpc)
        self._trust = trust_grpc.TrustServiceStub(grpc)

    @property
    def _metadata(self) -> dict[str, str]:
        return {"version": self._version}

    async def ping(self) -> auth_pb2.PingResponse:
        """Name, version and public address of the cluster."""
        request = auth_pb2.PingRequest()
        reply = await self._channel.call(self._auth.Ping, request, self._metadata)
        major = reply.ServerVersion.partition(".")[0]
        if major.isascii() and major.isdecimal() and len(major) <= 3:
            self._version = f"{major}.0.0"
        return reply

    async def vnet_config(self) -> vnet_pb2.VnetConfigSpec:
        """See `AuthApi`. Clusters before v16, and those never configured, have none."""
        request = vnet_pb2.GetVnetConfigRequest()
        try:
            reply = await self._channel.call(self._vnet.GetVnetConfig, request, self._metadata)
        except (NotFoundError, NotImplementedByClusterError):
            return vnet_pb2.VnetConfigSpec()
        return reply.spec

    async def app_servers(self, predicate: str, limit: int) -> list[types_pb2.AppServerV3]:
        """See `AuthApi`. One app served by several agents gives several."""
        found = await self._some("app_server", predicate, limit)
        return [r.AppServer for r in found if r.WhichOneof("resource") == "AppServer"]

    async def database_servers(
        self, predicate: str, limit: int
    ) -> list[types_pb2.DatabaseServerV3]:
        """See `AuthApi`. One database served by several agents gives several."""
        found = await self._some("db_server", predicate, limit)
        return [r.DatabaseServer for r in found if r.WhichOneof("resource") == "DatabaseServer"]

    async def _some(
        self, kind: str, predicate: str, limit: int
    ) -> Sequence[auth_pb2.PaginatedResource]:
        request = auth_pb2.ListResourcesRequest(
            ResourceType=kind, Limit=limit, PredicateExpression=predicate
        )
        reply = await self._channel.call(self._auth.ListResources, request, self._metadata)
        return reply.Resources

    async def resources(
        self, kind: str, *, search: Sequence[str] = ()
    ) -> AsyncIterator[auth_pb2.PaginatedResource]:
        """See `AuthApi`. One page at a time is in memory; what several agents serve comes often."""
        request = auth_pb2.ListResourcesRequest(
            ResourceType=kind, Limit=PAGE_SIZE, SearchKeywords=search
        )
        for _ in range(MAX_PAGES):
            reply = await self._page(request)
            for resource in reply.Resources:
                yield resource
            if not reply.NextKey:
                return
            if reply.NextKey == request.StartKey:
                raise UnreachableError(f"the list of kind {kind} does not go on after a page")
            request.StartKey = reply.NextKey
        raise UnreachableError(f"the list of kind {kind} has more than {MAX_PAGES} pages")

    async def _page(self, request: auth_pb2.ListResourcesRequest) -> auth_pb2.ListResourcesResponse:
        """One page; the request's limit becomes smaller when that is what the server can send."""
        while True:
            try:
                return await self._channel.call(self._auth.ListResources, request, self._metadata)
            except LimitExceededError:
                if request.Limit <= 1:
                    raise
                request.Limit //= 2

    async def is_mfa_required(self, request: auth_pb2.IsMFARequiredRequest) -> bool:
        """Whether a session with this resource needs a second factor now."""
        reply = await self._channel.call(self._auth.IsMFARequired, request, self._metadata)
        return reply.Required or reply.MFARequired == auth_pb2.MFA_REQUIRED_YES

    async def create_challenge(
        self, request: auth_pb2.CreateAuthenticateChallengeRequest
    ) -> auth_pb2.MFAAuthenticateChallenge:
        """A challenge for one of the user's second factors. Root cluster only."""
        return await self._channel.call(
            self._auth.CreateAuthenticateChallenge, request, self._metadata
        )

    async def generate_user_certs(self, request: auth_pb2.UserCertsRequest) -> auth_pb2.Certs:
        """New certificates for the keys in the request. Root cluster only."""
        return await self._channel.call(self._auth.GenerateUserCerts, request, self._metadata)

    async def remote_clusters(self) -> list[types_pb2.RemoteClusterV3]:
        """See `AuthApi`."""
        found: list[types_pb2.RemoteClusterV3] = []
        request = presence_pb2.ListRemoteClustersRequest()
        for _ in range(MAX_PAGES):
            reply = await self._channel.call(
                self._presence.ListRemoteClusters, request, self._metadata
            )
            found += reply.remote_clusters
            if len(found) > MAX_REMOTE_CLUSTERS:
                break
            if not reply.next_page_token:
                return found
            request.page_token = reply.next_page_token
        raise UnreachableError(f"there are more than {MAX_REMOTE_CLUSTERS} leaf clusters")

    async def host_authority(self, cluster: str) -> tuple[bytes, ...]:
        """See `AuthApi`. While one is rotated, those that are trusted besides are among them."""
        sets = await self._host_keys(cluster)
        pem = b"\n".join(pair.Cert for keys in sets for pair in keys.TLS)
        try:
            return parse_authorities(pem)[:MAX_AUTHORITIES]
        except CredentialError as error:
            raise UnreachableError(
                f"the root cluster sent no host authority of cluster {cluster}: {error}"
            ) from error

    async def ssh_host_authorities(self, cluster: str) -> tuple[bytes, ...]:
        """See `AuthApi`. While one is rotated, both are among them."""
        sets = await self._host_keys(cluster)
        return ssh_authorities(pair.PublicKey for keys in sets for pair in keys.SSH)

    async def _host_keys(self, cluster: str) -> Sequence[types_pb2.CAKeySet]:
        request = trust_pb2.GetCertAuthorityRequest(type="host", domain=cluster)
        reply = await self._channel.call(self._trust.GetCertAuthority, request, self._metadata)
        return reply.Spec.ActiveKeys, reply.Spec.AdditionalTrustedKeys

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()


class Connector:
    """Makes clients for the clusters of logins, and keeps what they share.

    Without TLS routing, all clusters of one login share one connection to the proxy. The connection
    of a leaf is closed after `leaf_idle_seconds` without a call (0: never) and opened again by the
    next: there may be hundreds of leaves. `environment` names a forward proxy, or none.
    """

    def __init__(
        self,
        *,
        ca_file: str = "",
        insecure: bool = False,
        environment: Mapping[str, str] = NO_ENVIRONMENT,
        timeout_seconds: float = 10.0,
        leaf_idle_seconds: float = 60.0,
    ) -> None:
        self._ca_file = ca_file
        self._insecure = insecure
        self._environment = environment
        self._timeout_seconds = timeout_seconds
        self._leaf_idle_seconds = leaf_idle_seconds
        self._web_context: ssl.SSLContext | None = None
        self._transports: WeakValueDictionary[object, ClusterTransport] = WeakValueDictionary()

    def __call__(
        self, login: Login, cluster: str = "", authorities: tuple[bytes, ...] | None = None
    ) -> AuthClient:
        """A client for `cluster` (default: the root cluster) with a login's credentials.

        `authorities` are the cluster's host authorities (DER), by default those that tsh stored.
        Does no I/O: the connection is opened by the first call. A login without credentials has no
        business here.

        Raises:
            UnreachableError: no authority of the cluster is known, or none that TLS takes.
        """
        profile, credentials = login.profile, login.credentials
        assert profile is not None
        assert credentials is not None
        root = credentials.identity.root_cluster
        cluster = cluster or root
        if authorities is None:
            authorities = login.authorities.get(cluster)
        if not authorities:
            raise UnreachableError(
                f"no host authority of cluster {cluster} is known: "
                f"run tsh login --proxy={profile.address}"
            )
        route = auth_route(profile, self._environment)
        pair = credentials.certificate, credentials.key
        carrier: Carrier
        try:
            match route.way:
                case Way.DIRECT:
                    carrier = DirectCarrier(route)
                    context = auth_context(root, cluster, authorities, *pair)
                case Way.UPGRADE:
                    carrier = UpgradeCarrier(route, self._upgrade_context)
                    context = auth_context(root, cluster, authorities, *pair)
                case Way.TRANSPORT:
                    carrier = TransportCarrier(self._transport(login, route), cluster)
                    context = cluster_context(root, authorities, *pair, alpn=("h2",))
        except ssl.SSLError as error:
            raise UnreachableError(
                f"a host authority of cluster {cluster} is no certificate: "
                f"run tsh login --proxy={profile.address}"
            ) from error
        return AuthClient(
            Endpoint(carrier, context, cluster, profile.address),
            timeout_seconds=self._timeout_seconds,
            idle_seconds=self._leaf_idle_seconds if cluster != root else 0.0,
        )

    async def _upgrade_context(self) -> ssl.SSLContext:
        if self._web_context is None:
            # In a thread: reading the system's authorities takes several milliseconds.
            self._web_context = await asyncio.to_thread(
                upgrade_context, ca_file=self._ca_file, insecure=self._insecure
            )
        return self._web_context

    def _transport(self, login: Login, route: AuthRoute) -> ClusterTransport:
        credentials = login.credentials
        assert credentials is not None
        root = credentials.identity.root_cluster
        authorities = login.authorities.get(root, ())
        key = (login.name, route, credentials.fingerprint, authorities)
        transport = self._transports.get(key)
        if transport is None:
            transport = self._transports[key] = ClusterTransport(
                DirectCarrier(route),
                cluster_context(
                    root,
                    authorities,
                    credentials.certificate,
                    credentials.key,
                    alpn=TRANSPORT_ALPN,
                ),
                profile=login.name,
                version=CLIENT_VERSION,
                timeout_seconds=self._timeout_seconds,
            )
        return transport


def connect(
    login: Login,
    cluster: str = "",
    *,
    authorities: tuple[bytes, ...] | None = None,
    timeout_seconds: float = 10.0,
) -> AuthClient:
    """A client that shares nothing with others, for a web port that the system trusts.

    See `Connector`.
    """
    return Connector(timeout_seconds=timeout_seconds)(login, cluster, authorities)


def timestamp(moment: datetime) -> Timestamp:
    """A time zone aware moment as protobuf."""
    value = Timestamp()
    value.FromDatetime(moment)
    return value

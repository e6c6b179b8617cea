"""The questions VNet asks a cluster's auth service, over one kept connection.

Source: `api/proto/teleport/legacy/client/proto/authservice.proto` and the services beside it.
"""

from datetime import datetime
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from workers.proxy.teleport.channel import AuthChannel, Endpoint
from workers.proxy.teleport.contexts import auth_context
from workers.proxy.teleport.errors import (
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

# A server refuses clients older than its own previous major version, not newer ones. After the
# first Ping the server's own version is announced.
CLIENT_VERSION = "18.0.0"
MAX_PAGES = 100


class AuthApi(Protocol):
    """What the rest of this package needs of a cluster. Every method raises `TeleportError`."""

    async def ping(self) -> auth_pb2.PingResponse: ...

    async def vnet_config(self) -> vnet_pb2.VnetConfigSpec:
        """The cluster's `vnet_config`; empty (all defaults) when it has none."""

    async def app_servers(self, predicate: str, limit: int) -> list[types_pb2.AppServerV3]:
        """At most `limit` app servers for which the predicate holds."""

    async def is_mfa_required(self, request: auth_pb2.IsMFARequiredRequest) -> bool: ...

    async def generate_user_certs(self, request: auth_pb2.UserCertsRequest) -> auth_pb2.Certs: ...

    def close(self) -> None: ...


class AuthClient:
    """`AuthApi` over the network."""

    def __init__(self, endpoint: Endpoint, *, timeout_seconds: float = 10.0) -> None:
        self._channel = AuthChannel(endpoint, timeout_seconds=timeout_seconds)
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
        request = auth_pb2.ListResourcesRequest(
            ResourceType="app_server", Limit=limit, PredicateExpression=predicate
        )
        reply = await self._channel.call(self._auth.ListResources, request, self._metadata)
        return [r.AppServer for r in reply.Resources if r.WhichOneof("resource") == "AppServer"]

    async def is_mfa_required(self, request: auth_pb2.IsMFARequiredRequest) -> bool:
        """Whether a session with this resource needs a second factor now."""
        reply = await self._channel.call(self._auth.IsMFARequired, request, self._metadata)
        return reply.Required or reply.MFARequired == auth_pb2.MFA_REQUIRED_YES

    async def generate_user_certs(self, request: auth_pb2.UserCertsRequest) -> auth_pb2.Certs:
        """New certificates for the keys in the request. Root cluster only."""
        return await self._channel.call(self._auth.GenerateUserCerts, request, self._metadata)

    async def remote_clusters(self) -> list[types_pb2.RemoteClusterV3]:
        """The leaf clusters. Root cluster only."""
        found: list[types_pb2.RemoteClusterV3] = []
        token = ""
        for _ in range(MAX_PAGES):
            request = presence_pb2.ListRemoteClustersRequest(page_token=token)
            reply = await self._channel.call(
                self._presence.ListRemoteClusters, request, self._metadata
            )
            found += reply.remote_clusters
            token = reply.next_page_token
            if not token:
                return found
        raise UnreachableError(f"the list of leaf clusters has more than {MAX_PAGES} pages")

    async def host_authority(self, cluster: str) -> types_pb2.CertAuthorityV2:
        """The host authority of the root cluster or of one of its leaves."""
        request = trust_pb2.GetCertAuthorityRequest(type="host", domain=cluster)
        return await self._channel.call(self._trust.GetCertAuthority, request, self._metadata)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()


def connect(login: Login, cluster: str = "", *, timeout_seconds: float = 10.0) -> AuthClient:
    """A client for `cluster` (default: the root cluster) with a login's credentials.

    Does no I/O: the connection is opened by the first call.

    Raises:
        UnreachableError: the profile asks for a way of dialling that VNet does not know.
    """
    profile, credentials = login.profile, login.credentials
    assert profile is not None
    assert credentials is not None
    root = credentials.identity.root_cluster
    cluster = cluster or root
    if profile.is_conn_upgrade_required or not profile.is_tls_routing_enabled:
        kind = "has no TLS routing" if not profile.is_tls_routing_enabled else "is behind a layer 7"
        raise UnreachableError(
            f"{profile.name} {kind}, which VNet does not support yet: use tsh proxy app"
        )
    authorities = login.authorities.get(cluster)
    if authorities is None:
        raise UnreachableError(
            f"no host authority of cluster {cluster} is known: run tsh login --proxy={profile.name}"
        )
    context = auth_context(root, cluster, authorities, credentials.certificate, credentials.key)
    endpoint = Endpoint(
        host=profile.web_host,
        port=profile.web_port,
        context=context,
        cluster=cluster,
        profile=profile.name,
    )
    return AuthClient(endpoint, timeout_seconds=timeout_seconds)


def timestamp(moment: datetime) -> Timestamp:
    """A time zone aware moment as protobuf."""
    value = Timestamp()
    value.FromDatetime(moment)
    return value

"""The gRPC services of the auth server, thin over `usercerts`, `resources` and the state.

Errors become status codes by the table of lib/auth's trail package; expected refusals only.
"""

import asyncio
import contextlib
import functools
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.empty_pb2 import Empty
from grpclib.const import Status
from grpclib.events import RecvRequest
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from demo.cluster.authorities import Authority
from demo.cluster.config import App, Database, Node
from demo.cluster.errors import (
    AccessError,
    IdentityError,
    NotFoundError,
    PredicateError,
    RequestError,
)
from demo.cluster.identity import Identity, decode_peer
from demo.cluster.resources import MAX_PAGE, ZERO_TIME, Listing, Listings, Page, Query
from demo.cluster.state import MIN_CLIENT_MAJOR, SERVER_VERSION, ClusterState, may_use
from demo.cluster.usercerts import generate_user_certs
from workers.proxy.teleport.pb import (
    auth_grpc,
    auth_pb2,
    header_pb2,
    presence_grpc,
    presence_pb2,
    trust_grpc,
    trust_pb2,
    types_pb2,
    vnet_grpc,
    vnet_pb2,
)

_Service = TypeVar("_Service")
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")

# https://semver.org: what the `version` header must hold.
_SEMVER = re.compile(r"(\d{1,9})\.\d{1,9}\.\d{1,9}(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", re.ASCII)

# How often a call that a fault holds back looks whether the fault is gone.
_HANG_POLL_SECONDS = 0.05


def is_supported_version(text: str) -> bool:
    """Whether a client that announces this version may go on."""
    match = _SEMVER.fullmatch(text.removeprefix("v"))
    return match is not None and int(match[1]) >= MIN_CLIENT_MAJOR


@contextlib.contextmanager
def _statuses() -> Iterator[None]:
    """Turns refusals into gRPC statuses."""
    try:
        yield
    except (AccessError, IdentityError) as error:
        raise GRPCError(Status.PERMISSION_DENIED, str(error)) from error
    except (RequestError, PredicateError) as error:
        raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from error
    except NotFoundError as error:
        raise GRPCError(Status.NOT_FOUND, str(error)) from error


def request_check(state: ClusterState) -> Callable[[RecvRequest], Coroutine[Any, Any, None]]:
    """What grpclib runs before every call: `check_call`."""

    async def check(event: RecvRequest) -> None:
        await check_call(state, event.metadata.get("version"), event.peer.cert())

    return check


async def check_call(state: ClusterState, version: object, peer: Mapping[str, Any] | None) -> None:
    """Looks at faults, the client's version (None: it names none) and its certificate.

    Raises:
        GRPCError: the call is refused.
    """
    while state.faults.hang:  # noqa: ASYNC110  # faults come from a file that is polled too
        await asyncio.sleep(_HANG_POLL_SECONDS)
    if state.faults.unavailable:
        raise GRPCError(Status.UNAVAILABLE, "a fault keeps the auth server away")
    if version is not None and not is_supported_version(str(version)):
        raise GRPCError(Status.PERMISSION_DENIED, "client version is unsupported")
    with _statuses():
        caller = decode_peer(peer)
        if caller.usage:
            raise AccessError("access denied: invalid client certificate")
        # TLS sees to it, but for a clock of our own.
        if not caller.is_current(state.now()):
            raise AccessError("access denied: client credentials have expired, please relogin.")


def unary(
    answer: Callable[[_Service, _Request, Identity], Awaitable[_Reply]],
) -> Callable[[_Service, Stream[_Request, _Reply]], Coroutine[Any, Any, None]]:
    """A gRPC handler around a method that turns (request, caller) into a reply."""

    @functools.wraps(answer)
    async def handle(self: _Service, stream: Stream[_Request, _Reply]) -> None:
        request = await stream.recv_message()
        if request is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "the request has no message")
        with _statuses():
            reply = await answer(self, request, decode_peer(stream.peer.cert()))
        await stream.send_message(reply)

    return handle


class AuthService(auth_grpc.AuthServiceBase):
    """proto.AuthService."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._listings = Listings(state)
        # Made now, so that no client waits for a long one.
        self._listings.of("app_server")

    @unary
    async def Ping(  # noqa: N802
        self, _request: auth_pb2.PingRequest, caller: Identity
    ) -> auth_pb2.PingResponse:
        return auth_pb2.PingResponse(
            ClusterName=self._state.name,
            ServerVersion=SERVER_VERSION,
            ProxyPublicAddr=self._state.config.proxy_addr,
            RemoteAddr=f"{caller.login_ip}:0",
        )

    @unary
    async def GetDomainName(  # noqa: N802
        self, _request: Empty, _caller: Identity
    ) -> auth_pb2.GetDomainNameResponse:
        return auth_pb2.GetDomainNameResponse(DomainName=self._state.name)

    @unary
    async def ListResources(  # noqa: N802
        self, request: auth_pb2.ListResourcesRequest, caller: Identity
    ) -> auth_pb2.ListResourcesResponse:
        await asyncio.sleep(self._state.faults.slow_list_seconds)
        if request.Limit <= 0:
            raise RequestError("nonpositive parameter limit")
        listing = self._listings.of(request.ResourceType)
        page = _page(listing, request, caller, needs_total=request.NeedTotalCount)
        return auth_pb2.ListResourcesResponse(
            Resources=[row.resource for row in page.rows],
            NextKey=page.next_key,
            TotalCount=page.total,
        )

    @unary
    async def ListUnifiedResources(  # noqa: N802
        self, request: auth_pb2.ListUnifiedResourcesRequest, caller: Identity
    ) -> auth_pb2.ListUnifiedResourcesResponse:
        await asyncio.sleep(self._state.faults.slow_list_seconds)
        page = _page(self._listings.unified(request.Kinds), request, caller)
        return auth_pb2.ListUnifiedResourcesResponse(
            Resources=[row.resource for row in page.rows], NextKey=page.next_key
        )

    @unary
    async def ResolveSSHTarget(  # noqa: N802
        self, request: auth_pb2.ResolveSSHTargetRequest, _caller: Identity
    ) -> auth_pb2.ResolveSSHTargetResponse:
        found = self._state.find_node(request.host)
        row = next(row for row in self._listings.of("node") if row.fields["name"] == found.uuid)
        return auth_pb2.ResolveSSHTargetResponse(server=row.resource.Node)

    @unary
    async def GenerateUserCerts(  # noqa: N802
        self, request: auth_pb2.UserCertsRequest, caller: Identity
    ) -> auth_pb2.Certs:
        if self._state.faults.refuse_certs:
            raise AccessError("access denied")
        if self._state.faults.deny:
            raise AccessError(self._state.faults.deny)
        if self._state.root is not None:
            raise AccessError(f"user {caller.user} is not of cluster {self._state.name}")
        return generate_user_certs(self._state, caller, request, self._state.now())

    @unary
    async def IsMFARequired(  # noqa: N802
        self, request: auth_pb2.IsMFARequiredRequest, caller: Identity
    ) -> auth_pb2.IsMFARequiredResponse:
        required = self._is_mfa_required(request, caller)
        answer = auth_pb2.MFA_REQUIRED_YES if required else auth_pb2.MFA_REQUIRED_NO
        return auth_pb2.IsMFARequiredResponse(Required=required, MFARequired=answer)

    @unary
    async def CreateAuthenticateChallenge(  # noqa: N802
        self, request: auth_pb2.CreateAuthenticateChallengeRequest, caller: Identity
    ) -> auth_pb2.MFAAuthenticateChallenge:
        if self._state.root is not None:
            raise NotFoundError(f"user {caller.user} is not of cluster {self._state.name}")
        if not request.HasField("ContextUser"):
            raise RequestError("only ContextUser challenges are available")
        has_check = request.HasField("MFARequiredCheck")
        if has_check and not self._is_mfa_required(request.MFARequiredCheck, caller):
            return auth_pb2.MFAAuthenticateChallenge(MFARequired=auth_pb2.MFA_REQUIRED_NO)
        challenge = self._state.factors.challenge(
            *(caller.user, request.ChallengeExtensions, self._state.proxy, self._state.now()),
            callback=request.SSOClientRedirectURL,
        )
        if has_check:
            challenge.MFARequired = auth_pb2.MFA_REQUIRED_YES
        return challenge

    def _is_mfa_required(self, request: auth_pb2.IsMFARequiredRequest, caller: Identity) -> bool:
        match request.WhichOneof("Target"):
            case "App":
                asked = request.App.Name
                found: App | Database | Node | None = self._state.apps.with_name(asked)
            case "Node":
                asked = request.Node.Node
                found = self._state.find_node(asked)
                # Who may not log in anyway is not told what is there (lib/auth).
                if not may_use(found, caller) or request.Node.Login not in caller.principals:
                    return False
            case "Database":
                asked = request.Database.ServiceName
                found = self._state.find_database(asked)
            case target:
                raise RequestError(f"target {target} is not supported")
        if found is None:
            raise NotFoundError(f"{asked!r} is not found")
        return found.session_mfa


def _page(
    listing: Listing,
    request: auth_pb2.ListResourcesRequest | auth_pb2.ListUnifiedResourcesRequest,
    caller: Identity,
    *,
    needs_total: bool = False,
) -> Page:
    query = Query(
        limit=min(request.Limit, MAX_PAGE) if request.Limit > 0 else MAX_PAGE,
        start_key=request.StartKey,
        predicate=request.PredicateExpression,
        labels=dict(request.Labels),
        words=list(request.SearchKeywords),
        needs_total=needs_total,
    )
    return listing.select(query, caller)


class VnetConfigService(vnet_grpc.VnetConfigServiceBase):
    """teleport.vnet.v1.VnetConfigService."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state

    @unary
    async def GetVnetConfig(  # noqa: N802
        self, _request: vnet_pb2.GetVnetConfigRequest, _caller: Identity
    ) -> vnet_pb2.VnetConfig:
        config = self._state.config
        if not config.has_vnet_config or self._state.faults.no_vnet_config:
            raise NotFoundError("vnet_config is not found")
        return vnet_pb2.VnetConfig(
            kind="vnet_config",
            version="v1",
            metadata=header_pb2.Metadata(name="vnet-config"),
            spec=vnet_pb2.VnetConfigSpec(
                ipv4_cidr_range=config.ipv4_cidr_range,
                custom_dns_zones=[
                    vnet_pb2.CustomDNSZone(suffix=zone) for zone in config.custom_dns_zones
                ],
            ),
        )


class PresenceService(presence_grpc.PresenceServiceBase):
    """teleport.presence.v1.PresenceService."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state

    @unary
    async def ListRemoteClusters(  # noqa: N802
        self, request: presence_pb2.ListRemoteClustersRequest, _caller: Identity
    ) -> presence_pb2.ListRemoteClustersResponse:
        limit = request.page_size if 0 < request.page_size < MAX_PAGE else MAX_PAGE
        names = sorted(name for name in self._state.leaves if name >= request.page_token)
        return presence_pb2.ListRemoteClustersResponse(
            remote_clusters=[self._remote_cluster(name) for name in names[:limit]],
            next_page_token=names[limit] if len(names) > limit else "",
        )

    def _remote_cluster(self, name: str) -> types_pb2.RemoteClusterV3:
        is_offline = self._state.is_offline(name)
        status = types_pb2.RemoteClusterStatusV3(
            Connection="offline" if is_offline else "online", LastHeartbeat=ZERO_TIME
        )
        if not is_offline:
            status.LastHeartbeat.FromDatetime(self._state.now())
        return types_pb2.RemoteClusterV3(
            Kind="remote_cluster",
            Version="v3",
            Metadata=types_pb2.Metadata(Name=name, Namespace="default"),
            Status=status,
        )


class TrustService(trust_grpc.TrustServiceBase):
    """teleport.trust.v1.TrustService."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state

    @unary
    async def GetCertAuthority(  # noqa: N802
        self, request: trust_pb2.GetCertAuthorityRequest, _caller: Identity
    ) -> types_pb2.CertAuthorityV2:
        for cluster in self._trusted(request.type, include_key=request.include_key):
            if cluster.name == request.domain:
                return _certificate_authority(cluster, request.type)
        raise NotFoundError(f"key /authorities/{request.type}/{request.domain} is not found")

    @unary
    async def GetCertAuthorities(  # noqa: N802
        self, request: trust_pb2.GetCertAuthoritiesRequest, _caller: Identity
    ) -> trust_pb2.GetCertAuthoritiesResponse:
        trusted = self._trusted(request.type, include_key=request.include_key)
        return trust_pb2.GetCertAuthoritiesResponse(
            cert_authorities_v2=[_certificate_authority(c, request.type) for c in trusted]
        )

    def _trusted(self, kind: str, *, include_key: bool) -> tuple[ClusterState, ...]:
        if include_key:
            raise AccessError("access denied to read certificate authority keys")
        if kind not in {"host", "user"}:
            raise RequestError(f"authority type {kind!r} is not supported")
        return self._state.trusted()


def _certificate_authority(cluster: ClusterState, kind: str) -> types_pb2.CertAuthorityV2:
    authorities = cluster.host_authorities if kind == "host" else (cluster.user_ca,)
    return types_pb2.CertAuthorityV2(
        Kind="cert_authority",
        SubKind=kind,
        Version="v2",
        Metadata=types_pb2.Metadata(Name=cluster.name, Namespace="default"),
        Spec=types_pb2.CertAuthoritySpecV2(
            Type=kind,
            ClusterName=cluster.name,
            ActiveKeys=_key_set(authorities[:1]),
            AdditionalTrustedKeys=_key_set(authorities[1:]),
        ),
    )


def _key_set(authorities: Sequence[Authority]) -> types_pb2.CAKeySet:
    return types_pb2.CAKeySet(
        SSH=[types_pb2.SSHKeyPair(PublicKey=one.ssh_public_line()) for one in authorities],
        TLS=[types_pb2.TLSKeyPair(Cert=one.tls.certificate_pem()) for one in authorities],
    )

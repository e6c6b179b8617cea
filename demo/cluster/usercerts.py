"""GenerateUserCerts: which certificate a user gets, as lib/auth decides it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf.timestamp_pb2 import Timestamp

from demo.cluster.authorities import BACKDATE, TlsPublicKey, issue_user_certificate
from demo.cluster.errors import AccessError, NotFoundError, RequestError
from demo.cluster.identity import (
    USAGE_APPS,
    USAGE_DATABASES,
    AppRoute,
    DatabaseRoute,
    Identity,
)
from demo.cluster.sshcert import issue_ssh_user_certificate, parse_ssh_public_key
from demo.cluster.state import AppSession, ClusterState
from workers.proxy.teleport.pb import auth_pb2

# UserSingleUseCertTTL of lib/auth.
SINGLE_USE_LIFETIME = timedelta(minutes=1)

_Request = auth_pb2.UserCertsRequest
# Local proxies keep key and certificate in memory, so theirs live as long as asked.
_LONG_LIVED: Final = frozenset(
    {
        (_Request.App, _Request.TSH_APP_LOCAL_PROXY),
        (_Request.Database, _Request.TSH_DB_LOCAL_PROXY_TUNNEL),
        (_Request.Kubernetes, _Request.TSH_KUBE_LOCAL_PROXY),
        (_Request.Kubernetes, _Request.TSH_KUBE_LOCAL_PROXY_HEADLESS),
    }
)


_USAGES: Final = {_Request.App: (USAGE_APPS,), _Request.Database: (USAGE_DATABASES,)}


def generate_user_certs(
    state: ClusterState, caller: Identity, request: auth_pb2.UserCertsRequest, now: datetime
) -> auth_pb2.Certs:
    """Certificates for `caller`; an app certificate opens a new app session.

    Raises:
        RequestError, AccessError, NotFoundError: as the real server refuses.
    """
    _check_request(state, caller, request)
    # Without the caller's requests the certificate has only the user's own roles.
    roles = state.roles_with(request.AccessRequests)
    expires = _expiry(caller, request, now)
    mfa_verified = _check_mfa(state, caller, request, now)
    identity = Identity(
        user=caller.user,
        roles=roles,
        teleport_cluster=state.name,
        expires=expires,
        principals=caller.principals,
        usage=_USAGES.get(request.Usage, ()),
        route_to_cluster=request.RouteToCluster or state.name,
        traits=caller.traits,
        route_to_database=_database_route(request),
        access_requests=tuple(request.AccessRequests),
        login_ip=caller.login_ip,
        mfa_verified=mfa_verified or caller.mfa_verified,
        previous_identity_expires=caller.expires if mfa_verified else None,
    )
    return _issue(state, identity, request, now)


def _database_route(request: auth_pb2.UserCertsRequest) -> DatabaseRoute | None:
    """Certificates for other usages lead to no database, whatever else is asked for."""
    asked = request.RouteToDatabase
    if request.Usage not in {_Request.All, _Request.Database} or not asked.ServiceName:
        return None
    return DatabaseRoute(asked.ServiceName, asked.Protocol, asked.Username, asked.Database)


def _issue(
    state: ClusterState, identity: Identity, request: auth_pb2.UserCertsRequest, now: datetime
) -> auth_pb2.Certs:
    certs = auth_pb2.Certs(
        TLSCACerts=[one.tls.certificate_pem() for one in state.host_authorities],
        SSHCACerts=[one.ssh_public_line() for one in state.host_authorities],
    )
    # A single-use answer carries only the certificate that matches its usage.
    is_ssh_only = _is_single_use(request) and request.Usage == _Request.SSH
    is_tls_only = _is_single_use(request) and not is_ssh_only
    if request.SSHPublicKey and not is_tls_only:
        ssh_key = parse_ssh_public_key(request.SSHPublicKey)
        certs.SSH = issue_ssh_user_certificate(state.user_ca, identity, ssh_key, now)
    if request.TLSPublicKey and not is_ssh_only:
        tls_key = parse_tls_public_key(request.TLSPublicKey)
        if request.Usage == _Request.App:
            identity = _with_session(state, identity, request.RouteToApp, now)
        not_before = now - BACKDATE
        certs.TLS = issue_user_certificate(state.user_ca, identity, tls_key, not_before)
    if not certs.SSH and not certs.TLS:
        raise RequestError("no public key for the requested usage is given")
    return certs


def _with_session(
    state: ClusterState, identity: Identity, asked: auth_pb2.RouteToApp, now: datetime
) -> Identity:
    session_id = state.sessions.create(AppSession(identity.user, identity.expires), now)
    route = AppRoute(
        name=asked.Name,
        public_addr=asked.PublicAddr,
        cluster_name=asked.ClusterName,
        session_id=session_id,
        target_port=asked.TargetPort,
    )
    return replace(identity, route_to_app=route)


def _check_request(
    state: ClusterState, caller: Identity, request: auth_pb2.UserCertsRequest
) -> None:
    if caller.disallow_reissue:
        raise AccessError("access denied: identity is not allowed to reissue certificates")
    if request.Username != caller.user:
        raise AccessError(f"access denied: {caller.user} may not impersonate {request.Username!r}")
    if request.Usage == _Request.All and _is_single_use(request):
        raise RequestError("single-use certificates cannot be issued for all purposes")
    if request.Usage == _Request.App and not request.RouteToApp.Name:
        raise RequestError("missing app Name in the RouteToApp of an App-only UserCertsRequest")
    if request.Usage == _Request.App and request.RouteToApp.TargetPort > 65535:
        raise RequestError(f"target port {request.RouteToApp.TargetPort} is no port")
    if request.Usage == _Request.SSH and not request.NodeName:
        raise RequestError("missing NodeName field in a ssh-only UserCertsRequest")
    if request.Usage == _Request.Database and not request.RouteToDatabase.ServiceName:
        raise RequestError("missing ServiceName field in a database-only UserCertsRequest")
    if request.RouteToCluster and state.member(request.RouteToCluster) is None:
        raise NotFoundError(f"cluster {request.RouteToCluster!r} is not found")
    for name in set(request.AccessRequests) - set(caller.access_requests):
        raise NotFoundError(f"access request {name!r} is not found")


def _check_mfa(
    state: ClusterState, caller: Identity, request: auth_pb2.UserCertsRequest, now: datetime
) -> str:
    """The device that answered the challenge; empty without an answer.

    That an answer was needed is decided at connect time, not here.
    """
    if not request.HasField("MFAResponse"):
        return ""
    if state.faults.mfa_refused:
        raise AccessError("MFA response validation failed: a fault refuses every answer")
    return state.factors.check(caller.user, request.MFAResponse, state.proxy, now)


def _expiry(caller: Identity, request: auth_pb2.UserCertsRequest, now: datetime) -> datetime:
    asked = _as_datetime(request.Expires)
    if asked <= now:
        raise AccessError("access denied: client credentials have expired, please relogin.")
    limits = [asked, caller.expires]
    if _is_single_use(request) and (request.Usage, request.RequesterName) not in _LONG_LIVED:
        limits.append(now + SINGLE_USE_LIFETIME)
    # X.509 counts in whole seconds.
    return min(limits).replace(microsecond=0)


def _as_datetime(timestamp: Timestamp) -> datetime:
    """An absent timestamp is long past, as Go's zero time is."""
    seconds = min(max(timestamp.seconds, 0), 2**37)
    return datetime.fromtimestamp(seconds, UTC)


def _is_single_use(request: auth_pb2.UserCertsRequest) -> bool:
    return request.Purpose == _Request.CERT_PURPOSE_SINGLE_USE_CERTS


def parse_tls_public_key(pem: bytes) -> TlsPublicKey:
    """The public key of a TLS certificate to be, PKIX or PKCS#1 PEM.

    Raises:
        RequestError: it cannot be read or is of an unsupported kind.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RequestError(f"the TLS public key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        raise RequestError("the TLS public key is of an unsupported kind")
    return key

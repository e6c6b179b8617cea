"""Certificates for apps: issued by the root cluster, kept in memory until they expire.

Source: `lib/vnet/app_handler.go`, `GenerateUserCerts` in authservice.proto. The requester
TSH_APP_LOCAL_PROXY makes the server grant the asked lifetime, on the promise that key and
certificate never touch a disk.
"""

import asyncio
import ssl
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from workers.proxy.teleport.apps import App
from workers.proxy.teleport.auth_client import AuthApi, timestamp
from workers.proxy.teleport.contexts import app_context
from workers.proxy.teleport.credentials import CredentialError, certificate_pem, pem_blocks
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    MfaRequiredError,
    NotImplementedByClusterError,
    RefusedError,
)
from workers.proxy.teleport.identity import Identity, IdentityError, read_identity
from workers.proxy.teleport.pb import auth_pb2
from workers.proxy.teleport.single_flight import SingleFlight

# The dial that follows must still find the certificate valid.
MARGIN = timedelta(seconds=3)


@dataclass(frozen=True, slots=True)
class CertificateKey:
    """What a certificate is for. `leaf` is empty for the root cluster, `target_port` 0 for any."""

    leaf: str
    app: str
    public_addr: str
    target_port: int


@dataclass(frozen=True, slots=True)
class AppCertificate:
    """An issued certificate, ready for dialling."""

    context: ssl.SSLContext
    not_after: datetime
    session: str


def certificate_request(
    identity: Identity, cluster: str, app: App, target_port: int, public_key: bytes
) -> auth_pb2.UserCertsRequest:
    """The request for an app certificate. Pure.

    `cluster` is the one that has the app; `public_key` is PEM, SubjectPublicKeyInfo. The active
    access requests go with it, or the certificate would have only the base roles.
    """
    return auth_pb2.UserCertsRequest(
        Username=identity.user,
        Expires=timestamp(identity.not_after),
        RouteToCluster=cluster,
        AccessRequests=identity.active_requests,
        Usage=auth_pb2.UserCertsRequest.App,
        RequesterName=auth_pb2.UserCertsRequest.TSH_APP_LOCAL_PROXY,
        RouteToApp=route_to_app(cluster, app, target_port),
        TLSPublicKey=public_key,
    )


def route_to_app(cluster: str, app: App, target_port: int) -> auth_pb2.RouteToApp:
    """The part of the request that names the app. Pure."""
    return auth_pb2.RouteToApp(
        Name=app.name,
        PublicAddr=app.public_addr,
        ClusterName=cluster,
        URI=app.uri,
        TargetPort=target_port,
    )


class AppCertificates:
    """The app certificates of one login. A changed login gets a new object.

    Parallel requests for one key are one request. At most `max_kept` are kept; the one not used for
    longest is forgotten.
    """

    def __init__(
        self,
        identity: Identity,
        root: AuthApi,
        *,
        wall_clock: Callable[[], datetime],
        ca_file: str = "",
        insecure: bool = False,
        max_kept: int = 256,
    ) -> None:
        self._identity = identity
        self._root = root
        self._wall_clock = wall_clock
        self._ca_file = ca_file
        self._insecure = insecure
        self._max_kept = max_kept
        self._kept = OrderedDict[CertificateKey, AppCertificate]()
        self._flight = SingleFlight[CertificateKey, AppCertificate]()

    async def get(
        self, app: App, target_port: int, *, cluster: str, leaf: str, owner: AuthApi
    ) -> AppCertificate:
        """A certificate that is valid now. `owner` is the auth service of the app's cluster.

        Raises:
            LoginExpiredError: the user certificate has expired.
            MfaRequiredError: the app needs a second factor for each session.
            TeleportError: the cluster issued none.
        """
        key = CertificateKey(leaf, app.name, app.public_addr, target_port)
        kept = self._kept.get(key)
        # Only the end is compared: with a slow local clock every fresh certificate would seem not
        # yet valid, and each connection would ask for another.
        if kept is not None and self._wall_clock() < kept.not_after - MARGIN:
            self._kept.move_to_end(key)
            return kept
        return await self._flight.run(
            key, lambda: self._issue(key, app, cluster=cluster, owner=owner)
        )

    async def _issue(
        self, key: CertificateKey, app: App, *, cluster: str, owner: AuthApi
    ) -> AppCertificate:
        if self._wall_clock() >= self._identity.not_after:
            raise LoginExpiredError("the login has expired: run tsh login")
        question = auth_pb2.IsMFARequiredRequest(App=route_to_app(cluster, app, key.target_port))
        try:
            needs_mfa = await owner.is_mfa_required(question)
        except NotImplementedByClusterError:
            needs_mfa = False
        if needs_mfa:
            raise MfaRequiredError(f"app {app.name} needs a second factor for each session")
        private = ec.generate_private_key(ec.SECP256R1())
        public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        request = certificate_request(self._identity, cluster, app, key.target_port, public)
        reply = await self._root.generate_user_certs(request)
        der, identity = _issued(reply, app)
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            # In a thread: reading the system's authorities takes several milliseconds.
            context = await asyncio.to_thread(
                app_context,
                certificate_pem(der),
                pem,
                ca_file=self._ca_file,
                insecure=self._insecure,
            )
        except ssl.SSLError as error:
            raise RefusedError(
                f"the cluster issued an unusable certificate for app {app.name}"
            ) from error
        certificate = AppCertificate(context, identity.not_after, identity.app_session)
        self._kept[key] = certificate
        self._kept.move_to_end(key)
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return certificate

    async def close(self) -> None:
        """Ends what runs and forgets every certificate."""
        await self._flight.close()
        self._kept.clear()


def _issued(reply: auth_pb2.Certs, app: App) -> tuple[bytes, Identity]:
    # The proxy wants exactly one certificate, so whatever follows the first is dropped.
    try:
        for label, body in pem_blocks(reply.TLS):
            if label == "CERTIFICATE":
                return body, read_identity(body)
    except (CredentialError, IdentityError) as error:
        raise RefusedError(
            f"the cluster issued an unreadable certificate for app {app.name}: {error}"
        ) from error
    raise RefusedError(f"the cluster issued no certificate for app {app.name}")

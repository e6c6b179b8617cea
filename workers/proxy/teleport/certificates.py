"""Certificates for apps and databases: issued by the root cluster, kept in memory until they expire.

Source: `lib/vnet/app_handler.go`, `lib/vnet/db_handler.go`, `lib/client/cluster_client.go`,
`GenerateUserCerts` in authservice.proto. The requesters used here make the server grant the asked
lifetime, on the promise that key and certificate never touch a disk.
"""

import asyncio
import ssl
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from workers.proxy.teleport.apps import App
from workers.proxy.teleport.auth_client import AuthApi, timestamp
from workers.proxy.teleport.contexts import app_context, tunnel_app_context
from workers.proxy.teleport.credentials import CredentialError, certificate_pem, pem_blocks
from workers.proxy.teleport.databases import Database
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    NotImplementedByClusterError,
    RefusedError,
)
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.identity import Identity, IdentityError, read_identity
from workers.proxy.teleport.issue_tally import IssueTally
from workers.proxy.teleport.mfa import Prompter
from workers.proxy.teleport.names import APP_ALPN, DATABASE_ALPN
from workers.proxy.teleport.pb import auth_pb2
from workers.proxy.teleport.second_factor import PROMPT_SECONDS, Purpose, SecondFactor
from workers.proxy.teleport.single_flight import SingleFlight
from workers.proxy.teleport.sso_callback import Callbacks

# The dial that follows must still find the certificate valid.
MARGIN = timedelta(seconds=3)


@dataclass(frozen=True, slots=True)
class AppSubject:
    """An app, and the port of it that is dialled: 0 for an app without a list of ports."""

    app: App
    target_port: int

    @property
    def text(self) -> str:
        """How users are told of it."""
        return f"app {self.app.name}"

    @property
    def alpn(self) -> tuple[str, ...]:
        """What the proxy takes the connection for."""
        return APP_ALPN


@dataclass(frozen=True, slots=True)
class DatabaseSubject:
    """A database. Its user and schema are not named: the proxy reads them from the connection."""

    database: Database

    @property
    def text(self) -> str:
        """How users are told of it."""
        return f"database {self.database.name}"

    @property
    def alpn(self) -> tuple[str, ...]:
        """What the proxy takes the connection for."""
        return DATABASE_ALPN[self.database.protocol]


Subject: TypeAlias = AppSubject | DatabaseSubject


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom a certificate is shown to. `authorities` are the root cluster's host authorities, DER."""

    ca_file: str
    insecure: bool
    authorities: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class Certificate:
    """An issued certificate with its key, both PEM. The TLS contexts are made at first use."""

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    not_after: datetime
    session: str  # of an app; empty for a database
    subject: Subject
    trust: Trust = field(repr=False)
    _context: ssl.SSLContext | None = field(default=None, repr=False)
    _tunnel_context: ssl.SSLContext | None = field(default=None, repr=False)

    @property
    def context(self) -> ssl.SSLContext:
        """For the proxy's own port. Trusts the system's authorities and the configured ones.

        Reads files when it is made.

        Raises:
            MisconfiguredError: the configured authorities cannot be read.
            RefusedError: the certificate is not for the key.
        """
        if self._context is None:
            try:
                self._context = app_context(
                    self.certificate_pem,
                    self.key_pem,
                    alpn=self.subject.alpn,
                    ca_file=self.trust.ca_file,
                    insecure=self.trust.insecure,
                )
            except ssl.SSLError as error:
                raise _unusable(self.subject) from error
        return self._context

    @property
    def tunnel_context(self) -> ssl.SSLContext:
        """For the inside of a connection upgrade. Trusts the root cluster's host authorities.

        Raises:
            RefusedError: the certificate is not for the key.
        """
        if self._tunnel_context is None:
            try:
                self._tunnel_context = tunnel_app_context(
                    self.certificate_pem,
                    self.key_pem,
                    self.trust.authorities,
                    alpn=self.subject.alpn,
                )
            except ssl.SSLError as error:
                raise _unusable(self.subject) from error
        return self._tunnel_context


def _unusable(subject: Subject) -> RefusedError:
    return RefusedError(f"the cluster issued an unusable certificate for {subject.text}")


@dataclass(frozen=True, slots=True)
class _Key:
    """What a certificate is for. `leaf` is empty for the root cluster."""

    leaf: str
    kind: type[Subject]
    name: str
    detail: str  # the app's public address, the database's protocol
    target_port: int


def _key(subject: Subject, leaf: str) -> _Key:
    match subject:
        case AppSubject(app, port):
            return _Key(leaf, AppSubject, app.name, app.public_addr, port)
        case DatabaseSubject(database):
            return _Key(leaf, DatabaseSubject, database.name, database.protocol, 0)


def certificate_request(
    identity: Identity, subject: Subject, cluster: str, public_key: bytes
) -> auth_pb2.UserCertsRequest:
    """The request for a certificate, without a second factor. Pure.

    `cluster` is the one that has the subject; `public_key` is PEM, SubjectPublicKeyInfo. The active
    access requests go with it, or the certificate would have only the base roles.
    """
    request = auth_pb2.UserCertsRequest(
        Username=identity.user,
        Expires=timestamp(identity.not_after),
        RouteToCluster=cluster,
        AccessRequests=identity.active_requests,
        TLSPublicKey=public_key,
    )
    match subject:
        case AppSubject():
            request.Usage = auth_pb2.UserCertsRequest.App
            request.RequesterName = auth_pb2.UserCertsRequest.TSH_APP_LOCAL_PROXY
            request.RouteToApp.CopyFrom(_route_to_app(subject, cluster))
        case DatabaseSubject():
            request.Usage = auth_pb2.UserCertsRequest.Database
            request.RequesterName = auth_pb2.UserCertsRequest.TSH_DB_LOCAL_PROXY_TUNNEL
            request.RouteToDatabase.CopyFrom(_route_to_database(subject))
    return request


def mfa_question(subject: Subject, cluster: str) -> auth_pb2.IsMFARequiredRequest:
    """Asks the cluster of the subject whether a session with it needs a second factor. Pure."""
    match subject:
        case AppSubject():
            return auth_pb2.IsMFARequiredRequest(App=_route_to_app(subject, cluster))
        case DatabaseSubject():
            return auth_pb2.IsMFARequiredRequest(Database=_route_to_database(subject))


def _route_to_app(subject: AppSubject, cluster: str) -> auth_pb2.RouteToApp:
    return auth_pb2.RouteToApp(
        Name=subject.app.name,
        PublicAddr=subject.app.public_addr,
        ClusterName=cluster,
        URI=subject.app.uri,
        TargetPort=subject.target_port,
    )


def _route_to_database(subject: DatabaseSubject) -> auth_pb2.RouteToDatabase:
    return auth_pb2.RouteToDatabase(
        ServiceName=subject.database.name, Protocol=subject.database.protocol
    )


class Certificates:
    """The certificates of one login. A changed login gets a new object.

    Parallel requests for one subject are one request, and one question to the user if a second
    factor is needed. At most `max_kept` are kept; the one not used for longest is forgotten.
    """

    def __init__(
        self,
        login: Login,
        root: AuthApi,
        *,
        wall_clock: Callable[[], datetime],
        prompter: Prompter | None = None,
        ca_file: str = "",
        insecure: bool = False,
        max_kept: int = 256,
        prompt_seconds: float = PROMPT_SECONDS,
        callbacks: Callbacks | None = None,
        tally: IssueTally | None = None,
    ) -> None:
        assert login.profile is not None
        assert login.credentials is not None
        self._identity = login.credentials.identity
        self._root = root
        self._wall_clock = wall_clock
        authorities = login.authorities.get(self._identity.root_cluster, ())
        self._trust = Trust(ca_file, insecure, authorities)
        self._is_in_tunnel = login.profile.is_conn_upgrade_required
        self._second_factor = SecondFactor(
            login, root, prompter, prompt_seconds=prompt_seconds, callbacks=callbacks
        )
        self._tally = tally or IssueTally()
        self._max_kept = max_kept
        self._kept = OrderedDict[_Key, Certificate]()
        self._flight = SingleFlight[_Key, Certificate]()

    def kept(self, subject: Subject, *, leaf: str) -> Certificate | None:
        """A certificate from earlier that is valid now."""
        key = _key(subject, leaf)
        kept = self._kept.get(key)
        # Only the end is compared: with a slow local clock every fresh certificate would seem not
        # yet valid, and each connection would ask for another.
        if kept is None or self._wall_clock() + MARGIN >= kept.not_after:
            return None
        self._kept.move_to_end(key)
        return kept

    async def get(
        self, subject: Subject, *, cluster: str, leaf: str, owner: AuthApi
    ) -> Certificate:
        """A certificate that is valid now. `owner` is the auth service of the subject's cluster.

        Takes as long as the user does. A caller who stops waiting leaves the question open, and
        whoever asks next gets its result.

        Raises:
            LoginExpiredError: the user certificate has expired.
            MfaRequiredError: a second factor is needed, and was not given or not taken.
            TeleportError: the cluster issued none.
        """
        kept = self.kept(subject, leaf=leaf)
        if kept is not None:
            return kept
        key = _key(subject, leaf)

        async def issue() -> Certificate:
            with self._tally.counting("app" if isinstance(subject, AppSubject) else "database"):
                certificate = await self._issue(subject, cluster=cluster, leaf=leaf, owner=owner)
            self._keep(key, certificate)
            return certificate

        return await self._flight.run(key, issue)

    async def _issue(
        self, subject: Subject, *, cluster: str, leaf: str, owner: AuthApi
    ) -> Certificate:
        if self._wall_clock() >= self._identity.not_after:
            raise LoginExpiredError("the login has expired: run tsh login")
        private = ec.generate_private_key(ec.SECP256R1())
        public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        request = certificate_request(self._identity, subject, cluster, public)
        question = mfa_question(subject, cluster)
        if await _is_required(owner, question):
            purpose = Purpose(subject.text, cluster, check=None if leaf else question)
            reply = await self._second_factor.certify(request, purpose)
        else:
            reply = await self._root.generate_user_certs(request)
        body, identity = _issued(reply, subject)
        certificate = Certificate(
            certificate_pem=certificate_pem(body),
            key_pem=private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            not_after=identity.not_after,
            session=identity.app_session,
            subject=subject,
            trust=self._trust,
        )
        # In a thread: reading the system's authorities takes several milliseconds.
        await asyncio.to_thread(self._prepare, certificate)
        return certificate

    def _prepare(self, certificate: Certificate) -> None:
        """Makes the context that dialling will ask for."""
        _ = certificate.tunnel_context if self._is_in_tunnel else certificate.context

    def _keep(self, key: _Key, certificate: Certificate) -> None:
        self._kept[key] = certificate
        self._kept.move_to_end(key)
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)

    async def close(self) -> None:
        """Ends what runs and forgets every certificate."""
        await self._flight.close()
        self._kept.clear()


async def _is_required(owner: AuthApi, question: auth_pb2.IsMFARequiredRequest) -> bool:
    try:
        return await owner.is_mfa_required(question)
    except NotImplementedByClusterError:
        return False


def _issued(reply: auth_pb2.Certs, subject: Subject) -> tuple[bytes, Identity]:
    # The proxy wants exactly one certificate, so whatever follows the first is dropped.
    try:
        for label, body in pem_blocks(reply.TLS):
            if label == "CERTIFICATE":
                return body, read_identity(body)
    except (CredentialError, IdentityError) as error:
        raise RefusedError(
            f"the cluster issued an unreadable certificate for {subject.text}: {error}"
        ) from error
    raise RefusedError(f"the cluster issued no certificate for {subject.text}")

"""A gRPC connection to the auth service of a cluster, and the translation of its errors.

TLS is between us and the auth service; whatever way leads there (`Carrier`) forwards it unread.
This is the only module where errors of ssl, asyncio, h2 and grpclib become errors of
`workers.proxy.teleport.errors`.
"""

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError
from grpclib.client import Channel, Handler, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import Connection, EventsProcessor, H2Protocol, Stream
from grpclib.utils import Wrapper
from h2.exceptions import ProtocolError as Http2Error

from workers.proxy.teleport.errors import (
    AccessDeniedError,
    DeviceTrustError,
    KeyPolicyError,
    LimitExceededError,
    LoginExpiredError,
    MfaRequiredError,
    NotFoundError,
    NotImplementedByClusterError,
    RefusedError,
    TeleportError,
    UnreachableError,
    safe_text,
)
from workers.proxy.teleport.names import API_DOMAIN
from workers.proxy.teleport.pipe import Line

Request = TypeVar("Request")
Reply = TypeVar("Reply")

# As much as other gRPC clients take by default.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# How long a closing TLS connection waits for the other end to close as well.
TLS_SHUTDOWN_SECONDS = 2.0


class MessageTooLargeError(Exception):
    """A message of more than MAX_MESSAGE_BYTES was announced."""


# What grpclib and all below it raise for whatever a server may do. The last four are grpclib's for
# a compressed message, a cut one, and headers that are missing or malformed.
FOREIGN_ERRORS = (
    MessageTooLargeError,
    GRPCError,
    StreamTerminatedError,
    ProtocolError,
    Http2Error,
    DecodeError,
    TimeoutError,
    OSError,  # ssl.SSLError and socket.gaierror are OSErrors
    NotImplementedError,
    AssertionError,
    LookupError,
    ValueError,
)
# Alerts by which a TLS server says that it does not take our certificate (RFC 8446 section 6.2).
_LOGIN_ALERTS = (
    "ALERT_BAD_CERTIFICATE",
    "ALERT_CERTIFICATE_EXPIRED",
    "ALERT_CERTIFICATE_REVOKED",
    "ALERT_CERTIFICATE_UNKNOWN",
    "ALERT_UNKNOWN_CA",
    "ALERT_DECRYPT_ERROR",  # an authority of the same name with another key
)
# Teleport, `api/utils/keys/policy.go`: either word, by version.
_KEY_POLICY = re.compile(r"private key policy not (?:met|satisfied)")


class Carrier(Protocol):
    """A way to a TLS server: direct, or through tunnels."""

    @property
    def is_kept(self) -> bool:
        """Whether `connect` would use a connection from earlier, which may have died unnoticed."""

    async def connect(self) -> Line:
        """A new connection to the server. Has no deadline of its own.

        Raises:
            TeleportError, OSError, TimeoutError: there is no way through.
        """

    def suspect(self, since: float) -> None:
        """A deadline was missed: what is kept and has been silent since then is closed.

        `since` is a time of the event loop's clock, in seconds.
        """


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to reach the auth service of one cluster."""

    carrier: Carrier
    context: ssl.SSLContext
    cluster: str  # for messages
    profile: str  # for messages


class AuthChannel:
    """One kept connection. It is opened by the first call and opened again after a failure.

    With `idle_seconds`, it is also closed when there was no call for so long.
    """

    def __init__(
        self, endpoint: Endpoint, *, timeout_seconds: float, idle_seconds: float = 0.0
    ) -> None:
        self._endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._idle_seconds = idle_seconds
        self._answered_at = -inf
        self._under_way = 0
        self._idle_timer: asyncio.TimerHandle | None = None
        self.grpc = TlsChannel(endpoint.carrier, endpoint.context, timeout_seconds)

    async def call(
        self,
        method: UnaryUnaryMethod[Request, Reply],
        request: Request,
        metadata: Mapping[str, str],
    ) -> Reply:
        """One unary call with a deadline.

        A kept connection may have died unnoticed; then the call is repeated once on a new one.

        Raises:
            TeleportError: the leaf class says what happened.
        """
        self._under_way += 1
        self._stop_idle_timer()
        try:
            return await self._call(method, request, metadata)
        finally:
            self._under_way -= 1
            if self._idle_seconds and not self._under_way and self.grpc.is_connected:
                self._idle_timer = asyncio.get_running_loop().call_later(
                    self._idle_seconds, self.grpc.close
                )

    async def _call(
        self,
        method: UnaryUnaryMethod[Request, Reply],
        request: Request,
        metadata: Mapping[str, str],
    ) -> Reply:
        was_kept = self.grpc.is_connected or self._endpoint.carrier.is_kept
        try:
            return await self._attempt(method, request, metadata)
        except (StreamTerminatedError, ConnectionError) as error:
            if not was_kept:
                raise self._translated(error) from error
        except FOREIGN_ERRORS as error:
            raise self._translated(error) from error
        try:
            return await self._attempt(method, request, metadata)
        except FOREIGN_ERRORS as error:
            raise self._translated(error) from error

    async def _attempt(
        self,
        method: UnaryUnaryMethod[Request, Reply],
        request: Request,
        metadata: Mapping[str, str],
    ) -> Reply:
        clock = asyncio.get_running_loop().time
        start = clock()
        try:
            async with method.open(timeout=self._timeout_seconds, metadata=metadata) as stream:
                await stream.send_message(request, end=True)
                reply = await stream.recv_message()
        except TimeoutError:
            # A connection on which nothing has come meanwhile may be dead without a word: the
            # machine slept, a firewall forgot it. One that works for others is left alone.
            if self._answered_at < start:
                self.grpc.close()
                self._endpoint.carrier.suspect(start)
            raise
        if reply is None:
            raise DecodeError("the answer is empty")
        self._answered_at = clock()
        return reply

    def _translated(self, error: BaseException) -> TeleportError:
        if isinstance(error, StreamTerminatedError) and self.grpc.lost is not None:
            error = self.grpc.lost
        return translate(error, self._endpoint.cluster, self._endpoint.profile)

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def close(self) -> None:
        """Closes the connection for good; calls under way and later ones fail."""
        self._stop_idle_timer()
        self.grpc.is_retired = True
        self.grpc.close()


class _BoundedStream(Stream):
    """grpclib takes messages of up to 4 GiB."""

    async def recv_data(self, size: int) -> bytes:
        if size > MAX_MESSAGE_BYTES:
            raise MessageTooLargeError(f"a message of {size} bytes is too large")
        return await super().recv_data(size)


class _Connection(Connection):
    def create_stream(
        self, *, stream_id: int | None = None, wrapper: Wrapper | None = None
    ) -> Stream:
        return _BoundedStream(
            self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper
        )


class _Protocol(H2Protocol):
    """Remembers why the connection ended: in TLS 1.3 a refused certificate shows only then."""

    lost: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        made = self.connection
        # grpclib has no other hook for its streams.
        self.connection = _Connection(
            made._connection,  # noqa: SLF001
            made._transport,  # noqa: SLF001
            config=self.config,
        )
        self.processor = EventsProcessor(self.handler, self.connection)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = exc
        super().connection_lost(exc)


class TlsChannel(Channel):
    """gRPC over TLS over a carrier, with a deadline for connecting."""

    def __init__(self, carrier: Carrier, context: ssl.SSLContext, timeout_seconds: float) -> None:
        super().__init__(API_DOMAIN, 443, ssl=context)  # the name that requests show the server
        self._carrier = carrier
        self._context = context
        self._timeout_seconds = timeout_seconds
        self._latest: _Protocol | None = None
        self._line: Line | None = None
        self.is_retired = False

    @property
    def is_connected(self) -> bool:
        return self._protocol is not None and self._connected

    @property
    def lost(self) -> BaseException | None:
        """Why the latest connection ended, if it has and there was a reason."""
        lost = self._latest.lost if self._latest is not None else None
        return lost if _is_telling(lost) else self._fault or lost

    @property
    def _fault(self) -> BaseException | None:
        return self._line.fault() if self._line is not None else None

    def _protocol_factory(self) -> H2Protocol:
        self._latest = _Protocol(Handler(), self._config, self._h2_config)
        return self._latest

    async def _create_connection(self) -> H2Protocol:
        self._refuse_if_retired()
        self._latest = self._line = None
        async with asyncio.timeout(self._timeout_seconds):
            self._line = await self._carrier.connect()
            try:
                protocol = await self._shake_hands(self._line.sock)
            except OSError as error:
                if not _is_telling(error) and (fault := self._fault) is not None:
                    raise fault from error
                raise
        try:
            self._refuse_if_retired()
        except ConnectionAbortedError:
            protocol.processor.close()
            raise
        return protocol

    async def _shake_hands(self, sock: socket.socket) -> H2Protocol:
        loop = asyncio.get_running_loop()
        # uvloop tells the two kinds of sockets apart by the method.
        is_pipe = sock.family == socket.AF_UNIX
        connect = loop.create_unix_connection if is_pipe else loop.create_connection
        protocol: H2Protocol
        try:
            _, protocol = await connect(
                self._protocol_factory,
                sock=sock,
                ssl=self._context,
                server_hostname=API_DOMAIN,  # the context knows the real one
                ssl_shutdown_timeout=TLS_SHUTDOWN_SECONDS,
            )
        except BaseException:
            sock.close()
            raise
        return protocol

    def _refuse_if_retired(self) -> None:
        if self.is_retired:
            raise ConnectionAbortedError("the login has changed")


def _is_telling(error: BaseException | None) -> bool:
    """Whether TLS itself says what is wrong; a tunnel that ends with it has nothing to add."""
    ends = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
    return isinstance(error, ssl.SSLError) and not isinstance(error, ends)


def translate(error: BaseException, cluster: str, profile: str) -> TeleportError:
    """The error of this package that a foreign error stands for. Pure."""
    match error:
        case TeleportError():
            return error
        # The cluster is told how long it has, and may say first that it was too long.
        case TimeoutError() | GRPCError(status=Status.DEADLINE_EXCEEDED):
            return UnreachableError(f"{cluster} did not answer in time")
        case GRPCError():
            return _from_status(error.status, safe_text(error.message or ""), cluster, profile)
        case MessageTooLargeError():
            return LimitExceededError(f"{cluster} sent too much at once: {error}")
        case ssl.SSLCertVerificationError():
            return UnreachableError(
                f"{cluster}: the server's certificate is not trusted "
                f"({safe_text(error.verify_message, 100)}): if the cluster's authority was "
                f"rotated, run tsh login --proxy={profile}"
            )
        case ssl.SSLError() if any(alert in str(error.reason) for alert in _LOGIN_ALERTS):
            return LoginExpiredError(
                f"{cluster} does not accept the user certificate any more: "
                f"run tsh login --proxy={profile}"
            )
        case ssl.SSLError():
            detail = error.reason or "TLS failed"
        case OSError() if error.errno and not isinstance(error, socket.gaierror):
            detail = os.strerror(error.errno)  # asyncio puts words of its own into strerror
        case OSError():
            detail = error.strerror or str(error) or "the connection was lost"
        case StreamTerminatedError():
            detail = "the connection was closed before an answer came"
        case _:
            detail = f"malformed answer, {type(error).__name__}"
    return UnreachableError(f"{cluster} cannot be reached at {profile}: {safe_text(detail, 200)}")


def _from_status(status: Status, text: str, cluster: str, profile: str) -> TeleportError:
    match status:
        case Status.PERMISSION_DENIED | Status.INVALID_ARGUMENT if _KEY_POLICY.search(text):
            return KeyPolicyError(
                f"{cluster}: {text}: the cluster wants the private key in a hardware token, which "
                "VNet cannot use: ask your administrator for a role without that policy"
            )
        case Status.PERMISSION_DENIED if "requires MFA" in text:
            return MfaRequiredError(f"{cluster}: {text}")
        case Status.PERMISSION_DENIED if "requires a trusted device" in text:
            return DeviceTrustError(
                f"{cluster}: {text}: log in with tsh on a device that is registered with the "
                f"cluster (tsh login --proxy={profile})"
            )
        # The cluster's clock counts, or the login was made shorter since.
        case Status.PERMISSION_DENIED if "credentials have expired" in text:
            return _not_accepted(cluster, text, profile)
        case Status.PERMISSION_DENIED:
            return AccessDeniedError(f"{cluster} refused: {text}")
        case Status.NOT_FOUND:
            return NotFoundError(f"{cluster}: {text}")
        case Status.UNIMPLEMENTED:
            return NotImplementedByClusterError(f"{cluster}: {text}")
        case Status.UNAUTHENTICATED:
            return _not_accepted(cluster, text, profile)
        case Status.INVALID_ARGUMENT | Status.FAILED_PRECONDITION | Status.ALREADY_EXISTS:
            return RefusedError(f"{cluster} refused: {text}")
        case Status.RESOURCE_EXHAUSTED:
            return LimitExceededError(f"{cluster} limits what may be asked: {text}")
        case _:
            return UnreachableError(f"{cluster} failed ({status.name}): {text}")


def _not_accepted(cluster: str, text: str, profile: str) -> LoginExpiredError:
    return LoginExpiredError(
        f"{cluster} does not accept the login ({text}): run tsh login --proxy={profile}"
    )

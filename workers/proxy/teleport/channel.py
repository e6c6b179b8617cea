"""A gRPC connection through the Teleport proxy, and the translation of its errors.

The proxy reads the first ALPN entry and forwards the bytes; TLS is between us and the auth service.
This is the only module where errors of ssl, asyncio, h2 and grpclib become errors of
`workers.proxy.teleport.errors`.
"""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from google.protobuf.message import DecodeError
from grpclib.client import Channel, Handler, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import H2Protocol
from h2.exceptions import ProtocolError as Http2Error

from workers.proxy.teleport.errors import (
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

Request = TypeVar("Request")
Reply = TypeVar("Reply")

_FOREIGN = (
    GRPCError,
    StreamTerminatedError,
    ProtocolError,
    Http2Error,
    DecodeError,
    TimeoutError,
    OSError,  # ssl.SSLError and socket.gaierror are OSErrors
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


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to reach the auth service of one cluster."""

    host: str
    port: int
    context: ssl.SSLContext
    cluster: str  # for messages
    profile: str  # for messages


class AuthChannel:
    """One kept connection. It is opened by the first call and opened again after a failure."""

    def __init__(self, endpoint: Endpoint, *, timeout_seconds: float) -> None:
        self._endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._answered_at = -inf
        self.grpc = _Channel(endpoint, timeout_seconds)

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
        was_connected = self.grpc.is_connected
        try:
            return await self._attempt(method, request, metadata)
        except (StreamTerminatedError, ConnectionError) as error:
            if not was_connected:
                raise self._translated(error) from error
        except _FOREIGN as error:
            raise self._translated(error) from error
        try:
            return await self._attempt(method, request, metadata)
        except _FOREIGN as error:
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
            raise
        if reply is None:
            raise DecodeError("the answer is empty")
        self._answered_at = clock()
        return reply

    def _translated(self, error: BaseException) -> TeleportError:
        if isinstance(error, StreamTerminatedError) and self.grpc.lost is not None:
            error = self.grpc.lost
        return translate(error, self._endpoint.cluster, self._endpoint.profile)

    def close(self) -> None:
        """Closes the connection for good; calls under way and later ones fail."""
        self.grpc.is_retired = True
        self.grpc.close()


class _Protocol(H2Protocol):
    """Remembers why the connection ended: in TLS 1.3 a refused certificate shows only then."""

    lost: BaseException | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = exc
        super().connection_lost(exc)


class _Channel(Channel):
    """A connection with a deadline of its own and a protocol that remembers why it ended."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        super().__init__(endpoint.host, endpoint.port, ssl=endpoint.context)
        self._endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._latest: _Protocol | None = None
        self.is_retired = False

    @property
    def is_connected(self) -> bool:
        return self._protocol is not None and self._connected

    @property
    def lost(self) -> BaseException | None:
        """Why the latest connection ended, if it has and there was a reason."""
        return self._latest.lost if self._latest is not None else None

    def _protocol_factory(self) -> H2Protocol:
        self._latest = _Protocol(Handler(), self._config, self._h2_config)
        return self._latest

    async def _create_connection(self) -> H2Protocol:
        self._refuse_if_retired()
        protocol: H2Protocol
        async with asyncio.timeout(self._timeout_seconds):
            _, protocol = await asyncio.get_running_loop().create_connection(
                self._protocol_factory,
                self._endpoint.host,
                self._endpoint.port,
                ssl=self._endpoint.context,
                server_hostname=API_DOMAIN,  # the context knows the real one
            )
        try:
            self._refuse_if_retired()
        except ConnectionAbortedError:
            protocol.processor.close()
            raise
        return protocol

    def _refuse_if_retired(self) -> None:
        if self.is_retired:
            raise ConnectionAbortedError("the login has changed")


def translate(error: BaseException, cluster: str, profile: str) -> TeleportError:
    """The error of this package that a foreign error stands for. Pure."""
    match error:
        case GRPCError():
            return _from_status(error.status, safe_text(error.message or ""), cluster, profile)
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
        case TimeoutError():
            return UnreachableError(f"{cluster} did not answer in time")
        case ssl.SSLError():
            detail = error.reason or "TLS failed"
        case OSError():
            detail = error.strerror or str(error) or type(error).__name__
        case StreamTerminatedError():
            detail = "the connection was closed before an answer came"
        case _:
            detail = f"malformed answer, {type(error).__name__}"
    return UnreachableError(f"{cluster} cannot be reached at {profile}: {safe_text(detail, 200)}")


def _from_status(status: Status, text: str, cluster: str, profile: str) -> TeleportError:
    match status:
        case Status.PERMISSION_DENIED if "requires MFA" in text:
            return MfaRequiredError(f"{cluster}: {text}")
        case Status.NOT_FOUND:
            return NotFoundError(f"{cluster}: {text}")
        case Status.UNIMPLEMENTED:
            return NotImplementedByClusterError(f"{cluster}: {text}")
        case Status.UNAUTHENTICATED:
            return LoginExpiredError(
                f"{cluster} does not accept the login ({text}): run tsh login --proxy={profile}"
            )
        case (
            Status.PERMISSION_DENIED
            | Status.INVALID_ARGUMENT
            | Status.FAILED_PRECONDITION
            | Status.ALREADY_EXISTS
        ):
            return RefusedError(f"{cluster} refused: {text}")
        case _:
            return UnreachableError(f"{cluster} failed ({status.name}): {text}")

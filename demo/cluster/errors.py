"""Errors of the embedded cluster, named by whose fault they are."""


class EmbeddedClusterError(Exception):
    """Base of all errors of this package."""


class ClusterFileError(EmbeddedClusterError):
    """The cluster file is wrong; the message names the key and the offending value."""


class HomeError(EmbeddedClusterError):
    """The directory cannot become a tsh home; the message says why."""


class ClientHelloError(EmbeddedClusterError):
    """The first bytes of a connection are no TLS ClientHello, or one that is too large."""


class FramingError(EmbeddedClusterError):
    """A ping frame is larger than the receiver allows."""


class DatabaseError(EmbeddedClusterError):
    """A client or a database does not speak the protocol it should, or the database refuses."""


class WebSocketError(EmbeddedClusterError):
    """A client breaks the WebSocket protocol; `code` says how (RFC 6455 section 7.4.1)."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class PredicateError(EmbeddedClusterError):
    """A predicate expression cannot be parsed or names an unknown field."""


class IdentityError(EmbeddedClusterError):
    """A certificate holds no usable Teleport identity."""


class AccessError(EmbeddedClusterError):
    """A client may not have what it asks for; the message goes to the log, or to a gRPC status."""


class RequestError(EmbeddedClusterError):
    """A request is malformed; becomes INVALID_ARGUMENT."""


class TruncatedStreamError(EmbeddedClusterError):
    """A TLS peer closed TCP without close_notify (RFC 8446 section 6.1)."""


class NotFoundError(EmbeddedClusterError):
    """What is asked for does not exist; becomes NOT_FOUND."""


class Http2Error(EmbeddedClusterError):
    """A client breaks HTTP/2; `code` says how (RFC 9113 section 7)."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code

"""Why no connection was made."""


class DialError(Exception):
    """Base: no connection was made. The text is one sentence, safe to log and show."""


class ProxyUnreachableError(DialError):
    """No such name, no route, nobody listens, the way there failed, or the connection was lost."""


class DialTimedOutError(DialError):
    """The whole dial took longer than allowed."""


class ProxyUntrustedError(DialError):
    """A certificate on the way, mostly the proxy's, is not trusted or is for another name."""


class DialRefusedError(DialError):
    """The proxy answered with a TLS alert or closed during the handshake.

    Under TLS 1.3 a refused client certificate shows only later, see `Upstream.on_lost`.
    """


class HandshakeFailedError(DialError):
    """TLS failed in another way: no TLS at the other end, no common version or protocol."""


class UpgradeFailedError(DialError):
    """The web port did not make the connection a tunnel."""


class NodeUnreachableError(DialError):
    """The proxy was reached, and did not reach the SSH host: unknown, offline, ambiguous."""


class NodeDeniedError(NodeUnreachableError):
    """The proxy does not let this user connect to the SSH host."""


class LoginRefusedError(NodeUnreachableError):
    """The proxy does not take the user's login any more."""


class SshUnsupportedError(NodeUnreachableError):
    """The proxy's version does not carry SSH in this way."""

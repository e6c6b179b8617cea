"""The way through a load balancer that ends TLS: an HTTP request that becomes a byte stream. Pure.

    client --TLS--> balancer --> proxy      GET /webapi/connectionupgrade, a WebSocket handshake
    client <========================> proxy      WebSocket frames with the bytes of another TLS

The balancer hides the application protocol (ALPN) that a Teleport proxy routes by; the TLS inside
has it again. The frames are `workers.proxy.websocket`'s.

Source: RFC 6455 section 4; Teleport, api/client/alpn_conn_upgrade.go, lib/web/conn_upgrade.go.
"""

import base64
import hashlib
import secrets

from workers.proxy.http_head import USER_AGENT, HttpHead, HttpHeadError, authority, describe
from workers.proxy.layers import LayerError

PATH = "/webapi/connectionupgrade"

ALPN = "alpn"
ALPN_PING = "alpn-ping"  # the proxy pings every 30 s, for streams that have no pings of their own

_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_NOT_FOUND = 404


class UpgradeError(LayerError):
    """The web port did not agree. The text is one clause, safe to log and show."""


class ConnectionUpgrade:
    """One request and its answer. Send `request`, then `feed` what comes."""

    __slots__ = ("_accept", "_head", "_protocol", "request")

    def __init__(
        self, host: str, port: int, *, protocol: str = ALPN, key: bytes | None = None
    ) -> None:
        """`host` and `port` are the web proxy's; `key` (16 bytes) is random unless given.

        Raises:
            UpgradeError: this is no host.
        """
        text = base64.b64encode(secrets.token_bytes(16) if key is None else key)
        # SHA-1 is what the handshake is defined with; nothing rests on it.
        digest = hashlib.sha1(text + _ACCEPT_GUID, usedforsecurity=False).digest()
        self._accept = base64.b64encode(digest).decode()
        self._protocol = protocol
        self._head = HttpHead()
        try:
            where = authority(host, port)
        except HttpHeadError as error:
            raise UpgradeError(f"connection upgrade: {error}") from error
        self.request = (
            f"GET {PATH} HTTP/1.1\r\n"
            f"Host: {where}\r\n"
            f"User-Agent: {USER_AGENT}\r\n"
            "Upgrade: websocket\r\n"
            "Connection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {text.decode()}\r\n"
            f"Sec-WebSocket-Protocol: {protocol}\r\n"
            "\r\n"
        ).encode("ascii")

    def feed(self, data: bytes | memoryview) -> bytes | None:
        """The WebSocket's first bytes (may be none) once the proxy agreed; None until then.

        Raises:
            UpgradeError: it did not, or this is no answer.
        """
        try:
            rest = self._head.feed(data)
        except HttpHeadError as error:
            raise UpgradeError(f"connection upgrade: {error}") from error
        if rest is not None:
            self._check()
        return rest

    def _check(self) -> None:
        status, fields = self._head.status, self._head.fields
        if status == _NOT_FOUND:
            raise UpgradeError(
                "the proxy has no connection upgrade over WebSocket: its version is too old"
            )
        if status != 101:
            raise UpgradeError(f"the proxy answered {describe(status)} to the connection upgrade")
        if fields.get("upgrade", "").lower() != "websocket":
            raise UpgradeError("the proxy upgraded the connection to something else")
        if fields.get("sec-websocket-accept") != self._accept:
            raise UpgradeError("connection upgrade: the answer is not to this request")
        if fields.get("sec-websocket-protocol") != self._protocol:
            raise UpgradeError("connection upgrade: the proxy chose another protocol")

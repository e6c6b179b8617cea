"""The request that turns a web connection into a tunnel for ALPN (lib/web/conn_upgrade.go). Pure.

GET /webapi/connectionupgrade, WebSocket, sub-protocol alpn or alpn-ping --> 101
"""

from dataclasses import dataclass

from demo.cluster.web import Request, refuse
from demo.cluster.websocket import CloseCode, accept_key, encode_close, is_key

PATH = "/webapi/connectionupgrade"
ALPN = "alpn"
ALPN_PING = "alpn-ping"


@dataclass(frozen=True, slots=True)
class Answer:
    """The response; the connection is a WebSocket after it where `protocol` is not empty."""

    response: bytes
    protocol: str = ""


def answer_upgrade(request: Request) -> Answer:
    """What the proxy says to a request for `PATH`."""
    if request.method != "GET":
        return Answer(refuse(405, f"method {request.method} is not allowed"))
    upgrades = request.values("upgrade")
    if "websocket" not in upgrades:
        return Answer(refuse(404, f"unsupported upgrade types: {upgrades}"))
    if "upgrade" not in (token.lower() for token in request.tokens("connection")):
        return Answer(refuse(400, "'upgrade' token not found in 'Connection' header"))
    if request.one("sec-websocket-version") != "13":
        return Answer(refuse(400, "13 not found in 'Sec-Websocket-Version' header"))
    key = request.one("sec-websocket-key")
    if not is_key(key):
        return Answer(refuse(400, "'Sec-WebSocket-Key' header must be 16 bytes in base64"))
    return _accept(key, request.tokens("sec-websocket-protocol"))


def _accept(key: str, offered: list[str]) -> Answer:
    protocol = next((known for known in (ALPN, ALPN_PING) if known in offered), "")
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept_key(key)}",
    ]
    if protocol:
        lines.append(f"Sec-WebSocket-Protocol: {protocol}")
    response = "\r\n".join((*lines, "", "")).encode()
    if not protocol:
        # A proxy says that it knows none of them only in the WebSocket.
        response += encode_close(CloseCode.UNSUPPORTED_DATA, "unknown or empty subprotocol")
    return Answer(response, protocol)

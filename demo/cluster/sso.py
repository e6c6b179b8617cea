"""Single sign-on as a second factor: requests, the identity provider's page, tokens. Pure.

    CreateAuthenticateChallenge --> /sso-demo?request=<id> --> the client's callback --> token checked

As lib/auth and lib/web have it, except that the provider's page, which is the proxy's own here, asks
nothing and redirects at once: there is nobody to ask. Checks of the callback are those of
ValidateClientRedirect in lib/auth/github.go; how the token travels, ConstructSSHResponse in
lib/web/apiserver.go and lib/secret.
"""

import base64
import hmac
import json
import secrets
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from demo.cluster.errors import AccessError, RequestError
from workers.proxy.teleport.pb import auth_pb2

PAGE = "/sso-demo"
CONNECTOR_ID = "sso-demo"
DEVICE_ID = "9d1b3f0e-55a2-4c3b-9f3e-73736f2d6d66"
# For the sign-on and then for the token.
SSO_SECONDS = 180
_MAX_REQUESTS = 100
_KEY_BYTES = 32
_NONCE_BYTES = 12
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(slots=True)
class _Request:
    user: str
    scope: int
    callback: str
    expires: datetime
    token: str = field(default="", repr=False)


def check_callback(url: str) -> bytes:
    """The secret key in a client's callback URL.

    Raises:
        RequestError: it is malformed.
        AccessError: it is not on loopback; connectors that allow others are not to be had here.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        fields = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise RequestError("malformed client redirect URL") from error
    if parts.path != "/callback":
        raise RequestError("invalid path in client redirect URL")
    if [name for name, _ in fields] != ["secret_key"]:
        raise RequestError("malformed query parameters in client redirect URL")
    if parts.fragment or "@" in parts.netloc:
        raise RequestError("fragment or user info in client redirect URL")
    if parts.scheme != "http" or host not in _LOOPBACK:
        raise AccessError(f"{host!r} is not allowed as host of a client redirect URL")
    try:
        key = bytes.fromhex(fields[0][1])
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise RequestError("the secret key in the client redirect URL is none of 32 bytes")
    return key


@dataclass(slots=True)
class SignOns:
    """Requests by their ID; the oldest makes room."""

    _requests: dict[str, _Request] = field(default_factory=dict)

    def begin(
        self, user: str, scope: int, callback: str, proxy: tuple[str, int], now: datetime
    ) -> auth_pb2.SSOChallenge:
        """A challenge; the browser shall come back to `callback`.

        Raises:
            RequestError, AccessError: the callback is not acceptable.
        """
        check_callback(callback)
        while len(self._requests) >= _MAX_REQUESTS:
            del self._requests[next(iter(self._requests))]
        request_id = str(uuid.uuid4())
        expires = now + timedelta(seconds=SSO_SECONDS)
        self._requests[request_id] = _Request(user, scope, callback, expires)
        host, port = proxy
        made = auth_pb2.SSOChallenge(
            request_id=request_id,
            redirect_url=f"https://{host}:{port}{PAGE}?request={request_id}",
        )
        made.device.connector_id = CONNECTOR_ID
        made.device.connector_type = "oidc"
        return made

    def sign_on(self, request_id: str, now: datetime, *, is_refused: bool) -> str:
        """Where the browser goes after the identity provider: the callback with what it gets.

        Raises:
            RequestError: no such request waits for it.
        """
        request = self._requests.get(request_id)
        if request is None or request.token or request.expires <= now:
            raise RequestError("no such sign-on is under way")
        key = check_callback(request.callback)
        if is_refused:
            del self._requests[request_id]
            return _with_fields(request.callback, {"err": "a fault refuses every sign-on"})
        request.token = secrets.token_hex(16)
        request.expires = now + timedelta(seconds=SSO_SECONDS)
        login = {"username": request.user, "mfa_token": request.token}
        # The proxy blanks the key, which does not have to travel again.
        fields = {"secret_key": "", "response": _seal(key, json.dumps(login).encode())}
        return _with_fields(request.callback, fields)

    def check(self, user: str, response: auth_pb2.SSOResponse, scope: int, now: datetime) -> None:
        """Raises AccessError unless the token is this user's; it cannot be used again."""
        request = self._requests.get(response.request_id)
        if (
            request is None
            or not request.token
            or request.expires <= now
            or (request.user, request.scope) != (user, scope)
            or not hmac.compare_digest(request.token.encode(), response.token.encode())
        ):
            raise AccessError("invalid SSO MFA challenge response")
        del self._requests[response.request_id]


def _with_fields(callback: str, fields: dict[str, str]) -> str:
    parts = urlsplit(callback)
    query = dict(parse_qsl(parts.query)) | fields
    return urlunsplit(parts._replace(query=urlencode(query)))


def _seal(key: bytes, text: bytes) -> str:
    """AES-256-GCM, as JSON with base64 (Go's encoding of bytes)."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = {"ciphertext": AESGCM(key).encrypt(nonce, text, None), "nonce": nonce}
    return json.dumps({name: base64.b64encode(data).decode() for name, data in sealed.items()})

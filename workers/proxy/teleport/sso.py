"""Single sign-on as a second factor: what a browser brings back from the identity provider. Pure.

    http://127.0.0.1:<port>/callback?secret_key=<key>       where the cluster sends it
    .../callback?response={"ciphertext": ..., "nonce": ...}  with a token, encrypted with the key
    .../callback?secret_key=<key>&err=<text>                 without

Source: `lib/client/sso/redirector.go`, `lib/secret/secret.go` (AES-256-GCM, nonce of 12 bytes, tag
at the end, no additional data), `lib/web/apiserver.go`.
"""

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from workers.proxy.teleport.errors import SignInFailedError, safe_text

HOST = "127.0.0.1"
PATH = "/callback"
METHODS = "GET, OPTIONS, POST"
# A token has some dozen characters; a login through the same page would bring certificates.
MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024
MAX_FIELDS = 16
_KEY_BYTES = 32
_NONCE_BYTES = 12
_MAX_TOKEN = 4096
_FORM = "application/x-www-form-urlencoded"
_SUCCESS_PAGE = "/web/msg/info/login_success"
_ERROR_PAGE = "/web/msg/error/login"
_REASONS = {
    200: "OK",
    302: "Found",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    411: "Length Required",
    413: "Content Too Large",
}


class CallbackError(Exception):
    """This is no answer to what was asked with the key."""


class HttpError(Exception):
    """No request that is answered here; the argument is the status."""

    def __init__(self, status: int) -> None:
        super().__init__(_REASONS[status])
        self.status = status


class _Sealed(msgspec.Struct, frozen=True):
    ciphertext: bytes  # both base64 (RFC 4648 section 4)
    nonce: bytes


class _Login(msgspec.Struct, frozen=True):
    mfa_token: str = ""


_sealed = msgspec.json.Decoder(_Sealed)
_login = msgspec.json.Decoder(_Login)


class SecretKey:
    """Known to the cluster and to us; never in a log."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES)

    def callback_url(self, port: int) -> str:
        """Where the cluster shall send the browser."""
        return f"http://{HOST}:{port}{PATH}?secret_key={self._key.hex()}"

    def matches(self, text: str) -> bool:
        """Whether the text is the key, in hexadecimal."""
        return hmac.compare_digest(self._key.hex().encode(), text.encode(errors="replace"))

    def token(self, response: str) -> str:
        """The token in a `response`.

        Raises:
            CallbackError: it was made with another key, or is none.
            SignInFailedError: it was made with this key and has no token.
        """
        try:
            sealed = _sealed.decode(response)
            if len(sealed.nonce) != _NONCE_BYTES:
                raise CallbackError("the nonce has another length")
            opened = AESGCM(self._key).decrypt(sealed.nonce, sealed.ciphertext, None)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise CallbackError("it is malformed") from error
        except InvalidTag as error:
            raise CallbackError("it is for somebody else") from error
        try:
            token = _login.decode(opened).mfa_token
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SignInFailedError(
                "the cluster's answer to single sign-on is malformed"
            ) from error
        if not 0 < len(token) <= _MAX_TOKEN:
            raise SignInFailedError("the cluster's answer to single sign-on has no token")
        return token


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request. `length`: of the form that follows, in bytes."""

    method: str
    path: str
    query: str
    length: int


def read_head(head: bytes) -> Request:
    """A request's head, with or without its empty line (RFC 9112 sections 3 and 5).

    Raises:
        HttpError: it is none, or none for us.
    """
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[1].startswith("/") or not parts[2].startswith("HTTP/1."):
        raise HttpError(400)
    path, _, query = parts[1].partition("?")
    if path != PATH:
        raise HttpError(404)
    if parts[0] not in METHODS.split(", "):
        raise HttpError(405)
    fields = {name.strip().lower(): value.strip() for name, _, value in _split(lines)}
    length = _form_length(fields) if parts[0] == "POST" else 0
    return Request(parts[0], path, query, length)


def _split(lines: list[str]) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in lines]


def _form_length(fields: Mapping[str, str]) -> int:
    if fields.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        return 0
    length = fields.get("content-length", "")
    if "transfer-encoding" in fields or not (length.isascii() and length.isdigit()):
        raise HttpError(411)
    if len(length) > len(str(MAX_BODY_BYTES)) or int(length) > MAX_BODY_BYTES:
        raise HttpError(413)
    return int(length)


def form_fields(request: Request, body: bytes) -> dict[str, str]:
    """What the browser brings; what is in the body counts before what is in the address.

    Raises:
        HttpError: too much, or not encoded as forms are.
    """
    found: dict[str, str] = {}
    try:
        for text in (body.decode("ascii"), request.query):
            for name, value in parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FIELDS):
                found.setdefault(name, value)
    except ValueError as error:
        raise HttpError(400) from error
    return found


def failure(fields: Mapping[str, str]) -> SignInFailedError:
    """What the proxy says in the place of a token."""
    text = safe_text(fields.get("err", "")) or "no reason is given"
    return SignInFailedError(f"single sign-on failed: {text}")


def redirect(origin: str, *, is_success: bool) -> bytes:
    """Sends the browser to the proxy's page with the outcome."""
    page = _SUCCESS_PAGE if is_success else _ERROR_PAGE
    return _response(302, f"Location: {origin}{page}\r\n")


def answer_options() -> bytes:
    """What a browser asks before it sends a form from another site."""
    return _response(200)


def refuse(status: int) -> bytes:
    """Says that nothing is here."""
    return _response(status)


def _response(status: int, fields: str = "") -> bytes:
    reason = _REASONS[status]
    body = f"{reason}\n".encode()
    head = (
        f"HTTP/1.1 {status} {reason}\r\nAllow: {METHODS}\r\nAccess-Control-Allow-Origin: *\r\n"
        f"{fields}Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\n"
        f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body

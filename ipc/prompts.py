"""What a proxy and `vnet mfa` say to each other: JSON objects, one per line. Pure.

    proxy                       vnet mfa
      |-- PromptOpened ------------>|   for each that waits already, then Waiting; later as they come
      |<---------- RenewChallenge --|   before a security key is used; PromptOpened follows
      |<------ Answer or Decline ---|   the first one counts, whoever sends it
      |-- PromptAnswered ---------->|   to everyone; then PromptOpened of the same id if the cluster
      |-- PromptClosed ------------>|   did not take the answer, else PromptClosed

A page of single sign-on is answered in the browser: it comes back to the proxy, not to `vnet mfa`.

The socket is `<run dir>/mfa/<slot>.sock` (0600, the VNet user's); a proxy that finishes beside its
successor and may still have to ask has `<slot>-old.sock`. Source of the WebAuthn fields:
https://www.w3.org/TR/webauthn-2/ sections 5.5 and 5.2.2; bytes are base64 in JSON.
"""

import re
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from ipc import json_lines
from ipc.messages import SafeText

# In the run directory.
PROMPTS_DIRECTORY = "mfa"
LEAVING_ENDING = "-old.sock"
# With its line feed. A WebAuthn challenge with many keys has a few kilobytes.
MAX_LINE_BYTES = 64 * 1024
MAX_CREDENTIALS = 100
# WebAuthn section 4, "Credential ID".
MAX_CREDENTIAL_ID_BYTES = 1023
# A SAML request is a part of it, some kilobytes long.
MAX_PAGE_URL = 8192

# RFC 3986 section 2; nothing of it does anything to a terminal.
_URL_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+", re.ASCII)
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

PromptId: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
Blob: TypeAlias = Annotated[bytes, Meta(max_length=4096)]
Name: TypeAlias = Annotated[str, Meta(max_length=512)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=3600)]


class _Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", forbid_unknown_fields=True):
    pass


class WebauthnChallenge(msgspec.Struct, frozen=True, kw_only=True):
    """What a security key has to sign. `origin` is the proxy's web address.

    `app_id` is the name by which keys know the cluster that were registered before WebAuthn
    (section 10.1, "appid"); empty for none.
    """

    origin: Name
    rp_id: Name
    challenge: Blob
    credential_ids: Annotated[
        list[Annotated[bytes, Meta(max_length=MAX_CREDENTIAL_ID_BYTES)]],
        Meta(max_length=MAX_CREDENTIALS),
    ]
    user_verification: Annotated[str, Meta(max_length=32)] = ""
    timeout_seconds: Seconds = 60.0
    app_id: Name = ""


def page_problem(url: str) -> str:
    """Why a browser should not be sent to this address; empty when it may be.

    It has to be https, or http on this machine, and must not look like another site's.
    """
    if len(url) > MAX_PAGE_URL:
        return f"it has more than {MAX_PAGE_URL} characters"
    if not url:
        return "there is none"
    if not _URL_CHARACTERS.fullmatch(url):
        return "it has characters that no address has"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "it is no address"
    if not host or parts.scheme not in {"https", "http"}:
        return "it is no https address"
    if parts.scheme == "http" and host not in LOOPBACK_HOSTS:
        return "it is not https"
    return "it names a user" if "@" in parts.netloc else ""


class SsoChallenge(msgspec.Struct, frozen=True, kw_only=True):
    """The page where the user signs in once more; `provider` names who shows it, empty: unknown.

    See `page_problem` for what `redirect_url` may be.
    """

    redirect_url: str
    provider: Name = ""

    def __post_init__(self) -> None:
        problem = page_problem(self.redirect_url)
        if problem:
            raise ValueError(f"the page for single sign-on cannot be opened: {problem}")


class PromptOpened(_Line, frozen=True, tag=True):
    """A connection waits for a second factor. `seconds_left` at the moment of sending."""

    id: PromptId
    target: SafeText  # "app pg", "database orders"
    cluster: SafeText
    user: SafeText
    seconds_left: Seconds
    takes_code: bool  # a one-time password
    webauthn: WebauthnChallenge | None = None
    sso: SsoChallenge | None = None
    problem: SafeText = ""  # why the last answer was not taken


class PromptAnswered(_Line, frozen=True, tag=True):
    """Somebody has answered; the cluster is asked whether it takes the answer."""

    id: PromptId
    is_by_browser: bool = False  # with single sign-on


class PromptClosed(_Line, frozen=True, tag=True):
    """Nobody waits any more. `outcome` is a sentence."""

    id: PromptId
    outcome: SafeText


class Waiting(_Line, frozen=True, tag=True):
    """All prompts that were open at the start have been told."""


class WebauthnAssertion(msgspec.Struct, frozen=True, kw_only=True):
    """What the security key answered. `used_app_id`: under the challenge's `app_id`."""

    credential_id: Blob
    client_data: Blob
    authenticator_data: Blob
    signature: Blob
    user_handle: Blob = b""
    used_app_id: bool = False


class RenewChallenge(_Line, frozen=True, tag=True):
    """A security key is about to be used.

    A cluster keeps one challenge for each user, the latest: of several prompts with a security key
    only one at a time can be answered.
    """

    id: PromptId


class Answer(_Line, frozen=True, tag=True):
    """The user's answer: exactly one of the two."""

    id: PromptId
    code: Annotated[str, Meta(max_length=64)] = ""
    webauthn: WebauthnAssertion | None = None

    def __post_init__(self) -> None:
        if bool(self.code) == (self.webauthn is not None):
            raise ValueError("an answer is a code or the signature of a security key")


class Decline(_Line, frozen=True, tag=True):
    """The user does not want this connection."""

    id: PromptId


FromProxy: TypeAlias = PromptOpened | PromptAnswered | PromptClosed | Waiting
FromUser: TypeAlias = RenewChallenge | Answer | Decline

_from_proxy = json_lines.decoder_of(FromProxy)
_from_user = json_lines.decoder_of(FromUser)


def encode(message: FromProxy | FromUser) -> bytes:
    """One line, with its line feed."""
    return json_lines.encode(message)


def decode_from_proxy(line: bytes) -> FromProxy:
    """What a proxy said.

    Raises:
        msgspec.MsgspecError: the line is no such message.
    """
    message: FromProxy = _from_proxy(line)
    return message


def decode_from_user(line: bytes) -> FromUser:
    """What `vnet mfa` said.

    Raises:
        msgspec.MsgspecError: the line is no such message.
    """
    message: FromUser = _from_user(line)
    return message

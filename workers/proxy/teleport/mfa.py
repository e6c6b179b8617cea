"""Second factors: the cluster's challenge as a question to the user, the answer for the cluster. Pure.

Source: `api/proto/teleport/legacy/client/proto/authservice.proto`,
`api/types/webauthn/webauthn.proto`, `lib/client/mfa`; https://www.w3.org/TR/webauthn-2/.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ipc.prompts import (
    MAX_CREDENTIAL_ID_BYTES,
    MAX_CREDENTIALS,
    Answer,
    SsoChallenge,
    WebauthnAssertion,
    WebauthnChallenge,
    page_problem,
)
from workers.proxy.teleport.errors import MfaUnansweredError, SignInFailedError, safe_text
from workers.proxy.teleport.names import DEFAULT_WEB_PORT
from workers.proxy.teleport.pb import auth_pb2, mfa_pb2, webauthn_pb2

# A line of `ipc.prompts` holds the challenge of this many bytes, and base64 adds a third.
_MAX_CREDENTIALS_BYTES = 24 * 1024
_MAX_CHALLENGE_BYTES = 4096
_MAX_NAME = 512
_MAX_REQUEST_ID = 512
_MAX_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MfaQuestion:
    """What the user is asked. All questions for one certificate have one `id`.

    At least one of `takes_code`, `webauthn` and `sso` is there. `problem` says why the cluster did not
    take the answer before; empty for the first question. `seconds` is how long the user has.
    """

    id: str
    profile: str
    cluster: str
    target: str  # "app pg", "database orders"
    user: str
    takes_code: bool
    webauthn: WebauthnChallenge | None
    seconds: float
    sso: SsoChallenge | None = None
    problem: str = ""


# The same question with a new challenge, for which less time is left. Raises TeleportError.
Renew: TypeAlias = Callable[[], Awaitable[MfaQuestion]]
# How single sign-on ended in the browser.
SignedIn: TypeAlias = auth_pb2.MFAAuthenticateResponse | SignInFailedError


class Prompter(Protocol):
    """Whoever asks the user."""

    async def ask(self, question: MfaQuestion, renew: Renew) -> auth_pb2.MFAAuthenticateResponse:
        """The user's answer.

        A cluster keeps one WebAuthn challenge for each user, the latest. So `renew` is called when
        a security key is about to be used.

        Raises:
            SignInFailedError: it was given to `give`.
            MfaUnansweredError: there is none.
        """
        ...

    def give(self, question_id: str, outcome: SignedIn) -> None:
        """The user was in the browser: `ask` ends with this, unless it has another answer.

        Ids for which nobody waits are ignored.
        """
        ...

    def settled(self, question_id: str, outcome: str) -> None:
        """Nothing more is asked under this id; `outcome` is a sentence. Unknown ids are ignored."""
        ...


def challenge_request(
    check: auth_pb2.IsMFARequiredRequest | None, callback_url: str = "", proxy_address: str = ""
) -> auth_pb2.CreateAuthenticateChallengeRequest:
    """Asks the root cluster for a challenge to the holder of the certificate.

    With `check`, which only the root cluster's own resources allow, the answer may be that none is
    needed. Single sign-on is offered only to who says where the browser shall come back to.
    """
    return auth_pb2.CreateAuthenticateChallengeRequest(
        ContextUser=auth_pb2.ContextUser(),
        MFARequiredCheck=check,
        ChallengeExtensions=mfa_pb2.ChallengeExtensions(scope=mfa_pb2.CHALLENGE_SCOPE_USER_SESSION),
        SSOClientRedirectURL=callback_url,
        ProxyAddress=proxy_address if callback_url else "",
    )


def web_origin(host: str, port: int) -> str:
    """The origin of the proxy's web page (RFC 6454 section 6.1): without the default port."""
    shown = f"[{host}]" if ":" in host else host
    return f"https://{shown}" if port == DEFAULT_WEB_PORT else f"https://{shown}:{port}"


def webauthn_challenge(
    challenge: auth_pb2.MFAAuthenticateChallenge, origin: str
) -> WebauthnChallenge | None:
    """The challenge for a security key; None when the cluster offers none that can be carried."""
    if not challenge.HasField("WebauthnChallenge"):
        return None
    options = challenge.WebauthnChallenge.public_key
    app_id = options.extensions.app_id
    texts = (origin, options.rp_id, app_id)
    if (
        not 0 < len(options.challenge) <= _MAX_CHALLENGE_BYTES
        or not options.rp_id
        or max(map(len, texts)) > _MAX_NAME
    ):
        return None
    return WebauthnChallenge(
        origin=origin,
        rp_id=options.rp_id,
        challenge=options.challenge,
        credential_ids=_bounded(c.id for c in options.allow_credentials),
        user_verification=options.user_verification[:32],
        timeout_seconds=min(max(options.timeout_ms / 1000, 0.0), _MAX_SECONDS),
        app_id=app_id,
    )


def _bounded(ids: Iterable[bytes]) -> list[bytes]:
    """As many as a line can carry; who has more keys than that uses one of the first."""
    kept: list[bytes] = []
    left = _MAX_CREDENTIALS_BYTES
    for one in ids:
        if 0 < len(one) <= min(MAX_CREDENTIAL_ID_BYTES, left) and len(kept) < MAX_CREDENTIALS:
            kept.append(one)
            left -= len(one)
    return kept


def sso_challenge(challenge: auth_pb2.MFAAuthenticateChallenge) -> SsoChallenge | None:
    """The page for single sign-on; None when the cluster offers none that can be opened."""
    offered = challenge.SSOChallenge
    if not 0 < len(offered.request_id) <= _MAX_REQUEST_ID or page_problem(offered.redirect_url):
        return None
    provider = safe_text(offered.device.connector_id, _MAX_NAME)
    return SsoChallenge(redirect_url=offered.redirect_url, provider=provider)


def sso_response(
    challenge: auth_pb2.MFAAuthenticateChallenge, token: str
) -> auth_pb2.MFAAuthenticateResponse:
    """The answer for the cluster, with the token that the browser has brought."""
    request_id = challenge.SSOChallenge.request_id
    return auth_pb2.MFAAuthenticateResponse(
        SSO=auth_pb2.SSOResponse(request_id=request_id, token=token)
    )


def require_answerable(
    challenge: auth_pb2.MFAAuthenticateChallenge,
    webauthn: WebauthnChallenge | None,
    sso: SsoChallenge | None,
    target: str,
) -> None:
    """Raises MfaUnansweredError when VNet can ask for none of the factors on offer."""
    if challenge.HasField("TOTP") or webauthn is not None or sso is not None:
        return
    if challenge.HasField("SSOChallenge"):
        reason = page_problem(challenge.SSOChallenge.redirect_url) or "no answer could come back"
        raise MfaUnansweredError(
            f"{target} needs a second factor, and the cluster's page for single sign-on cannot be"
            f" opened ({reason}): tell who runs the cluster, or register a security key with tsh"
            " mfa add"
        )
    raise MfaUnansweredError(
        f"{target} needs a second factor, and you have none that VNet can ask for: register a"
        " security key with tsh mfa add"
    )


def response(answer: Answer) -> auth_pb2.MFAAuthenticateResponse:
    """The answer for the cluster."""
    if answer.webauthn is None:
        return auth_pb2.MFAAuthenticateResponse(TOTP=auth_pb2.TOTPResponse(Code=answer.code))
    return auth_pb2.MFAAuthenticateResponse(Webauthn=_assertion(answer.webauthn))


def _assertion(assertion: WebauthnAssertion) -> webauthn_pb2.CredentialAssertionResponse:
    return webauthn_pb2.CredentialAssertionResponse(
        type="public-key",
        raw_id=assertion.credential_id,
        response=webauthn_pb2.AuthenticatorAssertionResponse(
            client_data_json=assertion.client_data,
            authenticator_data=assertion.authenticator_data,
            signature=assertion.signature,
            user_handle=assertion.user_handle,
        ),
        extensions=webauthn_pb2.AuthenticationExtensionsClientOutputs(app_id=assertion.used_app_id),
    )

"""The second factors of the logged-in user: challenges and their answers.

As lib/auth has it: a one-time password answers any challenge and is accepted once; a security key
answers the newest challenge of its user, until 5 minutes have passed or it was answered. Single
sign-on is offered to clients that name where the browser shall come back to: see `demo.cluster.sso`.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from demo.cluster.config import MfaKind
from demo.cluster.errors import AccessError, RequestError
from demo.cluster.sso import DEVICE_ID as SSO_DEVICE_ID
from demo.cluster.sso import SignOns
from demo.cluster.totp import WINDOW_SECONDS, accepts_totp
from demo.cluster.webauthn import (
    CHALLENGE_SECONDS,
    SecurityKey,
    assertion_request,
    check_assertion,
    make_challenge,
)
from workers.proxy.teleport.pb import auth_pb2, mfa_pb2

TOTP_DEVICE_ID = "6f0e4c4e-3d0c-4d0f-9d0a-70747020786d"
WEBAUTHN_DEVICE_ID = "0d8a1a5f-61a7-4f0b-8a36-77656261756e"
# More users than a cluster file can make.
_MAX_CHALLENGES = 100
_USER_SESSION = mfa_pb2.CHALLENGE_SCOPE_USER_SESSION
_ADMIN_ACTION = mfa_pb2.CHALLENGE_SCOPE_ADMIN_ACTION
_KNOWN_SCOPES = frozenset(mfa_pb2.ChallengeScope.values()) - {mfa_pb2.CHALLENGE_SCOPE_UNSPECIFIED}


@dataclass(frozen=True, slots=True)
class _Challenge:
    value: bytes
    scope: int
    expires: datetime


@dataclass(slots=True)
class SecondFactors:
    """Which devices the user has, and what the cluster remembers of their use."""

    kinds: tuple[MfaKind, ...]
    totp_secret: str = field(repr=False)
    key: SecurityKey
    sign_ons: SignOns = field(default_factory=SignOns)
    _challenges: dict[str, _Challenge] = field(default_factory=dict)
    _used_codes: dict[str, datetime] = field(default_factory=dict)

    def challenge(
        self,
        user: str,
        extensions: mfa_pb2.ChallengeExtensions,
        proxy: tuple[str, int],
        now: datetime,
        callback: str = "",
    ) -> auth_pb2.MFAAuthenticateChallenge:
        """A challenge for every device; a security key cannot answer the one before it any more.

        `callback` is where the browser shall come back to from single sign-on; empty: nowhere.

        Raises:
            RequestError, AccessError: the extensions are not those of a session, or the callback
                is not acceptable.
        """
        if extensions.scope not in _KNOWN_SCOPES:
            raise RequestError("mfa challenge scope must be specified")
        if extensions.scope == mfa_pb2.CHALLENGE_SCOPE_PASSWORDLESS_LOGIN:
            raise RequestError("passwordless challenge scope is not allowed for MFA flows")
        is_reusable = extensions.allow_reuse == mfa_pb2.CHALLENGE_ALLOW_REUSE_YES
        if is_reusable and extensions.scope != _ADMIN_ACTION:
            raise AccessError("unable to create MFA challenges")
        made = auth_pb2.MFAAuthenticateChallenge()
        if "totp" in self.kinds:
            made.TOTP.SetInParent()
        if "webauthn" in self.kinds:
            value = make_challenge()
            expires = now + timedelta(seconds=CHALLENGE_SECONDS)
            self._remember(user, _Challenge(value, extensions.scope, expires))
            made.WebauthnChallenge.CopyFrom(assertion_request(self.key, value, proxy[0]))
        if "sso" in self.kinds and callback:
            begun = self.sign_ons.begin(user, extensions.scope, callback, proxy, now)
            made.SSOChallenge.CopyFrom(begun)
        return made

    def check(
        self,
        user: str,
        response: auth_pb2.MFAAuthenticateResponse,
        proxy: tuple[str, int],
        now: datetime,
    ) -> str:
        """The ID of the device that gave this answer, which cannot be given again.

        Raises:
            AccessError: the answer is wrong, late or another user's.
            RequestError: it is none, or was given before.
        """
        match response.WhichOneof("Response"):
            case "TOTP":
                self._check_code(response.TOTP.Code, now)
                return TOTP_DEVICE_ID
            case "Webauthn":
                try:
                    self._check_assertion(user, response, proxy, now)
                except AccessError as error:
                    raise AccessError(f"MFA response validation failed: {error}") from error
                return WEBAUTHN_DEVICE_ID
            case "SSO":
                try:
                    self.sign_ons.check(user, response.SSO, _USER_SESSION, now)
                except AccessError as error:
                    raise AccessError(f"MFA response validation failed: {error}") from error
                return SSO_DEVICE_ID
            case _:
                raise RequestError("unknown or missing MFAAuthenticateResponse type")

    def _check_code(self, code: str, now: datetime) -> None:
        self._used_codes = {c: end for c, end in self._used_codes.items() if end > now}
        if code in self._used_codes:
            raise RequestError("previously used totp token")
        if "totp" not in self.kinds or not accepts_totp(self.totp_secret, code, now.timestamp()):
            raise AccessError("invalid totp token")
        self._used_codes[code] = now + timedelta(seconds=WINDOW_SECONDS)

    def _check_assertion(
        self,
        user: str,
        response: auth_pb2.MFAAuthenticateResponse,
        proxy: tuple[str, int],
        now: datetime,
    ) -> None:
        challenge = self._challenges.get(user)
        if "webauthn" not in self.kinds or challenge is None or challenge.expires <= now:
            raise AccessError(f'key "/web/users/{user}/webauthnsessiondata/login" is not found')
        if challenge.scope != _USER_SESSION:
            given = mfa_pb2.ChallengeScope.Name(challenge.scope)
            raise AccessError(
                'required scope "CHALLENGE_SCOPE_USER_SESSION" is not satisfied by the given '
                f'webauthn session with scope "{given}"'
            )
        check_assertion(self.key, response.Webauthn, challenge.value, proxy)
        del self._challenges[user]

    def _remember(self, user: str, challenge: _Challenge) -> None:
        self._challenges.pop(user, None)
        while len(self._challenges) >= _MAX_CHALLENGES:
            del self._challenges[next(iter(self._challenges))]
        self._challenges[user] = challenge

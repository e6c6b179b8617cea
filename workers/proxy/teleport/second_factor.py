"""Gets certificates for which the user has to give a second factor.

    CreateAuthenticateChallenge --> Prompter.ask --> GenerateUserCerts --+--> certificate
              ^                         ^                                |
              |                     Callback <-- the user's browser      |
              +------------- the answer was not taken, try again --------+

Each challenge is asked for with an address for a browser to come back to: a cluster offers single
sign-on only then, and may refuse who names none. So one request does for every factor, and a
cluster without single sign-on costs a listener for the time of that request.

Source: `lib/client/cluster_client.go`, `lib/client/mfa`, `lib/client/sso`, `lib/auth/auth.go`.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from workers.proxy.teleport import mfa
from workers.proxy.teleport.auth_client import AuthApi
from workers.proxy.teleport.errors import (
    AccessDeniedError,
    MfaRequiredError,
    MfaUnansweredError,
    RefusedError,
    SignInFailedError,
    TeleportError,
)
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.mfa import MfaQuestion, Prompter
from workers.proxy.teleport.pb import auth_pb2
from workers.proxy.teleport.sso_callback import Callbacks, Outcome

# All questions for one certificate together. A program that waits for its connection gives up
# earlier (Linux: 130 s), but the next one finds the certificate.
PROMPT_SECONDS = 110.0
# Answers that the cluster may refuse before VNet gives up.
MAX_ANSWERS = 3
# A wrong code is PERMISSION_DENIED, one that was used before INVALID_ARGUMENT. Leaves of these
# classes say something else.
_WRONG_ANSWER: Final = (AccessDeniedError, RefusedError)


@dataclass(frozen=True, slots=True)
class Purpose:
    """What the certificate is for. `check` is only for a target in the root cluster."""

    target: str  # "app pg"
    cluster: str
    check: auth_pb2.IsMFARequiredRequest | None


class SecondFactor:
    """Asks the user of one login."""

    def __init__(
        self,
        login: Login,
        root: AuthApi,
        prompter: Prompter | None,
        *,
        prompt_seconds: float = PROMPT_SECONDS,
        callbacks: Callbacks | None = None,
    ) -> None:
        assert login.profile is not None
        self._callbacks = callbacks or Callbacks()
        self._profile = login.profile
        self._root = root
        self._prompter = prompter
        self._prompt_seconds = prompt_seconds

    async def certify(self, request: auth_pb2.UserCertsRequest, purpose: Purpose) -> auth_pb2.Certs:
        """Has the request fulfilled, with an answer of the user.

        Raises:
            MfaUnansweredError: the user gave no answer, or cannot be asked.
            MfaRequiredError: the cluster took none of the answers.
            TeleportError: the cluster cannot be asked, or refuses for another reason.
        """
        if self._prompter is None:
            raise MfaRequiredError(f"{purpose.target} needs a second factor for each session")
        question_id = secrets.token_hex(16)
        outcome = "given up"
        try:
            certs = await self._ask(self._prompter, question_id, request, purpose)
            outcome = f"{purpose.target} can be used now"
            return certs
        except TeleportError as error:
            outcome = str(error)
            raise
        finally:
            self._prompter.settled(question_id, outcome)

    async def _ask(
        self,
        prompter: Prompter,
        question_id: str,
        request: auth_pb2.UserCertsRequest,
        purpose: Purpose,
    ) -> auth_pb2.Certs:
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._prompt_seconds
        problem = ""
        for _ in range(MAX_ANSWERS):
            callback = await self._callbacks.open(self._origin)
            try:
                challenge = await self._challenge(purpose, callback.url)
                if challenge.MFARequired == auth_pb2.MFA_REQUIRED_NO:
                    # The cluster's mind has changed since it was asked.
                    return await self._root.generate_user_certs(request)
                question = self._question(
                    *(question_id, purpose, challenge),
                    has_callback=bool(callback.url),
                    seconds=deadline - clock(),
                    problem=problem,
                )
                if question.sso is None:
                    callback.close()
                else:
                    callback.deliver = _giver(prompter, question_id, challenge)

                async def renew(question: MfaQuestion = question) -> MfaQuestion:
                    # Without single sign-on, for which what was offered first stays good.
                    again = await self._challenge(purpose, "")
                    webauthn = mfa.webauthn_challenge(again, self._origin)
                    return replace(question, webauthn=webauthn, seconds=deadline - clock())

                answer = await prompter.ask(question, renew)
            except SignInFailedError as error:
                problem = str(error)
                continue
            finally:
                callback.close()
            try:
                return await self._root.generate_user_certs(_with_answer(request, answer))
            except RefusedError as error:
                if type(error) not in _WRONG_ANSWER:
                    raise
                problem = str(error)
        raise MfaRequiredError(
            f"{purpose.target}: the second factor was refused {MAX_ANSWERS} times ({problem}):"
            " connect again to try once more"
        )

    async def _challenge(
        self, purpose: Purpose, callback_url: str
    ) -> auth_pb2.MFAAuthenticateChallenge:
        request = mfa.challenge_request(purpose.check, callback_url, self._profile.address)
        return await self._root.create_challenge(request)

    def _question(
        self,
        question_id: str,
        purpose: Purpose,
        challenge: auth_pb2.MFAAuthenticateChallenge,
        *,
        has_callback: bool,
        seconds: float,
        problem: str,
    ) -> MfaQuestion:
        webauthn = mfa.webauthn_challenge(challenge, self._origin)
        sso = mfa.sso_challenge(challenge) if has_callback else None
        mfa.require_answerable(challenge, webauthn, sso, purpose.target)
        if seconds <= 0:
            raise MfaUnansweredError(
                f"{purpose.target}: no time is left for a second factor"
                f" ({problem or 'the cluster was slow'}): connect again to try once more"
            )
        return MfaQuestion(
            id=question_id,
            profile=self._profile.name,
            cluster=purpose.cluster,
            target=purpose.target,
            user=self._profile.user,
            takes_code=challenge.HasField("TOTP"),
            webauthn=webauthn,
            sso=sso,
            seconds=seconds,
            problem=problem,
        )

    @property
    def _origin(self) -> str:
        return mfa.web_origin(self._profile.web_host, self._profile.web_port)


def _giver(
    prompter: Prompter, question_id: str, challenge: auth_pb2.MFAAuthenticateChallenge
) -> Callable[[Outcome], None]:
    def give(outcome: Outcome) -> None:
        if isinstance(outcome, str):
            prompter.give(question_id, mfa.sso_response(challenge, outcome))
        else:
            prompter.give(question_id, outcome)

    return give


def _with_answer(
    request: auth_pb2.UserCertsRequest, answer: auth_pb2.MFAAuthenticateResponse
) -> auth_pb2.UserCertsRequest:
    answered = auth_pb2.UserCertsRequest()
    answered.CopyFrom(request)
    answered.MFAResponse.CopyFrom(answer)
    answered.Purpose = auth_pb2.UserCertsRequest.CERT_PURPOSE_SINGLE_USE_CERTS
    return answered

"""A user who answers, and a cluster that asks for second factors."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_public_key
from teleport_fakes import AUTHORITY, AUTHORITY_KEY, NOW, FakeApi, oid, pem, write_home
from teleport_fakes import _issue as issue
from teleport_fakes import name as subject_name

from workers.proxy.teleport.errors import AccessDeniedError, RefusedError
from workers.proxy.teleport.home import Login, read_home
from workers.proxy.teleport.pb import auth_pb2, webauthn_pb2

RIGHT_CODE = "123456"


def make_login(directory: Path, **changes: object) -> Login:
    """The login of a home that is written there."""
    write_home(directory, **changes)  # type: ignore[arg-type]
    (login,) = read_home(directory).logins
    return login


@dataclass
class FakePrompter:
    """Answers with the codes in `codes`, then waits for ever; None declines."""

    codes: list = field(default_factory=lambda: [RIGHT_CODE])
    error: Exception | None = None
    questions: list = field(default_factory=list)
    renews: list = field(default_factory=list)
    outcomes: list = field(default_factory=list)
    given: list = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def ask(self, question, renew):
        self.questions.append(question)
        self.renews.append(renew)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if not self.codes:
            await asyncio.Event().wait()
        return auth_pb2.MFAAuthenticateResponse(TOTP=auth_pb2.TOTPResponse(Code=self.codes.pop(0)))

    def give(self, question_id, outcome):
        self.given.append((question_id, outcome))

    def settled(self, question_id, outcome):
        self.outcomes.append((question_id, outcome))


@dataclass
class MfaApi(FakeApi):
    """A cluster whose resources need a second factor."""

    needs_mfa: bool = True
    challenge: auth_pb2.MFAAuthenticateChallenge = field(
        default_factory=lambda: auth_pb2.MFAAuthenticateChallenge(TOTP=auth_pb2.TOTPChallenge())
    )
    refusal: Exception | None = None
    challenge_requests: list = field(default_factory=list)
    mfa_requests: list = field(default_factory=list)
    not_after: object = None

    async def is_mfa_required(self, request):
        self.mfa_requests.append(request)
        return await super().is_mfa_required(request)

    async def create_challenge(self, request):
        await self._called("create_challenge")
        self.challenge_requests.append(request)
        return self.challenge

    async def generate_user_certs(self, request):
        if request.HasField("MFAResponse"):
            await self._called("generate_user_certs")
            code = request.MFAResponse.TOTP.Code
            if code == "used":
                raise RefusedError("demo.test refused: previously used totp token")
            if code not in (RIGHT_CODE, ""):
                raise AccessDeniedError("demo.test refused: invalid totp token")
        if self.refusal is not None:
            raise self.refusal
        if self.not_after is None:
            return await super().generate_user_certs(request)
        self.requests.append(request)
        return auth_pb2.Certs(TLS=certificate_until(self.not_after, request.TLSPublicKey))


def certificate_until(not_after, public_key: bytes) -> bytes:
    """A certificate of a user with any end, PEM."""
    subject = [(oid("1.7"), "demo.test")]
    from teleport_fakes import USER_SUBJECT

    certificate = issue(
        subject_name([*USER_SUBJECT, *subject]),
        AUTHORITY.subject,
        load_pem_public_key(public_key),
        AUTHORITY_KEY,
        not_after,
    )
    return pem(certificate)


def webauthn_challenge(**changes: object) -> webauthn_pb2.CredentialAssertion:
    """A challenge for one security key."""
    values: dict = {
        "challenge": b"challenge",
        "timeout_ms": 60_000,
        "rp_id": "teleport.demo.test",
        "allow_credentials": [webauthn_pb2.CredentialDescriptor(type="public-key", id=b"key")],
        "user_verification": "discouraged",
    }
    options = webauthn_pb2.PublicKeyCredentialRequestOptions(**(values | changes))
    return webauthn_pb2.CredentialAssertion(public_key=options)


__all__ = [
    "NOW",
    "RIGHT_CODE",
    "FakePrompter",
    "MfaApi",
    "certificate_until",
    "make_login",
    "webauthn_challenge",
]

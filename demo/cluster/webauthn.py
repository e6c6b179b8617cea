"""The security key of the logged-in user: what the cluster knows of it, and how answers are checked.

The cluster makes the key itself, so that a software authenticator can answer in its place: see
`SecurityKey.describe`. Source: https://www.w3.org/TR/webauthn-2/ section 7.2; which checks the
server makes, lib/auth/webauthn.
"""

import base64
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec
from fido2.cose import ES256
from fido2.server import Fido2Server
from fido2.webauthn import (
    AttestedCredentialData,
    AuthenticationResponse,
    AuthenticatorAssertionResponse,
    AuthenticatorData,
    CollectedClientData,
    PublicKeyCredentialRpEntity,
)

from demo.cluster.authorities import private_key_pem
from demo.cluster.errors import AccessError
from workers.proxy.teleport.pb import webauthn_pb2

# 5 minutes, defaults.WebauthnChallengeTimeout of lib/defaults.
CHALLENGE_SECONDS = 300
_CHALLENGE_BYTES = 32
_DEFAULT_PORT = 443
_NO_AAGUID = bytes(16)


@dataclass(frozen=True, slots=True)
class SecurityKey:
    """One credential, which the demo user has at every cluster."""

    credential_id: bytes
    user_handle: bytes
    private_key: ec.EllipticCurvePrivateKey = field(repr=False)

    def describe(self, rp_ids: Sequence[str]) -> bytes:
        """What a software authenticator needs, as JSON. Bytes are base64 (RFC 4648 section 4)."""
        document = {
            "rp_id": rp_ids[0],
            "rp_ids": list(rp_ids),
            "credential_id": base64.b64encode(self.credential_id).decode(),
            "user_handle": base64.b64encode(self.user_handle).decode(),
            "private_key": private_key_pem(self.private_key).decode(),
        }
        return json.dumps(document, indent=2).encode() + b"\n"


def make_security_key() -> SecurityKey:
    """A new P-256 credential."""
    return SecurityKey(
        credential_id=secrets.token_bytes(32),
        user_handle=secrets.token_bytes(16),
        private_key=ec.generate_private_key(ec.SECP256R1()),
    )


def make_challenge() -> bytes:
    """A challenge nobody can guess."""
    return secrets.token_bytes(_CHALLENGE_BYTES)


def assertion_request(
    key: SecurityKey, challenge: bytes, rp_id: str
) -> webauthn_pb2.CredentialAssertion:
    """The challenge as it goes to the client. A PIN is not asked for beside a certificate."""
    return webauthn_pb2.CredentialAssertion(
        public_key=webauthn_pb2.PublicKeyCredentialRequestOptions(
            challenge=challenge,
            timeout_ms=CHALLENGE_SECONDS * 1000,
            rp_id=rp_id,
            allow_credentials=[
                webauthn_pb2.CredentialDescriptor(type="public-key", id=key.credential_id)
            ],
            user_verification="discouraged",
        )
    )


def check_assertion(
    key: SecurityKey,
    response: webauthn_pb2.CredentialAssertionResponse,
    challenge: bytes,
    proxy: tuple[str, int],
) -> None:
    """Verifies an answer to `challenge`; the relying party is the proxy's host.

    Raises:
        AccessError: whatever is wrong with it.
    """
    host, port = proxy
    if response.type != "public-key":
        raise AccessError(f"credential type {response.type!r} is not public-key")
    if response.raw_id != key.credential_id:
        shown = base64.urlsafe_b64encode(response.raw_id).rstrip(b"=").decode()
        raise AccessError(f'unknown device credential: "{shown}"')
    if response.response.user_handle not in {b"", key.user_handle}:
        raise AccessError("userHandle and User ID do not match")
    server = Fido2Server(
        PublicKeyCredentialRpEntity(id=host, name=host),
        verify_origin=lambda origin: is_origin_of(origin, host, port),
    )
    state = {
        "challenge": base64.urlsafe_b64encode(challenge).rstrip(b"=").decode(),
        "user_verification": None,
    }
    public = ES256.from_cryptography_key(  # type: ignore[no-untyped-call]
        key.private_key.public_key()
    )
    known = AttestedCredentialData.create(_NO_AAGUID, key.credential_id, public)
    try:
        server.authenticate_complete(state, [known], _parsed(response))
    # What the library raises for bytes that are no answer at all.
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError) as error:
        raise AccessError(str(error) or type(error).__name__) from error


def is_origin_of(origin: object, host: str, port: int) -> bool:
    """Whether a browser on the proxy's pages would name this origin; port 443 may be left out."""
    if not isinstance(origin, str):
        return False
    try:
        parts = urlsplit(origin)
        named = parts.port or _DEFAULT_PORT
    except ValueError:
        return False
    is_bare = origin == f"{parts.scheme}://{parts.netloc}"
    return is_bare and parts.scheme == "https" and parts.hostname == host.lower() and named == port


def _parsed(response: webauthn_pb2.CredentialAssertionResponse) -> AuthenticationResponse:
    answer = response.response
    return AuthenticationResponse(
        raw_id=response.raw_id,
        response=AuthenticatorAssertionResponse(
            client_data=CollectedClientData(answer.client_data_json),
            authenticator_data=AuthenticatorData(answer.authenticator_data),
            signature=answer.signature,
            user_handle=answer.user_handle or None,
        ),
    )

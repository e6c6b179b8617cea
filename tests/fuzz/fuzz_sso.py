"""What a browser, or any program of this machine, says to the place where single sign-on comes back.

Byte 0: a head and, behind an empty line, a form; or what a cluster has sealed with the key.
"""

import json
from base64 import b64encode

from byte_choices import Choices
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from error_texts import check_text

from workers.proxy.teleport.errors import SignInFailedError
from workers.proxy.teleport.sso import (
    MAX_BODY_BYTES,
    MAX_FIELDS,
    PATH,
    CallbackError,
    HttpError,
    SecretKey,
    failure,
    form_fields,
    read_head,
    refuse,
)

KEY, NONCE = b"k" * 32, b"n" * 12
SECRET = SecretKey()
SECRET._key = KEY


def check(data: bytes) -> None:
    choices = Choices(data)
    if choices.below(2):
        check_sealed(choices.rest())
        return
    head, _, body = choices.rest().partition(b"\r\n\r\n")
    try:
        request = read_head(head)
        assert request.path == PATH
        assert 0 <= request.length <= MAX_BODY_BYTES
        fields = form_fields(request, body[: request.length])
    except HttpError as error:
        refuse(error.status)
        return
    assert len(fields) <= 2 * MAX_FIELDS
    check_text(failure(fields))
    assert not SECRET.matches(fields.get("secret_key", ""))
    check_token(fields.get("response", ""))


def check_sealed(plain: bytes) -> None:
    sealed = {
        "ciphertext": b64encode(AESGCM(KEY).encrypt(NONCE, plain, None)).decode(),
        "nonce": b64encode(NONCE).decode(),
    }
    token = check_token(json.dumps(sealed))
    assert token is None or token.encode() in plain or b"\\" in plain


def check_token(response: str) -> str | None:
    try:
        token = SECRET.token(response)
    except CallbackError:
        return None
    except SignInFailedError as error:
        check_text(error)
        return None
    assert token
    return token

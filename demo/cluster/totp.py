"""Time-based one-time passwords: RFC 6238 with SHA-1, 30 seconds, six digits. Pure."""

import base64
import hashlib
import hmac

_STEP_SECONDS = 30
_DIGITS = 6
# How long a code is accepted: its own step, and one before and after.
WINDOW_SECONDS = 3 * _STEP_SECONDS


def totp_code(secret_base32: str, unix_seconds: float) -> str:
    """The code for this moment."""
    counter = int(unix_seconds) // _STEP_SECONDS
    key = base64.b32decode(secret_base32, casefold=True)
    digest = hmac.new(key, counter.to_bytes(8, "big"), hashlib.sha1).digest()
    # RFC 4226 section 5.3: dynamic truncation.
    offset = digest[-1] & 0xF
    number = int.from_bytes(digest[offset : offset + 4], "big") & 0x7FFFFFFF
    return str(number % 10**_DIGITS).zfill(_DIGITS)


def accepts_totp(secret_base32: str, code: str, unix_seconds: float) -> bool:
    """Whether `code` is right now, or was or will be within one step (RFC 6238 section 5.2)."""
    moments = (unix_seconds + offset * _STEP_SECONDS for offset in (-1, 0, 1))
    return any(
        hmac.compare_digest(totp_code(secret_base32, moment).encode(), code.encode())
        for moment in moments
    )

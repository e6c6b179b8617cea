"""CURVE key pairs for the bus (RFC 26/CURVEZMQ), as Z85 text (RFC 32/Z85).

Made without libzmq, because the supervisor makes them and keeps that library out of its process.
"""

from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

_ALPHABET: Final = (
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
)


def make_key_pair() -> tuple[str, str]:
    """A fresh key pair: (public, secret), 40 characters each."""
    secret = X25519PrivateKey.generate()
    return (
        z85_encode(secret.public_key().public_bytes_raw()),
        z85_encode(secret.private_bytes_raw()),
    )


def z85_encode(data: bytes) -> str:
    """Bytes (a multiple of 4) as text, 5 characters for 4 bytes."""
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no multiple of 4")
    text: list[str] = []
    for start in range(0, len(data), 4):
        value = int.from_bytes(data[start : start + 4], "big")
        digits: list[str] = []
        for _ in range(5):
            value, digit = divmod(value, 85)
            digits.append(_ALPHABET[digit])
        text += reversed(digits)
    return "".join(text)

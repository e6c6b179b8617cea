"""Signatures as SSH writes them, by keys of the cryptography package. Pure.

    string algorithm, string signature          RFC 4253 section 6.6
    ECDSA: two mpints in the second             RFC 5656 section 3.1.2
    RSA: PKCS #1 v1.5, SHA-2 only               RFC 8332

Algorithm names here are those of plain keys: a certificate's name without its ending.
"""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm

from workers.proxy.ssh.messages import string, take_string

CERTIFICATE_ENDING = "-cert-v01@openssh.com"
# Strongest first; the order in which they are offered.
RSA_ALGORITHMS = ("rsa-sha2-512", "rsa-sha2-256")

PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey | RSAPrivateKey
PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey | RSAPublicKey

_RSA_HASHES: dict[str, HashAlgorithm] = {"rsa-sha2-256": SHA256(), "rsa-sha2-512": SHA512()}
_CURVES: dict[str, tuple[str, HashAlgorithm]] = {
    "secp256r1": ("ecdsa-sha2-nistp256", SHA256()),
    "secp384r1": ("ecdsa-sha2-nistp384", SHA384()),
    "secp521r1": ("ecdsa-sha2-nistp521", SHA512()),
}


def algorithms_of(key: PrivateKey | PublicKey) -> tuple[str, ...]:
    """The algorithms a key can sign with, the best first. Empty: SSH does not know it."""
    if isinstance(key, Ed25519PrivateKey | Ed25519PublicKey):
        return ("ssh-ed25519",)
    if isinstance(key, RSAPrivateKey | RSAPublicKey):
        return RSA_ALGORITHMS
    known = _CURVES.get(key.curve.name)
    return (known[0],) if known else ()


def sign(key: PrivateKey, data: bytes, algorithm: str) -> bytes:
    """The signature blob. `algorithm` is one of `algorithms_of(key)`."""
    if isinstance(key, Ed25519PrivateKey):
        signature = key.sign(data)
    elif isinstance(key, RSAPrivateKey):
        signature = key.sign(data, padding.PKCS1v15(), _RSA_HASHES[algorithm])
    else:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(_CURVES[key.curve.name][1])))
        signature = _mpint(r) + _mpint(s)
    return string(algorithm.encode()) + string(signature)


def is_valid(key: PublicKey, data: bytes, blob: bytes, algorithm: str) -> bool:
    """Whether `blob` is the key's signature of `data` by that algorithm."""
    try:
        name, position = take_string(blob, 0)
        signature, position = take_string(blob, position)
        if name != algorithm.encode() or position != len(blob):
            return False
        if algorithm not in algorithms_of(key):
            return False
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, data)
        elif isinstance(key, RSAPublicKey):
            key.verify(signature, data, padding.PKCS1v15(), _RSA_HASHES[algorithm])
        else:
            r, position = take_string(signature, 0)
            s, position = take_string(signature, position)
            der = encode_dss_signature(int.from_bytes(r), int.from_bytes(s))
            key.verify(der, data, ec.ECDSA(_CURVES[key.curve.name][1]))
    except (InvalidSignature, ValueError):
        return False
    return True


def _mpint(number: int) -> bytes:
    """RFC 4251 section 5; not negative."""
    return string(number.to_bytes(number.bit_length() // 8 + 1) if number else b"")

"""A security key in software: CTAP 2.1 GetInfo, GetAssertion and ClientPIN with PIN protocol 1."""

import hmac
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from fido2 import cbor
from fido2.cose import ES256
from fido2.ctap import STATUS, CtapDevice, CtapError
from fido2.hid import CAPABILITY, CTAPHID
from fido2.webauthn import Aaguid, AttestedCredentialData

_GET_ASSERTION, _GET_INFO, _CLIENT_PIN = 0x02, 0x04, 0x06
_GET_KEY_AGREEMENT, _GET_PIN_TOKEN = 0x02, 0x05
_USER_PRESENT, _USER_VERIFIED = 0x01, 0x04
_NO_IV = bytes(16)
# What a key waits for is looked at this often, as real ones send a sign of life.
_KEEPALIVE_SECONDS = 0.01


@dataclass(eq=False)
class SoftwareKey(CtapDevice):
    """Knows one credential. Signs when `touched` is set; `touch_seconds` is how long it waits."""

    rp_id: str = "teleport.demo.test"
    credential_id: bytes = b"credential of the software key"
    user_handle: bytes = b""
    pin: str = ""
    touch_seconds: float = 30.0
    touched: threading.Event = field(default_factory=threading.Event)
    blinks: threading.Event = field(default_factory=threading.Event)
    is_closed: bool = False
    was_cancelled: bool = False
    counter: int = 0

    private_key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        self._agreement = ec.generate_private_key(ec.SECP256R1())
        self._token = b"t" * 32
        self.pins_tried = 0

    @property
    def credential(self) -> AttestedCredentialData:
        """What a server stores at registration."""
        public = ES256.from_cryptography_key(self.private_key.public_key())
        return AttestedCredentialData.create(Aaguid.NONE, self.credential_id, public)

    @property
    def capabilities(self) -> int:
        return CAPABILITY.CBOR

    @classmethod
    def list_devices(cls):
        return iter(())

    def close(self) -> None:
        self.is_closed = True

    def call(
        self,
        cmd: int,
        data: bytes = b"",
        event: threading.Event | None = None,
        on_keepalive: Callable[[STATUS], None] | None = None,
    ) -> bytes:
        assert cmd == CTAPHID.CBOR
        assert not self.is_closed
        command, parameters = data[0], cbor.decode(data[1:]) if data[1:] else {}
        if command == _GET_INFO:
            info = {1: ["FIDO_2_0"], 3: bytes(16), 4: {"clientPin": bool(self.pin)}, 6: [1]}
            return b"\0" + cbor.encode(info)
        if command == _CLIENT_PIN:
            return self._client_pin(parameters)
        if command == _GET_ASSERTION:
            return self._assertion(parameters, event or threading.Event(), on_keepalive)
        return bytes([CtapError.ERR.INVALID_COMMAND])

    def _assertion(self, parameters, event, on_keepalive) -> bytes:
        wanted = [one["id"] for one in parameters.get(3, [])]
        is_known = parameters[1] == self.rp_id and self.credential_id in wanted
        wants_touch = parameters.get(5, {}).get("up", True)
        if wants_touch:
            if on_keepalive is not None:
                on_keepalive(STATUS.UPNEEDED)
            self.blinks.set()
            left = self.touch_seconds
            while not self.touched.wait(_KEEPALIVE_SECONDS):
                left -= _KEEPALIVE_SECONDS
                if event.is_set():
                    self.was_cancelled = True
                    return bytes([CtapError.ERR.KEEPALIVE_CANCEL])
                if left <= 0:
                    return bytes([CtapError.ERR.USER_ACTION_TIMEOUT])
        if not is_known:
            return bytes([CtapError.ERR.NO_CREDENTIALS])
        self.counter += 1
        flags = _USER_PRESENT if wants_touch else 0
        if 6 in parameters:
            proof = hmac.digest(self._token, parameters[2], "sha256")[:16]
            if proof != parameters[6]:
                return bytes([CtapError.ERR.PIN_AUTH_INVALID])
            flags |= _USER_VERIFIED
        data = sha256(parameters[1].encode()).digest() + struct.pack(">BI", flags, self.counter)
        signature = self.private_key.sign(data + parameters[2], ec.ECDSA(hashes.SHA256()))
        reply: dict = {1: {"type": "public-key", "id": self.credential_id}, 2: data, 3: signature}
        if self.user_handle:
            reply[4] = {"id": self.user_handle}
        return b"\0" + cbor.encode(reply)

    def _client_pin(self, parameters) -> bytes:
        if parameters[2] == _GET_KEY_AGREEMENT:
            numbers = self._agreement.public_key().public_numbers()
            x, y = numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")
            return b"\0" + cbor.encode({1: {1: 2, 3: -25, -1: 1, -2: x, -3: y}})
        assert parameters[2] == _GET_PIN_TOKEN
        theirs = parameters[3]
        point = b"\4" + theirs[-2] + theirs[-3]
        peer = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        secret = sha256(self._agreement.exchange(ec.ECDH(), peer)).digest()
        cipher = Cipher(algorithms.AES(secret), modes.CBC(_NO_IV))
        decryptor, encryptor = cipher.decryptor(), cipher.encryptor()
        self.pins_tried += 1
        pin_hash = decryptor.update(parameters[6]) + decryptor.finalize()
        if pin_hash != sha256(self.pin.encode()).digest()[:16]:
            return bytes([CtapError.ERR.PIN_INVALID])
        return b"\0" + cbor.encode({2: encryptor.update(self._token) + encryptor.finalize()})

import queue
import threading

import msgspec
import pytest
from fido2.ctap import CtapError
from fido2.server import Fido2Server
from fido2.webauthn import (
    AuthenticationResponse,
    AuthenticatorAssertionResponse,
    AuthenticatorData,
    CollectedClientData,
    PublicKeyCredentialRpEntity,
    PublicKeyCredentialType,
)
from software_key import SoftwareKey

from ipc.prompts import WebauthnChallenge
from supervisor.cli import security_key as k

ORIGIN = "https://teleport.demo.test:3080"
CHALLENGE = WebauthnChallenge(
    origin=ORIGIN,
    rp_id="teleport.demo.test",
    challenge=bytes(range(32)),
    credential_ids=[b"another", b"credential of the software key"],
    user_verification="discouraged",
)
DEADLINE_SECONDS = 20.0


def changed(**changes):
    return msgspec.structs.replace(CHALLENGE, **changes)


def touched_key(**changes):
    key = SoftwareKey(**changes)
    key.touched.set()
    return key


def sign(key, challenge=CHALLENGE):
    return k.sign(key, challenge, lambda _event: None, threading.Event())


def verify(key, assertion, challenge=CHALLENGE, rp_id="teleport.demo.test"):
    """As a server does, that knows this key."""
    server = Fido2Server(
        PublicKeyCredentialRpEntity(name="VNet", id=rp_id), verify_origin=lambda o: o == ORIGIN
    )
    _, state = server.authenticate_begin([key.credential], challenge=challenge.challenge)
    response = AuthenticationResponse(
        raw_id=assertion.credential_id,
        response=AuthenticatorAssertionResponse(
            client_data=CollectedClientData(assertion.client_data),
            authenticator_data=AuthenticatorData(assertion.authenticator_data),
            signature=assertion.signature,
            user_handle=assertion.user_handle or None,
        ),
        type=PublicKeyCredentialType.PUBLIC_KEY,
    )
    server.authenticate_complete(state, [key.credential], response)


@pytest.mark.parametrize("user_handle", [b"", b"alice"])
def test_a_server_takes_what_a_key_signs(user_handle):
    key = touched_key(user_handle=user_handle)
    assertion = sign(key)
    verify(key, assertion)
    assert assertion.user_handle == user_handle
    assert not assertion.used_app_id


def test_a_domain_above_the_proxy_may_be_signed_for():
    key = touched_key(rp_id="demo.test")
    challenge = changed(rp_id="demo.test")
    verify(key, sign(key, challenge), challenge, rp_id="demo.test")


@pytest.mark.parametrize("rp_id", ["bank.test", "", "x.teleport.demo.test", "t.demo.test"])
def test_a_proxy_cannot_have_keys_sign_for_other_sites(rp_id):
    with pytest.raises(k.SecurityKeyError, match="another site"):
        sign(touched_key(rp_id=rp_id), changed(rp_id=rp_id))


def test_a_whole_top_level_domain_is_another_site():
    with pytest.raises(k.SecurityKeyError, match="another site"):
        sign(touched_key(rp_id="com"), changed(rp_id="com", origin="https://t.example.com"))


def test_a_key_that_was_registered_before_webauthn_is_known_by_its_app_id():
    app_id = "https://demo.test"
    key = touched_key(rp_id=app_id)
    assertion = sign(key, changed(app_id=app_id))
    assert assertion.used_app_id
    assert assertion.authenticator_data[:32] == k_hash(app_id)
    with pytest.raises(k.SecurityKeyError, match="another site"):
        sign(key, changed(app_id="https://bank.test"))


def k_hash(name: str) -> bytes:
    from hashlib import sha256

    return sha256(name.encode()).digest()


def test_a_key_that_knows_the_cluster_is_not_asked_by_the_old_name():
    key = touched_key()
    assertion = sign(key, changed(app_id="https://demo.test"))
    verify(key, assertion)
    assert not assertion.used_app_id


def test_a_foreign_key_is_told_from_a_registered_one():
    with pytest.raises(k.SecurityKeyError, match="not registered"):
        sign(touched_key(credential_id=b"unknown"))


@pytest.mark.parametrize("verification", ["preferred", "discouraged", ""])
def test_a_key_with_a_pin_is_not_asked_for_it(verification):
    key = touched_key(pin="1234")
    verify(key, sign(key, changed(user_verification=verification)))
    assert not key.pins_tried


def test_a_key_without_a_pin_cannot_prove_who_touches_it():
    with pytest.raises(k.SecurityKeyError, match="set a PIN"):
        sign(touched_key(), changed(user_verification="required"))


def sign_with_pins(key, *pins):
    """Answers each question with the next PIN; returns the signature and what was said."""
    left, said = list(pins), []

    def tell(event):
        if isinstance(event, k.PinWanted):
            event.answer(left.pop(0))
        elif isinstance(event, k.KeyFailed):
            said.append(event.reason)

    challenge = changed(user_verification="required")
    return k.sign(key, challenge, tell, threading.Event()), said


def test_a_pin_proves_who_touches_the_key():
    key = touched_key(pin="1234")
    assertion, said = sign_with_pins(key, "1234")
    verify(key, assertion)
    assert AuthenticatorData(assertion.authenticator_data).is_user_verified()
    assert said == []


def test_a_wrong_pin_is_asked_for_again():
    key = touched_key(pin="1234")
    assertion, said = sign_with_pins(key, "4321", "1234")
    verify(key, assertion)
    assert said == ["that PIN is wrong"]


def test_wrong_pins_do_not_lock_the_key():
    key = touched_key(pin="1234")
    with pytest.raises(k.SecurityKeyError, match="too many wrong PINs"):
        sign_with_pins(key, *["4321"] * 10)
    assert key.pins_tried == k.MAX_PINS


def test_a_user_who_has_no_pin_at_hand_gives_up():
    with pytest.raises(k.SecurityKeyError, match="PIN"):
        sign_with_pins(touched_key(pin="1234"), "")


def test_who_hesitates_is_asked_again():
    key, events = SoftwareKey(touch_seconds=0.02), queue.Queue()
    keys = k.SecurityKeys(CHALLENGE, events.put, lambda: iter([("/dev/key", lambda: key)]))
    for _ in range(2):
        assert events.get(timeout=DEADLINE_SECONDS) == k.TouchWanted()
    key.touched.set()
    verify(key, signed(events))
    keys.stop()


def signed(events):
    while True:
        event = events.get(timeout=DEADLINE_SECONDS)
        if isinstance(event, k.Signed):
            return event.assertion


def test_the_key_that_is_touched_first_counts_and_the_others_stop_to_blink():
    one, other = SoftwareKey(), SoftwareKey()
    events = queue.Queue()
    found = [("1", lambda: one), ("2", lambda: other)]
    keys = k.SecurityKeys(CHALLENGE, events.put, lambda: iter(found))
    for key in (one, other):
        assert key.blinks.wait(DEADLINE_SECONDS)
    other.touched.set()
    verify(other, signed(events))
    keys.stop(DEADLINE_SECONDS)
    assert one.was_cancelled
    assert one.is_closed
    assert other.is_closed
    assert all(event == k.TouchWanted() for event in list(events.queue))


def test_a_key_that_is_plugged_in_later_is_found(monkeypatch):
    monkeypatch.setattr(k, "LOOK_SECONDS", 0.01)
    found, key, events = [], touched_key(), queue.Queue()
    looked = threading.Event()

    def find():
        looked.set()
        return iter(list(found))

    keys = k.SecurityKeys(CHALLENGE, events.put, find)
    assert looked.wait(DEADLINE_SECONDS)
    found.append(("1", lambda: key))
    verify(key, signed(events))
    keys.stop()


def test_a_prompt_that_closes_ends_the_blinking():
    key, events = SoftwareKey(), queue.Queue()
    keys = k.SecurityKeys(CHALLENGE, events.put, lambda: iter([("1", lambda: key)]))
    assert key.blinks.wait(DEADLINE_SECONDS)
    keys.stop(DEADLINE_SECONDS)
    assert key.was_cancelled
    assert key.is_closed
    assert list(events.queue) == [k.TouchWanted()]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("odd")])
def test_a_key_that_cannot_be_opened_does_not_hide_the_others(error):
    def open_it():
        raise error

    key, events = touched_key(), queue.Queue()
    found = [("1", open_it), ("2", lambda: key)]
    keys = k.SecurityKeys(CHALLENGE, events.put, lambda: iter(found))
    failed = events.get(timeout=DEADLINE_SECONDS)
    assert isinstance(failed, k.KeyFailed)
    assert "cannot be opened" in failed.reason
    verify(key, signed(events))
    keys.stop()


def test_a_key_that_is_pulled_out_fails_with_a_sentence():
    class Pulled(SoftwareKey):
        def _assertion(self, *_):
            raise OSError(19, "No such device")

    events = queue.Queue()
    keys = k.SecurityKeys(CHALLENGE, events.put, lambda: iter([("1", Pulled)]))
    failed = events.get(timeout=DEADLINE_SECONDS)
    assert "No such device" in failed.reason
    keys.stop()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (CtapError.ERR.PIN_BLOCKED, "locked"),
        (CtapError.ERR.PIN_AUTH_BLOCKED, "plug it in again"),
        (CtapError.ERR.OPERATION_DENIED, "refuses"),
        (CtapError.ERR.OTHER, "refuses"),
    ],
)
def test_what_a_key_answers_becomes_a_sentence(code, said):
    class Refusing(SoftwareKey):
        def _assertion(self, *_):
            return bytes([code])

    with pytest.raises(k.SecurityKeyError, match=said):
        sign(Refusing())


def test_looking_for_keys_harms_nobody():
    for _path, open_it in k.find_keys():
        assert callable(open_it)

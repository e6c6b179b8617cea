"""Challenges and answers of the demo user's second factors, at a clock of the test's own."""

import base64
import json
import stat
from datetime import UTC, datetime, timedelta

import pytest
from embedded_cluster_client import SoftwareKey
from hypothesis import given
from hypothesis import strategies as st

from demo.cluster.errors import AccessError, RequestError
from demo.cluster.home import write_webauthn_credential
from demo.cluster.mfa import TOTP_DEVICE_ID, WEBAUTHN_DEVICE_ID, SecondFactors
from demo.cluster.totp import totp_code
from demo.cluster.webauthn import is_origin_of, make_security_key
from workers.proxy.teleport.pb import auth_pb2, mfa_pb2

NOW = datetime(2026, 5, 4, 12, 0, 10, tzinfo=UTC)
PROXY = ("teleport.demo.test", 3080)
ORIGIN = "https://teleport.demo.test:3080"
SECRET = base64.b32encode(b"12345678901234567890").decode()
SESSION = mfa_pb2.ChallengeExtensions(scope=mfa_pb2.CHALLENGE_SCOPE_USER_SESSION)


def factors(*kinds):
    return SecondFactors(kinds or ("totp", "webauthn"), SECRET, make_security_key())


@pytest.fixture
def bed(tmp_path):
    """Second factors and the software key that answers for them."""
    made = factors()
    write_webauthn_credential(tmp_path, made.key.describe([PROXY[0]]))
    return made, SoftwareKey(tmp_path)


def challenge(made, user="alice", extensions=SESSION, now=NOW):
    return made.challenge(user, extensions, PROXY, now)


def code_response(code):
    return auth_pb2.MFAAuthenticateResponse(TOTP=auth_pb2.TOTPResponse(Code=code))


def test_credential_file_is_private_and_names_every_profile(tmp_path):
    write_webauthn_credential(tmp_path, make_security_key().describe(["a.test", "b.test"]))
    path = tmp_path / "webauthn-credential.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    document = json.loads(path.read_text())
    assert (document["rp_id"], document["rp_ids"]) == ("a.test", ["a.test", "b.test"])


@pytest.mark.parametrize(
    ("kinds", "totp", "webauthn", "sso"),
    [
        (("totp", "webauthn"), True, True, False),
        (("totp",), True, False, False),
        (("webauthn",), False, True, False),
        (("sso",), False, False, True),
        (("totp", "webauthn", "sso"), True, True, True),
        ((), False, False, False),
    ],
)
def test_challenge_is_for_the_devices_the_user_has(kinds, totp, webauthn, sso):
    made = SecondFactors(kinds, SECRET, make_security_key())
    callback = f"http://127.0.0.1:4711/callback?secret_key={'0' * 64}"
    asked = made.challenge("alice", SESSION, PROXY, NOW, callback=callback)
    fields = ("TOTP", "WebauthnChallenge", "SSOChallenge")
    assert [asked.HasField(name) for name in fields] == [totp, webauthn, sso]


def test_webauthn_challenge_names_the_proxy_as_relying_party():
    options = challenge(factors()).WebauthnChallenge.public_key
    assert options.rp_id == "teleport.demo.test"
    assert len(options.challenge) >= 16
    assert options.user_verification == "discouraged"


@pytest.mark.parametrize(
    ("extensions", "error"),
    [
        (mfa_pb2.ChallengeExtensions(), RequestError),
        (mfa_pb2.ChallengeExtensions(scope=99), RequestError),
        (
            mfa_pb2.ChallengeExtensions(scope=mfa_pb2.CHALLENGE_SCOPE_PASSWORDLESS_LOGIN),
            RequestError,
        ),
        (
            mfa_pb2.ChallengeExtensions(
                scope=mfa_pb2.CHALLENGE_SCOPE_USER_SESSION,
                allow_reuse=mfa_pb2.CHALLENGE_ALLOW_REUSE_YES,
            ),
            AccessError,
        ),
    ],
)
def test_challenge_that_a_session_does_not_have_is_refused(extensions, error):
    with pytest.raises(error):
        challenge(factors(), extensions=extensions)


def test_security_key_answers_once(bed):
    made, key = bed
    response = key.answer(challenge(made), ORIGIN)
    assert made.check("alice", response, PROXY, NOW) == WEBAUTHN_DEVICE_ID
    with pytest.raises(AccessError, match=r"MFA response validation failed: .*not found"):
        made.check("alice", response, PROXY, NOW)


def test_wrong_answer_leaves_the_challenge_for_another_try(bed):
    made, key = bed
    asked = challenge(made)
    with pytest.raises(AccessError):
        made.check("alice", key.answer(asked, "https://evil.test"), PROXY, NOW)
    assert made.check("alice", key.answer(asked, ORIGIN), PROXY, NOW) == WEBAUTHN_DEVICE_ID


@pytest.mark.parametrize(
    "changes",
    [
        {"origin": "https://teleport.demo.test"},
        {"origin": "http://teleport.demo.test:3080"},
        {"origin": "https://teleport.demo.test:3080/path"},
        {"origin": "https://teleport.demo.test.evil.test:3080"},
        {"origin": 7},
        {"kind": "webauthn.create"},
        {"flags": 0},
        {"flags": 4},
        {"rp_id": "evil.test"},
        {"credential_id": b"another"},
    ],
    ids=str,
)
def test_answer_to_another_question_is_refused(bed, changes):
    made, key = bed
    given = {"origin": ORIGIN, **changes}
    response = key.answer(challenge(made), **given)
    with pytest.raises(AccessError, match="MFA response validation failed: "):
        made.check("alice", response, PROXY, NOW)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("signature", b""),
        ("signature", bytes(70)),
        ("authenticator_data", b""),
        ("authenticator_data", bytes(37)),
        ("authenticator_data", bytes([0] * 32 + [0xC1] + [0] * 40)),
        ("client_data_json", b""),
        ("client_data_json", b"\xff"),
        ("client_data_json", b"[]"),
        ("client_data_json", b'{"type": "webauthn.get"}'),
        ("user_handle", b"another"),
    ],
)
def test_tampered_answer_is_refused(bed, field, value):
    made, key = bed
    response = key.answer(challenge(made), ORIGIN)
    setattr(response.Webauthn.response, field, value)
    with pytest.raises(AccessError):
        made.check("alice", response, PROXY, NOW)


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_any_bytes_raise_only_the_refusal(client_data, authenticator_data, signature):
    made = factors()
    challenge(made)
    response = auth_pb2.MFAAuthenticateResponse()
    response.Webauthn.type = "public-key"
    response.Webauthn.raw_id = made.key.credential_id
    answer = response.Webauthn.response
    answer.client_data_json = client_data
    answer.authenticator_data = authenticator_data
    answer.signature = signature
    with pytest.raises(AccessError):
        made.check("alice", response, PROXY, NOW)


def test_newer_challenge_makes_the_older_unanswerable(bed):
    made, key = bed
    older, newer = challenge(made), challenge(made)
    with pytest.raises(AccessError, match="challenge"):
        made.check("alice", key.answer(older, ORIGIN), PROXY, NOW)
    made.check("alice", key.answer(newer, ORIGIN), PROXY, NOW)


def test_challenge_is_for_its_user_and_for_five_minutes(bed):
    made, key = bed
    response = key.answer(challenge(made), ORIGIN)
    with pytest.raises(AccessError, match="bob"):
        made.check("bob", response, PROXY, NOW)
    with pytest.raises(AccessError, match="not found"):
        made.check("alice", response, PROXY, NOW + timedelta(seconds=300))
    late = NOW + timedelta(seconds=299)
    assert made.check("alice", response, PROXY, late) == WEBAUTHN_DEVICE_ID


def test_challenge_of_another_scope_opens_no_session(bed):
    made, key = bed
    login = mfa_pb2.ChallengeExtensions(scope=mfa_pb2.CHALLENGE_SCOPE_LOGIN)
    response = key.answer(challenge(made, extensions=login), ORIGIN)
    with pytest.raises(AccessError, match=r"required scope .* is not satisfied"):
        made.check("alice", response, PROXY, NOW)


def test_security_key_that_the_user_does_not_have_is_refused():
    made = factors("totp")
    response = auth_pb2.MFAAuthenticateResponse()
    response.Webauthn.type = "public-key"
    with pytest.raises(AccessError):
        made.check("alice", response, PROXY, NOW)


def test_code_is_accepted_once_in_its_window():
    made = factors()
    code = totp_code(SECRET, NOW.timestamp())
    assert made.check("alice", code_response(code), PROXY, NOW) == TOTP_DEVICE_ID
    for seconds in (0, 29, 59):
        with pytest.raises(RequestError, match="previously used totp token"):
            made.check("alice", code_response(code), PROXY, NOW + timedelta(seconds=seconds))
    later = NOW + timedelta(seconds=30)
    made.check("alice", code_response(totp_code(SECRET, later.timestamp())), PROXY, later)


def test_wrong_or_late_code_is_refused():
    made = factors()
    code = totp_code(SECRET, NOW.timestamp())
    for given_code, now in (("000000x", NOW), (code, NOW + timedelta(minutes=2))):
        with pytest.raises(AccessError, match="invalid totp token"):
            made.check("alice", code_response(given_code), PROXY, now)
    with pytest.raises(AccessError, match="invalid totp token"):
        factors("webauthn").check("alice", code_response(code), PROXY, NOW)


def test_answers_of_no_kind_and_of_unknown_sign_ons_are_refused():
    made = factors("sso")
    assert not challenge(made).HasField("SSOChallenge")  # the client named no way back
    with pytest.raises(RequestError):
        made.check("alice", auth_pb2.MFAAuthenticateResponse(), PROXY, NOW)
    sso = auth_pb2.MFAAuthenticateResponse(SSO=auth_pb2.SSOResponse(request_id="x", token="y"))
    with pytest.raises(AccessError, match="MFA response validation failed: "):
        made.check("alice", sso, PROXY, NOW)


@pytest.mark.parametrize(
    ("origin", "port", "is_right"),
    [
        ("https://a.test", 443, True),
        ("https://a.test:443", 443, True),
        ("https://A.test", 443, True),
        ("https://a.test", 3080, False),
        ("https://a.test:99999", 443, False),
        ("https://a.test@b.test", 443, False),
    ],
)
def test_origin_is_the_proxy_as_a_browser_names_it(origin, port, is_right):
    assert is_origin_of(origin, "a.test", port) is is_right

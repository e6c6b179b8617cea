import pytest
from hypothesis import given
from hypothesis import strategies as st
from mfa_fakes import webauthn_challenge

from ipc import prompts as p
from workers.proxy.teleport import mfa
from workers.proxy.teleport.errors import MfaUnansweredError
from workers.proxy.teleport.pb import auth_pb2, webauthn_pb2

ORIGIN = "https://teleport.demo.test:3080"


def challenge(**changes):
    return auth_pb2.MFAAuthenticateChallenge(WebauthnChallenge=webauthn_challenge(**changes))


def sso(request_id="1", redirect_url="https://idp.test/", provider="okta"):
    made = auth_pb2.MFAAuthenticateChallenge()
    made.SSOChallenge.request_id = request_id
    made.SSOChallenge.redirect_url = redirect_url
    made.SSOChallenge.device.connector_id = provider
    return made


def test_a_challenge_becomes_what_a_security_key_needs():
    extensions = webauthn_pb2.AuthenticationExtensionsClientInputs(app_id="https://demo.test")
    assert mfa.webauthn_challenge(challenge(extensions=extensions), ORIGIN) == p.WebauthnChallenge(
        origin=ORIGIN,
        rp_id="teleport.demo.test",
        challenge=b"challenge",
        credential_ids=[b"key"],
        user_verification="discouraged",
        timeout_seconds=60.0,
        app_id="https://demo.test",
    )


def test_no_challenge_for_a_security_key_is_none():
    assert mfa.webauthn_challenge(auth_pb2.MFAAuthenticateChallenge(), ORIGIN) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"challenge": b""},
        {"challenge": b"x" * 5000},
        {"rp_id": ""},
        {"rp_id": "x" * 1000},
        {"extensions": webauthn_pb2.AuthenticationExtensionsClientInputs(app_id="x" * 1000)},
    ],
)
def test_a_challenge_that_cannot_be_signed_is_none(changes):
    assert mfa.webauthn_challenge(challenge(**changes), ORIGIN) is None


@given(
    st.binary(min_size=1, max_size=5000),
    st.lists(st.binary(max_size=1500).map(lambda b: b * 3), max_size=150),
    st.integers(-(2**63), 2**63 - 1),
    st.text(max_size=100),
    st.integers(0, 9000),
    st.text(max_size=1000),
)
def test_whatever_a_cluster_offers_fits_into_a_line(
    data, ids, timeout, verification, path, provider
):
    descriptors = [webauthn_pb2.CredentialDescriptor(id=one) for one in ids]
    found = mfa.webauthn_challenge(
        challenge(
            challenge=data,
            allow_credentials=descriptors,
            timeout_ms=timeout,
            user_verification=verification,
        ),
        ORIGIN,
    )
    if found is None:
        assert len(data) > 4096
        return
    offered = sso(redirect_url="https://idp.test/" + "x" * path, provider=provider)
    opened = p.PromptOpened(
        id="i" * 64,
        target="t" * 500,
        cluster="c" * 500,
        user="u" * 500,
        seconds_left=110.0,
        takes_code=True,
        webauthn=found,
        sso=mfa.sso_challenge(offered),
        problem="p" * 500,
    )
    line = p.encode(opened)
    assert len(line) <= p.MAX_LINE_BYTES
    assert p.decode_from_proxy(line) == opened


@pytest.mark.parametrize(
    ("host", "port", "origin"),
    [
        ("teleport.demo.test", 443, "https://teleport.demo.test"),
        ("teleport.demo.test", 3080, ORIGIN),
        ("::1", 443, "https://[::1]"),
        ("::1", 3080, "https://[::1]:3080"),
    ],
)
def test_the_origin_is_that_of_a_browser(host, port, origin):
    assert mfa.web_origin(host, port) == origin


def test_a_code_goes_to_the_cluster_as_it_is():
    answer = mfa.response(p.Answer(id="1", code="123 456"))
    assert answer.WhichOneof("Response") == "TOTP"
    assert answer.TOTP.Code == "123 456"


def test_a_signature_goes_to_the_cluster_with_all_its_parts():
    assertion = p.WebauthnAssertion(
        credential_id=b"key",
        client_data=b"{}",
        authenticator_data=b"data",
        signature=b"signature",
        user_handle=b"alice",
        used_app_id=True,
    )
    found = mfa.response(p.Answer(id="1", webauthn=assertion)).Webauthn
    assert (found.type, found.raw_id) == ("public-key", b"key")
    parts = found.response
    assert (parts.client_data_json, parts.authenticator_data) == (b"{}", b"data")
    assert (parts.signature, parts.user_handle) == (b"signature", b"alice")
    assert found.extensions.app_id


def test_the_widest_line_that_a_cluster_can_cause_is_carried():
    challenge_of_many = challenge(
        challenge=b"x" * 4096,
        rp_id="\0" * 512,  # six characters each, in JSON
        allow_credentials=[
            webauthn_pb2.CredentialDescriptor(id=bytes([n]) * 1023) for n in range(100)
        ],
        extensions=webauthn_pb2.AuthenticationExtensionsClientInputs(app_id="\0" * 512),
    )
    offered = sso(redirect_url="https://idp.test/" + "x" * 8175, provider="\U0001f511" * 999)
    opened = p.PromptOpened(
        id="i" * 64,
        target="\U0001f511" * 500,
        cluster="\U0001f511" * 500,
        user="\U0001f511" * 500,
        seconds_left=110.0,
        takes_code=True,
        webauthn=mfa.webauthn_challenge(challenge_of_many, ORIGIN),
        sso=mfa.sso_challenge(offered),
        problem="\U0001f511" * 500,
    )
    assert opened.webauthn is not None
    assert opened.sso is not None
    assert len(p.encode(opened)) <= p.MAX_LINE_BYTES


def test_a_page_for_single_sign_on_is_shown_with_its_provider():
    assert mfa.sso_challenge(sso()) == p.SsoChallenge(
        redirect_url="https://idp.test/", provider="okta"
    )
    assert mfa.sso_challenge(sso(provider="\x1b[2J")).provider.isprintable()


@pytest.mark.parametrize(
    "offered",
    [
        auth_pb2.MFAAuthenticateChallenge(),
        sso(request_id=""),
        sso(request_id="x" * 600),
        sso(redirect_url=""),
        sso(redirect_url="http://idp.test/"),
        sso(redirect_url="https://idp.test/\n"),
    ],
)
def test_a_page_that_cannot_be_opened_is_none(offered):
    assert mfa.sso_challenge(offered) is None


def test_a_token_goes_to_the_cluster_with_its_request():
    given = mfa.sso_response(sso(request_id="r1"), "token").SSO
    assert (given.request_id, given.token) == ("r1", "token")


def test_single_sign_on_is_asked_for_with_the_way_back():
    asked = mfa.challenge_request(None, "http://127.0.0.1:1/callback", "proxy.test:443")
    assert asked.SSOClientRedirectURL == "http://127.0.0.1:1/callback"
    assert asked.ProxyAddress == "proxy.test:443"
    assert mfa.challenge_request(None, "", "proxy.test:443").ProxyAddress == ""


def test_one_factor_that_can_be_asked_for_is_enough():
    bad = sso(redirect_url="http://idp.test/")
    bad.TOTP.SetInParent()
    mfa.require_answerable(bad, None, None, "app pg")
    mfa.require_answerable(sso(), None, mfa.sso_challenge(sso()), "app pg")
    bad.ClearField("TOTP")
    with pytest.raises(MfaUnansweredError, match=r"^app pg .* single sign-on .*it is not https"):
        mfa.require_answerable(bad, None, None, "app pg")

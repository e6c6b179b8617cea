import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import prompts as p

CHALLENGE = p.WebauthnChallenge(
    origin="https://teleport.demo.test",
    rp_id="teleport.demo.test",
    challenge=bytes(range(32)),
    credential_ids=[b"one", b"two"],
)
ASSERTION = p.WebauthnAssertion(
    credential_id=b"one", client_data=b"{}", authenticator_data=b"\xff", signature=b"\0"
)
SSO = p.SsoChallenge(redirect_url="https://idp.test/authorize?a=b%20c", provider="okta")
FROM_PROXY = [
    p.PromptOpened(
        id="1",
        target="app pg",
        cluster="demo.test",
        user="alice",
        seconds_left=109.5,
        takes_code=True,
        webauthn=webauthn,
        sso=sso,
    )
    for webauthn, sso in ((None, None), (CHALLENGE, None), (None, SSO))
] + [p.PromptAnswered(id="1"), p.PromptClosed(id="1", outcome="declined"), p.Waiting()]
FROM_USER = [
    p.Answer(id="1", code="123456"),
    p.Answer(id="1", webauthn=ASSERTION),
    p.Decline(id="1"),
    p.RenewChallenge(id="1"),
]


@pytest.mark.parametrize("message", FROM_PROXY)
def test_what_a_proxy_says_arrives(message):
    assert p.decode_from_proxy(p.encode(message)) == message


@pytest.mark.parametrize("message", FROM_USER)
def test_what_a_user_says_arrives(message):
    assert p.decode_from_user(p.encode(message)) == message


@pytest.mark.parametrize("message", FROM_PROXY + FROM_USER)
def test_nobody_may_say_what_only_the_other_may(message):
    wrong = p.decode_from_user if message in FROM_PROXY else p.decode_from_proxy
    with pytest.raises(msgspec.MsgspecError):
        wrong(p.encode(message))


@pytest.mark.parametrize(
    "line",
    [
        b'{"t":"Answer","id":"1"}',
        b'{"t":"Answer","id":"1","code":""}',
        b'{"t":"Answer","id":"","code":"1"}',
        b'{"t":"Answer","id":"1","code":"%b"}' % (b"1" * 65),
        b'{"t":"Answer","id":"1","code":"1","more":1}',
        b'{"t":"Decline"}',
        b'{"t":"Stop"}',
        b"[]",
        b"",
        b"\xff",
        p.encode(p.Answer(id="1", webauthn=ASSERTION)).replace(b'"code":""', b'"code":"1"'),
    ],
)
def test_a_malformed_answer_is_recognised(line):
    with pytest.raises(msgspec.MsgspecError):
        p.decode_from_user(line)


@pytest.mark.parametrize(
    ("url", "is_good"),
    [
        ("https://idp.test/", True),
        ("https://idp.test:8443/a/b?c=d&e=%20#f", True),
        ("https://[2001:db8::1]:8443/", True),
        ("http://localhost:3080/sso", True),
        ("http://127.0.0.1/", True),
        ("http://[::1]:80/", True),
        ("", False),
        ("http://idp.test/", False),
        ("http://127.0.0.1.evil.test/", False),
        ("https://", False),
        ("https:///path", False),
        ("https://idp.test@evil.test/", False),
        ("http://localhost@evil.test/", False),
        ("https://idp.test:99999/", False),
        ("https://[::1/", False),
        ("javascript:alert(1)", False),
        ("file:///etc/passwd", False),
        ("-https://idp.test/", False),
        ("https://idp.test/\x1b[2J", False),
        ("https://idp.test/\n", False),
        ("https://idp.test/a b", False),
        ("https://idp.test/\u202e", False),
        ("https://idp.test/" + "x" * 9000, False),
    ],
)
def test_only_harmless_pages_are_shown(url, is_good):
    assert (p.page_problem(url) == "") is is_good
    opened = p.encode(FROM_PROXY[2]).replace(
        msgspec.json.encode(SSO.redirect_url), msgspec.json.encode(url)
    )
    if is_good:
        assert p.decode_from_proxy(opened).sso.redirect_url == url
    else:
        with pytest.raises(msgspec.ValidationError):
            p.decode_from_proxy(opened)


@given(st.text(max_size=300))
def test_any_text_is_a_page_or_not(url):
    if not p.page_problem(url):
        assert url.startswith(("https://", "http://"))
        assert url.isprintable()


@pytest.mark.parametrize(
    "line",
    [
        b'{"t":"Decline","id":"\xff"}',
        b'{"t":"PromptClosed","id":"\xff","outcome":""}',
        b'{"x":' + b"[" * 5000,
    ],
)
def test_a_line_that_cannot_be_read_is_malformed(line):
    for decode in (p.decode_from_proxy, p.decode_from_user):
        with pytest.raises(msgspec.MsgspecError):
            decode(line)


@given(st.binary(max_size=200))
def test_anything_else_is_malformed_and_nothing_worse(line):
    for decode in (p.decode_from_proxy, p.decode_from_user):
        with pytest.raises(msgspec.MsgspecError):
            decode(line)

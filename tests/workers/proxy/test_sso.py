import pytest
from hypothesis import given
from hypothesis import strategies as st
from sso_browser import key_of, sealed

from workers.proxy.teleport import sso
from workers.proxy.teleport.errors import SignInFailedError

FORM = "Content-Type: application/x-www-form-urlencoded\r\n"


def made():
    key = sso.SecretKey()
    return key, key_of(key.callback_url(1))


def test_the_callback_is_what_servers_accept():
    key, raw = made()
    assert key.callback_url(4711) == f"http://127.0.0.1:4711/callback?secret_key={raw.hex()}"
    assert len(raw) == 32
    assert made()[1] != raw
    assert raw.hex() not in repr(key)


def test_a_token_is_read_with_its_key():
    key, raw = made()
    assert key.token(sealed(raw, token="abc")) == "abc"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "{}",
        "null",
        "[" * 100_000,
        '{"a":' + "[" * 100_000,
        '{"ciphertext":"","nonce":""}',
        '{"ciphertext":"","nonce":"AAAAAAAAAAAAAAAA"}',
        '{"ciphertext":"AAAA","nonce":"AAAAAAAAAAAAAAAA"}',
        '{"ciphertext":"%%%","nonce":"AAAAAAAAAAAAAAAA"}',
        '{"ciphertext":[1],"nonce":1}',
        '{"ciphertext":"AAAA","nonce":"' + "A" * 4000 + '"}',
        sealed(bytes(32)),
    ],
    ids=range(12),
)
def test_what_the_key_does_not_open_is_for_somebody_else(response):
    with pytest.raises(sso.CallbackError):
        made()[0].token(response)


def test_a_changed_answer_is_not_opened():
    key, raw = made()
    good = sealed(raw)
    start = good.index('"', good.index(":")) + 1
    for place in (start, start + 8, start + 40):
        changed = good[:place] + ("B" if good[place] == "A" else "A") + good[place + 1 :]
        with pytest.raises(sso.CallbackError):
            key.token(changed)


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"mfa_token":""}',
        b'{"mfa_token":7}',
        b'{"mfa_token":"%b"}' % (b"x" * 5000),
        b"[" * 20_000,
        b'{"mfa_token":"\xff"}',
    ],
    ids=range(9),
)
def test_an_answer_of_the_cluster_without_a_token_fails_the_sign_on(plain):
    key, raw = made()
    with pytest.raises(SignInFailedError, match="single sign-on"):
        key.token(sealed(raw, plain))


@given(st.text(max_size=300))
def test_any_other_text_is_not_opened(text):
    key, raw = made()
    with pytest.raises(sso.CallbackError):
        key.token(text)
    assert not key.matches(text)
    assert key.matches(raw.hex())


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("", 400),
        ("GET", 400),
        ("GET /callback", 400),
        ("GET /callback HTTP/2.0", 400),
        ("GET http://127.0.0.1/callback HTTP/1.1", 400),
        ("\x16\x03\x01\x02\x00", 400),
        ("GET / HTTP/1.1", 404),
        ("GET /callback/ HTTP/1.1", 404),
        ("GET /callback/../callback HTTP/1.1", 404),
        ("GET /Callback HTTP/1.1", 404),
        ("HEAD /callback HTTP/1.1", 405),
        ("PUT /callback HTTP/1.1", 405),
        ("get /callback HTTP/1.1", 405),
        (f"POST /callback HTTP/1.1\r\n{FORM}", 411),
        (f"POST /callback HTTP/1.1\r\n{FORM}Content-Length: -1", 411),
        (f"POST /callback HTTP/1.1\r\n{FORM}Content-Length: \u0661", 411),
        (f"POST /callback HTTP/1.1\r\n{FORM}Transfer-Encoding: chunked\r\nContent-Length: 1", 411),
        (f"POST /callback HTTP/1.1\r\n{FORM}Content-Length: 65537", 413),
        (f"POST /callback HTTP/1.1\r\n{FORM}Content-Length: " + "9" * 5000, 413),
    ],
)
def test_other_requests_are_refused(head, status):
    with pytest.raises(sso.HttpError) as caught:
        sso.read_head(head.encode())
    assert caught.value.status == status
    assert sso.refuse(status).startswith(b"HTTP/1.1 %d " % status)


def test_a_form_is_read_from_the_address_and_from_the_body():
    get = sso.read_head(b"GET /callback?response=a%20b&err= HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (get.method, get.length) == ("GET", 0)
    assert sso.form_fields(get, b"") == {"response": "a b", "err": ""}
    post = sso.read_head(
        f"POST /callback?a=1&b=2 HTTP/1.1\r\n{FORM}content-length: 9\r\n\r\n".encode()
    )
    assert post.length == 9
    assert sso.form_fields(post, b"b=3&c=+4&") == {"a": "1", "b": "3", "c": " 4"}


@pytest.mark.parametrize("body", [b"\xff=1", b"&".join(b"a%d=1" % n for n in range(20))])
def test_too_much_of_a_form_is_refused(body):
    with pytest.raises(sso.HttpError):
        sso.form_fields(sso.read_head(b"GET /callback HTTP/1.1"), body)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_anything_sent_is_refused_or_read(head, body):
    for start in (b"", b"POST /callback?"):
        try:
            request = sso.read_head(start + head)
            assert request.length <= sso.MAX_BODY_BYTES
            sso.form_fields(request, body)
        except sso.HttpError:
            pass


def test_the_reason_of_a_failure_is_one_printable_line():
    error = sso.failure({"err": "denied\x1b[2J\n" + "x" * 9999})
    assert str(error).startswith("single sign-on failed: denied [2J x")
    assert len(str(error)) < 500
    assert "no reason" in str(sso.failure({"err": " "}))

"""Single sign-on of the demo user: requests, the page that stands for a provider, tokens."""

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from embedded_cluster_client import VERSION, session_challenge
from grpclib.exceptions import GRPCError
from hypothesis import given
from hypothesis import strategies as st
from proxy_bed import run, set_faults, until, web

from demo.cluster.errors import AccessError, RequestError
from demo.cluster.sso import SSO_SECONDS, SignOns, check_callback
from workers.proxy.teleport.pb import auth_grpc, auth_pb2, mfa_pb2

NOW = datetime(2026, 5, 4, 12, 0, 10, tzinfo=UTC)
PROXY = ("teleport.demo.test", 3080)
SESSION = mfa_pb2.CHALLENGE_SCOPE_USER_SESSION
KEY = bytes(range(32))
CALLBACK = f"http://127.0.0.1:4711/callback?secret_key={KEY.hex()}"


def begin(made, scope=SESSION):
    return made.begin("alice", scope, CALLBACK, PROXY, NOW)


def opened(location, key=KEY):
    """What a client reads in the callback."""
    (response,) = parse_qs(urlsplit(location).query)["response"]
    sealed = {name: base64.b64decode(text) for name, text in json.loads(response).items()}
    return json.loads(AESGCM(key).decrypt(sealed["nonce"], sealed["ciphertext"], None))


def answer(request_id, location):
    return auth_pb2.SSOResponse(request_id=request_id, token=opened(location)["mfa_token"])


def test_sign_on_brings_a_token_that_is_good_once():
    made = SignOns()
    challenge = begin(made)
    request_id = challenge.request_id
    assert challenge.redirect_url == (
        f"https://teleport.demo.test:3080/sso-demo?request={request_id}"
    )
    location = made.sign_on(request_id, NOW, is_refused=False)
    assert location.startswith("http://127.0.0.1:4711/callback?")
    assert KEY.hex() not in location
    assert opened(location)["username"] == "alice"
    given_answer = answer(request_id, location)
    made.check("alice", given_answer, SESSION, NOW)
    with pytest.raises(AccessError):
        made.check("alice", given_answer, SESSION, NOW)


@pytest.mark.parametrize(
    ("user", "scope", "token", "seconds"),
    [
        ("bob", SESSION, None, 0),
        ("alice", mfa_pb2.CHALLENGE_SCOPE_LOGIN, None, 0),
        ("alice", SESSION, "", 0),
        ("alice", SESSION, "another", 0),
        ("alice", SESSION, None, SSO_SECONDS),
    ],
)
def test_another_answer_is_refused_and_the_right_one_still_does(user, scope, token, seconds):
    made = SignOns()
    request_id = begin(made).request_id
    right = answer(request_id, made.sign_on(request_id, NOW, is_refused=False))
    wrong = auth_pb2.SSOResponse(request_id=request_id, token=right.token)
    if token is not None:
        wrong.token = token
    with pytest.raises(AccessError):
        made.check(user, wrong, scope, NOW + timedelta(seconds=seconds))
    made.check("alice", right, SESSION, NOW + timedelta(seconds=SSO_SECONDS - 1))


def test_without_a_sign_on_no_token_is_right():
    made = SignOns()
    with pytest.raises(AccessError):
        made.check("alice", auth_pb2.SSOResponse(request_id=begin(made).request_id), SESSION, NOW)


def test_a_page_answers_one_request_once_and_in_time():
    made = SignOns()
    first, late = begin(made).request_id, begin(made).request_id
    made.sign_on(first, NOW, is_refused=False)
    later = NOW + timedelta(seconds=SSO_SECONDS)
    for request_id, now in ((first, NOW), (late, later), ("unknown", NOW), ("", NOW)):
        with pytest.raises(RequestError):
            made.sign_on(request_id, now, is_refused=False)


def test_a_refusal_goes_to_the_callback_too():
    made = SignOns()
    location = made.sign_on(begin(made).request_id, NOW, is_refused=True)
    fields = parse_qs(urlsplit(location).query)
    assert fields == {
        "secret_key": [KEY.hex()],
        "err": ["a fault refuses every sign-on"],
    }


def test_requests_that_nobody_answers_make_room():
    made = SignOns()
    first = begin(made).request_id
    for _ in range(200):
        begin(made)
    with pytest.raises(RequestError):
        made.sign_on(first, NOW, is_refused=False)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (CALLBACK, None),
        (CALLBACK.replace("127.0.0.1", "localhost"), None),
        (CALLBACK.replace("127.0.0.1", "[::1]"), None),
        ("", RequestError),
        (CALLBACK.replace("/callback", "/"), RequestError),
        (CALLBACK.replace("/callback", "/callback/"), RequestError),
        (CALLBACK + "&a=b", RequestError),
        (f"{CALLBACK}&secret_key={KEY.hex()}", RequestError),
        (CALLBACK.replace("secret_key", "key"), RequestError),
        (CALLBACK.partition("?")[0], RequestError),
        (CALLBACK[:-2], RequestError),
        (CALLBACK[:-1] + "x", RequestError),
        (CALLBACK + "#x", RequestError),
        (CALLBACK.replace("127", "user@127"), RequestError),
        (CALLBACK.replace("4711", "99999"), RequestError),
        (CALLBACK.replace("127.0.0.1", "evil.test"), AccessError),
        (CALLBACK.replace("127.0.0.1", "127.0.0.2"), AccessError),
        (CALLBACK.replace("http:", "https:"), AccessError),
    ],
)
def test_only_callbacks_on_loopback_are_taken(url, error):
    if error is None:
        assert check_callback(url) == KEY
    else:
        with pytest.raises(error):
            check_callback(url)


@given(st.text(max_size=100))
def test_any_text_is_refused_in_order(text):
    for url in (text, CALLBACK.replace(KEY.hex(), text)):
        with pytest.raises((RequestError, AccessError)):
            check_callback(url)


# -- in a running cluster --

FILE = """
[[clusters]]
name = "sso.test"
proxy_addr = "localhost:0"
mfa_devices = ["sso"]
"""


def mfa_refused(home):
    return [state.faults.mfa_refused for state in home.embedded.states.values()]


async def challenge_of(home, **fields):
    async with home.auth() as channel:
        stub = auth_grpc.AuthServiceStub(channel)
        return await stub.CreateAuthenticateChallenge(session_challenge(**fields), metadata=VERSION)


def test_the_web_port_redirects_to_the_callback(tmp_path):
    async def scenario(home):
        assert not (await challenge_of(home)).HasField("SSOChallenge")
        with pytest.raises(GRPCError, match="path"):
            await challenge_of(home, SSOClientRedirectURL="http://127.0.0.1/")
        for is_refused in (False, True):
            set_faults(home, "mfa_refused" if is_refused else "")
            wanted = [is_refused]
            await until(lambda wanted=wanted: mfa_refused(home) == wanted)
            offered = (await challenge_of(home, SSOClientRedirectURL=CALLBACK)).SSOChallenge
            page = urlsplit(offered.redirect_url)
            request = f"GET {page.path}?{page.query} HTTP/1.1\nHost: {page.netloc}"
            status, fields, _ = await asyncio.to_thread(web, home, request)
            assert "302" in status
            assert fields["location"].startswith("http://127.0.0.1:4711/callback?")
            assert ("err=" in fields["location"]) is is_refused
            status, _, _ = await asyncio.to_thread(web, home, request)
            assert "400" in status
        for path in ("/web/msg/info/login_success", "/web/msg/error/login"):
            status, _, body = await asyncio.to_thread(web, home, f"GET {path} HTTP/1.1")
            assert "200" in status
            assert body

    run(tmp_path, FILE, scenario)

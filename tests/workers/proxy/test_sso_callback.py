"""Browsers, and what is none, at the listener for single sign-on."""

import asyncio
import logging
import socket

import pytest
import uvloop
from sso_browser import exchange, key_of, port_of, sealed, visit
from teleport_fakes import until

from workers.proxy.teleport import sso_callback
from workers.proxy.teleport.errors import SignInFailedError
from workers.proxy.teleport.sso_callback import MAX_CONNECTIONS, Callbacks

ORIGIN = "https://teleport.demo.test:3080"
SUCCESS = f"{ORIGIN}/web/msg/info/login_success"
ERROR = f"{ORIGIN}/web/msg/error/login"


class Bed:
    def __init__(self):
        self.callbacks = Callbacks(request_seconds=20)
        self.outcomes = []

    async def open(self, origin=ORIGIN):
        callback = await self.callbacks.open(origin)
        callback.deliver = self.outcomes.append
        return callback


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request):
    """Runs a scene, under each event loop: workers use uvloop."""

    def run(scene):
        async def main():
            bed = Bed()
            async with asyncio.timeout(30):
                await scene(bed)
                for callback in list(bed.callbacks._open):
                    callback.close()
                await until(lambda: not bed.callbacks._connections)

        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())

    return run


def is_listening(port):
    with socket.socket() as end:
        return end.connect_ex(("127.0.0.1", port)) == 0


def test_a_token_is_delivered_and_the_browser_told(play):
    async def scene(bed):
        callback = await bed.open()
        url = callback.url
        status, fields, _ = await visit(port_of(url), response=sealed(key_of(url)), secret_key="")
        assert (status, fields["location"]) == (302, SUCCESS)
        assert bed.outcomes == ["the token"]

    play(scene)


def test_a_form_does_as_well(play):
    async def scene(bed):
        url = (await bed.open()).url
        form = {"response": sealed(key_of(url))}
        status, fields, _ = await visit(port_of(url), method="POST", form=form)
        assert (status, fields["location"]) == (302, SUCCESS)
        assert bed.outcomes == ["the token"]

    play(scene)


def test_every_answer_says_what_is_allowed(play):
    async def scene(bed):
        port = port_of((await bed.open()).url)
        for status, changes in [
            (200, {"method": "OPTIONS"}),
            (302, {}),
            (404, {"path": "/"}),
            (405, {"method": "PUT"}),
        ]:
            found, fields, body = await visit(port, **changes)
            assert found == status
            assert fields["allow"] == "get, options, post"
            assert fields["access-control-allow-origin"] == "*"
            assert int(fields["content-length"]) == len(body)
        assert bed.outcomes == []

    play(scene)


def test_the_reason_of_the_proxy_is_delivered_if_it_knows_the_key(play):
    async def scene(bed):
        url = (await bed.open()).url
        port, key = port_of(url), key_of(url).hex()
        for wrong in ("", "x", key[:-1], key.upper() + "0", "0" * 64, "é"):
            status, fields, _ = await visit(port, err="denied", secret_key=wrong)
            assert (status, fields["location"]) == (302, ERROR)
        assert bed.outcomes == []
        status, fields, _ = await visit(port, err="denied", secret_key=key)
        assert (status, fields["location"]) == (302, ERROR)
        (outcome,) = bed.outcomes
        assert isinstance(outcome, SignInFailedError)
        assert str(outcome) == "single sign-on failed: denied"

    play(scene)


def test_who_does_not_know_the_key_neither_answers_nor_ends_a_question(play):
    async def scene(bed):
        url = (await bed.open()).url
        port, key = port_of(url), key_of(url)
        for response in ("", "{}", "garbage", sealed(bytes(32)), sealed(key)[:-9]):
            status, fields, _ = await visit(port, response=response)
            assert (status, fields["location"]) == (302, ERROR)
        assert bed.outcomes == []
        await visit(port, response=sealed(key))
        assert bed.outcomes == ["the token"]

    play(scene)


def test_a_replay_is_told_the_same_and_delivers_nothing(play):
    async def scene(bed):
        url = (await bed.open()).url
        response = sealed(key_of(url))
        for _ in range(3):
            _, fields, _ = await visit(port_of(url), response=response)
            assert fields["location"] == SUCCESS
        await visit(port_of(url), err="denied", secret_key=key_of(url).hex())
        assert bed.outcomes == ["the token"]

    play(scene)


def test_an_answer_to_a_question_that_is_over_is_nobodys(play):
    async def scene(bed):
        over, other = await bed.open(), await bed.open("https://other.test")
        response = sealed(key_of(over.url))
        over.close()
        _, fields, _ = await visit(port_of(other.url), response=response)
        assert fields["location"] == "https://other.test/web/msg/error/login"
        assert bed.outcomes == []

    play(scene)


def test_questions_share_a_listener_and_keys_tell_them_apart(play):
    async def scene(bed):
        callbacks = [await bed.callbacks.open(f"https://{n}.test") for n in range(3)]
        assert len({port_of(callback.url) for callback in callbacks}) == 1
        assert len({key_of(callback.url) for callback in callbacks}) == 3
        outcomes = {}
        for n, callback in enumerate(callbacks):
            callback.deliver = lambda outcome, n=n: outcomes.__setitem__(n, outcome)
        for n in (1, 2, 0):
            url = callbacks[n].url
            _, fields, _ = await visit(port_of(url), response=sealed(key_of(url), token=f"t{n}"))
            assert fields["location"].startswith(f"https://{n}.test/")
        assert outcomes == {0: "t0", 1: "t1", 2: "t2"}

    play(scene)


def test_it_listens_on_loopback_and_only_while_somebody_waits(play):
    async def scene(bed):
        many = await asyncio.gather(*(bed.open() for _ in range(5)))
        (port,) = {port_of(callback.url) for callback in many}
        (end,) = bed.callbacks._server.sockets
        assert end.getsockname() == ("127.0.0.1", port)
        for callback in many[1:]:
            callback.close()
            callback.close()
        assert is_listening(port)
        many[0].close()
        await until(lambda: not is_listening(port))
        # And again for the next one.
        assert is_listening(port_of((await bed.open()).url))

    play(scene)


def test_a_browser_that_is_being_answered_hears_the_end(play):
    async def scene(bed):
        callback = await bed.open()
        callback.deliver = lambda _outcome: callback.close()
        url = callback.url
        _, fields, _ = await visit(port_of(url), response=sealed(key_of(url)))
        assert fields["location"] == SUCCESS

    play(scene)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0" * 200_000,
        b"GET /callback?response=" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /callback HTTP/1.1\r\n" + b"A: b\r\n" * 50_000,
    ],
    ids=["noise", "address", "fields"],
)
def test_a_huge_request_ends_its_connection_only(play, request_bytes):
    async def scene(bed):
        url = (await bed.open()).url
        assert await exchange(port_of(url), request_bytes) is None
        await visit(port_of(url), response=sealed(key_of(url)))
        assert bed.outcomes == ["the token"]

    play(scene)


@pytest.mark.parametrize(
    "start", [b"", b"GET /call", b"POST /callback HTTP/1.1\r\nContent-Length: 9\r\n"]
)
def test_who_is_slow_is_sent_away(play, start):
    async def scene(bed):
        bed.callbacks = Callbacks(request_seconds=0.05)
        assert await exchange(port_of((await bed.open()).url), start) is None

    play(scene)


def test_a_body_that_does_not_come_is_not_waited_for(play):
    async def scene(bed):
        bed.callbacks = Callbacks(request_seconds=0.05)
        head = b"POST /callback HTTP/1.1\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        port = port_of((await bed.open()).url)
        assert await exchange(port, head + b"Content-Length: 9\r\n\r\nerr=") is None

    play(scene)


def test_connections_that_are_held_open_do_not_keep_a_browser_away(play):
    async def scene(bed):
        url = (await bed.open()).url
        held = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(40)]
        await visit(port_of(url), response=sealed(key_of(url)))
        assert bed.outcomes == ["the token"]
        assert len(bed.callbacks._connections) <= MAX_CONNECTIONS
        for _, writer in held:
            writer.close()

    play(scene)


def test_without_a_port_there_is_no_address(play, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("no ports")

    async def scene(bed):
        with monkeypatch.context() as patched:
            patched.setattr(sso_callback.socket, "create_server", fail)
            callback = await bed.open()
        assert callback.url == ""
        callback.close()
        assert "no ports" in caplog.text

    play(scene)


def test_no_log_has_a_secret(play, caplog):
    caplog.set_level(logging.DEBUG)

    async def scene(bed):
        url = (await bed.open()).url
        key = key_of(url)
        await visit(port_of(url), response="garbage", secret_key=key.hex())
        await visit(port_of(url), err="denied", secret_key=key.hex())
        await visit(port_of(url), path="/x", secret_key=key.hex())
        await visit(port_of(url), response=sealed(key))
        assert key.hex() not in caplog.text
        assert "the token" not in caplog.text

    play(scene)

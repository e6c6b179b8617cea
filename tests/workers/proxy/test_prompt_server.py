import asyncio
import contextlib
import os
import socket
import stat
from dataclasses import replace

import pytest
import uvloop
from teleport_fakes import until

from ipc import prompts as p
from workers.proxy import prompts, user_socket
from workers.proxy.prompts import MAX_CLIENTS, MAX_PROMPTS, PromptServer
from workers.proxy.teleport.errors import MfaUnansweredError, SignInFailedError, UnreachableError
from workers.proxy.teleport.mfa import MfaQuestion
from workers.proxy.teleport.pb import auth_pb2

QUESTION = MfaQuestion(
    id="q1",
    profile="teleport.demo.test",
    cluster="demo.test",
    target="app pg",
    user="alice",
    takes_code=True,
    webauthn=None,
    seconds=60.0,
)
CHALLENGE = p.WebauthnChallenge(
    origin="https://teleport.demo.test",
    rp_id="teleport.demo.test",
    challenge=b"one",
    credential_ids=[b"key"],
)


async def no_renewal():
    raise AssertionError("nobody asked for a new challenge")


class Client:
    """A program that answers prompts."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, directory, name):
        return cls(*await asyncio.open_unix_connection(directory / name, limit=1 << 20))

    async def hear(self):
        return p.decode_from_proxy(await self.reader.readuntil(b"\n"))

    def say(self, message):
        self.writer.write(message if isinstance(message, bytes) else p.encode(message))

    async def is_sent_away(self):
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        return True


class Bed:
    def __init__(self, directory):
        self.directory = directory
        self.notified = []
        self.server = PromptServer(directory, "proxy-0", self.notified.append)
        self.clients = []
        self.asked = []

    async def __aenter__(self):
        await self.server.start()
        return self

    async def __aexit__(self, *_):
        await self.server.close()
        await asyncio.gather(*self.asked, return_exceptions=True)
        for client in self.clients:
            client.writer.close()
            with contextlib.suppress(OSError):
                await client.writer.wait_closed()

    async def connect(self, *, waits=True, name="proxy-0.sock"):
        client = await Client.connect(self.directory, name)
        self.clients.append(client)
        if waits:
            assert isinstance(await client.hear(), p.Waiting)
        return client

    def ask(self, question=QUESTION, renew=no_renewal):
        task = asyncio.ensure_future(self.server.ask(question, renew))
        self.asked.append(task)
        return task


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request, tmp_path):
    """Runs a scene with a server, under each event loop: workers use uvloop."""

    def run(scene):
        async def main():
            async with Bed(tmp_path) as bed, asyncio.timeout(30):
                await scene(bed)

        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())
        assert not (tmp_path / "proxy-0.sock").exists()

    return run


def test_a_code_reaches_who_asked_and_everyone_hears_of_it(play):
    async def scene(bed):
        one, other = await bed.connect(), await bed.connect()
        asked = bed.ask()
        for client in (one, other):
            opened = await client.hear()
            assert (opened.id, opened.target, opened.cluster) == ("q1", "app pg", "demo.test")
            assert (opened.user, opened.takes_code, opened.problem) == ("alice", True, "")
            assert 50 < opened.seconds_left <= 60
        one.say(p.Answer(id="q1", code="123456"))
        assert (await asked).TOTP.Code == "123456"
        bed.server.settled("q1", "app pg can be used now")
        for client in (one, other):
            assert await client.hear() == p.PromptAnswered(id="q1")
            assert await client.hear() == p.PromptClosed(id="q1", outcome="app pg can be used now")

    play(scene)


def test_who_comes_later_is_told_what_waits_already(play):
    async def scene(bed):
        bed.ask()
        bed.ask(replace(QUESTION, id="q2", target="database orders"))
        answered = bed.ask(replace(QUESTION, id="q3"))
        await asyncio.sleep(0)
        first = await bed.connect(waits=False)
        first.say(p.Answer(id="q3", code="1"))
        await answered
        client = await bed.connect(waits=False)
        assert [(await client.hear()).id for _ in range(2)] == ["q1", "q2"]
        assert await client.hear() == p.Waiting()

    play(scene)


def test_the_first_answer_counts(play):
    async def scene(bed):
        one, other = await bed.connect(), await bed.connect()
        asked = bed.ask()
        await one.hear()
        one.say(p.Answer(id="q1", code="1"))
        await asked
        other.say(p.Answer(id="q1", code="2"))
        other.say(p.Decline(id="q1"))
        other.say(p.Answer(id="unknown", code="2"))
        assert (await asked).TOTP.Code == "1"
        # The late ones did no harm: it is still told of what comes.
        bed.ask(replace(QUESTION, id="q2"))
        heard = [await other.hear() for _ in range(3)]
        assert [type(m) for m in heard] == [p.PromptOpened, p.PromptAnswered, p.PromptOpened]

    play(scene)


def test_an_answer_that_was_not_taken_is_asked_for_again(play):
    async def scene(bed):
        client = await bed.connect()
        first = bed.ask()
        await client.hear()
        client.say(p.Answer(id="q1", code="1"))
        await first
        again = bed.ask(replace(QUESTION, problem="invalid totp token"))
        assert isinstance(await client.hear(), p.PromptAnswered)
        assert (await client.hear()).problem == "invalid totp token"
        client.say(p.Answer(id="q1", code="2"))
        assert (await again).TOTP.Code == "2"
        assert len(bed.notified) == 1

    play(scene)


def test_a_browser_answers_in_the_place_of_the_user(play):
    async def scene(bed):
        client = await bed.connect()
        sso = p.SsoChallenge(redirect_url="https://idp.test/", provider="okta")
        asked = bed.ask(replace(QUESTION, takes_code=False, sso=sso))
        assert (await client.hear()).sso == sso
        given = auth_pb2.MFAAuthenticateResponse(SSO=auth_pb2.SSOResponse(token="t"))
        bed.server.give("unknown", given)
        bed.server.give("q1", given)
        client.say(p.Answer(id="q1", code="123456"))
        assert await asked == given
        assert await client.hear() == p.PromptAnswered(id="q1", is_by_browser=True)
        bed.server.give("q1", given)  # too late, and harmless

    play(scene)


def test_a_browser_that_fails_leaves_the_prompt_for_another_try(play):
    async def scene(bed):
        client = await bed.connect()
        asked = bed.ask()
        await client.hear()
        bed.server.give("q1", SignInFailedError("denied"))
        with pytest.raises(SignInFailedError, match="denied"):
            await asked
        again = bed.ask(replace(QUESTION, problem="denied"))
        assert isinstance(await client.hear(), p.PromptAnswered)
        assert (await client.hear()).problem == "denied"
        client.say(p.Answer(id="q1", code="1"))
        assert (await again).TOTP.Code == "1"
        assert len(bed.notified) == 1

    play(scene)


def test_nobody_answers_in_time(play):
    async def scene(bed):
        client = await bed.connect()
        with pytest.raises(MfaUnansweredError, match=r"app pg in demo.test .* run vnet mfa"):
            await bed.ask(replace(QUESTION, seconds=0.05))
        await client.hear()
        closed = await client.hear()
        assert isinstance(closed, p.PromptClosed)
        assert "nobody" in closed.outcome
        late = await bed.connect()  # and nothing waits any more
        assert late is not None

    play(scene)


def test_a_user_may_decline(play):
    async def scene(bed):
        client = await bed.connect()
        asked = bed.ask()
        await client.hear()
        client.say(p.Decline(id="q1"))
        with pytest.raises(MfaUnansweredError, match="declined"):
            await asked
        assert "declined" in (await client.hear()).outcome

    play(scene)


def test_a_question_that_is_taken_back_closes(play):
    async def scene(bed):
        client = await bed.connect()
        asked = bed.ask()
        await client.hear()
        asked.cancel()
        assert isinstance(await client.hear(), p.PromptClosed)

    play(scene)


def test_a_security_key_gets_a_challenge_of_its_own(play):
    async def scene(bed):
        question = replace(QUESTION, webauthn=CHALLENGE)
        renewals = []

        async def renew():
            renewals.append(1)
            changed = p.WebauthnChallenge(
                origin="https://x", rp_id="x", challenge=b"two", credential_ids=[]
            )
            return replace(question, webauthn=changed)

        client = await bed.connect()
        bed.ask(question, renew)
        assert (await client.hear()).webauthn == CHALLENGE
        client.say(p.RenewChallenge(id="q1"))
        assert (await client.hear()).webauthn.challenge == b"two"
        assert len(renewals) == 1
        late = await bed.connect(waits=False)
        assert (await late.hear()).webauthn.challenge == b"two"

    play(scene)


def test_without_a_new_challenge_the_old_one_stays(play):
    async def scene(bed):
        async def renew():
            raise UnreachableError("gone")

        client = await bed.connect()
        bed.ask(replace(QUESTION, webauthn=CHALLENGE), renew)
        await client.hear()
        client.say(p.RenewChallenge(id="q1"))
        assert (await client.hear()).webauthn == CHALLENGE

    play(scene)


def test_challenges_are_renewed_one_at_a_time_and_not_for_ever(play, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_RENEWALS", 3)

    async def scene(bed):
        running, most, total = 0, 0, 0

        async def renew():
            nonlocal running, most, total
            running += 1
            total += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return QUESTION

        client = await bed.connect()
        bed.ask(renew=renew)
        await client.hear()
        for _ in range(3):
            client.say(5 * p.encode(p.RenewChallenge(id="q1")))
            await client.hear()
        await until(lambda: total == 3)
        client.say(20 * p.encode(p.RenewChallenge(id="q1")))
        client.say(p.Answer(id="q1", code="1"))
        while not isinstance(await client.hear(), p.PromptAnswered):
            pass
        assert (most, total) == (1, 3)

    play(scene)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"nonsense\n",
        b'{"t":"Answer","id":"q1"}\n',
        b"\0" * (2 * p.MAX_LINE_BYTES),
        b'{"t":"Waiting"}\n',
        b'{"t":"Decline","id":"q1"',  # and then it goes
    ],
)
def test_nonsense_ends_only_who_says_it(play, nonsense):
    async def scene(bed):
        good, bad = await bed.connect(), await bed.connect()
        asked = bed.ask()
        await good.hear()
        bad.say(nonsense)
        if not nonsense.endswith((b"\n", b"\0")):
            bad.writer.write_eof()
        assert await bad.is_sent_away()
        good.say(p.Answer(id="q1", code="1"))
        assert (await asked).TOTP.Code == "1"

    play(scene)


def test_one_client_too_many_is_sent_away_and_the_others_stay(play):
    async def scene(bed):
        clients = [await bed.connect() for _ in range(MAX_CLIENTS)]
        extra = await bed.connect(waits=False)
        assert await extra.is_sent_away()
        clients[0].writer.close()
        await until(lambda: len(bed.server._clients) < MAX_CLIENTS)
        await bed.connect()
        bed.ask()
        assert isinstance(await clients[-1].hear(), p.PromptOpened)

    play(scene)


def test_who_does_not_read_is_sent_away(play, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_UNREAD_BYTES", 100_000)

    async def scene(bed):
        await bed.connect()
        # The kernel takes some megabytes at most.
        for number in range(20_000):
            bed.server.settled("none", "x")
            bed.server._tell(p.PromptClosed(id=str(number), outcome="o" * 500))
            if not number % 100:
                await asyncio.sleep(0)
            if not bed.server._clients:
                return
        raise AssertionError("it is still there")

    play(scene)


@pytest.mark.parametrize(
    ("uid", "is_heard"), [(0, True), (os.getuid(), True), (4711, False), (None, False)]
)
def test_only_the_user_and_root_are_heard(play, monkeypatch, uid, is_heard):
    def peer_uid(_end):
        if uid is None:
            raise OSError("the kernel does not say")
        return uid

    monkeypatch.setattr(user_socket, "peer_uid", peer_uid)

    async def scene(bed):
        client = await bed.connect(waits=is_heard)
        if not is_heard:
            assert await client.is_sent_away()

    play(scene)


def test_who_the_kernel_says_it_is(play, monkeypatch):
    server_side = []
    real = user_socket.peer_uid
    monkeypatch.setattr(user_socket, "peer_uid", lambda end: server_side.append(real(end)) or 0)

    async def scene(bed):
        await bed.connect()
        assert server_side == [os.getuid()]

    play(scene)


def test_the_socket_is_the_users_alone(play):
    async def scene(bed):
        found = (bed.directory / "proxy-0.sock").stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600

    play(scene)


def test_the_socket_of_a_dead_predecessor_is_replaced(tmp_path, play):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "proxy-0.sock"))

    async def scene(bed):
        await bed.connect()

    play(scene)


def test_there_is_a_limit_of_prompts(play):
    async def scene(bed):
        for number in range(MAX_PROMPTS):
            bed.ask(replace(QUESTION, id=f"q{number}"))
        await asyncio.sleep(0)
        with pytest.raises(MfaUnansweredError, match="100 others wait"):
            await bed.ask(replace(QUESTION, id="more"))
        client = await bed.connect(waits=False)
        for _ in range(MAX_PROMPTS):
            assert isinstance(await client.hear(), p.PromptOpened)
        assert await client.hear() == p.Waiting()

    play(scene)


def test_without_a_socket_questions_are_refused_at_once(tmp_path, caplog):
    async def run():
        server = PromptServer(tmp_path / "none", "proxy-0")
        await server.start()
        with pytest.raises(MfaUnansweredError, match="log"):
            await server.ask(QUESTION, no_renewal)
        await server.close()

    asyncio.run(run())
    assert "proxy-0.sock" in caplog.text


def test_control_characters_of_a_cluster_do_not_reach_a_terminal(play):
    async def scene(bed):
        client = await bed.connect()
        bed.ask(replace(QUESTION, target="app \x1b[2J" + "x" * 1000, problem="\n\r"))
        opened = await client.hear()
        assert opened.target.isprintable()
        assert len(opened.target) <= 500

    play(scene)


def test_end_leaves_the_socket_of_a_successor(play):
    async def scene(bed):
        successor = PromptServer(bed.directory, "proxy-0")
        await successor.start()
        await bed.server.close()
        client = await bed.connect()
        await successor.close()
        assert await client.is_sent_away()
        assert not (bed.directory / "proxy-0.sock").exists()

    play(scene)


def test_who_steps_aside_still_asks_beside_its_successor(play):
    async def scene(bed):
        early = await bed.connect()
        asked = bed.ask()
        assert isinstance(await early.hear(), p.PromptOpened)
        bed.server.step_aside()
        successor = PromptServer(bed.directory, "proxy-0")
        await successor.start()
        await bed.connect()  # at the successor, with nothing to answer
        client = await bed.connect(waits=False, name="proxy-0-old.sock")
        opened = await client.hear()
        assert (opened.id, await client.hear()) == ("q1", p.Waiting())
        client.say(p.Answer(id="q1", code="123456"))
        assert (await asked).TOTP.Code == "123456"
        assert isinstance(await early.hear(), p.PromptAnswered)
        again = bed.ask(replace(QUESTION, id="q2"))
        await until(lambda: "q2" in bed.server._prompts)
        await bed.server.close()
        await asyncio.wait([again])
        assert again.cancelled()
        assert [path.name for path in bed.directory.iterdir()] == ["proxy-0.sock"]
        await successor.close()

    play(scene)


def test_who_was_replaced_already_cannot_step_aside_in_the_place_of_the_other(play):
    async def scene(bed):
        successor = PromptServer(bed.directory, "proxy-0")
        await successor.start()
        bed.server.step_aside()
        assert [path.name for path in bed.directory.iterdir()] == ["proxy-0.sock"]
        await successor.close()

    play(scene)

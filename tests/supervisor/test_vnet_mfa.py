"""`vnet mfa` as its users have it: a process, in a terminal, with real prompts."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from fido2.server import Fido2Server
from fido2.webauthn import (
    AuthenticationResponse,
    AuthenticatorAssertionResponse,
    AuthenticatorData,
    CollectedClientData,
    PublicKeyCredentialRpEntity,
    PublicKeyCredentialType,
)
from mfa_terminal import DEADLINE_SECONDS, ROOT, VNET, WITH_KEY, Terminal, key_environment
from software_key import SoftwareKey

from ipc import prompts as p
from ipc import slots
from supervisor.cli import mfa
from supervisor.cli.control_client import AskError
from supervisor.exits import ExitStatus
from workers.proxy.prompts import PromptServer
from workers.proxy.teleport.errors import MfaUnansweredError
from workers.proxy.teleport.mfa import MfaQuestion

QUESTION = MfaQuestion(
    id="q1",
    profile="teleport.demo.test",
    cluster="demo.test",
    target="app pg",
    user="alice",
    takes_code=True,
    webauthn=None,
    seconds=100.0,
)
CHALLENGE = p.WebauthnChallenge(
    origin="https://teleport.demo.test:3080",
    rp_id="teleport.demo.test",
    challenge=b"not renewed, not renewed, not ren",
    credential_ids=[b"credential of the software key"],
)


class Bed:
    """Proxies that ask, and terminals that answer."""

    def __init__(self, run_dir):
        self.run_dir = run_dir
        self.directory = run_dir / p.PROMPTS_DIRECTORY
        self.directory.mkdir()
        self.terminals = []
        self.servers = []
        self.asked = []

    async def proxy(self, slot="proxy-0"):
        server = PromptServer(self.directory, slot)
        await server.start()
        self.servers.append(server)
        return server

    def ask(self, server, question=QUESTION, renew=None):
        task = asyncio.ensure_future(server.ask(question, renew))
        self.asked.append(task)
        return task

    async def terminal(self, *arguments, **changes):
        terminal = await Terminal.start(self.run_dir, *arguments, **changes)
        self.terminals.append(terminal)
        return terminal

    async def piped(self, given, *arguments):
        """Runs to its end with lines instead of a terminal; returns status and output."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", VNET, "mfa", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"VNET_RUN_DIR": str(self.run_dir)},
        )
        async with asyncio.timeout(DEADLINE_SECONDS):
            output, _ = await process.communicate(given)
        return process.returncode, output.decode()

    async def close(self):
        for terminal in self.terminals:
            terminal.close()
            await terminal.process.wait()
        for server in self.servers:
            await server.close()
        await asyncio.gather(*self.asked, return_exceptions=True)


def play(run_dir, scene):
    async def main():
        bed = Bed(run_dir)
        try:
            await scene(bed)
        finally:
            await bed.close()

    asyncio.run(main())


async def accepted(bed, server, asked, question=QUESTION):
    """What a proxy does when the cluster takes the answer."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        answer = await asked
    server.settled(question.id, f"{question.target} can be used now")
    return answer


def test_a_code_is_typed_and_the_outcome_told(tmp_path):
    async def scene(bed):
        server = await bed.proxy()
        asked = bed.ask(server)
        terminal = await bed.terminal()
        await terminal.expect("app pg in demo.test waits for a second factor of alice")
        assert re.search(r"\b(9\d|100) s are left", terminal.text)
        await terminal.expect("code (")
        terminal.type("123 456\n")
        assert (await accepted(bed, server, asked)).TOTP.Code == "123456"
        await terminal.expect("app pg can be used now")
        assert await terminal.end() == 0

    play(tmp_path, scene)


def test_a_wrong_code_is_asked_for_again(tmp_path):
    async def scene(bed):
        server = await bed.proxy()
        asked = bed.ask(server)
        terminal = await bed.terminal()
        await terminal.expect("code (")
        terminal.type("111111\n")
        await asked
        asked = bed.ask(server, replace(QUESTION, problem="invalid totp token"))
        await terminal.expect("invalid totp token")
        await terminal.expect("code (")
        terminal.type("222222\n")
        assert (await accepted(bed, server, asked)).TOTP.Code == "222222"
        assert await terminal.end() == 0

    play(tmp_path, scene)


def test_nothing_waits(tmp_path):
    async def scene(bed):
        await bed.proxy("proxy-0")
        await bed.proxy("proxy-1")
        assert await bed.piped(b"") == (0, "no prompt is waiting\n")

    play(tmp_path, scene)


def test_lines_answer_the_prompts_of_all_proxies(tmp_path):
    async def scene(bed):
        servers = [await bed.proxy("proxy-0"), await bed.proxy("proxy-1")]
        asked = [
            bed.ask(server, replace(QUESTION, id=f"q{index}"))
            for index, server in enumerate(servers)
        ]
        await asyncio.sleep(0)

        async def accept(index):
            question = replace(QUESTION, id=f"q{index}")
            answer = await accepted(bed, servers[index], asked[index], question)
            return answer.TOTP.Code

        codes, (status, output) = await asyncio.gather(
            asyncio.gather(accept(0), accept(1)), bed.piped(b"111111\n222222")
        )
        assert sorted(codes) == ["111111", "222222"]
        assert status == 0
        assert output.count("can be used now") == 2

    play(tmp_path, scene)


def test_a_script_that_runs_out_of_codes_is_told(tmp_path):
    async def scene(bed):
        server = await bed.proxy()
        bed.ask(server)
        bed.ask(server, replace(QUESTION, id="q2"))
        await asyncio.sleep(0)
        status, output = await bed.piped(b"")
        assert status == 1
        assert "2 still waiting" in output

    play(tmp_path, scene)


def test_a_user_declines_one_and_leaves_the_other_for_later(tmp_path):
    async def scene(bed):
        server = await bed.proxy()
        declined, kept = bed.ask(server), bed.ask(server, replace(QUESTION, id="q2"))
        terminal = await bed.terminal()
        await terminal.expect("code (")
        terminal.type("n\n")
        with pytest.raises(MfaUnansweredError, match="declined"):
            await declined
        await terminal.expect("code (")
        terminal.type("\n")
        assert await terminal.end() == 0
        assert not kept.done()

    play(tmp_path, scene)


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_ctrl_c_and_ctrl_d_leave_without_an_answer(tmp_path, key):
    async def scene(bed):
        server = await bed.proxy()
        asked = bed.ask(server)
        terminal = await bed.terminal()
        await terminal.expect("code (")
        terminal.type(key)
        assert await terminal.end() == 0
        assert "Traceback" not in terminal.text
        assert not asked.done()

    play(tmp_path, scene)


def test_a_prompt_that_somebody_else_answers_is_no_work_left(tmp_path):
    async def scene(bed):
        server = await bed.proxy()
        asked = bed.ask(server)
        one, other = await bed.terminal(), await bed.terminal()
        await one.expect("code (")
        await other.expect("code (")
        one.type("1\n")
        await accepted(bed, server, asked)
        await other.expect("answered elsewhere")
        assert await one.end() == await other.end() == 0

    play(tmp_path, scene)


def test_a_prompt_whose_time_is_up_ends_the_wait(tmp_path):
    async def scene(bed):
        server = await bed.proxy()
        terminal = await bed.terminal("--watch")
        await terminal.expect("waiting for prompts")
        with pytest.raises(MfaUnansweredError):
            await bed.ask(server, replace(QUESTION, seconds=1.0))
        await terminal.expect("nobody gave the second factor in time")

    play(tmp_path, scene)


def test_a_watch_goes_on_with_a_proxy_that_steps_aside_and_finds_its_successor(tmp_path):
    async def scene(bed):
        leaving = await bed.proxy("ssh")
        asked = bed.ask(leaving)
        terminal = await bed.terminal("--watch")
        await terminal.expect("code (")
        leaving.step_aside()
        successor = await bed.proxy("ssh")
        other = replace(QUESTION, id="q2", target="app of the successor")
        later = bed.ask(successor, other)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not successor._clients:
                await asyncio.sleep(0.01)
        assert len(leaving._clients) == 1
        terminal.type("123456\n")
        assert (await accepted(bed, leaving, asked)).TOTP.Code == "123456"
        await terminal.expect("app pg can be used now")
        await terminal.expect("app of the successor in demo.test waits")
        await terminal.expect("code (")
        terminal.type("654321\n")
        assert (await accepted(bed, successor, later, other)).TOTP.Code == "654321"
        await terminal.expect("app of the successor can be used now")
        assert terminal.text.count("app pg in demo.test waits") == 1

    play(tmp_path, scene)


def test_every_proxy_that_there_may_be_is_found(tmp_path):
    names = {f"{slot}.sock" for slot in [*slots.of_proxies(64), "ssh-old"]}
    for name in names:
        (tmp_path / name).touch()
    found = mfa._Mfa(tmp_path, watch=False)._sockets()
    assert {Path(path).name for _, path in found} == names


def test_a_watch_outlives_its_proxies(tmp_path):
    async def scene(bed):
        server = await bed.proxy()
        terminal = await bed.terminal("--watch")
        await terminal.expect("waiting for prompts")
        bed.ask(server)
        await terminal.expect("code (")
        await server.close()
        await terminal.expect("app pg in demo.test: given up")
        await terminal.expect("VNet is not running, or starts anew: waiting")
        # As when the whole of VNet is started again.
        bed.directory.rmdir()
        bed.directory.mkdir()
        server = await bed.proxy("proxy-1")
        await terminal.expect("VNet is there again")
        question = replace(QUESTION, id="q2", target="database orders")
        asked = bed.ask(server, question)
        await terminal.expect("database orders in demo.test waits")
        await terminal.expect("code (")
        terminal.type("123456\n")
        assert (await accepted(bed, server, asked, question)).TOTP.Code == "123456"
        await terminal.expect("database orders can be used now")
        terminal.type("\x03")
        assert await terminal.end() == 0

    play(tmp_path, scene)


def test_a_watch_that_is_terminated_ends_in_order(tmp_path):
    async def scene(bed):
        await bed.proxy()
        terminal = await bed.terminal("--watch")
        await terminal.expect("waiting for prompts")
        terminal.process.send_signal(signal.SIGTERM)
        assert await terminal.end() == 128 + signal.SIGTERM
        assert "Traceback" not in terminal.text

    play(tmp_path, scene)


def verify(key, response, challenge):
    """As a server does, that knows this key."""
    server = Fido2Server(
        PublicKeyCredentialRpEntity(name="VNet", id="teleport.demo.test"),
        verify_origin=lambda origin: origin == CHALLENGE.origin,
    )
    _, state = server.authenticate_begin([key.credential], challenge=challenge)
    parts = response.response
    answer = AuthenticationResponse(
        raw_id=response.raw_id,
        response=AuthenticatorAssertionResponse(
            client_data=CollectedClientData(parts.client_data_json),
            authenticator_data=AuthenticatorData(parts.authenticator_data),
            signature=parts.signature,
        ),
        type=PublicKeyCredentialType.PUBLIC_KEY,
    )
    server.authenticate_complete(state, [key.credential], answer)


@pytest.mark.parametrize("takes_code", [True, False])
def test_a_security_key_answers_with_the_newest_challenge(tmp_path, takes_code):
    async def scene(bed):
        key, newest = SoftwareKey(), b"the challenge that counts, renewed"
        question = replace(QUESTION, webauthn=CHALLENGE, takes_code=takes_code)

        async def renew():
            options = {f: getattr(CHALLENGE, f) for f in CHALLENGE.__struct_fields__}
            return replace(
                question, webauthn=p.WebauthnChallenge(**(options | {"challenge": newest}))
            )

        server = await bed.proxy()
        asked = bed.ask(server, question, renew)
        terminal = await bed.terminal(program=WITH_KEY + VNET, **key_environment(key))
        await terminal.expect("touch your security key")
        answer = await accepted(bed, server, asked)
        verify(key, answer.Webauthn, newest)
        await terminal.expect("app pg can be used now")
        assert await terminal.end() == 0

    play(tmp_path, scene)


def test_a_code_may_be_typed_in_place_of_a_touch(tmp_path):
    async def scene(bed):
        question = replace(QUESTION, webauthn=CHALLENGE)

        async def renew():
            return question

        server = await bed.proxy()
        asked = bed.ask(server, question, renew)
        environment = key_environment(SoftwareKey()) | {"TEST_UNTOUCHED": "1"}
        terminal = await bed.terminal(program=WITH_KEY + VNET, **environment)
        await terminal.expect("touch your security key")
        terminal.type("123456\n")
        assert (await accepted(bed, server, asked)).TOTP.Code == "123456"
        assert await terminal.end() == 0

    play(tmp_path, scene)


def test_a_pin_is_not_seen_and_not_taken_for_a_code(tmp_path):
    async def scene(bed):
        options = {f: getattr(CHALLENGE, f) for f in CHALLENGE.__struct_fields__}
        strict = p.WebauthnChallenge(**(options | {"user_verification": "required"}))
        question = replace(QUESTION, webauthn=strict)

        async def renew():
            return question

        key = SoftwareKey()
        server = await bed.proxy()
        asked = bed.ask(server, question, renew)
        environment = key_environment(key) | {"TEST_PIN": "73519"}
        terminal = await bed.terminal(program=WITH_KEY + VNET, **environment)
        await terminal.expect("PIN of the security key: ")
        terminal.type("73519\n")
        answer = await accepted(bed, server, asked)
        verify(key, answer.Webauthn, strict.challenge)
        assert await terminal.end() == 0
        assert "73519" not in terminal.text

    play(tmp_path, scene)


def test_vnet_is_not_running(tmp_path):
    async def scene(bed):
        for directory in (bed.run_dir, bed.run_dir / "none"):
            bed.run_dir = directory
            for arguments in ([], ["--watch"]):
                status, output = await bed.piped(b"", *arguments)
                assert status == ExitStatus.NOT_RUNNING
                assert output.startswith("vnet: VNet is not running")
                assert output.count("\n") == 1

    play(tmp_path, scene)


def test_one_client_too_many_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.proxy.prompts.MAX_CLIENTS", 0)

    async def scene(bed):
        await bed.proxy()
        status, output = await bed.piped(b"")
        assert status == ExitStatus.INTERNAL
        assert "end the other vnet mfa" in output

    play(tmp_path, scene)


@pytest.mark.root
@pytest.mark.parametrize("closed", ["directory", "socket"])
def test_other_users_may_not_answer(closed):
    with tempfile.TemporaryDirectory(prefix="vnet-mfa-") as name:
        run_dir = Path(name)
        run_dir.chmod(0o755)

        async def scene(bed):
            await bed.proxy()
            bed.directory.chmod(0o700 if closed == "directory" else 0o755)
            assert await asyncio.to_thread(asked_by_nobody, run_dir) == ExitStatus.NOT_PERMITTED

        play(run_dir, scene)


def asked_by_nobody(run_dir: Path) -> int:
    """What `vnet mfa` would end with if nobody ran it."""
    program = f"""
import os
from pathlib import Path
from supervisor.cli import mfa
from supervisor.cli.control_client import AskError
os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
try:
    mfa.run(Path({str(run_dir)!r}), watch=False)
except AskError as error:
    os._exit(error.status)
"""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode


def test_a_run_without_proxies_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(mfa, "ask_status", lambda *_: None)
    monkeypatch.setattr(mfa, "START_SECONDS", 0.0)
    with pytest.raises(AskError, match="no proxy is running") as caught:
        mfa.run(tmp_path, watch=False)
    assert caught.value.status == ExitStatus.DEGRADED

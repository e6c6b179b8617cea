"""The worker of SSH beside the other proxies: what it keeps in the tsh home, and what it alone loads."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from handover_bed import Bed, StubNaming, StubTeleport, until

from ipc import messages as m
from ipc import prompts as p
from ipc import slots
from workers.proxy import worker as module
from workers.proxy.teleport.mfa import MfaQuestion

CONFIG, KNOWN_HOSTS = "vnet_ssh_config", "vnet_known_hosts"


def patterns(home: Path) -> set[str]:
    """The hosts that the configuration is for."""
    lines = (home / CONFIG).read_text().splitlines()
    return {word for line in lines if line.startswith("Host ") for word in line.split()[1:]}


def cluster(name: str, state: m.ClusterState = m.ClusterState.OK, **changes: object) -> m.Cluster:
    values: dict = {"profile": "p", "leaf_of": None, "user": "", "expires": None}
    return m.Cluster(name=name, state=state, zones=[], ranges=[], **(values | changes))


@pytest.fixture
def play(monkeypatch, tmp_path) -> Iterator[object]:
    monkeypatch.setattr(module, "Teleport", StubTeleport)
    monkeypatch.setattr(module, "Naming", StubNaming)
    monkeypatch.setattr(StubTeleport, "made", [], raising=False)
    monkeypatch.setattr(StubTeleport, "asked", [cluster("demo.test")], raising=False)
    (tmp_path / "tsh").mkdir(mode=0o700)

    def run(scene, slot: str = "ssh") -> None:
        async def main() -> None:
            async with Bed(tmp_path, slot) as bed, asyncio.timeout(60):
                await scene(bed, tmp_path / "tsh")

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


def test_files_for_ssh_clients_are_there_when_it_is_ready_and_gone_at_the_end(play, tmp_path):
    async def scene(_bed: Bed, home) -> None:
        assert "*.demo.test" in patterns(home)
        StubTeleport.asked = [
            cluster("demo.test"),
            cluster("leaf.test", leaf_of="demo.test"),
            cluster("expired.test", m.ClusterState.LOGIN_EXPIRED),
            cluster("gone.test", m.ClusterState.NO_LOGIN),
        ]
        StubTeleport.made[0].on_change()
        await until(lambda: {"*.demo.test", "*.expired.test", "*.leaf.test"} <= patterns(home))
        assert not any("gone.test" in pattern for pattern in patterns(home))

    play(scene)
    left = {path.name for path in (tmp_path / "tsh").iterdir()}
    assert CONFIG not in left
    assert {"id_vnet", "id_vnet.pub", "vnet_host_key"} <= left


def test_a_successor_takes_the_files_over(play):
    async def scene(bed: Bed, home) -> None:
        before = (home / KNOWN_HOSTS).read_bytes()
        old = await bed.replace()
        async with asyncio.timeout(20):
            await old.task
        # Its host authority is another; the end of the old one takes nothing away.
        await until(lambda: (home / KNOWN_HOSTS).read_bytes() != before)
        assert (home / CONFIG).exists()

    play(scene)


async def no_renewal() -> MfaQuestion:
    raise AssertionError("nobody asked for a new challenge")


def test_a_login_that_waits_for_a_second_factor_outlives_the_handover(play, monkeypatch):
    async def scene(bed: Bed, home) -> None:
        monkeypatch.setattr(slots, "SSH_PORT", bed.port)  # that of the bed's listener
        program = await bed.connect()
        await program.exchange(b"hello")
        question = MfaQuestion(
            id="q1",
            profile="p",
            cluster="demo.test",
            target="SSH host node as root",
            user="alice",
            takes_code=True,
            webauthn=None,
            seconds=60.0,
        )
        asked = asyncio.ensure_future(StubTeleport.made[0].prompter.ask(question, no_renewal))
        old = await bed.replace()
        sockets = home.parent / "mfa"
        await until((sockets / "ssh.sock").exists)
        reader, writer = await asyncio.open_unix_connection(sockets / "ssh-old.sock")
        assert p.decode_from_proxy(await reader.readline()).id == "q1"
        writer.write(p.encode(p.Answer(id="q1", code="123456")))
        assert (await asked).TOTP.Code == "123456"
        writer.close()
        assert not old.task.done()
        program.close()
        await old.task
        assert {path.name for path in sockets.glob("*.sock")} == {"ssh.sock"}

    play(scene)


def test_other_proxies_ask_nothing_after_the_handover(play):
    async def scene(bed: Bed, home) -> None:
        program = await bed.connect()
        await bed.replace()
        assert not list((home.parent / "mfa").glob("*-old.sock"))
        await program.exchange(b"still here")

    play(scene, "proxy-0")


def test_a_home_that_cannot_be_written_is_reported_and_nothing_worse(play, tmp_path):
    (tmp_path / "tsh").rmdir()
    (tmp_path / "tsh").write_text("no directory")

    async def scene(bed: Bed, _home) -> None:
        def reports() -> list[str]:
            heard = bed.present.heard
            return [one.problem for one in heard if isinstance(one, m.ClustersReported)]

        await until(lambda: any("SSH clients are not set up" in text for text in reports()))
        StubTeleport.made[0].problem = "no profile"
        StubTeleport.made[0].on_change()
        await until(lambda: reports()[-1] == "no profile")

    play(scene)


def test_other_proxies_keep_no_files(play):
    async def scene(_bed: Bed, home) -> None:
        assert list(home.iterdir()) == []

    play(scene, "proxy-0")


def test_other_proxies_do_not_load_what_ssh_takes():
    code = (
        "import sys, workers.proxy.worker\n"
        "loaded = [n for n in sys.modules if n == 'paramiko' or n.startswith('workers.proxy.ssh.')]\n"
        "print(loaded)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"

"""The worker for SSH keeps its files in the tsh home, with the rights that are left to it."""

import asyncio
import os
import pwd
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from confined_body import run_confined

from supervisor.confinement import identities
from supervisor.confinement.landlock_rules import KEEP_FILES, KEEP_SOCKETS, READ, FileRule, Reach
from supervisor.settings import User
from workers.proxy.prompts import PromptServer
from workers.proxy.ssh.housekeeping import HomeKeeper
from workers.proxy.ssh.identity import LocalIdentity

pytestmark = pytest.mark.root

OWNER = pwd.getpwnam("daemon")
USER = User(OWNER.pw_name, OWNER.pw_uid, OWNER.pw_gid, Path("/nonexistent"))
ALL = ["id_vnet", "id_vnet.pub", "vnet_host_key", "vnet_known_hosts", "vnet_ssh_config"]


@pytest.fixture
def home():
    with tempfile.TemporaryDirectory(prefix="vnet-confined-ssh-") as name:
        path = Path(name)
        os.chown(path, USER.uid, USER.gid)
        yield path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def confined(monkeypatch, home: Path, rights) -> dict[str, str]:
    keeper = HomeKeeper(home, LocalIdentity(home))

    def change_everything() -> str:
        for name in ("id_vnet", "vnet_host_key", "vnet_ssh_config"):
            (home / name).chmod(0o644)
        return keeper.refresh(["demo.test", "leaf.test"])

    def remove() -> list[str]:
        keeper.remove()
        return names(home)

    attempts = {
        "make": lambda: keeper.refresh(["demo.test"]),
        "keep": change_everything,
        "look": lambda: names(home),
        "remove": remove,
    }
    chosen = identities.choose(["tun", "ssh", "dns"], USER)
    reach = Reach(None, (FileRule(home, rights),))
    ended = run_confined(monkeypatch, "ssh", chosen.of["ssh"], reach, attempts)
    assert ended.status == 0, ended.log
    # It may not be able to read its own program then.
    assert "is imported by a confined worker" not in ended.log
    return ended.outcomes


def test_it_makes_changes_and_removes_them(monkeypatch, home):
    found = confined(monkeypatch, home, KEEP_FILES)
    assert (found["make"], found["keep"], found["look"]) == ("", "", str(ALL))
    assert found["remove"] == str(ALL[:-1])
    for path in home.iterdir():
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (USER.uid, USER.gid)
        assert status.st_mode & 0o777 == 0o600


def test_its_socket_for_prompts_can_step_aside(monkeypatch, home):
    async def scene() -> tuple[list[str], list[str]]:
        left, server = PromptServer(home, "ssh"), PromptServer(home, "ssh")
        for one in (left, server):
            await one.start()
            one.step_aside()
        found = names(home)
        await server.close()
        await left.close()
        return found, names(home)

    def in_a_loop_of_its_own() -> object:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, scene()).result()

    chosen = identities.choose(["tun", "ssh", "dns"], USER)
    reach = Reach(None, (FileRule(home, KEEP_SOCKETS),))
    attempts = {"step aside": in_a_loop_of_its_own}
    ended = run_confined(monkeypatch, "ssh", chosen.of["ssh"], reach, attempts)
    assert ended.outcomes["step aside"] == "(['ssh-old.sock'], [])", ended.log


def test_without_the_right_it_says_so(monkeypatch, home):
    found = confined(monkeypatch, home, READ)
    assert "id_vnet cannot be written (Permission denied)" in found["make"]
    assert list(home.iterdir()) == []

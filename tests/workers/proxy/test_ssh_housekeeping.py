"""The files for SSH clients: made, kept, repaired, and a home in any state ends nothing."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from workers.proxy.ssh.housekeeping import HomeKeeper, SshHousekeeping
from workers.proxy.ssh.identity import parse_private_key, parse_public_key, private_pem, public_line

ALL = ["id_vnet", "id_vnet.pub", "vnet_host_key", "vnet_known_hosts", "vnet_ssh_config"]
NEVER = 1000.0


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "tsh"
    path.mkdir(mode=0o700)
    return path


@contextlib.asynccontextmanager
async def kept(home, clusters=None, *, remove=True, **seconds):
    """A housekeeping that has begun; `told` counts what it told."""
    names = ["demo.test"] if clusters is None else clusters
    told = []
    keeping = SshHousekeeping(
        home,
        lambda: names,
        on_change=lambda: told.append(keeping.problem),
        **({"refresh_seconds": NEVER, "retry_seconds": NEVER} | seconds),
    )
    keeping.told = told
    await keeping.start()
    try:
        yield keeping
    finally:
        await keeping.close(remove=remove)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def contents(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.iterdir()}


def stamps(home: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in home.iterdir()}


def blob(line: bytes) -> bytes:
    found = parse_public_key(line)
    assert found is not None
    return found


def test_all_files_are_there_after_the_start_and_fit_together(home):
    async def run():
        before = os.umask(0o277)
        try:
            async with kept(home) as keeping:
                assert keeping.problem == ""
                assert sorted(contents(home)) == ALL
                assert {path.stat().st_mode & 0o7777 for path in home.iterdir()} == {0o600}
                found = contents(home)
                private = parse_private_key(found["id_vnet"])
                assert public_line(private) + b"\n" == found["id_vnet.pub"]
                assert keeping.identity.is_trusted(blob(found["id_vnet.pub"]))
                host_key = parse_private_key(found["vnet_host_key"])
                shown = keeping.identity.host_key_for("a.demo.test")
                assert public_line(host_key) == public_line(shown.plain_key)
                assert found["vnet_known_hosts"].splitlines() == [
                    b"@cert-authority * " + keeping.identity.authority_line,
                    b"* " + public_line(host_key),
                ]
                assert b"Host *.demo.test " in found["vnet_ssh_config"]
        finally:
            os.umask(before)

    asyncio.run(run())


def test_keys_outlive_a_run_and_the_authority_does_not(home):
    async def run():
        async with kept(home):
            first = contents(home)
        left = contents(home)
        assert sorted(left) == [name for name in ALL if name != "vnet_ssh_config"]
        async with kept(home):
            second = contents(home)
        for name in ("id_vnet", "id_vnet.pub", "vnet_host_key"):
            assert first[name] == second[name]
        authority = [text["vnet_known_hosts"].splitlines()[0] for text in (first, second)]
        assert authority[0] != authority[1]

    asyncio.run(run())


def test_a_new_pair_is_made_when_the_public_key_is_missing_and_only_then(home):
    async def run():
        async with kept(home) as keeping:
            first = contents(home)
            (home / "id_vnet").unlink()
            keeping.changed()
            (home / "vnet_ssh_config").unlink()
            await until((home / "vnet_ssh_config").exists)
            # Somebody may have the private key in an agent.
            assert not (home / "id_vnet").exists()
            (home / "id_vnet.pub").unlink()
            keeping.changed()
            await until((home / "id_vnet.pub").exists)
            second = contents(home)
            assert second["id_vnet"] != first["id_vnet"]
            assert keeping.identity.is_trusted(blob(second["id_vnet.pub"]))
            assert not keeping.identity.is_trusted(blob(first["id_vnet.pub"]))

    asyncio.run(run())


def test_clusters_that_come_and_go(home):
    clusters: list[str] = []

    def text() -> str:
        return (home / "vnet_ssh_config").read_text()

    async def run():
        async with kept(home, clusters) as keeping:
            assert "Host" not in text().split()
            clusters.append("demo.test")
            keeping.changed()
            await until(lambda: "Host *.demo.test " in text())
            clusters.append("leaf.test")
            keeping.changed()
            await until(lambda: "Host *.demo.test *.leaf.test " in text())

    asyncio.run(run())


def test_what_somebody_deletes_or_changes_is_put_right_at_the_next_look(home):
    async def run():
        async with kept(home, refresh_seconds=0.02) as keeping:
            before = contents(home)
            host_key = keeping.identity.plain_line
            for name in ("vnet_known_hosts", "vnet_ssh_config", "vnet_host_key"):
                (home / name).unlink()
                await until((home / name).exists)
                (home / name).chmod(0o644)
                await until(lambda name=name: (home / name).stat().st_mode & 0o777 == 0o600)
            (home / "vnet_ssh_config").write_text("Host *\n")
            (home / "id_vnet").chmod(0o640)
            config = before["vnet_ssh_config"]
            await until(lambda: (home / "vnet_ssh_config").read_bytes() == config)
            assert contents(home)["vnet_known_hosts"] == before["vnet_known_hosts"]
            # Its file has random bytes beside the key.
            assert public_line(parse_private_key(contents(home)["vnet_host_key"])) == host_key
            await until(lambda: (home / "id_vnet").stat().st_mode & 0o777 == 0o600)

    asyncio.run(run())


def test_what_is_right_is_not_written_again(home):
    async def run():
        looks = []
        async with kept(home) as keeping:
            first = stamps(home)
            keeping._clusters = lambda: looks.append(1) or ["demo.test"]
            for count in (1, 2, 3):
                keeping.changed()
                await until(lambda count=count: len(looks) == count)
            assert stamps(home) == first

    asyncio.run(run())


def test_a_predecessor_leaves_the_files_to_its_successor(home):
    async def run():
        async with kept(home, refresh_seconds=0.01, remove=False) as leaver:
            await leaver.close(remove=False)
            leaver.changed()
            async with kept(home) as successor:
                mine = contents(home)
                assert successor.identity.authority_line in mine["vnet_known_hosts"]
                await leaver.close(remove=True)
                await asyncio.sleep(0.05)
                assert contents(home) == mine
                # Connections that it still has are recognised by it.
                assert leaver.identity.is_trusted(blob(mine["id_vnet.pub"]))

    asyncio.run(run())


def test_clients_of_a_predecessor_may_still_look_it_up_for_a_while(home):
    def authorities():
        return [
            line.split(b" ", 2)[2]
            for line in (home / "vnet_known_hosts").read_bytes().splitlines()
            if line.startswith(b"@")
        ]

    async def run():
        async with kept(home, remove=False) as before:
            old = before.identity.authority_line
        async with kept(home, is_successor=True, predecessor_seconds=NEVER) as keeping:
            assert authorities() == [keeping.identity.authority_line, old]
            middle = keeping.identity.authority_line
        async with kept(
            home, is_successor=True, predecessor_seconds=0.001, refresh_seconds=0.01
        ) as keeping:
            await until(lambda: authorities() == [keeping.identity.authority_line])
        async with kept(home) as keeping:
            assert authorities() == [keeping.identity.authority_line]
            assert middle not in authorities()

    asyncio.run(run())


def test_a_predecessors_file_that_cannot_be_used_is_replaced(home):
    async def run():
        (home / "vnet_known_hosts").write_bytes(b"@cert-authority * x\n" * 1000)
        async with kept(home, is_successor=True) as keeping:
            assert keeping.problem == ""
            assert (home / "vnet_known_hosts").read_bytes().count(b"\n") == 2

    asyncio.run(run())


def test_the_end_removes_no_file_of_somebody_else(home):
    async def run():
        async with kept(home):
            (home / "vnet_ssh_config").write_text("Host mine\n")
        assert (home / "vnet_ssh_config").read_text() == "Host mine\n"
        async with kept(home):
            (home / "vnet_ssh_config").unlink()

    asyncio.run(run())


# -- homes in any state --


def link_to_victim(path: Path) -> None:
    victim = path.parent.parent / "victim"
    victim.write_text("untouched")
    path.unlink()
    path.symlink_to(victim)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def of_another_user(path: Path) -> None:
    path.unlink()
    path.write_text("")
    os.chown(path, 12345, -1)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


WRONG = [
    (link_to_victim, "is a symbolic link: remove it"),
    (folder_instead, "is no regular file: remove it"),
    (fifo_instead, "is no regular file: remove it"),
    pytest.param(of_another_user, "belongs to another user: remove it", marks=pytest.mark.root),
]


@pytest.mark.parametrize(("spoil", "said"), WRONG)
@pytest.mark.parametrize("name", ALL)
def test_something_else_in_the_place_of_a_file(home, name, spoil, said):
    async def run():
        async with kept(home):
            pass
        (home / "vnet_ssh_config").touch()
        (home / "vnet_known_hosts").write_text("old")
        spoil(home / name)
        async with kept(home) as keeping:
            assert keeping.problem == (f"SSH clients are not set up: {home / name} {said}.")
            # The others are there all the same.
            if name != "vnet_known_hosts":
                found = (home / "vnet_known_hosts").read_bytes()
                assert keeping.identity.authority_line in found
            if name != "vnet_ssh_config":
                assert b"Host *.demo.test" in (home / "vnet_ssh_config").read_bytes()
            remove(home / name)
            keeping.changed()
            # Of the pair only the public key is made anew by itself.
            await until(lambda: not keeping.problem)
            assert keeping.told == [f"SSH clients are not set up: {home / name} {said}.", ""]
        if spoil is link_to_victim:
            assert (home.parent / "victim").read_text() == "untouched"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("id_vnet.pub", b"", "holds no public key: remove it"),
        ("id_vnet.pub", b"#" * 10_001, "has more than 10000 bytes: remove it"),
        ("vnet_host_key", b"nonsense", "is no Ed25519 key without password: remove it"),
        ("vnet_host_key", b"#" * 10_001, "has more than 10000 bytes: remove it"),
    ],
)
def test_a_key_that_is_none_is_not_replaced(home, name, data, said):
    async def run():
        (home / name).write_bytes(data)
        async with kept(home) as keeping:
            assert said in keeping.problem
            assert (home / name).read_bytes() == data
            # With the key of this run instead.
            assert keeping.identity.plain_line in (home / "vnet_known_hosts").read_bytes()
            (home / name).unlink()
            keeping.changed()
            await until(lambda: not keeping.problem)
            assert keeping.identity.plain_line in (home / "vnet_known_hosts").read_bytes()

    asyncio.run(run())


def test_a_host_key_that_was_kept_is_used(home):
    key = Ed25519PrivateKey.generate()
    (home / "vnet_host_key").write_bytes(private_pem(key))
    (home / "vnet_host_key").chmod(0o644)

    async def run():
        async with kept(home) as keeping:
            assert keeping.identity.plain_line == public_line(key)
            assert (home / "vnet_host_key").stat().st_mode & 0o777 == 0o600

    asyncio.run(run())


def test_a_home_that_comes_later_and_goes_again(tmp_path):
    home = tmp_path / "later" / "tsh"

    async def run():
        async with kept(home, retry_seconds=0.02, refresh_seconds=0.02) as keeping:
            assert keeping.problem == (
                f"SSH clients are not set up: there is no {home}: run tsh login."
            )
            assert not home.parent.exists()
            home.mkdir(parents=True)
            await until(lambda: not keeping.problem)
            assert sorted(contents(home)) == ALL
            home.rename(tmp_path / "gone")
            await until(lambda: keeping.problem)
            home.write_text("no directory")
            await until(lambda: "cannot be used (Not a directory)" in keeping.problem)

    asyncio.run(run())


def test_leftovers_of_a_writer_that_died_are_no_obstacle(home):
    async def run():
        (home / ".vnet_known_hosts.vnet-new").symlink_to("/nowhere")
        (home / ".vnet_ssh_config.vnet-new").write_text("half")
        async with kept(home) as keeping:
            assert keeping.problem == ""
            assert sorted(contents(home)) == ALL

    asyncio.run(run())


def test_a_home_that_does_not_answer_holds_nothing_up(home, monkeypatch):
    answers, asked = threading.Event(), threading.Event()

    def hang(*_: object) -> str:
        asked.set()
        assert answers.wait(30)
        return ""

    async def run():
        monkeypatch.setattr(HomeKeeper, "refresh", hang)
        async with kept(home, patience_seconds=0.05) as keeping:
            assert asked.wait(20)
            await keeping.close(remove=True)
            answers.set()

    asyncio.run(run())


def test_a_fault_of_ours_ends_nothing(home):
    async def run():
        calls = []

        def clusters() -> list[str]:
            calls.append(1)
            if len(calls) == 1:
                raise KeyError("a fault")
            return ["demo.test"]

        keeping = SshHousekeeping(home, clusters, retry_seconds=0.01)
        await keeping.start()
        assert "see vnet logs" in keeping.problem
        await until(lambda: not keeping.problem)
        await keeping.close(remove=True)

    asyncio.run(run())


def test_a_problem_is_one_short_line(tmp_path):
    async def run():
        async with kept(tmp_path / "a\nb" / ("c" * 200) / ("d" * 200)) as keeping:
            assert keeping.problem.startswith("SSH clients are not set up: there is no ")
            assert len(keeping.problem) <= 400
            assert "\n" not in keeping.problem

    asyncio.run(run())


@pytest.mark.parametrize("name", ["${HOME}", "a\nb"])
def test_a_path_that_openssh_cannot_be_told_of(tmp_path, name):
    home = tmp_path / name
    home.mkdir()

    async def run():
        async with kept(home) as keeping:
            assert "TELEPORT_HOME" in keeping.problem
            assert "\n" not in keeping.problem
            assert (home / "vnet_known_hosts").exists()

    asyncio.run(run())


# Run in a mount namespace of its own, with the home on a small file system.
IN_A_SMALL_HOME = """
import os, subprocess, sys
from pathlib import Path
from workers.proxy.ssh.housekeeping import HomeKeeper
from workers.proxy.ssh.identity import LocalIdentity
home = Path(sys.argv[1])
def mount(*arguments):
    subprocess.run(["mount", *arguments, str(home)], check=True)
mount("-t", "tmpfs", "-o", "size=8k,mode=700", "tmpfs")
keeper = HomeKeeper(home, LocalIdentity(home))
(home / "filler").write_bytes(bytes(8192))
print(keeper.refresh(["demo.test"]))
print(*sorted(os.listdir(home)))
(home / "filler").unlink()
mount("-o", "remount,size=1m")
print(keeper.refresh(["demo.test"]))
print(*sorted(os.listdir(home)))
mount("-o", "remount,ro")
print(keeper.refresh(["demo.test", "leaf.test"]))
keeper.remove()
mount("-o", "remount,rw")
print(keeper.refresh(["demo.test", "leaf.test"]))
"""


@pytest.mark.root
def test_a_full_disk_and_one_that_cannot_be_written(home):
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", IN_A_SMALL_HOME, str(home)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    full, left, well, files, read_only, again = done.stdout.split("\n")[:6]
    assert "No space left on device" in full
    assert "make room" in full
    assert left == "filler"
    assert (well, files) == ("", " ".join(ALL))
    assert "vnet_ssh_config cannot be written (Read-only file system)" in read_only
    assert again == ""
    assert "cannot be removed (Read-only file system)" in done.stderr

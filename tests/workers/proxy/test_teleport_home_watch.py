"""Changes of a tsh home are noticed at once, whatever comes and goes."""

import asyncio
import errno
import os
import shutil
import time

import pytest
import uvloop
from teleport_fakes import PROXY, write_home

from workers.proxy.teleport import home_watch
from workers.proxy.teleport.home import fingerprint
from workers.proxy.teleport.home_watch import HomeWatch, is_network_device, nearest_folder

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
NEVER = 1000.0


class Looker:
    """Looks at the home whenever the watch says so."""

    def __init__(self, directory, **seconds):
        self.directory = directory
        self.watch = HomeWatch(directory, **({"poll_seconds": NEVER, **seconds}))
        self.looks = 0
        self.seen = None
        self.looked = asyncio.Condition()

    async def __aenter__(self):
        await self.watch.start()
        await self._look()
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_exc):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.watch.close()

    async def _run(self):
        while True:
            await self.watch.wait()
            await self._look()

    async def _look(self):
        async with self.looked:
            self.seen = fingerprint(self.directory)
            self.looks += 1
            self.looked.notify_all()

    async def until_seen(self):
        """Until the last look has seen what is there now."""
        async with asyncio.timeout(10), self.looked:
            await self.looked.wait_for(lambda: self.seen == fingerprint(self.directory))


@LOOPS
def test_every_change_of_a_login_is_seen(tmp_path, run):
    async def main():
        keys = write_home(tmp_path)
        async with Looker(tmp_path, watched_poll_seconds=NEVER) as looker:
            assert looker.watch.is_watching
            for path in (
                tmp_path / f"{PROXY}.yaml",
                keys / "alice.crt",
                keys / "cas/demo.test.pem",
            ):
                before = looker.seen
                path.write_bytes(path.read_bytes() + b"\n")
                await looker.until_seen()
                assert looker.seen != before
            (keys / "alice.key").unlink()
            await looker.until_seen()
            (keys / "alice.crt").replace(keys / "bob.crt")
            await looker.until_seen()
            shutil.rmtree(tmp_path / "keys")
            await looker.until_seen()

    run(main())


@LOOPS
def test_folders_that_come_are_followed(tmp_path, run):
    async def main():
        async with Looker(tmp_path, watched_poll_seconds=NEVER) as looker:
            for proxy in ("a.test", "b.test"):
                keys = write_home(tmp_path, proxy=proxy)
                await looker.until_seen()
                (keys / "cas" / "leaf.test.pem").write_bytes(b"x")
                await looker.until_seen()
                (keys / "cas" / "leaf.test.pem").unlink()
                await looker.until_seen()

    run(main())


@LOOPS
def test_a_home_that_does_not_exist_yet_is_seen_when_it_comes(tmp_path, run):
    async def main():
        home = tmp_path / "some" / "where" / ".tsh"
        async with Looker(home, watched_poll_seconds=NEVER) as looker:
            assert looker.watch.is_watching
            for folder in (tmp_path / "some", tmp_path / "some" / "where", home):
                folder.mkdir()
                await asyncio.sleep(0.1)
            write_home(home)
            await looker.until_seen()
            assert looker.seen

            shutil.rmtree(tmp_path / "some")
            await looker.until_seen()
            write_home(home)
            await looker.until_seen()
            assert looker.seen

    run(main())


def test_others_in_the_folder_above_do_not_disturb(tmp_path):
    async def main():
        async with Looker(tmp_path / ".tsh", watched_poll_seconds=NEVER) as looker:
            looks = looker.looks
            for i in range(20):
                (tmp_path / f"{i}.txt").write_bytes(b"x")
            await asyncio.sleep(0.2)
            assert looker.looks == looks

    asyncio.run(main())


def test_many_writes_are_one_change(tmp_path):
    async def main():
        keys = write_home(tmp_path)
        async with Looker(tmp_path, watched_poll_seconds=NEVER) as looker:
            looks = looker.looks
            for i in range(20):
                (keys / "alice.key").write_bytes(b"-" * i)
                await asyncio.sleep(0.002)
            await looker.until_seen()
            assert looker.looks <= looks + 10

    asyncio.run(main())


def test_writes_without_end_are_seen_nevertheless(tmp_path):
    async def main():
        keys = write_home(tmp_path)
        async with Looker(tmp_path, watched_poll_seconds=NEVER) as looker:
            looks, end = looker.looks, time.monotonic() + 10
            while looker.looks == looks and time.monotonic() < end:
                (keys / "alice.key").write_bytes(os.urandom(8))
                await asyncio.sleep(0.01)
            assert looker.looks > looks

    asyncio.run(main())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC])
def test_without_a_watch_the_home_is_looked_at_regularly(tmp_path, monkeypatch, caplog, number):
    def refuse(*_args):
        raise OSError(number, os.strerror(number))

    async def main():
        monkeypatch.setattr(home_watch, "Inotify", refuse)
        async with Looker(tmp_path, poll_seconds=0.01) as looker:
            assert not looker.watch.is_watching
            write_home(tmp_path)
            await looker.until_seen()
            assert looker.seen
            monkeypatch.undo()
            async with asyncio.timeout(10):
                while not looker.watch.is_watching:
                    await asyncio.sleep(0.01)

    with caplog.at_level("INFO"):
        asyncio.run(main())
    assert caplog.text.count("not watched") == 1
    assert "fs.inotify" in caplog.text


def test_a_home_on_a_network_file_system_is_looked_at_regularly_too(tmp_path, monkeypatch):
    async def main():
        monkeypatch.setattr(home_watch, "is_network_device", lambda *_args: True)
        async with Looker(tmp_path, poll_seconds=0.01, watched_poll_seconds=NEVER) as looker:
            assert not looker.watch.is_watching
            looks = looker.looks
            async with asyncio.timeout(10):
                while looker.looks < looks + 3:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:35 / /home rw,relatime shared:20 master:1 - nfs4 server:/home rw,vers=4.2
41 22 0:36 / /mnt rw - fuse.sshfs host:/ rw
42 22 0:37 / /tmp rw - tmpfs tmpfs rw
broken
"""


@pytest.mark.parametrize(
    ("device", "is_network"),
    [((8, 1), False), ((0, 35), True), ((0, 36), True), ((0, 37), False), ((9, 9), False)],
)
def test_network_file_systems_are_told_by_their_type(device, is_network):
    assert is_network_device(MOUNTS, os.makedev(*device)) is is_network


def test_the_nearest_folder_above_is_found(tmp_path):
    assert nearest_folder(tmp_path) == tmp_path
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path

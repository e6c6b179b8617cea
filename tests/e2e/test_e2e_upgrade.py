"""`vnet restart all --drain`: another version takes over under running connections."""

import contextlib
import hashlib
import importlib.metadata
import os
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from demo_bed import demo_bed, scratch_directory
from private_bed import Bed, children, is_running, read_all, read_exactly, wait_until
from shared_cluster import CLUSTER, CONFIG

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
PACKAGES = ("ipc", "supervisor", "workers", "demo")
ECHO, OWN = (f"{app}.teleport.e2e.test" for app in ("echo", "own"))
DATA = random.Random(5).randbytes(48 << 20)
# Every worker is replaced, one after the other.
RESTART_SECONDS = 120


class Installed:
    """A copy of the program, whose version can be changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for package in PACKAGES:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, directory / package, ignore=ignore)
        found = importlib.metadata.distribution("vnet")
        self.metadata = directory / "vnet-0.0.0.dist-info" / "METADATA"
        self.metadata.parent.mkdir()
        self.metadata.write_text(found.read_text("METADATA"))
        self.use_version("1.0.0")

    def use_version(self, version: str) -> None:
        lines = self.metadata.read_text().splitlines()
        self.metadata.write_text(
            "\n".join(
                f"Version: {version}" if line.startswith("Version:") else line for line in lines
            )
        )


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    with scratch_directory() as directory:
        yield Installed(directory)


@contextlib.contextmanager
def running_from(installed: Installed) -> Iterator[Bed]:
    """A demo that runs from the copy."""
    with (
        mock.patch.dict(os.environ, PYTHONPATH=str(installed.directory)),
        # `python -m` looks there first.
        contextlib.chdir(installed.directory),
        demo_bed(CLUSTER, CONFIG) as bed,
    ):
        yield bed


@pytest.fixture(scope="module")
def upgraded(installed) -> Iterator[Bed]:
    with running_from(installed) as bed:
        yield bed


@pytest.fixture
def copy_bed(upgraded) -> Bed:
    upgraded.wait_for_health("healthy")
    wait_until(lambda: len(upgraded.status()["workers"]) == 5, "nothing drains any more")
    return upgraded


def echo(bed: Bed, text: bytes = b"hello") -> bytes:
    with bed.connect(ECHO, 7) as end:
        end.sendall(text)
        end.shutdown(1)
        return read_all(end)


@contextlib.contextmanager
def connecting_all_the_time(bed: Bed) -> Iterator[list[float]]:
    """New connections, one after the other, while the block lasts; how long each took, in seconds."""
    took: list[float] = []
    failures: list[BaseException] = []
    is_over = threading.Event()

    def connect() -> None:
        try:
            while not is_over.is_set():
                began = time.monotonic()
                assert echo(bed) == b"hello"
                took.append(time.monotonic() - began)
        except BaseException as error:  # noqa: BLE001  # raised again in the test
            failures.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield took
    finally:
        is_over.set()
        thread.join(60)
    if failures:
        raise failures[0]


def send_data(connection: socket.socket) -> None:
    # Nobody reads on before the other version has taken over.
    connection.settimeout(RESTART_SECONDS)
    connection.sendall(DATA)


def rows(bed: Bed, name: str) -> list[dict]:
    return [worker for worker in bed.status()["workers"] if worker["name"] == name]


def test_another_version_takes_over_under_a_running_download(copy_bed, installed):
    bed = copy_bed
    before = bed.status()["supervisor"]
    pids = bed.pids()
    assert before["version"] != "2.0.0"
    installed.use_version("2.0.0")
    # What is installed is not what runs.
    assert bed.status()["supervisor"]["version"] == before["version"]
    digest = hashlib.sha256()
    with (
        bed.listening(7001, send_data),
        bed.connect(OWN, 80, timeout=60) as download,
    ):
        owner = bed.owner_of(download.getpeername()[0])
        digest.update(read_exactly(download, 1 << 20))
        with connecting_all_the_time(bed) as took:
            said = bed.output("vnet", "restart", "all", "--drain", timeout=RESTART_SECONDS)
        print(said, f"{len(took)} connections meanwhile, the slowest took {max(took):.2f} s")
        assert "VNet 2.0.0 takes over" in said
        after = bed.status()["supervisor"]
        assert (after["version"], after["pid"]) == ("2.0.0", before["pid"])
        assert after["uptime_seconds"] > before["uptime_seconds"]
        for name, pid in pids.items():
            assert rows(bed, name)[0]["pid"] != pid
        # The old process that has the download finishes it.
        assert [row["state"] for row in rows(bed, owner)] == ["ready", "draining"]
        assert rows(bed, owner)[1]["pid"] == pids[owner]
        digest.update(read_all(download))
    assert digest.digest() == hashlib.sha256(DATA).digest()
    wait_until(lambda: len(bed.status()["workers"]) == len(pids), "the old ones are gone")
    bed.wait_for_health("healthy")
    assert echo(bed) == b"hello"


def test_it_can_be_done_again_under_one_connection(copy_bed, installed):
    bed = copy_bed
    before = bed.status()["supervisor"]
    assert echo(bed) == b"hello"  # its listener stays open
    files = bed.open_files("supervisor")
    with bed.connect(ECHO, 7) as end:
        owner = bed.owner_of(end.getpeername()[0])
        pid = rows(bed, owner)[0]["pid"]
        for version in ("3.0.0", "4.0.0"):
            installed.use_version(version)
            bed.output("vnet", "restart", "all", "--drain", timeout=RESTART_SECONDS)
            assert bed.status()["supervisor"]["version"] == version
            bed.wait_for_health("healthy")
            assert echo(bed) == b"hello"
            # A process that finishes what it has is handed over as well.
            assert pid in [row["pid"] for row in rows(bed, owner)]
            end.sendall(version.encode())
            assert read_exactly(end, 5) == version.encode()
    wait_until(lambda: pid not in [row["pid"] for row in rows(bed, owner)], "the oldest has ended")
    assert bed.status()["supervisor"]["pid"] == before["pid"]
    log = bed.output("vnet", "logs")
    assert "VNet 1.0.0 starts" in log
    assert f"VNet 3.0.0 goes on after {before['version']}" in log
    wait_until(lambda: bed.open_files("supervisor") <= files, "nothing is left open")


def test_a_broken_version_changes_nothing(copy_bed, installed):
    bed = copy_bed
    broken = installed.directory / "supervisor" / "crew.py"
    good = broken.read_text()
    before = bed.status()
    with bed.connect(ECHO, 7) as end:
        broken.write_text(good + "\ndef (\n")
        try:
            done = bed.run("vnet", "restart", "all", "--drain", timeout=RESTART_SECONDS)
        finally:
            broken.write_text(good)
        [line] = done.stderr.decode().splitlines()
        assert done.returncode == 5
        assert "nothing has changed" in line
        assert "SyntaxError" in line
        assert "crew.py" in line
        end.sendall(b"still here")
        assert read_exactly(end, 10) == b"still here"
    after = bed.status()
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]
    assert after["supervisor"]["version"] == before["supervisor"]["version"]


def test_a_broken_worker_is_noticed_too(copy_bed, installed):
    bed = copy_bed
    broken = installed.directory / "workers" / "tun" / "pump.py"
    good = broken.read_text()
    broken.write_text("import no_such_module\n" + good)
    try:
        done = bed.run("vnet", "restart", "all", "--drain", timeout=RESTART_SECONDS)
    finally:
        broken.write_text(good)
    assert done.returncode == 5
    assert b"no_such_module" in done.stderr
    assert bed.health() == "healthy"


def test_a_version_with_another_format_says_so(copy_bed, installed):
    bed = copy_bed
    other = installed.directory / "supervisor" / "handover.py"
    good = other.read_text()
    # Those of handovers with and without metrics.
    changed, count = re.subn(r"(FORMAT|_WITHOUT_METRICS): Final = ", r"\1: Final = 90 + ", good)
    assert count == 2
    other.write_text(changed)
    try:
        done = bed.run("vnet", "restart", "all", "--drain", timeout=RESTART_SECONDS)
    finally:
        other.write_text(good)
    assert done.returncode == 5
    assert b"restart VNet" in done.stderr
    assert echo(bed) == b"hello"


def test_a_version_that_fails_in_the_middle_leaves_nothing_behind(installed):
    """What no check can find: it ends, its workers with it, and nothing hangs."""
    program = installed.directory / "supervisor" / "supervisor.py"
    good = program.read_text()
    line = "    def _adopt(self, handed: Handover) -> None:\n"
    assert line in good
    with running_from(installed) as bed, bed.connect(ECHO, 7) as end:
        bed.wait_for_health("healthy")
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"
        supervisor = bed.outer_pid(bed.status()["supervisor"]["pid"])
        workers = children(supervisor)
        program.write_text(good.replace(line, line + '        raise StartupError("out of luck")\n'))
        try:
            done = bed.run("vnet", "restart", "all", "--drain", timeout=RESTART_SECONDS)
        finally:
            program.write_text(good)
        assert done.returncode == 3
        assert b"not running" in done.stderr
        assert "vnet-supervisor: out of luck" in bed.log()
        end.settimeout(5)
        with pytest.raises(ConnectionResetError):
            end.recv(1)
        wait_until(lambda: not any(map(is_running, [supervisor, *workers])), "they have ended")
        wait_until(lambda: "vnet0" not in bed.output("ip", "link"), "the interface is gone")
        assert not bed.run_dir.exists()

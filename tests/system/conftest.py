"""The booted systems that tests share, and their journal beside each failure."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The beds of the end-to-end tests are the base of the one here.
sys.path.insert(1, str(Path(__file__).parent.parent / "e2e"))

import booted_bed
import debian_tree
import private_bed
from booted_bed import BootedBed, booted
from far_end import give_cluster, install

ROOT = Path(__file__).parent.parent.parent
BUILD_SECONDS = 600


def _cannot(why: str) -> None:
    if os.environ.get("VNET_REQUIRE_E2E") == "1":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def debian() -> Path:
    """The tree that is booted."""
    if why := booted_bed.can_boot():
        _cannot(why)
    try:
        return debian_tree.tree()
    except debian_tree.NoTreeError as error:
        _cannot(str(error))
        raise


@pytest.fixture(scope="session")
def package(tmp_path_factory, debian) -> Path:
    """The Debian package of this checkout."""
    directory = tmp_path_factory.mktemp("package")
    done = subprocess.run(
        [ROOT / "scripts/build-deb", directory],
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
        env=os.environ
        | {
            "DPKG_DEB_COMPRESSOR_TYPE": "none",
            "VNET_DEB_CACHE": str(debian_tree.cache_directory()),
        },
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture
def unpack(tmp_path) -> Callable[[str], Path]:
    """Unpacks a Debian package; returns where."""

    def unpack(package: str) -> Path:
        directory = tmp_path / package
        try:
            debian_tree.unpacked(package, directory)
        except debian_tree.NoTreeError as error:
            _cannot(str(error))
        return directory

    return unpack


@pytest.fixture
def bare(debian) -> Iterator[BootedBed]:
    """A system of its own for one test, without VNet."""
    with booted(debian) as bed:
        yield bed


@pytest.fixture(scope="session")
def session_machine(debian, package) -> Iterator[BootedBed]:
    """A system with the package, a cluster, and a login of alice."""
    with booted(debian) as bed:
        _let_restart_often(bed)
        install(bed, package)
        give_cluster(bed)
        yield bed


def _let_restart_often(bed: BootedBed) -> None:
    """Five times in ten seconds are systemd's limit; tests, in any order, restart this service more often."""
    drop_in = bed.path("/etc/systemd/system/systemd-resolved.service.d/test.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Unit]\nStartLimitIntervalSec=0\n")
    bed.systemctl("daemon-reload")


@pytest.fixture
def machine(session_machine) -> BootedBed:
    """The shared system, without a running VNet."""
    session_machine.run("systemctl", "stop", "vnet@*.service")
    session_machine.run("systemctl", "reset-failed", "vnet@*.service")
    return session_machine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Shows the end of each live system's journal with a failure."""
    report = yield
    if report.failed:
        for number, shown in enumerate(private_bed.LIVE):
            lines = shown.log().splitlines()[-private_bed.LOG_LINES :]
            report.sections.append((f"journal of system {number}", "\n".join(lines)))
    return report

"""A whole tsh home: whatever its files hold, it is read as logins with a state and a sentence.

Choices: name of the profile's file, which files there are, then their contents, each with a length
before it (two bytes) or, for a length of 65535, the good contents.
"""

import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from byte_choices import Choices

from ipc.messages import ClusterState
from workers.proxy.teleport.home import fingerprint, folders, read_home

SEEDS = Path(__file__).parent / "corpus" / "credentials"
NAMES = ["teleport.demo.test", "a", "..", "b\udcff", "x" * 200]
PROFILE = b"web_proxy_addr: teleport.demo.test:443\nuser: alice\ncluster: demo.test\n"
PLACES = [
    "keys/{}/alice.crt",
    "keys/{}/alice.key",
    "keys/{}/cas/demo.test.pem",
    "keys/{}/cas/x.pem",
]
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
MEMORY = "/dev/shm"


def good_files() -> list[bytes]:
    """Certificate, key and authority of the committed login."""
    certificate, _, key = (SEEDS / "login").read_bytes().partition(b"\n#\n")
    return [PROFILE, certificate, key, certificate, b""]


GOOD = good_files()


def check(data: bytes) -> None:
    choices = Choices(data)
    where = MEMORY if Path(MEMORY).is_dir() else None
    home = Path(tempfile.mkdtemp(prefix="fuzz-tsh-", dir=where))
    try:
        fill(home, choices)
        check_home(home)
    finally:
        shutil.rmtree(home)


def fill(home: Path, choices: Choices) -> None:
    name = choices.pick(NAMES)
    which = choices.byte()
    for number, place in enumerate([f"{name}.yaml", *PLACES]):
        length = int.from_bytes(choices.take(2).rjust(2, b"\xff"))
        contents = GOOD[number] if length == 65535 else choices.take(length)
        if which >> number & 1:
            continue
        path = home / place.format("teleport.demo.test")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)


def check_home(home: Path) -> None:
    found = read_home(home)
    assert fingerprint(home) == fingerprint(home)
    assert all(home == folder or home in folder.parents for folder in folders(home))
    assert found.logins or found.problem
    for login in found.logins:
        state, problem = login.state_at(NOW)
        assert (state is ClusterState.OK) == (not problem)
        assert problem.isprintable()
        problem.encode(errors="surrogateescape")
        assert len(problem) < 5000
        if state is ClusterState.OK:
            assert login.profile is not None
            assert login.credentials is not None
            assert login.credentials.identity.root_cluster in login.authorities

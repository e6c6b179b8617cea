"""`vnet login` with a `tsh` that notes how it is called."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from supervisor.exits import ExitStatus

ROOT = Path(__file__).parent.parent.parent
VNET = "from supervisor.cli.app import main; main()"
TSH = """#!/bin/sh
printf '%s\\n' "$TELEPORT_HOME" "$@" > "$TSH_CALLED"
read line
echo "tsh heard $line"
exit 7
"""
KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(not_after: datetime) -> bytes:
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "alice"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "access"),
        ]
    )
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "demo.test")])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(not_after)
        .sign(KEY, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


class Bed:
    def __init__(self, directory: Path) -> None:
        self.home = directory / "home"
        self.home.mkdir()
        self.programs = directory / "bin"
        self.programs.mkdir()
        self.called = directory / "called"
        tsh = self.programs / "tsh"
        tsh.write_text(TSH)
        tsh.chmod(0o755)
        self.run_dir = directory / "run"

    def profile(self, proxy: str, port: int = 443, *, hours: float | None, **values: str) -> None:
        """A profile whose login ends in so many hours; None: after a logout."""
        lines = {"web_proxy_addr": f"{proxy}:{port}", "user": "alice", "cluster": "demo.test"}
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in (lines | values).items())
        (self.home / f"{proxy}.yaml").write_text(text)
        keys = self.home / "keys" / proxy
        (keys / "cas").mkdir(parents=True)
        end = datetime.now(UTC) + timedelta(hours=hours or 0)
        (keys / "cas" / "demo.test.pem").write_bytes(certificate(end))
        if hours is not None:
            pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            (keys / "alice.crt").write_bytes(certificate(end))
            (keys / "alice.key").write_bytes(pem)

    def login(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {
            "TELEPORT_HOME": str(self.home),
            "VNET_RUN_DIR": str(self.run_dir),
            "TSH_CALLED": str(self.called),
            "PATH": f"{self.programs}:{os.defpath}",
        }
        inherited = {k: v for k, v in os.environ.items() if k != "SUDO_USER"}
        return subprocess.run(
            [sys.executable, "-c", VNET, "login", *arguments],
            input="hello\n",
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=inherited | own | environment,
        )

    @property
    def call(self) -> list[str]:
        """TELEPORT_HOME, then the arguments, of the call there was."""
        return self.called.read_text().splitlines()


@pytest.fixture
def bed(tmp_path):
    return Bed(tmp_path)


def test_the_one_that_has_expired_is_logged_in_again(bed):
    bed.profile("old.test", 3080, hours=-1)
    bed.profile("good.test", hours=5)
    done = bed.login()
    assert bed.call == [str(bed.home), "login", "--proxy=old.test:3080", "--user=alice"]
    # It has the terminal, and the last word.
    assert done.returncode == 7
    assert "tsh heard hello" in done.stdout
    assert "tsh login --proxy=old.test:3080 --user=alice" in done.stdout


def test_after_a_logout_there_is_something_to_do(bed):
    bed.profile("left.test", hours=None)
    bed.login()
    assert "--proxy=left.test:443" in bed.call


def test_a_broken_profile_is_repaired_by_a_login(bed):
    (bed.home / "broken.test.yaml").write_text("nonsense")
    bed.login()
    assert bed.call[1:] == ["login", "--proxy=broken.test"]


def test_single_sign_on_decides_on_the_user_itself(bed):
    bed.profile("sso.test", hours=-1, auth_connector="okta")
    bed.login()
    assert bed.call[1:] == ["login", "--proxy=sso.test:443"]


def test_of_several_one_must_be_named(bed):
    bed.profile("one.test", hours=-1)
    bed.profile("two.test", hours=None)
    bed.profile("good.test", hours=5)
    done = bed.login()
    assert done.returncode == ExitStatus.USAGE
    assert done.stderr == (
        "vnet: the logins of one.test, two.test have expired: name one, as in vnet login one.test\n"
    )
    assert not bed.called.exists()
    bed.login("two.test")
    assert "--proxy=two.test:443" in bed.call


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("good.test", ["--proxy=good.test:3080", "--user=alice"]),
        ("GOOD.test", ["--proxy=good.test:3080", "--user=alice"]),
        ("good.test:443", ["--proxy=good.test:443", "--user=alice"]),
        ("new.test", ["--proxy=new.test"]),
    ],
)
def test_a_named_proxy_needs_no_expired_login(bed, name, arguments):
    bed.profile("good.test", 3080, hours=5)
    bed.login(name)
    assert bed.call[2:] == arguments


def test_nothing_has_expired(bed):
    bed.profile("good.test", hours=5)
    done = bed.login()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no login has expired")
    assert not bed.called.exists()


@pytest.mark.parametrize("name", ["a b", "a.test:0", "a/b", ":1"])
def test_what_is_no_proxy_is_named(bed, name):
    done = bed.login(name)
    assert done.returncode == ExitStatus.USAGE
    assert repr(name) in done.stderr


def test_without_a_profile_the_proxy_must_be_named(bed):
    done = bed.login()
    assert done.returncode == ExitStatus.USAGE
    assert str(bed.home) in done.stderr
    assert "vnet login teleport.example.com" in done.stderr


def test_without_tsh_the_user_is_told_what_to_do(bed):
    bed.profile("old.test", hours=-1)
    done = bed.login(PATH="/nonexistent")
    assert done.returncode == ExitStatus.USAGE
    assert done.stderr.count("\n") == 1
    assert "install it" in done.stderr
    assert "tsh login --proxy=old.test:443 --user=alice" in done.stderr


def test_a_tsh_that_cannot_be_run_is_told(bed):
    bed.profile("old.test", hours=-1)
    (bed.programs / "tsh").write_bytes(b"\0 no program")
    done = bed.login()
    assert done.returncode == ExitStatus.INTERNAL
    assert "Exec format error" in done.stderr


@pytest.mark.root
def test_root_does_not_log_in_for_the_user(bed):
    bed.profile("old.test", hours=-1)
    done = bed.login(SUDO_USER="nobody")
    assert done.returncode == ExitStatus.NOT_PERMITTED
    assert "run this command as nobody" in done.stderr
    assert not bed.called.exists()

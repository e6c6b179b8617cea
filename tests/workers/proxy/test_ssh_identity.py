"""Host certificates as OpenSSH reads them, and which public key is trusted at which time."""

import base64
import os
import re
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from workers.proxy.ssh.identity import (
    LocalIdentity,
    parse_private_key,
    parse_public_key,
    private_pem,
    public_line,
)

needs_ssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no OpenSSH client")

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def line_of(key) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )


def blob_of(key) -> bytes:
    return base64.b64decode(line_of(key).split()[1])


@pytest.fixture
def home(tmp_path):
    (tmp_path / "id_vnet.pub").write_bytes(line_of(KEY) + b"\n")
    return tmp_path


@needs_ssh
def test_ssh_keygen_reads_the_certificate(home):
    identity = LocalIdentity(home)
    path = home / "cert.pub"
    path.write_bytes(identity.host_key_for("node1.demo.test.").certificate_line + b"\n")
    told = subprocess.run(
        ["ssh-keygen", "-L", "-f", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert "ssh-ed25519-cert-v01@openssh.com host certificate" in told
    assert re.search(r"Serial: 1\n", told)
    assert "Valid: forever" in told
    names = told[told.index("Principals:") : told.index("Critical Options:")].split()[1:]
    assert names == ["node1.demo.test.", "node1.demo.test"]
    (home / "ca.pub").write_bytes(identity.authority_line)
    ca = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(home / "ca.pub")], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    assert f"Signing CA: ED25519 {ca} " in told


def test_each_connection_has_a_key_of_its_own_and_each_run_an_authority(home):
    first, second = LocalIdentity(home), LocalIdentity(home)
    keys = [first.host_key_for("a.demo.test") for _ in range(3)]
    assert len({key.certificate_key.private_bytes_raw() for key in keys}) == 3
    assert len({key.certificate_line for key in keys}) == 3
    assert {key.plain_key for key in keys} == {first.plain_key}
    assert first.authority_line != second.authority_line
    certificate = serialization.load_ssh_public_identity(keys[0].certificate_line)
    certificate.verify_cert_signature()
    assert line_of(first._authority) == first.authority_line
    assert certificate.public_key().public_bytes_raw() == (
        keys[0].certificate_key.public_key().public_bytes_raw()
    )
    assert certificate.signature_key().public_bytes_raw() in base64.b64decode(
        first.authority_line.split()[1]
    )


def test_only_the_key_in_the_file_is_trusted(home):
    identity = LocalIdentity(home)
    assert identity.is_trusted(blob_of(KEY))
    for blob in (blob_of(OTHER), b"", blob_of(KEY)[:-1], blob_of(KEY) + b"\0"):
        assert not identity.is_trusted(blob)


def test_a_file_that_changes_is_read_anew(home):
    identity = LocalIdentity(home)
    path = home / "id_vnet.pub"
    assert identity.is_trusted(blob_of(KEY))
    new = home / "new"
    new.write_bytes(line_of(OTHER))
    new.rename(path)
    assert not identity.is_trusted(blob_of(KEY))
    assert identity.is_trusted(blob_of(OTHER))
    path.unlink()
    assert not identity.is_trusted(blob_of(OTHER))
    path.write_bytes(line_of(KEY))
    assert identity.is_trusted(blob_of(KEY))


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", b"#" * 10_000 + b"\n" + line_of(KEY), b"ssh-ed25519 AAAA"]
)
def test_without_a_key_in_the_file_nobody_is_trusted(home, data):
    identity = LocalIdentity(home)
    (home / "id_vnet.pub").write_bytes(data)
    for blob in (blob_of(KEY), b""):
        assert not identity.is_trusted(blob)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("real")])
def test_what_is_no_file_is_trusted_by_nobody(home, make):
    path = home / "id_vnet.pub"
    path.rename(home / "real")
    make(path)
    assert not LocalIdentity(home).is_trusted(blob_of(KEY))


def test_public_keys_as_users_write_them():
    rsa_key = rsa.generate_private_key(65537, 2048)
    p256 = ec.generate_private_key(ec.SECP256R1())
    for key in (KEY, rsa_key, p256):
        line = line_of(key)
        for text in (
            line,
            b"\n# comment\n  " + line + b" alice@laptop, \xff\n" + line_of(OTHER),
            b'from="10.0.0.0/8",command="a b" ' + line + b"\r\n",
        ):
            assert parse_public_key(text) == blob_of(key)
    assert parse_public_key(b"# " + line_of(KEY)) is None
    assert parse_public_key(b"ssh-rsa " + line_of(KEY).split()[1]) is None


@given(st.binary(max_size=300))
def test_no_bytes_are_too_strange(data):
    assert parse_public_key(data) is None
    assert parse_private_key(data) is None
    assert parse_private_key(private_pem(KEY)[: len(data)]) is None


def test_private_keys_of_another_kind_or_with_a_password_are_none():
    text = {
        "encoding": serialization.Encoding.PEM,
        "format": serialization.PrivateFormat.OpenSSH,
    }
    plain = serialization.NoEncryption()
    found = parse_private_key(private_pem(KEY))
    assert found is not None
    assert found.private_bytes_raw() == KEY.private_bytes_raw()
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        **text, encryption_algorithm=plain
    )
    assert parse_private_key(other) is None
    locked = serialization.BestAvailableEncryption(b"secret")
    assert parse_private_key(KEY.private_bytes(**text, encryption_algorithm=locked)) is None


@needs_ssh
def test_ssh_keygen_reads_our_private_keys(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(private_pem(KEY))
    path.chmod(0o600)
    told = subprocess.run(["ssh-keygen", "-y", "-f", str(path)], capture_output=True, check=True)
    assert told.stdout.split()[:2] == public_line(KEY).split()

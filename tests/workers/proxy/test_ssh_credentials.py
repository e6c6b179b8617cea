"""Keys, certificates and known_hosts as tsh leaves them."""

from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import SSHCertificateType
from ssh_keys import (
    HOST_AUTHORITY,
    KINDS,
    SSH_KEY,
    certificate,
    known_hosts_line,
    line,
    openssh_pem,
    write_old_home,
    write_ssh,
)
from teleport_fakes import CLUSTER, NOW, PROXY, pem_key, write_home

from workers.proxy.teleport.credentials import CredentialError
from workers.proxy.teleport.errors import HardwareKeyError, NoSshLoginError, UnreachableError
from workers.proxy.teleport.home import read_home
from workers.proxy.teleport.ssh_credentials import (
    MAX_AUTHORITIES,
    authorities,
    known_authorities,
    parse_ssh_key,
    public_line,
    user_certificate,
)
from workers.proxy.teleport.ssh_home import read_authorities, read_certificate, read_key

OTHER = KINDS["ecdsa"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_key_with_its_certificate(kind):
    key = parse_ssh_key(openssh_pem(KINDS[kind]))
    assert public_line(key) == line(KINDS[kind])
    found = user_certificate(key, certificate(key.public_key()) + b" comment\n")
    assert found.not_after == NOW + timedelta(hours=12)
    assert b"-cert-v01@openssh.com " in found.line
    assert "private" not in repr(found)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_in_other_forms_of_pem(kind):
    assert public_line(parse_ssh_key(pem_key(KINDS[kind]))) == line(KINDS[kind])


def test_a_certificate_without_end():
    found = user_certificate(SSH_KEY, certificate(SSH_KEY.public_key(), not_after=None))
    assert found.not_after is None


BROKEN = {
    "of another key": (certificate(OTHER.public_key()), "do not belong together"),
    "of a host": (
        certificate(SSH_KEY.public_key(), kind=SSHCertificateType.HOST),
        "not one of a user",
    ),
    "a key": (line(SSH_KEY), "in the place of the certificate"),
    "two lines": (certificate(SSH_KEY.public_key()) + b"\nmore", "more than one line"),
    "nothing": (b"", "cannot be read"),
    "cut": (certificate(SSH_KEY.public_key())[:200], "cannot be read"),
    "too large": (b"ssh-ed25519 " + b"A" * 600_000, "too large"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_certificates_that_cannot_be_used(broken):
    data, why = BROKEN[broken]
    with pytest.raises(CredentialError, match=why):
        user_certificate(SSH_KEY, data)


def test_a_key_that_is_none_for_ssh():
    with pytest.raises(CredentialError, match="of a kind that SSH does not know"):
        parse_ssh_key(pem_key(X25519PrivateKey.generate()))


# -- known_hosts --


def test_the_authorities_of_one_cluster_among_others():
    other = KINDS["rsa"]
    text = (
        b"# comment\n\n"
        + known_hosts_line(CLUSTER, HOST_AUTHORITY)
        + known_hosts_line(CLUSTER, other)  # both, while one is rotated
        + known_hosts_line(CLUSTER, HOST_AUTHORITY)
        + known_hosts_line("leaf." + CLUSTER, OTHER)
        + known_hosts_line("x", OTHER, hosts=f"*.{CLUSTER}")
        + f"{CLUSTER} ".encode()
        + line(OTHER)
        + b"\n"  # a key that is no authority
        + f"@revoked {CLUSTER} ".encode()
        + line(OTHER)
        + b"\n"
        + f"@cert-authority {CLUSTER} ssh-ed25519 AAAA\n".encode()
        + f"@cert-authority {CLUSTER}\n".encode()
        + f"@cert-authority {CLUSTER} ".encode()
        + certificate(OTHER.public_key())
        + b"\n"
        + bytes(range(256))
    )
    assert known_authorities(text, CLUSTER) == (line(HOST_AUTHORITY), line(other))
    assert known_authorities(text, CLUSTER.upper()) == (line(HOST_AUTHORITY), line(other))
    assert known_authorities(text, "leaf." + CLUSTER) == (line(OTHER),)
    assert known_authorities(text, "other.test") == ()


def test_authorities_are_bounded_and_without_comment():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    lines = [line(Ed25519PrivateKey.generate()) + b" comment" for _ in range(MAX_AUTHORITIES + 5)]
    found = authorities(lines)
    assert len(found) == MAX_AUTHORITIES
    assert all(one.count(b" ") == 1 for one in found)


# -- homes --


def profile_of(home):
    return read_home(home).logins[0].profile


@pytest.mark.parametrize("kind", KINDS)
def test_a_home_of_today(tmp_path, kind):
    write_home(tmp_path)
    write_ssh(tmp_path, KINDS[kind], clusters=(CLUSTER, "leaf.test"))
    profile = profile_of(tmp_path)
    key = read_key(tmp_path, profile)
    assert public_line(key) == line(KINDS[kind])
    found = read_certificate(tmp_path, profile, key, [CLUSTER])
    assert found.not_after == NOW + timedelta(hours=12)
    assert read_authorities(tmp_path, CLUSTER) == (line(HOST_AUTHORITY),)
    assert read_authorities(tmp_path, "other.test") == ()


def test_a_home_of_version_16_has_one_key_for_everything(tmp_path):
    write_old_home(tmp_path)
    [login] = read_home(tmp_path).logins
    assert login.credentials is not None, login.problem
    key = read_key(tmp_path, login.profile)
    assert public_line(key) == line(KINDS["rsa"])
    assert read_certificate(tmp_path, login.profile, key, [CLUSTER]).line


def test_the_leafs_own_certificate_comes_first_and_the_roots_does_without(tmp_path):
    write_home(tmp_path)
    folder = write_ssh(tmp_path, clusters=(CLUSTER, "leaf.test"))
    leaf = folder / "alice-ssh" / "leaf.test-cert.pub"
    profile = profile_of(tmp_path)
    wanted = ["leaf.test", CLUSTER]
    assert read_certificate(tmp_path, profile, SSH_KEY, wanted).line == leaf.read_bytes().strip()
    leaf.unlink()
    root = folder / "alice-ssh" / f"{CLUSTER}-cert.pub"
    assert read_certificate(tmp_path, profile, SSH_KEY, wanted).line == root.read_bytes().strip()


def test_a_cluster_name_leads_to_no_other_file(tmp_path):
    write_home(tmp_path)
    write_ssh(tmp_path)
    (tmp_path / "x-cert.pub").write_bytes(certificate(SSH_KEY.public_key()))
    with pytest.raises(NoSshLoginError):
        read_certificate(tmp_path, profile_of(tmp_path), SSH_KEY, ["../../../x"])


def test_what_is_missing_or_broken_says_what_to_do(tmp_path):
    write_home(tmp_path)
    profile = profile_of(tmp_path)
    again = f"run tsh login --proxy={PROXY}"
    with pytest.raises(NoSshLoginError, match=f"there is no alice: {again}"):
        read_key(tmp_path, profile)
    assert read_authorities(tmp_path, CLUSTER) == ()
    folder = write_ssh(tmp_path)
    (folder / "alice-ssh" / f"{CLUSTER}-cert.pub").unlink()
    with pytest.raises(NoSshLoginError, match=f"no SSH certificate for cluster {CLUSTER}: {again}"):
        read_certificate(tmp_path, profile, SSH_KEY, ["leaf.test", CLUSTER])
    (folder / "alice-ssh" / f"{CLUSTER}-cert.pub").write_bytes(certificate(OTHER.public_key()))
    with pytest.raises(NoSshLoginError, match="belong together"):
        read_certificate(tmp_path, profile, SSH_KEY, [CLUSTER])
    (folder / "alice").write_bytes(b"")
    with pytest.raises(NoSshLoginError, match=f"is empty: {again}"):
        read_key(tmp_path, profile)
    (tmp_path / "known_hosts").unlink()
    (tmp_path / "known_hosts").mkdir()
    with pytest.raises(UnreachableError, match="known_hosts"):
        read_authorities(tmp_path, CLUSTER)


def test_a_key_in_a_token_is_told(tmp_path):
    write_home(tmp_path)
    folder = write_ssh(tmp_path)
    (folder / "alice").write_bytes(
        b"-----BEGIN PIV YUBIKEY PRIVATE KEY-----\nAAAA\n-----END PIV YUBIKEY PRIVATE KEY-----\n"
    )
    with pytest.raises(HardwareKeyError, match="hardware token"):
        read_key(tmp_path, profile_of(tmp_path))

import base64
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from teleport_fakes import (
    AUTHORITY,
    CLUSTER,
    NOW,
    PROFILE,
    PROXY,
    USER_KEY,
    USER_SUBJECT,
    make_authority,
    oid,
    pem,
    pem_key,
    user_certificate,
    write_home,
)

from ipc.messages import ClusterState
from workers.proxy.teleport.credentials import (
    CredentialError,
    parse_authorities,
    parse_credentials,
    parse_private_key,
)
from workers.proxy.teleport.errors import HardwareKeyError
from workers.proxy.teleport.home import fingerprint, folders, read_home
from workers.proxy.teleport.profile import ProfileError, parse_profile

RSA_KEY = rsa.generate_private_key(65537, 2048)
PIV_KEY = (
    b"-----BEGIN PIV YUBIKEY PRIVATE KEY-----\n"
    b"eyJzZXJpYWxfbnVtYmVyIjoxfQ==\n"
    b"-----END PIV YUBIKEY PRIVATE KEY-----\n"
)


def only_login(directory):
    (login,) = read_home(directory).logins
    return login


# --- profile


def test_a_profile_names_proxy_and_user():
    profile = parse_profile(PROFILE.encode())
    assert (profile.name, profile.web_host, profile.web_port) == (PROXY, PROXY, 443)
    assert (profile.user, profile.cluster) == ("alice", CLUSTER)
    assert profile.is_tls_routing_enabled
    assert not profile.is_conn_upgrade_required


@pytest.mark.parametrize(
    ("key", "line", "expected"),
    [
        ("ssh_proxy", "ssh_proxy_addr: SSH.test:3024", ("ssh.test", 3024)),
        ("ssh_proxy", "ssh_proxy_addr: ssh.test", ("ssh.test", 3023)),
        ("ssh_proxy", "ssh_proxy_addr: '[2001:db8::1]:3023'", ("2001:db8::1", 3023)),
        ("ssh_proxy", "ssh_proxy_addr: ssh.test:0", None),
        ("ssh_proxy", "ssh_proxy_addr: [ssh.test]", None),
        ("ssh_proxy", "ssh_proxy_addr: ''", None),
        ("postgres_proxy", "postgres_proxy_addr: pg.test:5432", ("pg.test", 5432)),
        ("postgres_proxy", "postgres_proxy_addr: pg.test", ("pg.test", 443)),
        ("postgres_proxy", "", None),
        ("mysql_proxy", "mysql_proxy_addr: my.test", ("my.test", 3036)),
        ("mysql_proxy", "mysql_proxy_addr: 'my.test:port'", None),
    ],
)
def test_listeners_of_their_own_are_read_and_broken_ones_cost_nothing(key, line, expected):
    text = PROFILE.replace(f"ssh_proxy_addr: {PROXY}:443\n", "") + line
    assert getattr(parse_profile(text.encode()), key) == expected


def test_a_user_whose_name_looks_like_a_number_keeps_it():
    data = PROFILE.replace("user: alice", "user: 0123").encode()
    assert parse_profile(data).user == "0123"


def test_without_a_cluster_the_profile_name_counts():
    assert parse_profile(b"web_proxy_addr: a.test:1\nuser: u\n").cluster == "a.test"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1]",
        b"web_proxy_addr: a.test:1",
        b"user: u",
        b"web_proxy_addr: a.test:x\nuser: u",
        b"web_proxy_addr: a.test:1\nuser: ../../etc/passwd",
        b"web_proxy_addr: [a]\nuser: u",
        b"web_proxy_addr: a.test:1\nuser: u\n" + b"#" * 70_000,
        b"[" * 5000,
        b'user: "\\U00110000"',  # characters that there are not
        b'user: "\\UFFFFFFFF"',
        b'web_proxy_addr: a.test:1\nuser: "\\ud800"',
        b"web_proxy_addr: ..:1\nuser: u",
    ],
)
def test_impossible_profiles_are_refused(data):
    with pytest.raises(ProfileError):
        parse_profile(data)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_reading_a_profile_raises_only_profile_error(data):
    with pytest.raises(ProfileError):
        parse_profile(data)


# --- keys


@pytest.mark.parametrize(
    ("key", "form"),
    [
        (USER_KEY, PrivateFormat.PKCS8),
        (USER_KEY, PrivateFormat.TraditionalOpenSSL),
        (USER_KEY, PrivateFormat.OpenSSH),
        (RSA_KEY, PrivateFormat.PKCS8),
        (RSA_KEY, PrivateFormat.TraditionalOpenSSL),
        (RSA_KEY, PrivateFormat.OpenSSH),
        (ed25519.Ed25519PrivateKey.generate(), PrivateFormat.OpenSSH),
    ],
)
def test_every_form_of_key_that_tsh_writes_is_read(key, form):
    assert parse_private_key(pem_key(key, form)).public_key() == key.public_key()


def test_the_label_of_a_key_is_not_trusted():
    mislabelled = pem_key(RSA_KEY, PrivateFormat.PKCS8).replace(b"PRIVATE KEY", b"RSA PRIVATE KEY")
    assert parse_private_key(mislabelled).public_key() == RSA_KEY.public_key()


def test_an_elliptic_key_with_a_compressed_point_is_no_key():
    key = pem_key(USER_KEY, PrivateFormat.OpenSSH)
    body = b"".join(key.splitlines()[1:-1])
    compressed = base64.b64decode(body).replace(b"\0\0\0\x41\x04", b"\0\0\0\x41\x02")
    damaged = base64.encodebytes(compressed)
    with pytest.raises(CredentialError):
        parse_private_key(
            b"-----BEGIN OPENSSH PRIVATE KEY-----\n"
            + damaged
            + b"-----END OPENSSH PRIVATE KEY-----\n"
        )


def test_a_key_that_would_take_minutes_to_check_is_refused_unread():
    encoded = base64.encodebytes(b"\x30\x82\x80\x00" + b"\xff" * 32768)
    with pytest.raises(CredentialError, match="too large"):
        parse_private_key(
            b"-----BEGIN RSA PRIVATE KEY-----\n" + encoded + b"-----END RSA PRIVATE KEY-----\n"
        )


def test_a_block_that_never_ends_hides_no_other_and_costs_no_time():
    """A search for the end of each of these would take minutes."""
    cut_off = b"-----BEGIN CERTIFICATE-----\n" * 30_000
    assert parse_authorities(cut_off + pem(AUTHORITY)) == parse_authorities(pem(AUTHORITY))


def test_a_hardware_key_is_told_apart():
    with pytest.raises(HardwareKeyError):
        parse_private_key(PIV_KEY)


def test_secrets_stay_out_of_repr():
    credentials = parse_credentials(pem(user_certificate()), pem_key(USER_KEY))
    assert "PRIVATE" not in repr(credentials)


def test_a_key_of_another_certificate_is_refused():
    other = pem_key(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(CredentialError, match="do not belong together"):
        parse_credentials(pem(user_certificate()), other)


@given(st.binary(max_size=200))
def test_reading_keys_raises_only_credential_error(data):
    wrapped = b"-----BEGIN PRIVATE KEY-----\n" + data + b"\n-----END PRIVATE KEY-----\n"
    for candidate in (data, wrapped):
        with pytest.raises(CredentialError):
            parse_private_key(candidate)
        with pytest.raises(CredentialError):
            parse_authorities(candidate)
        with pytest.raises(CredentialError):
            parse_credentials(candidate, candidate)


# --- home


def test_a_login_of_v17_is_read(tmp_path):
    write_home(tmp_path)
    login = only_login(tmp_path)
    assert login.name == PROXY
    assert login.credentials.identity.user == "alice"
    assert set(login.authorities) == {CLUSTER}
    assert login.state_at(NOW) == (ClusterState.OK, "")


def test_a_login_of_v16_is_read(tmp_path):
    keys = write_home(tmp_path, user_certificate(key=RSA_KEY))
    (keys / "alice.crt").rename(keys / "alice-x509.pem")
    (keys / "alice.key").unlink()
    (keys / "alice").write_bytes(pem_key(RSA_KEY, PrivateFormat.TraditionalOpenSSL))
    assert only_login(tmp_path).state is ClusterState.OK


def test_several_authorities_in_one_file_are_all_trusted(tmp_path):
    keys = write_home(tmp_path)
    _key, successor = make_authority()
    (keys / "cas" / f"{CLUSTER}.pem").write_bytes(pem(AUTHORITY) + pem(successor))
    assert len(only_login(tmp_path).authorities[CLUSTER]) == 2


def test_an_expired_login_says_what_to_run(tmp_path):
    write_home(tmp_path, user_certificate(NOW + timedelta(hours=1)))
    login = only_login(tmp_path)
    assert login.state_at(NOW)[0] is ClusterState.OK
    state, problem = login.state_at(NOW + timedelta(hours=1))
    assert state is ClusterState.LOGIN_EXPIRED
    assert f"tsh login --proxy={PROXY}:443" in problem


def test_a_hardware_key_has_a_state_of_its_own(tmp_path):
    keys = write_home(tmp_path)
    (keys / "alice.key").write_bytes(PIV_KEY)
    login = only_login(tmp_path)
    assert login.state is ClusterState.HARDWARE_KEY
    assert login.problem


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (lambda path: path.unlink(), "alice.crt"),
        (lambda path: path.unlink(), "alice.key"),
        (lambda path: path.write_bytes(b""), "alice.key"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "alice.crt"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "alice.key"),
        (lambda path: path.unlink(), f"cas/{CLUSTER}.pem"),
        (lambda path: path.write_bytes(b"nonsense"), f"cas/{CLUSTER}.pem"),
        (lambda path: (path.unlink(), path.mkdir()), "alice.crt"),
        (lambda path: path.write_bytes(bytes(2_000_000)), "alice.crt"),
    ],
)
def test_a_half_written_login_is_no_login_and_says_where(tmp_path, damage, file):
    keys = write_home(tmp_path)
    damage(keys / file)
    login = only_login(tmp_path)
    assert login.state is ClusterState.NO_LOGIN
    assert str(keys) in login.problem
    assert "tsh login" in login.problem


@pytest.mark.parametrize("file", ["alice.crt", "alice.key"])
def test_a_logout_is_told_from_a_login_in_progress(tmp_path, file):
    keys = write_home(tmp_path)
    assert not only_login(tmp_path).is_removed
    (keys / file).write_bytes(b"")
    assert not only_login(tmp_path).is_removed
    (keys / file).unlink()
    assert only_login(tmp_path).is_removed


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ((NameOID.ORGANIZATIONAL_UNIT_NAME, "usage:apps"), "restricted to usage:apps"),
        ((oid("2.9"), "true"), "issues no other certificates"),
    ],
)
def test_a_certificate_that_gets_no_others_is_no_login(tmp_path, attribute, words):
    write_home(tmp_path, user_certificate(subject=[*USER_SUBJECT, attribute]))
    login = only_login(tmp_path)
    assert login.state is ClusterState.NO_LOGIN
    assert words in login.problem
    assert "tsh login" in login.problem


def test_all_folders_of_logins_are_named(tmp_path):
    keys = write_home(tmp_path)
    (keys / "alice-app").mkdir()
    assert folders(tmp_path) == [tmp_path, tmp_path / "keys", keys, keys / "cas"]
    assert folders(tmp_path / "none") == []


def test_a_broken_profile_does_not_hide_the_others(tmp_path):
    write_home(tmp_path)
    (tmp_path / "broken.test.yaml").write_text("web_proxy_addr: [")
    broken, good = read_home(tmp_path).logins
    assert (broken.name, broken.state) == ("broken.test", ClusterState.NO_LOGIN)
    assert str(tmp_path / "broken.test.yaml") in broken.problem
    assert good.state is ClusterState.OK


def test_a_user_name_too_long_for_a_file_is_no_login(tmp_path):
    write_home(tmp_path)
    path = tmp_path / f"{PROXY}.yaml"
    path.write_text(path.read_text().replace("alice", "a" * 5000))
    assert only_login(tmp_path).state is ClusterState.NO_LOGIN


def test_links_and_folders_are_no_profiles(tmp_path):
    write_home(tmp_path)
    (tmp_path / "link.yaml").symlink_to(tmp_path / f"{PROXY}.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert [login.name for login in read_home(tmp_path).logins] == [PROXY]


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_or_missing_home_says_what_to_run(tmp_path, exists):
    directory = tmp_path if exists else tmp_path / "none"
    home = read_home(directory)
    assert home.logins == ()
    assert str(directory) in home.problem
    assert "tsh login" in home.problem


def test_the_fingerprint_follows_every_file_of_a_login(tmp_path):
    keys = write_home(tmp_path)
    seen = {fingerprint(tmp_path)}
    for path in (tmp_path / f"{PROXY}.yaml", keys / "alice.crt", keys / f"cas/{CLUSTER}.pem"):
        path.write_bytes(path.read_bytes() + b"\n")
        seen.add(fingerprint(tmp_path))
    (tmp_path / f"{PROXY}.yaml").unlink()
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 5
    assert fingerprint(tmp_path / "none") == ()

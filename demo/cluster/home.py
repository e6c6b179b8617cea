"""Writes a tsh home as `tsh login` does (api/profile, api/utils/keypaths).

<home>/current-profile, <profile>.yaml, known_hosts
<home>/keys/<proxy host>/<user>, .pub, .key, .crt, <user>-ssh/<cluster>-cert.pub
<home>/keys/<proxy host>/cas/<cluster>.pem
<home>/web-ca.pem, totp-secret, webauthn-credential.json (ours)

Up to v16 there is one key for SSH and TLS, <user>, and <user>-x509.pem instead of .key and .crt.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from demo.cluster.errors import HomeError

WEB_CA_FILE = "web-ca.pem"
# Where keys and certificates lie changed with v17.
LAST_LAYOUT_WITH_ONE_KEY = 16


@dataclass(frozen=True, slots=True)
class Login:
    """Everything one `tsh login` leaves on disk."""

    proxy_host: str
    proxy_addr: str
    ssh_proxy_addr: str
    cluster: str
    user: str
    layout: int  # 16 or 17
    tls_routing: bool
    conn_upgrade_required: bool
    tls_key: bytes
    tls_certificate: bytes
    ssh_key: bytes
    ssh_public: bytes
    ssh_certificate: bytes
    host_authorities: Mapping[str, bytes]  # cluster name -> PEM of all that are trusted
    host_ssh_keys: Mapping[str, tuple[bytes, ...]]  # cluster name -> authorized_keys lines


def prepare_home(home: Path, web_ca: bytes) -> None:
    """Makes the directory, or empties it of an earlier demo's login.

    Raises:
        HomeError: it holds a login that this program did not write.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        profiles = sorted(home.glob("*.yaml"))
        if profiles and not (home / WEB_CA_FILE).exists():
            raise HomeError(f"{home} holds a real login ({profiles[0].name}): name another --home")
        for profile in profiles:
            profile.unlink()
        write_file(home / WEB_CA_FILE, web_ca, 0o644)
    except OSError as error:
        raise HomeError(f"{home} cannot be written: {error.strerror}") from error


def write_totp_secret(home: Path, secret: str) -> None:
    """Writes the demo user's one-time password secret (base32), as an authenticator app has it."""
    write_file(home / "totp-secret", f"{secret}\n".encode())


def write_webauthn_credential(home: Path, document: bytes) -> None:
    """Writes the demo user's security key (JSON), for a software authenticator."""
    write_file(home / "webauthn-credential.json", document)


def write_login(home: Path, login: Login) -> None:
    """Writes one profile with its keys and certificates, each file in one step."""
    keys = home / "keys" / login.proxy_host
    for directory in (home / "keys", keys, keys / f"{login.user}-ssh"):
        directory.mkdir(mode=0o700, exist_ok=True)
    write_authorities(home, login)
    write_file(keys / login.user, login.ssh_key)
    write_file(keys / f"{login.user}.pub", login.ssh_public)
    if login.layout > LAST_LAYOUT_WITH_ONE_KEY:
        write_file(keys / f"{login.user}.key", login.tls_key)
    write_certificates(home, login)
    write_file(home / f"{login.proxy_host}.yaml", _profile(login), 0o660)


def write_certificates(home: Path, login: Login) -> None:
    """Replaces only the user's certificates, as a new login with the same keys would."""
    keys = home / "keys" / login.proxy_host
    suffix = ".crt" if login.layout > LAST_LAYOUT_WITH_ONE_KEY else "-x509.pem"
    write_file(keys / f"{login.user}-ssh" / f"{login.cluster}-cert.pub", login.ssh_certificate)
    write_file(keys / f"{login.user}{suffix}", login.tls_certificate)


def write_authorities(home: Path, login: Login) -> None:
    """Writes the TLS host authorities of all clusters of a login."""
    directory = home / "keys" / login.proxy_host / "cas"
    directory.mkdir(mode=0o700, exist_ok=True)
    for cluster, pem in login.host_authorities.items():
        write_file(directory / f"{cluster}.pem", pem)


def write_shared(home: Path, logins: tuple[Login, ...]) -> None:
    """Writes what all profiles share: known_hosts and the current profile."""
    lines = [
        b"@cert-authority %s %s type=host\n" % (_host_list(login, cluster), key.strip())
        for login in logins
        for cluster, keys in login.host_ssh_keys.items()
        for key in keys
    ]
    write_file(home / "known_hosts", b"".join(lines))
    write_file(home / "current-profile", f"{logins[0].proxy_host}\n".encode(), 0o660)


def remove_logins(home: Path) -> None:
    """Removes every profile and key, as `tsh logout` does; what is ours stays."""
    # The profiles last: a reader that has seen one looks for its keys.
    shutil.rmtree(home / "keys", ignore_errors=True)
    for path in (*home.glob("*.yaml"), home / "current-profile", home / "known_hosts"):
        path.unlink(missing_ok=True)


def _host_list(login: Login, cluster: str) -> bytes:
    return f"{login.proxy_host},{cluster},*.{cluster}".encode()


def _profile(login: Login) -> bytes:
    values = {
        "web_proxy_addr": login.proxy_addr,
        "ssh_proxy_addr": login.ssh_proxy_addr,
        "kube_proxy_addr": login.proxy_addr,
        "user": login.user,
        "cluster": login.cluster,
        "dir": "",
        "tls_routing_enabled": login.tls_routing,
        "tls_routing_conn_upgrade_required": login.conn_upgrade_required,
        "auth_connector": "local",
        "mfa_mode": "auto",
        "private_key_policy": "none",
        "piv_slot": "",
        "missingclusterdetails": False,
        "saml_slo_enabled": False,
        "ssh_dial_timeout": "30s",
    }
    return yaml.safe_dump(values, sort_keys=False).encode()


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces a file in one step, so that a reader never sees half of it."""
    # Hidden and without a suffix that tsh's profile listing would pick up.
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)

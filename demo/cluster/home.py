"""Writes a tsh home as `tsh login` of v17 and newer does (api/profile, api/utils/keypaths).

<home>/current-profile, <profile>.yaml, known_hosts, web-ca.pem (ours)
<home>/keys/<proxy host>/<user>, .pub, .key, .crt, <user>-ssh/<cluster>-cert.pub
<home>/keys/<proxy host>/cas/<cluster>.pem
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from demo.cluster.errors import HomeError

WEB_CA_FILE = "web-ca.pem"


@dataclass(frozen=True, slots=True)
class Login:
    """Everything one `tsh login` leaves on disk."""

    proxy_host: str
    proxy_addr: str
    cluster: str
    user: str
    tls_routing: bool
    conn_upgrade_required: bool
    tls_key: bytes
    tls_certificate: bytes
    ssh_key: bytes
    ssh_public: bytes
    ssh_certificate: bytes
    host_authorities: Mapping[str, bytes]  # cluster name -> PEM
    host_ssh_keys: Mapping[str, bytes]  # cluster name -> authorized_keys line


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
        _write(home / WEB_CA_FILE, web_ca, 0o644)
    except OSError as error:
        raise HomeError(f"{home} cannot be written: {error.strerror}") from error


def write_totp_secret(home: Path, secret: str) -> None:
    """Writes the demo user's one-time password secret (base32), as an authenticator app has it."""
    _write(home / "totp-secret", f"{secret}\n".encode())


def write_login(home: Path, login: Login) -> None:
    """Writes one profile with its keys and certificates, each file in one step."""
    keys = home / "keys" / login.proxy_host
    ssh = keys / f"{login.user}-ssh"
    for directory in (home / "keys", keys, keys / "cas", ssh):
        directory.mkdir(mode=0o700, exist_ok=True)
    for cluster, pem in login.host_authorities.items():
        _write(keys / "cas" / f"{cluster}.pem", pem)
    _write(keys / login.user, login.ssh_key)
    _write(keys / f"{login.user}.pub", login.ssh_public)
    _write(keys / f"{login.user}.key", login.tls_key)
    _write(ssh / f"{login.cluster}-cert.pub", login.ssh_certificate)
    _write(keys / f"{login.user}.crt", login.tls_certificate)
    _write(home / f"{login.proxy_host}.yaml", _profile(login), 0o660)


def write_certificates(home: Path, login: Login) -> None:
    """Replaces only the user's certificates, as a new login with the same keys would."""
    keys = home / "keys" / login.proxy_host
    _write(keys / f"{login.user}-ssh" / f"{login.cluster}-cert.pub", login.ssh_certificate)
    _write(keys / f"{login.user}.crt", login.tls_certificate)


def write_shared(home: Path, logins: tuple[Login, ...]) -> None:
    """Writes what all profiles share: known_hosts and the current profile."""
    lines = [
        b"@cert-authority %s %s type=host\n" % (_host_list(login, cluster), key.strip())
        for login in logins
        for cluster, key in login.host_ssh_keys.items()
    ]
    _write(home / "known_hosts", b"".join(lines))
    _write(home / "current-profile", f"{logins[0].proxy_host}\n".encode(), 0o660)


def _host_list(login: Login, cluster: str) -> bytes:
    return f"{login.proxy_host},{cluster},*.{cluster}".encode()


def _profile(login: Login) -> bytes:
    values = {
        "web_proxy_addr": login.proxy_addr,
        "ssh_proxy_addr": login.proxy_addr,
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


def _write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces a file in one step, so that a reader never sees half of it."""
    # Hidden and without a suffix that tsh's profile listing would pick up.
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)

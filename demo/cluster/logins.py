"""The logins in the tsh home: made at the start, and changed as the faults want it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from demo.cluster.authorities import (
    BACKDATE,
    issue_user_certificate,
    private_key_pem,
    ssh_public_line,
)
from demo.cluster.faults import Faults
from demo.cluster.home import (
    LAST_LAYOUT_WITH_ONE_KEY,
    Login,
    remove_logins,
    write_authorities,
    write_certificates,
    write_login,
    write_shared,
)
from demo.cluster.sshcert import issue_ssh_user_certificate, private_key_openssh
from demo.cluster.state import ClusterState

# Where an expired login ended.
_EXPIRED_SINCE = timedelta(hours=1)
_RSA_BITS = 2048


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of one login; up to v16 they are the same RSA key."""

    tls: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    ssh: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the faults say of the logins."""

    is_logged_in: bool = True
    is_expired: bool = False
    other_user: str = ""

    @classmethod
    def by(cls, faults: Faults) -> "_Wanted":
        return cls(not faults.logout, faults.expire_login, faults.other_user)


class Logins:
    """One login for each root cluster. `roots` gives them in the cluster file's order."""

    def __init__(self, home: Path, roots: Callable[[], Sequence[ClusterState]]) -> None:
        self._home = home
        self._roots = roots
        self._keys: dict[str, _Keys] = {}
        self._written = _Wanted()

    def write(self) -> None:
        """Logs in anew everywhere, with new keys.

        Raises:
            OSError: the home cannot be written.
        """
        self._keys = {root.name: _make_keys(root.config.home_layout) for root in self._roots()}
        logins = self._logins()
        for login in logins:
            write_login(self._home, login)
        write_shared(self._home, logins)

    def write_authorities(self) -> None:
        """Tells the home which host authorities are trusted now."""
        if not self._written.is_logged_in:
            return
        logins = self._logins()
        for login in logins:
            write_authorities(self._home, login)
        write_shared(self._home, logins)

    def apply(self, faults: Faults) -> None:
        """Makes the home what these faults want.

        Raises:
            OSError: the home cannot be written; nothing is lost by trying again.
        """
        wanted, before = _Wanted.by(faults), self._written
        if wanted == before:
            return
        self._written = wanted
        try:
            self._change(before, wanted)
        except BaseException:
            self._written = before
            raise

    def _change(self, before: _Wanted, wanted: _Wanted) -> None:
        for root in self._roots():
            root.user = wanted.other_user or root.config.user
        if not wanted.is_logged_in:
            remove_logins(self._home)
        elif before.is_logged_in and before.other_user == wanted.other_user:
            for login in self._logins():
                write_certificates(self._home, login)
        else:
            self.write()

    def _logins(self) -> tuple[Login, ...]:
        return tuple(self._login(root) for root in self._roots())

    def _login(self, root: ClusterState) -> Login:
        keys = self._keys[root.name]
        config = root.config
        now = self._login_time(root)
        identity = root.login_identity(now)
        members = (root, *root.leaves.values())
        return Login(
            proxy_host=config.proxy_host,
            proxy_addr=config.proxy_addr,
            ssh_proxy_addr=config.ssh_proxy_addr,
            cluster=root.name,
            user=root.user,
            layout=config.home_layout,
            tls_routing=config.tls_routing,
            conn_upgrade_required=config.conn_upgrade_required,
            tls_key=private_key_pem(keys.tls),
            tls_certificate=issue_user_certificate(
                root.user_ca, identity, keys.tls.public_key(), now - BACKDATE
            ),
            ssh_key=_ssh_key_file(keys.ssh),
            ssh_public=ssh_public_line(keys.ssh.public_key()) + b"\n",
            ssh_certificate=issue_ssh_user_certificate(
                root.user_ca, identity, keys.ssh.public_key(), now
            ),
            host_authorities={
                member.name: b"".join(one.tls.certificate_pem() for one in member.host_authorities)
                for member in members
            },
            host_ssh_keys={
                member.name: tuple(one.ssh_public_line() for one in member.host_authorities)
                for member in members
            },
        )

    def _login_time(self, root: ClusterState) -> datetime:
        """Now, or so long ago that the login has expired."""
        now = root.now()
        if self._written.is_expired:
            now -= timedelta(seconds=root.config.cert_ttl_seconds) + _EXPIRED_SINCE
        return now


def _make_keys(layout: int) -> _Keys:
    if layout > LAST_LAYOUT_WITH_ONE_KEY:
        return _Keys(ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate())
    key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    return _Keys(key, key)


def _ssh_key_file(key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> bytes:
    """As tsh writes it: RSA as PKCS#1, Ed25519 in OpenSSH's own format."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return private_key_openssh(key)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )

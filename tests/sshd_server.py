"""An OpenSSH server of a test's own: keys, certificate authorities, configuration, process.

    authority = Authority.new()
    sshd = Sshd(directory, Authority.new(), user_authority_lines=[authority.line])
    with sshd: ...connect to 127.0.0.1:sshd.port...

The server runs on the loopback and lets the caller's own user in, who needs a user certificate of
a trusted authority with that name as a principal. As root it runs in a mount and process namespace
of its own, with its own /run, a home and a shell without start-up files for the user, and the user
`sshd` also where the package is only unpacked.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
)

START_SECONDS = 20
_FOR_EVER = 2**64 - 1
PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

# Debian keeps it where an ordinary user's PATH does not lead.
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def sshd_program() -> str:
    """Where sshd is; a test that needs it fails without."""
    found = shutil.which("sshd", path=_PATH)
    assert found, "sshd is missing: install the package openssh-server"
    return found


def own_user() -> str:
    """The name that sessions of `Sshd` run under."""
    return pwd.getpwuid(os.getuid()).pw_name


def new_key(kind: str = "ed25519") -> PrivateKey:
    """Kinds: ed25519, ecdsa256, ecdsa384, ecdsa521, rsa."""
    if kind == "rsa":
        return rsa.generate_private_key(65537, 2048)
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    curves = {"ecdsa256": ec.SECP256R1(), "ecdsa384": ec.SECP384R1(), "ecdsa521": ec.SECP521R1()}
    return ec.generate_private_key(curves[kind])


def public_line(key: PrivateKey) -> bytes:
    """As in authorized_keys, without comment or newline."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def private_pem(key: PrivateKey) -> bytes:
    """As ssh-keygen writes it, without a passphrase."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


@dataclass(frozen=True)
class Authority:
    """Signs user and host certificates."""

    key: PrivateKey

    @classmethod
    def new(cls, kind: str = "ed25519") -> "Authority":
        return cls(new_key(kind))

    @property
    def line(self) -> bytes:
        return public_line(self.key)

    def certificate(
        self,
        key: PrivateKey,
        principals: Sequence[str],
        kind: SSHCertificateType,
        *,
        valid_after: int = 0,
        valid_before: int = _FOR_EVER,
        critical_options: Sequence[tuple[bytes, bytes]] = (),
        extensions: Sequence[tuple[bytes, bytes]] = (),
    ) -> bytes:
        """One public-key line with a certificate for the public half of `key`.

        Times are seconds since 1970. No principals: valid for all.
        """
        builder = (
            SSHCertificateBuilder()
            .public_key(key.public_key())
            .serial(1)
            .type(kind)
            .key_id(b"test")
            .valid_after(valid_after)
            .valid_before(valid_before)
        )
        if principals:
            builder = builder.valid_principals([name.encode() for name in principals])
        else:
            builder = builder.valid_for_all_principals()
        for name, value in critical_options:
            builder = builder.add_critical_option(name, value)
        for name, value in extensions:
            builder = builder.add_extension(name, value)
        return builder.sign(self.key).public_bytes()

    def host_certificate(self, key: PrivateKey, principals: Sequence[str], **fields) -> bytes:
        return self.certificate(key, principals, SSHCertificateType.HOST, **fields)

    def user_certificate(self, key: PrivateKey, principals: Sequence[str], **fields) -> bytes:
        """With all that ssh-keygen permits by default."""
        fields.setdefault(
            "extensions",
            [
                (f"permit-{what}".encode(), b"")
                for what in (
                    "X11-forwarding",
                    "agent-forwarding",
                    "port-forwarding",
                    "pty",
                    "user-rc",
                )
            ],
        )
        return self.certificate(key, principals, SSHCertificateType.USER, **fields)


class Sshd:
    """One sshd process; `with` starts and ends it, sessions included."""

    def __init__(
        self,
        directory: Path,
        host_authority: Authority | None,
        *,
        user_authority_lines: Sequence[bytes],
        principals: Sequence[str] = ("node1",),
        host_key: PrivateKey | None = None,
        host_certificate: bytes | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """The host certificate is `host_certificate`, or one of `host_authority` for `principals`.

        With neither it shows its plain host key. `options` are lines for its configuration;
        the first line for a keyword counts.
        """
        self.directory = directory
        self.user = own_user()
        self.port = 0
        self.log = directory / "sshd.log"
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        key = host_key or new_key()
        self._write("host_key", private_pem(key), 0o600)
        self._write("host_key.pub", public_line(key) + b"\n")
        self._write("user_authorities", b"\n".join(user_authority_lines) + b"\n")
        certificate = host_certificate
        if certificate is None and host_authority is not None:
            certificate = host_authority.host_certificate(key, principals)
        if certificate is not None:
            self._write("host_key-cert.pub", certificate + b"\n")
        self._lines = [
            *options,
            f"HostKey {directory}/host_key",
            *([f"HostCertificate {directory}/host_key-cert.pub"] if certificate else []),
            f"TrustedUserCAKeys {directory}/user_authorities",
            "AuthorizedKeysFile none",
            "AuthenticationMethods publickey",
            "PermitRootLogin yes",
            "StrictModes no",
            "UsePAM no",
            "PidFile none",
            "PrintMotd no",
            "PrintLastLog no",
            "UseDNS no",
            "LogLevel VERBOSE",
            "MaxStartups 1000",
            "MaxSessions 1000",
            "AcceptEnv LANG VNET_*",
            "AllowStreamLocalForwarding yes",
            "X11Forwarding yes",
            "Subsystem sftp internal-sftp",
        ]

    def __enter__(self) -> Self:
        for _ in range(5):  # another program may take the port that was free
            self.port = _free_port()
            if self._starts():
                return self
        raise AssertionError(self.log.read_text(errors="replace"))

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server; as root also every session, at once."""
        if self._process is not None:
            # unshare ignores SIGTERM; killed, it takes its child along.
            is_root = os.getuid() == 0
            self._process.send_signal(signal.SIGKILL if is_root else signal.SIGTERM)
            self._process.wait(START_SECONDS)
            self._process = None

    def _write(self, name: str, data: bytes, mode: int = 0o644) -> None:
        path = self.directory / name
        path.unlink(missing_ok=True)
        path.touch(mode)
        path.write_bytes(data)

    def _starts(self) -> bool:
        lines = [f"ListenAddress 127.0.0.1:{self.port}", *self._lines]
        self._write("sshd_config", "\n".join(lines).encode() + b"\n")
        command = [sshd_program(), "-D", "-e", "-f", f"{self.directory}/sshd_config"]
        if os.getuid() == 0:
            command = self._in_namespace(command)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            if f"on 127.0.0.1 port {self.port}" in self.log.read_text(errors="replace"):
                return True
            time.sleep(0.01)
        return False

    def _in_namespace(self, command: list[str]) -> list[str]:
        """Its own /run, with the directory that sshd demands, and its own users."""
        script = "mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && "
        lines = Path("/etc/passwd").read_text().splitlines()
        if not any(line.startswith("sshd:") for line in lines):
            lines.append("sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin")
        # A home without start-up files, which may do much and say much.
        (self.directory / "home").mkdir(exist_ok=True)
        own = f"{self.user}:x:{os.getuid()}:{os.getgid()}::{self.directory}/home:/bin/sh"
        lines = [own if line.startswith(f"{self.user}:") else line for line in lines]
        self._write("passwd", "\n".join([*lines, ""]).encode())
        script += f"mount --bind {self.directory}/passwd /etc/passwd && "
        script += 'exec "$@"'
        # sshd as process 1 of its namespace: with it the kernel ends every session.
        namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return [*namespace, "sh", "-ec", script, "sh", *command]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""SSH in whole systems: clusters with nodes, real sshds beside them, and the stock OpenSSH client.

ssh ── VNet ── embedded cluster ── the cluster's small SSH server (`node1`, ...)
                               └── Debian's sshd in the same network (`real`)
"""

import contextlib
import itertools
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from private_bed import Bed, wait_until
from sshd_server import own_user, sshd_program

LOGIN = own_user()
UUID = "00000000-0000-4000-8000-000000000007"
WEB_PORT = 3080
SSHD_PORT, LEAF_SSHD_PORT, RECORDED_SSHD_PORT = 2222, 2223, 2224
# OpenSSH's status for what is wrong with the connection, not with the command.
SSH_FAILED = 255

# A node of the root has the name of one of the leaf's, as far as the root can see.
CLUSTER = f"""
[[clusters]]
name = "ssh.test"
proxy_addr = "teleport.ssh.test:{WEB_PORT}"
logins = ["{LOGIN}"]
mfa_devices = ["totp"]
nodes = [
  {{ hostname = "node1", uuid = "{UUID}" }},
  {{ hostname = "node.with.dots" }},
  {{ hostname = "inner.leaf" }},
  {{ hostname = "twin" }},
  {{ hostname = "twin" }},
  {{ hostname = "mfa1", session_mfa = true }},
  {{ hostname = "secret", allowed_roles = ["admin"] }},
  {{ hostname = "real", addr = "127.0.0.1:{SSHD_PORT}" }},
  {{ hostname = "nobody", addr = "127.0.0.1:9" }},
]
apps = [{{ name = "app22", uri = "tcp://echo.backend.internal:22" }}]

[[clusters]]
name = "leaf.ssh.test"
leaf_of = "ssh.test"
logins = ["{LOGIN}"]
nodes = [
  {{ hostname = "inner" }},
  {{ hostname = "real", addr = "127.0.0.1:{LEAF_SSHD_PORT}" }},
  {{ hostname = "mfa2", session_mfa = true }},
]

[[clusters]]
name = "far.test"
leaf_of = "ssh.test"
logins = ["{LOGIN}"]
nodes = [{{ hostname = "deep" }}]
"""

_SSHD_CONFIG = """
ListenAddress 127.0.0.1:{port}
HostKey {files}/ssh_host_key
HostCertificate {files}/ssh_host_key-cert.pub
TrustedUserCAKeys {files}/user_ca.pub
AuthorizedKeysFile none
AuthenticationMethods publickey
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
PrintMotd no
PrintLastLog no
UseDNS no
LogLevel VERBOSE
MaxStartups 1000
MaxSessions 1000
AcceptEnv LANG VNET_*
AllowStreamLocalForwarding yes
X11Forwarding yes
Subsystem sftp internal-sftp
"""
# sshd wants a directory in /run, and a user of its own where it runs as root.
_IN_NAMESPACE = """
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
if ! getent passwd sshd >/dev/null; then
  { cat /etc/passwd; echo sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin; } > "$1"
  mount --bind "$1" /etc/passwd
fi
shift
exec "$@"
"""
_numbers = itertools.count()


def home(bed: Bed) -> Path:
    """The tsh home, as we see it."""
    return bed.path(bed.environment["TELEPORT_HOME"])


def ssh_config(bed: Bed) -> str:
    """The configuration that VNet writes for OpenSSH, as the bed's programs see it."""
    path = f"{bed.environment['TELEPORT_HOME']}/vnet_ssh_config"
    wait_until(lambda: bed.path(path).exists(), "VNet has written its ssh configuration")
    return path


@contextlib.contextmanager
def sshd_in(bed: Bed, node: str, port: int) -> Iterator[Path]:
    """Debian's sshd as a node of the cluster (`<hostname>.<cluster>`); its log."""
    number = next(_numbers)
    files = f"{bed.environment['TELEPORT_HOME']}/nodes/{node}"
    config = bed.directory / f"sshd-{number}.conf"
    config.write_text(_SSHD_CONFIG.format(port=port, files=files))
    command = [sshd_program(), "-D", "-e", "-f", str(config)]
    # As first process of a namespace it takes its sessions along when it ends.
    flags = ["--mount", "--pid", "--fork", "--kill-child"]
    script = ["sh", "-ec", _IN_NAMESPACE, "sh", str(bed.directory / f"passwd-{number}")]
    log = bed.directory / f"sshd-{number}.log"
    with bed.running("unshare", *flags, *script, *command, log_name=log.stem) as process:

        def listens() -> bool:
            assert process.poll() is None, log.read_text(errors="replace")
            return f"on 127.0.0.1 port {port}" in log.read_text(errors="replace")

        wait_until(listens, "sshd listens")
        yield log


def ssh_command(bed: Bed, *arguments: str) -> tuple[str, ...]:
    """The stock client with VNet's configuration and nothing of the user's."""
    return ("ssh", "-F", ssh_config(bed), "-o", "BatchMode=yes", *arguments)


def ssh(
    bed: Bed,
    host: str,
    *command: str,
    options: Sequence[str] = (),
    login: str = LOGIN,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
) -> subprocess.CompletedProcess[bytes]:
    """Runs `ssh login@host command` to its end."""
    where = (*options, "-l", login, host)
    return bed.run(*ssh_command(bed, *where, *command), stdin=stdin, timeout=timeout, env=env)


def ssh_output(bed: Bed, host: str, *command: str, **options: object) -> str:
    """Standard output of a command on a host, which must succeed."""
    done = ssh(bed, host, *command, **options)  # type: ignore[arg-type]
    assert done.returncode == 0, f"{host}: status {done.returncode}\n{done.stderr.decode()}"
    return done.stdout.decode()


def copied_key(bed: Bed, *names: str) -> Path:
    """Copies of these files of the tsh home in a directory of their own, private again."""
    directory = bed.directory / f"keys-{next(_numbers)}"
    directory.mkdir()
    for name in names:
        shutil.copyfile(home(bed) / name, directory / name)
        (directory / name).chmod(0o600)
    return directory

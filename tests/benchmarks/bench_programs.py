"""The compiled programs of the benchmarks: how each is started, and how it is waited for.

Each function starts one program in the foreground, with all its files in `home`, and returns it;
`Programs` ends what it has started, by process id.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
# What socat moves at once; larger blocks were not faster.
SOCAT_BLOCK = "-b131072"
_STOP_SECONDS = 5.0
# Debian keeps sshd where an ordinary PATH does not lead.
_PROGRAM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


class Programs:
    """Programs by name, ended in the reverse order of their start."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop_all()

    def stop_all(self) -> None:
        """Ends everything that still runs."""
        for name in reversed(list(self._running)):
            self.stop(name)

    def start(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> int:
        """Starts a program with its output in `<home>/<name>.log`; returns its process id."""
        with (self.home / f"{name}.log").open("wb") as log:
            program = subprocess.Popen(
                arguments,
                env=None if environment is None else {**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._running[name] = program
        return program.pid

    def stop(self, name: str) -> None:
        """Ends a program and waits for it."""
        program = self._running.pop(name)
        program.terminate()
        try:
            program.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()

    def check(self, name: str) -> None:
        """Raises RuntimeError with the end of its log when a program has ended."""
        if self._running[name].poll() is not None:
            log = (self.home / f"{name}.log").read_text(errors="replace")
            raise RuntimeError(f"{name} has ended: {log[-2000:]}")

    def pids(self, name: str) -> list[int]:
        """A program's process and all below it."""
        root = psutil.Process(self._running[name].pid)
        return [root.pid, *(child.pid for child in root.children(recursive=True))]


def nginx(home: Path, name: str, servers: str) -> list[str]:
    """Runs nginx with these `server` blocks (and maps) in its stream module."""
    directory = home / name
    directory.mkdir()
    configuration = directory / "nginx.conf"
    configuration.write_text(
        f"""load_module {NGINX_STREAM};
        user root; daemon off; worker_processes 2; pid {directory}/pid;
        error_log {directory}/error.log; worker_rlimit_nofile 20000;
        events {{ worker_connections 8192; }}
        stream {{ tcp_nodelay on; {servers} }}"""
    )
    error_log = str(directory / "error.log")
    return ["nginx", "-e", error_log, "-p", str(directory), "-c", str(configuration)]


def nginx_tls_server(
    address: str, backend: str, *, certificate: Path, client_ca: Path, alpn: str
) -> str:
    """A `server` block that ends TLS and demands a client certificate."""
    return f"""server {{ listen {address} ssl backlog=4096; proxy_pass {backend};
        ssl_certificate {certificate}; ssl_certificate_key {certificate};
        ssl_protocols TLSv1.3; ssl_alpn {alpn};
        ssl_client_certificate {client_ca}; ssl_verify_client on; }}"""


def nginx_tls_relay(address: str, upstream: str, *, certificate: Path) -> str:
    """A `server` block that takes plain connections and hands them on over TLS."""
    return f"""server {{ listen {address} backlog=4096; proxy_pass {upstream};
        proxy_ssl on; proxy_ssl_session_reuse off; proxy_ssl_protocols TLSv1.3;
        proxy_ssl_certificate {certificate}; proxy_ssl_certificate_key {certificate}; }}"""


def socat_tls(address: str, *, certificate: Path, ca: Path, name: str) -> str:
    """The socat address of a TLS connection with a client certificate."""
    return f"OPENSSL:{address},cert={certificate},cafile={ca},commonname={name},nodelay"


def socat_listen(host: str, port: int) -> str:
    """The socat address of a listening socket; each connection gets a process."""
    return f"TCP-LISTEN:{port},bind={host},fork,reuseaddr,backlog=2048,nodelay"


def redis(home: Path, host: str, port: int) -> list[str]:
    """Redis without persistence."""
    options = {"bind": host, "port": port, "save": "", "appendonly": "no", "dir": home}
    options |= {"maxclients": 9000, "tcp-backlog": 2048, "tcp-keepalive": 0}
    return ["redis-server", *(part for k, v in options.items() for part in (f"--{k}", str(v)))]


def dnsmasq(address: str, records: Mapping[str, str], wildcards: Mapping[str, str]) -> list[str]:
    """Runs dnsmasq, which knows these names, and every name below the wildcards, and nothing else."""
    return [
        *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--user=root"),
        *("--no-resolv", "--no-hosts", "--bind-interfaces", f"--listen-address={address}"),
        *(f"--host-record={name},{ip}" for name, ip in records.items()),
        *(f"--address=/{zone}/{ip}" for zone, ip in wildcards.items()),
    ]


def sshd(home: Path, files: Path, host: str, port: int) -> list[str]:
    """Debian's sshd with the host key, certificate and user authority of a node in `files`.

    Its log says what was agreed on. It sees the mounts that there are when it is started.
    """
    config = home / f"sshd-{port}.conf"
    config.write_text(
        f"""ListenAddress {host}:{port}
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
        LogLevel DEBUG1
        MaxStartups 1000
        Subsystem sftp internal-sftp
        Match User *
            LogLevel INFO
        """
    )
    # It wants a directory in /run. As first process of a namespace it takes its sessions along.
    script = 'mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec "$@"'
    namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    program = shutil.which("sshd", path=_PROGRAM_PATH)
    if program is None:
        raise RuntimeError("sshd is missing: install the package openssh-server")
    return [*namespace, "sh", "-ec", script, "sh", program, "-D", "-e", "-f", str(config)]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Raises RuntimeError when the condition does not come about in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    raise RuntimeError(f"{what} after {seconds:g} s")


def wait_for_port(host: str, port: int) -> None:
    """Returns when connections are accepted."""

    def accepts() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=1).close()
            return True
        return False

    wait_for(accepts, f"nothing listens on {host}:{port}")


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes; those that are gone count nothing."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total

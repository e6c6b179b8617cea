"""Where the chaos happens: a private network with an embedded cluster, a far end, a load and VNet.

    init (this program) ─┬─ cluster, with the DNS server above VNet
                         ├─ far end
                         ├─ load
                         └─ vnet-supervisor ── its workers

All of it lies in `directory`, the state directory on a small file system of its own. Whatever loses
its parent becomes a child of init: that is how orphans are found.
"""

import asyncio
import contextlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_far_end
import chaos_traffic
from chaos_traffic import Load

from demo import linux, upstream_dns
from demo.cluster.config import App, Cluster, ClusterFile, Node, check_clusters
from demo.cluster.server import run_demo_cluster
from demo.private_network import bring_up_loopback, use_own_resolver
from demo.session import toml
from ipc.slots import SSH
from supervisor.cli.control_client import AskError, ask_status
from supervisor.control_messages import Status as AskStatus
from supervisor.status import Health

ZONE = "chaos.test"
PROXY_HOST, PROXY_ADDRESS, PROXY_PORT = f"teleport.{ZONE}", "127.0.1.1", 443
UPSTREAM_DNS = "127.0.0.54"
APPS, FRESH, FOREIGN = 24, 4000, 300
# Half of VNet's own range: all names get their addresses there.
NAMES_RANGE = "100.64.0.0/11"
PROXIES = 2
WORKERS = ("tun", "dns", *(f"proxy-{number}" for number in range(PROXIES)), SSH)
NODE = f"node1.{ZONE}"
STATE_BYTES = 4 << 20
START_SECONDS = 60.0
STOP_SECONDS = 20.0


class ChaosError(Exception):
    """The run cannot go on; the text says why."""


@dataclass(slots=True)
class Bed:
    """What runs, and where its files are."""

    directory: Path
    hang_seconds: float
    server: str = ""
    # Process ids of what is neither VNet nor this program.
    helpers: list[int] = field(default_factory=list)
    _supervisor: "subprocess.Popen[bytes] | None" = None
    _commands: socket.socket | None = None

    @property
    def home(self) -> Path:
        return self.directory / "tsh"

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def log_path(self) -> Path:
        return self.directory / "vnet.log"

    @property
    def records_path(self) -> Path:
        return self.directory / "records"

    @property
    def ssh_config(self) -> Path:
        return self.directory / "ssh_config"

    @property
    def environment(self) -> dict[str, str]:
        """For `vnet` commands."""
        return os.environ | {"VNET_RUN_DIR": str(self.run_dir), "TELEPORT_HOME": str(self.home)}

    @property
    def supervisor_pid(self) -> int:
        assert self._supervisor is not None
        return self._supervisor.pid

    def log_size(self) -> int:
        return self.log_path.stat().st_size

    def log_lines(self, offset: int = 0) -> list[dict[str, Any]]:
        """The records of the log from a byte on; lines that are none are left out."""
        found = []
        with self.log_path.open("rb") as file:
            file.seek(offset)
            for line in file:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        found.append(record)
        return found

    def check(self) -> None:
        """Raises ChaosError when the supervisor has ended."""
        assert self._supervisor is not None
        if (status := self._supervisor.poll()) is not None:
            raise ChaosError(f"the supervisor has ended with status {status}")

    # -- the load --

    def start_load(self, load: Load, seed: int) -> None:
        """Starts the load's process; it does nothing until it is told to."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        pid = _fork(lambda: chaos_traffic.run(load, seed, theirs, self.records_path))
        theirs.close()
        self.helpers.append(pid)
        self._commands = ours

    def tell_load(self, command: str, seconds: float = 120.0) -> None:
        """`run`, or `pause`, which returns when all its connections have ended."""
        assert self._commands is not None
        self._commands.settimeout(seconds)
        try:
            self._commands.sendall(f"{command}\n".encode())
            answer = self._commands.recv(100)
        except TimeoutError as error:
            raise ChaosError(f"the load does not {command} within {seconds:g} s") from error
        if answer != b"done\n":
            raise ChaosError("the load has ended: see above")

    # -- VNet --

    def start_supervisor(self) -> None:
        """Starts VNet and waits until it is healthy."""
        config: dict[str, Any] = {
            "dns": {"upstream": [UPSTREAM_DNS], "os_integration": "none"},
            "proxy": {"workers": PROXIES},
            "supervisor": {"hang_seconds": self.hang_seconds, "heartbeat_seconds": 0.5},
            "teleport": {"ca_file": str(self.home / "web-ca.pem")},
        }
        path = self.directory / "vnet.toml"
        path.write_text(toml(config))
        arguments = [sys.executable, "-m", "supervisor.main", "--config", str(path)]
        arguments += ["--run-dir", str(self.run_dir), "--state-dir", str(self.state_dir)]
        arguments += ["--user", _own_name(), "--log-format", "json"]
        with self.log_path.open("ab") as log:
            self._supervisor = subprocess.Popen(
                arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.server = self._wait_until_healthy()

    def _wait_until_healthy(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        why = "it does not answer"
        while time.monotonic() < deadline:
            self.check()
            try:
                status, _ = ask_status(self.run_dir, AskStatus())
            except AskError as error:
                why = str(error)
            else:
                if status.health is Health.HEALTHY and status.network is not None:
                    return status.network.dns_addresses[0]
                why = "; ".join(status.reasons)
            time.sleep(0.05)
        raise ChaosError(f"VNet is not healthy after {START_SECONDS:g} s: {why}")

    def stop_supervisor(self) -> tuple[int | None, float]:
        """Ends VNet as a service manager does: its exit status (None: it had to be killed), seconds."""
        assert self._supervisor is not None
        began = time.monotonic()
        self._supervisor.terminate()
        status: int | None
        try:
            status = self._supervisor.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
            status = None
        return status, time.monotonic() - began

    def vnet(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Runs a `vnet` command to its end."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("vnet")), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def apps() -> tuple[str, ...]:
    """Names of apps that lead to the far end."""
    return tuple(f"app-{number:02}.{ZONE}" for number in range(APPS))


def foreign() -> dict[str, str]:
    """Names that are not VNet's, with their addresses."""
    return {
        f"site-{number:03}.elsewhere.test": f"192.0.2.{number % 250}" for number in range(FOREIGN)
    }


def load_of(bed: Bed) -> Load:
    """The usual load."""
    fresh = tuple(f"app-{number:05}.{ZONE}" for number in range(FRESH))
    return Load(bed.server, PROXIES, apps(), fresh, foreign(), NODE, bed.ssh_config)


@contextlib.contextmanager
def running(directory: Path, hang_seconds: float) -> Iterator[Bed]:
    """A bed in this process's own namespaces, with a healthy VNet."""
    bring_up_loopback()
    use_own_resolver(directory, UPSTREAM_DNS)
    bed = Bed(directory, hang_seconds)
    bed.state_dir.mkdir()
    linux.mount("chaos", bed.state_dir, "tmpfs", data=f"size={STATE_BYTES},mode=0755")
    bed.helpers += [_fork(chaos_far_end.serve), _fork(lambda: _serve_cluster(bed.home))]
    _wait_for_home(bed.home)
    _write_ssh_config(bed)
    bed.start_supervisor()
    try:
        yield bed
    finally:
        for pid in bed.helpers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _wait_for_home(home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (home / "current-profile").exists():
        if time.monotonic() > deadline:
            raise ChaosError("the embedded cluster does not start")
        time.sleep(0.02)


async def _serve_cluster(home: Path) -> None:
    home.mkdir(mode=0o700)
    names = foreign() | {PROXY_HOST: PROXY_ADDRESS}
    dns = asyncio.create_task(upstream_dns.serve(UPSTREAM_DNS, 53, names))
    await run_demo_cluster(_clusters(), home, bind_hosts={ZONE: PROXY_ADDRESS})
    dns.cancel()


def _clusters() -> ClusterFile:
    uri = f"tcp://{chaos_far_end.HOST}:{chaos_far_end.PORT}"
    cluster = Cluster(
        name=ZONE,
        proxy_addr=f"{PROXY_HOST}:{PROXY_PORT}",
        ipv4_cidr_range=NAMES_RANGE,
        custom_dns_zones=(ZONE,),
        apps=tuple(App(name=name.partition(".")[0], uri=uri, public_addr=name) for name in apps()),
        logins=(_own_name(),),
        nodes=(Node(hostname=NODE.partition(".")[0]),),
        generated_apps=FRESH,
    )
    return check_clusters(ClusterFile(clusters=(cluster,)))


def _own_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _write_ssh_config(bed: Bed) -> None:
    """As VNet's own, which has no hosts while there is no login."""
    bed.ssh_config.write_text(
        f"""Host {NODE}
    HostKeyAlias {NODE}
    IdentityFile {bed.home}/id_vnet
    GlobalKnownHostsFile {bed.home}/vnet_known_hosts
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    IdentitiesOnly yes
    IdentityAgent none
    BatchMode yes
"""
    )


def _fork(work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Runs `work` in another process, which ends with this one."""
    pid = os.fork()
    if pid:
        return pid
    try:
        linux.die_with_parent()
        signal.alarm(0)
        asyncio.run(work())
        os._exit(0)
    except BaseException:  # noqa: BLE001  # the outermost frame of the process
        traceback.print_exc()
    finally:
        os._exit(1)

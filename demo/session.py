"""`vnet demo`: an embedded cluster, a complete VNet and a command, in a private network.

127.0.0.54:53     upstream DNS, for the names of the proxies and of web apps, which proxies show
127.0.1.1, .2 ..  one address for each proxy
vnet0             VNet, started like any user would start it
"""

import asyncio
import contextlib
import json
import logging
import os
import pwd
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TextIO

import msgspec

from demo import linux, upstream_dns
from demo.cluster.config import ClusterFile, default_clusters, parse_cluster_file
from demo.cluster.errors import EmbeddedClusterError
from demo.cluster.server import EmbeddedCluster, run_demo_cluster
from demo.cluster.web import web_apps
from demo.errors import DemoError
from demo.private_network import (
    CANNOT_SET_UP,
    bring_up_loopback,
    run_in_private_network,
    use_own_resolver,
)
from supervisor.cli.control_client import AskError, ask_status
from supervisor.cli.progress import Progress
from supervisor.config import parse
from supervisor.control_messages import Status
from supervisor.exits import MisconfiguredError
from supervisor.status import Health

DNS_ADDRESS = "127.0.0.54"
FIRST_PROXY_ADDRESS = int(ip_address("127.0.1.1"))
START_SECONDS = 60.0
STOP_SECONDS = 8.0
POLL_SECONDS = 0.02
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# Lines of VNet's log that are shown when the demo cannot be set up.
LOG_LINES = 15


def run_demo(cluster_path: Path | None, config_path: Path | None, command: list[str]) -> int:
    """Runs a demo and returns the exit status of `command`, or 125."""
    try:
        clusters = _read_clusters(cluster_path)
        config = _read_config(config_path)
    except DemoError as error:
        _say(str(error))
        return CANNOT_SET_UP
    chosen = command or _shell()

    def work(directory: Path) -> int:
        return _Demo(directory, clusters, config).run(chosen)

    return run_in_private_network(work, _say, passes_interrupt=not chosen)


def run_cluster(cluster_path: Path | None, home: Path) -> int:
    """Runs only the embedded cluster, on loopback, until SIGINT or SIGTERM."""
    try:
        clusters = _read_clusters(cluster_path, proxy_addr="localhost:3080")
    except DemoError as error:
        _say(str(error))
        return CANNOT_SET_UP
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")

    def started(_cluster: EmbeddedCluster) -> None:
        _say(f"the cluster runs; TELEPORT_HOME={home}, its web CA is {home / 'web-ca.pem'}")

    try:
        asyncio.run(run_demo_cluster(clusters, home, started=started))
    except (EmbeddedClusterError, OSError) as error:
        _say(f"the cluster cannot be started: {error}")
        return CANNOT_SET_UP
    return 0


def _say(text: str) -> None:
    print(f"vnet demo: {text}", file=sys.stderr, flush=True)  # noqa: T201  # a command's output


def _shell() -> list[str]:
    return [os.environ.get("SHELL") or "/bin/sh"] if sys.stdin and sys.stdin.isatty() else []


def _read_clusters(path: Path | None, proxy_addr: str = "") -> ClusterFile:
    logins = tuple(dict.fromkeys((_user(), "root")))
    try:
        if path is not None:
            return parse_cluster_file(path.read_text())
        if proxy_addr:
            return default_clusters(proxy_addr, logins=logins)
        return default_clusters(logins=logins)
    except (OSError, UnicodeDecodeError, EmbeddedClusterError) as error:
        raise DemoError(f"{path or 'the default cluster'}: {_why(error)}") from error


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError as error:
        raise DemoError(f"the system knows no user of uid {os.getuid()}: run as another") from error


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _read_config(path: Path | None) -> dict[str, Any]:
    try:
        text = "" if path is None else path.read_text()
        parse(text)  # what is wrong with it is better said now than in the log of VNet
        return tomllib.loads(text)
    except (OSError, UnicodeDecodeError, MisconfiguredError) as error:
        raise DemoError(f"{path}: {_why(error)}") from error


def toml(config: Mapping[str, Any]) -> str:
    """A configuration as TOML: JSON's strings, numbers and arrays are TOML's too."""
    top = [f"{key} = {_value(value)}" for key, value in config.items() if not _is_table(value)]
    for name, table in config.items():
        if _is_table(table):
            top += [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(top) + "\n"


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{_value(key)} = {_value(item)}" for key, item in value.items())
        return "{" + inside + "}"
    # JSON's escapes for characters beyond 16 bits are none of TOML's.
    return json.dumps(value, ensure_ascii=False)


def upstream_names(clusters: ClusterFile, addresses: Mapping[str, str]) -> dict[str, str]:
    """What the upstream DNS server knows: names of proxies, and of web apps, which are there too.

    `addresses` are those of the proxies by name of their cluster.
    """
    found: dict[str, str] = {}
    for root in clusters.roots:
        leaves = (cluster for cluster in clusters.clusters if cluster.leaf_of == root.name)
        names = (root.proxy_host.lower(), *web_apps(root, leaves))
        found |= dict.fromkeys(names, addresses[root.name])
    return found


@dataclass(slots=True)
class _Demo:
    """Process 1 of the demo's namespaces."""

    directory: Path
    clusters: ClusterFile
    config: dict[str, Any]
    helpers: list[int] = field(default_factory=list)
    command: int | None = None
    stop_is_asked: bool = False

    @property
    def home(self) -> Path:
        return self.directory / "tsh"

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def log_path(self) -> Path:
        return self.directory / "vnet.log"

    def run(self, command: list[str]) -> int:
        """Sets everything up, runs the command, takes everything down."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._take_signal)
        bring_up_loopback()
        resolv_conf = use_own_resolver(self.directory, DNS_ADDRESS)
        self._start_cluster()
        supervisor = self._start_supervisor()
        try:
            with Progress("VNet starts"):
                dns_address = self._wait_until_healthy(supervisor)
            resolv_conf.write_text(f"nameserver {dns_address}\n")
            if command:
                return self._run_command(command)
            self._explain()
            self._wait_for_stop()
            return 0
        finally:
            self._stop(supervisor)

    def _wait_for_stop(self) -> None:
        # Blocked first: between a look at the flag and a pause a signal would be missed.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        if not self.stop_is_asked:
            signal.sigwait(STOP_SIGNALS)

    def _take_signal(self, number: int, _frame: object) -> None:
        self.stop_is_asked = True
        if self.command is not None and number != signal.SIGINT:
            os.kill(self.command, number)

    # -- cluster --

    def _proxy_addresses(self) -> dict[str, str]:
        return {
            root.name: str(ip_address(FIRST_PROXY_ADDRESS + index))
            for index, root in enumerate(self.clusters.roots)
        }

    def _start_cluster(self) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            os.setsid()
            self._serve_cluster(writer)
        os.close(writer)
        self.helpers.append(pid)
        with os.fdopen(reader) as pipe, Progress("the embedded cluster starts"):
            first_line = pipe.readline().strip()
        if first_line != "ready":
            raise DemoError(f"the embedded cluster does not start: {first_line or 'see above'}")

    def _serve_cluster(self, writer: int) -> None:
        """The cluster's process; it ends with the demo."""
        status = 1
        try:
            linux.die_with_parent()
            linux.drop_capabilities_on_exec()  # for what runs on SSH nodes
            self.home.mkdir(mode=0o700)
            with os.fdopen(writer, "w") as pipe:
                asyncio.run(self._serve(pipe))
            status = 0
        except Exception:  # noqa: BLE001  # the outermost frame of the process
            traceback.print_exc()
        finally:
            os._exit(status)

    async def _serve(self, pipe: TextIO) -> None:
        addresses = self._proxy_addresses()
        names = upstream_names(self.clusters, addresses)

        def started(_cluster: EmbeddedCluster) -> None:
            pipe.write("ready\n")
            pipe.flush()

        dns = asyncio.create_task(upstream_dns.serve(DNS_ADDRESS, 53, names))
        try:
            await run_demo_cluster(self.clusters, self.home, bind_hosts=addresses, started=started)
        except (EmbeddedClusterError, OSError) as error:
            pipe.write(f"{error}\n")
        finally:
            dns.cancel()

    # -- VNet --

    def _start_supervisor(self) -> "subprocess.Popen[bytes]":
        config = msgspec.to_builtins(self.config)
        config.setdefault("dns", {}).update(upstream=[DNS_ADDRESS], os_integration="none")
        config.setdefault("teleport", {})["ca_file"] = str(self.home / "web-ca.pem")
        config_path = self.directory / "vnet.toml"
        config_path.write_text(toml(config))
        arguments = [sys.executable, "-m", "supervisor.main", "--config", str(config_path)]
        arguments += ["--run-dir", str(self.run_dir), "--user", _user()]
        arguments += ["--state-dir", str(self.directory / "state")]
        level = os.environ.get("VNET_DEMO_LOG_LEVEL")
        if level:
            arguments += ["--log-level", level]
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                arguments,
                env=os.environ | {"TELEPORT_HOME": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C is for the command; VNet goes on until the command has ended.
                start_new_session=True,
                preexec_fn=linux.die_with_parent,  # noqa: PLW1509  # this process has one thread
            )

    def _wait_until_healthy(self, supervisor: "subprocess.Popen[bytes]") -> str:
        """Waits, and returns the DNS server's first address."""
        deadline = time.monotonic() + START_SECONDS
        why = "it did not answer"
        while time.monotonic() < deadline:
            if self.stop_is_asked:
                raise DemoError("it was stopped while it started")
            if supervisor.poll() is not None:
                raise DemoError(f"vnet-supervisor ended: {self._last_log_lines()}")
            try:
                found, _ = ask_status(self.run_dir, Status())
            except AskError as error:
                why = str(error)
            else:
                if found.health is Health.HEALTHY and found.network is not None:
                    return found.network.dns_addresses[0]
                why = "; ".join(found.reasons) or found.health
            time.sleep(POLL_SECONDS)
        raise DemoError(f"VNet is not healthy after {START_SECONDS:g} s: {why}")

    def _last_log_lines(self) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except OSError:
            return "without a log"
        return "\n".join(lines[-LOG_LINES:])

    def _stop(self, supervisor: "subprocess.Popen[bytes]") -> None:
        supervisor.terminate()
        try:
            supervisor.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            supervisor.kill()
        for pid in self.helpers:
            # It may have ended by itself and been reaped.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    # -- the command --

    def _run_command(self, command: list[str]) -> int:
        pid = os.fork()
        if pid == 0:
            self._become(command)
        self.command = pid
        if self.stop_is_asked:  # in between, when there was nobody to pass the signal on to
            os.kill(pid, signal.SIGTERM)
        while True:
            # As process 1 this one is also handed the orphans of the command.
            ended, status = os.wait()
            if ended == pid:
                self.command = None
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def _become(self, command: list[str]) -> None:
        """Replaces this forked process by the command."""
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            linux.drop_capabilities_on_exec()
            own_programs = Path(sys.executable).parent
            path = os.environ.get("PATH", os.defpath)
            environment = os.environ | {
                "VNET_RUN_DIR": str(self.run_dir),
                "TELEPORT_HOME": str(self.home),
                "PATH": f"{own_programs}:{path}",
            }
            os.execvpe(command[0], command, environment)
        except OSError as error:
            _say(f"{shlex.join(command)}: {error.strerror}")
        finally:
            # As shells do: 127 for a command that is not there or cannot be run.
            os._exit(127)

    def _explain(self) -> None:
        root = self.clusters.roots[0]
        tries = [f"curl http://{app.public_addr}/" for app in root.apps[:1]]
        config = "$TELEPORT_HOME/vnet_ssh_config"
        tries += [f"ssh -F {config} {node.hostname}.{root.name}" for node in root.nodes[:1]]
        _say(f"VNet runs in a private network; try: {', or '.join(tries) or 'vnet status'}")

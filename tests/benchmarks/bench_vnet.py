"""A whole VNet and the DNS server above it, as all benchmarks start them."""

import os
import pwd
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import bench_programs as programs
from bench_programs import Programs, wait_for

from demo.private_network import bring_up_loopback, use_own_resolver
from demo.session import toml
from supervisor.cli.control_client import AskError, ask_status
from supervisor.control_messages import Status as AskStatus
from supervisor.status import Health, Status

UPSTREAM_DNS = "127.0.0.54"
# Every name below it has an address, and none is VNet's.
FORWARDED_ZONE = "forwarded.test"
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Vnet:
    """A running VNet with its files in `directory`."""

    directory: Path
    dns_address: str

    @property
    def config(self) -> Path:
        return self.directory / "vnet.toml"

    @property
    def home(self) -> Path:
        return self.directory / "tsh"

    def status(self) -> Status:
        """What `vnet status` says."""
        status = status_of(self.directory)
        assert status is not None
        return status

    def pids(self) -> dict[str, list[int]]:
        """VNet's processes by name."""
        status = self.status()
        assert status.workers is not None
        assert status.supervisor is not None
        workers = {worker.name: [worker.pid] for worker in status.workers if worker.pid}
        return {"supervisor": [status.supervisor.pid], **workers}


def start_upstream_dns(started: Programs, directory: Path, proxies: Mapping[str, str]) -> None:
    """dnsmasq, which knows the proxies' addresses, as the resolver of this network namespace."""
    bring_up_loopback()
    use_own_resolver(directory, UPSTREAM_DNS)
    names = {**proxies, "known.test": "192.0.2.1"}
    upstream = programs.dnsmasq(UPSTREAM_DNS, names, {FORWARDED_ZONE: "192.0.2.2"})
    started.start("dnsmasq", upstream)


def start_vnet(started: Programs, directory: Path, ca_file: Path) -> Vnet:
    """A healthy VNet for the tsh home in `directory`, and the resolver pointed at it."""
    config = {
        "dns": {"upstream": [UPSTREAM_DNS], "os_integration": "none"},
        "teleport": {"ca_file": str(ca_file)},
    }
    (directory / "vnet.toml").write_text(toml(config))
    arguments = [sys.executable, "-m", "supervisor.main", "--config", str(directory / "vnet.toml")]
    arguments += ["--run-dir", str(directory / "run"), "--state-dir", str(directory / "state")]
    arguments += ["--user", pwd.getpwuid(os.getuid()).pw_name]
    started.start("vnet", arguments, {"TELEPORT_HOME": str(directory / "tsh")})
    vnet = Vnet(directory, _wait_until_healthy(started, directory))
    (directory / "resolv.conf").write_text(f"nameserver {vnet.dns_address}\n")
    return vnet


def status_of(directory: Path) -> Status | None:
    """The status of the VNet with its files there; None when it does not answer."""
    try:
        return ask_status(directory / "run", AskStatus())[0]
    except AskError:
        return None


def _wait_until_healthy(started: Programs, directory: Path) -> str:
    def is_healthy() -> bool:
        started.check("vnet")
        status = status_of(directory)
        return status is not None and status.health is Health.HEALTHY

    wait_for(is_healthy, "VNet is not healthy", START_SECONDS)
    status = status_of(directory)
    assert status is not None
    assert status.network is not None
    return status.network.dns_addresses[0]

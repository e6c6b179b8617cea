"""What was found out before anything is judged. Pure: values only."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import msgspec

from supervisor.osconfig.route_conflicts import HostRoutes
from supervisor.ssh_config_include import Inclusion
from supervisor.status import Status


class VnetFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a running supervisor knows; its answer to `Diag`.

    `os_wanted` is `dns.os_integration`, `os_reasons` are the clauses of its choice. The problems are
    parts of the status's reasons, by what they are about.
    """

    status: Status
    teleport_home: str
    state_dir: str
    ca_file: str
    insecure: bool
    os_wanted: str
    ipv6_wanted: str
    os_reasons: list[str]
    os_problems: list[str]
    network_problems: list[str]
    login_problems: list[str]


@dataclass(frozen=True, slots=True)
class RouteFacts:
    """Routes of this host. `ways` are (range of VNet's, interface an address in it is sent to).

    The interface is empty where the address is sent nowhere; then `problem` of the third says why.
    """

    host: HostRoutes
    has_interface: bool
    ways: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SshFacts:
    """The user's SSH configuration; `text` is None where there is no such file."""

    config_path: Path
    wanted_path: Path
    text: str | None
    inclusion: Inclusion = Inclusion.NOT


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What one of VNet's DNS addresses answered when it was asked directly."""

    address: str
    a: str = ""
    aaaa: str = ""
    error: str = ""

    @property
    def is_reachable(self) -> bool:
        return bool(self.a or self.aaaa)


class Outcome(StrEnum):
    """What the system's resolver made of a question."""

    FOUND = "found"
    NOT_FOUND = "not found"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """The system's resolver was asked for a probe name in `zone`; `kind` is A or AAAA."""

    zone: str
    kind: str
    outcome: Outcome
    observed: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class DnsFacts:
    """Answers to probe names. `expected` has the right answer of each kind that is known."""

    servers: tuple[ServerFacts, ...]
    expected: dict[str, str] = field(default_factory=dict)
    records: tuple[RecordFacts, ...] = ()
    zones_left_out: int = 0


@dataclass(frozen=True, slots=True)
class Ipv6Facts:
    """Settings of the kernel; None where they cannot be read."""

    is_disabled_for_all: bool | None
    is_disabled_for_interface: bool | None


@dataclass(frozen=True, slots=True)
class ResolverFacts:
    """What the system would have VNet use; only asked while VNet does not run."""

    backend: str
    reasons: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class LeftoverFacts:
    """What a VNet may have left. `changes` describe the journal; None if it may not be read.

    `marks` maps each back end to its file that has VNet's mark or name. `is_in_use`: a VNet runs
    with this state directory, whatever the control socket says.
    """

    state_dir: Path
    changes: tuple[str, ...] | None
    marks: dict[str, str] = field(default_factory=dict)
    is_in_use: bool = False


@dataclass(frozen=True, slots=True)
class LoginFacts:
    """One profile of the tsh home. `state` is a cluster state of `ipc.messages`."""

    profile: str
    user: str
    state: str
    problem: str
    not_before: datetime | None = None
    not_after: datetime | None = None


@dataclass(frozen=True, slots=True)
class HomeFacts:
    """A tsh home."""

    directory: str
    problem: str
    logins: tuple[LoginFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class ProxyFacts:
    """How far one gets to a Teleport proxy as the caller. Errors are empty where all is well.

    `connects` are (address, error) of every address that was tried directly; none behind a forward
    proxy, whose name without password is `forward_proxy`. `skew_seconds` is how much the proxy's
    clock is ahead of ours, give or take `skew_error_seconds`.
    """

    profile: str
    address: str
    cluster: str
    lookup_error: str = ""
    forward_proxy: str = ""
    connects: tuple[tuple[str, str], ...] = ()
    web_error: str = ""
    is_untrusted: bool = False
    auth_error: str = ""
    server_version: str = ""
    skew_seconds: float | None = None
    skew_error_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A socket that takes DNS questions on this host. Without a right to look, `pid` is None."""

    protocol: str
    address: str
    pid: int | None
    program: str


@dataclass(frozen=True, slots=True)
class PortFacts:
    """Who holds port 53, and whom programs ask (`nameservers` of /etc/resolv.conf)."""

    holders: tuple[Holder, ...]
    nameservers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Raw samples of the machine, as far as they may be read. See `supervisor.diag.surroundings`.

    `capabilities` is the effective set of this process as bits; None if unknown.
    """

    kernel: str = ""
    init_environment: bytes = b""
    manager: str = ""
    has_dockerenv: bool = False
    containerenv: str | None = None
    has_openvz: bool = False
    cgroups: str = ""
    interfaces: tuple[str, ...] = ()
    resolv_conf: str = ""
    mounts: str = ""
    has_tun: bool = True
    is_root: bool = False
    capabilities: int | None = None

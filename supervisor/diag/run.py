"""One diagnosis: everything is looked at in parallel, then judged. Takes `TOTAL_SECONDS` at most."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from supervisor.diag import gather, probing, programs
from supervisor.diag.clock_check import check_clock
from supervisor.diag.dns_check import check_dns
from supervisor.diag.facts import (
    DnsFacts,
    HomeFacts,
    Ipv6Facts,
    LeftoverFacts,
    PortFacts,
    ProxyFacts,
    ResolverFacts,
    RouteFacts,
    SshFacts,
    Surroundings,
    VnetFacts,
)
from supervisor.diag.ipv6_check import check_ipv6
from supervisor.diag.leftover_check import check_leftovers
from supervisor.diag.login_check import check_logins
from supervisor.diag.model import (
    AttemptStatus,
    CannotCheckError,
    CheckAttempt,
    CheckReport,
    CheckStatus,
    CommandAttempt,
    DnsReport,
    NetworkStack,
    NetworkStackAttempt,
    Report,
    RouteConflictReport,
    SshConfigurationReport,
)
from supervisor.diag.parallel import Failed, run_all
from supervisor.diag.port_check import check_ports
from supervisor.diag.proxy_check import check_proxies
from supervisor.diag.redact import cleaned
from supervisor.diag.resolver_check import check_resolver
from supervisor.diag.route_check import check_routes
from supervisor.diag.ssh_check import check_ssh
from supervisor.diag.surroundings import check_surroundings
from supervisor.diag.vnet_check import check_vnet
from supervisor.settings import User
from supervisor.status import NetworkStatus

# With the question to VNet before it, 20 s.
TOTAL_SECONDS: Final = 17.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is diagnosed. `vnet` is None while no VNet answers; `error` then says why.

    `is_silent`: there is one, but it does not say what was asked.
    """

    vnet: VnetFacts | None
    error: str
    is_silent: bool
    user: User
    teleport_home: Path
    state_dir: Path
    os_wanted: str
    version: str

    @property
    def network(self) -> NetworkStatus | None:
        """VNet's network; None while it is not known."""
        return None if self.vnet is None else self.vnet.status.network

    def require(self) -> tuple[VnetFacts, NetworkStatus]:
        """What a running VNet has said. Raises CannotCheckError."""
        if self.vnet is None:
            raise CannotCheckError(
                "VNet does not answer" if self.is_silent else "VNet is not running"
            )
        if self.network is None:
            raise CannotCheckError("VNet has no network yet")
        return self.vnet, self.network


@dataclass(frozen=True, slots=True)
class Clients:
    """What the Teleport client finds out: the logins, and the way to their proxies."""

    read_home: Callable[[], HomeFacts]
    probe_proxies: Callable[[], tuple[ProxyFacts, ...]]


def diagnose(
    subject: Subject, clients: Clients, now: datetime, progress: Callable[[str], None]
) -> Report:
    """The whole report of this moment, without secrets. `progress` hears what is done."""
    jobs = _jobs(subject, clients)
    found = run_all(jobs, TOTAL_SECONDS, progress)
    report = Report(
        created_at=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        version=subject.version,
        network_stack_attempt=_network_stack(subject),
        checks=[*_checks(subject, _Found(found), now)],
    )
    return msgspec.convert(cleaned(msgspec.to_builtins(report)), Report)


def _jobs(subject: Subject, clients: Clients) -> dict[str, Callable[[], Any]]:
    jobs: dict[str, Callable[[], Any]] = {
        "SSH configuration": partial(gather.gather_ssh, subject.user.home, subject.teleport_home),
        "leftovers": partial(gather.gather_leftovers, subject.state_dir),
        "logins": clients.read_home,
        "proxies": clients.probe_proxies,
        "port 53": gather.gather_ports,
        "surroundings": gather.gather_surroundings,
    }
    network = subject.network
    if network is None:
        jobs["resolver"] = partial(gather.gather_resolver, subject.os_wanted)
    else:
        jobs["routes"] = partial(gather.gather_routes, network)
        jobs["IPv6"] = partial(gather.gather_ipv6, network.interface)
        jobs["DNS"] = partial(probing.probe_dns, network.dns_addresses, network.dns_zones)
    for command in (*programs.ROUTES, *programs.RESOLVER):
        if programs.find(command[0]) is not None:
            jobs[" ".join(command)] = partial(programs.run, command)
    return jobs


class _Found:
    """Results by the name of their job."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._results = results

    def take(self, name: str, kind: type[T]) -> T:
        """The result. Raises CannotCheckError if there is none."""
        result = self._results[name]
        if isinstance(result, Failed):
            raise CannotCheckError(_reason(result.error))
        assert isinstance(result, kind)
        return result

    def maybe(self, name: str, kind: type[T]) -> T | None:
        """The result, or None."""
        try:
            return self.take(name, kind)
        except CannotCheckError:
            return None

    def commands(self, wanted: Sequence[Sequence[str]]) -> list[CommandAttempt]:
        """What the programs wrote; those that are not installed are left out."""
        attempts = []
        for name in (" ".join(arguments) for arguments in wanted):
            result = self._results.get(name)
            if result is None:
                continue
            if isinstance(result, Failed):
                error = _reason(result.error)
                result = CommandAttempt(
                    status=AttemptStatus.ERROR, error=error, command=name, output=""
                )
            attempts.append(result)
        return attempts


def _reason(error: Exception) -> str:
    if isinstance(error, CannotCheckError | TimeoutError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return f"internal error: {type(error).__name__}: {error}"


def _checks(subject: Subject, found: _Found, now: datetime) -> Iterator[CheckAttempt]:
    vnet = subject.vnet
    backend = None if subject.network is None else subject.network.os_integration
    is_running = vnet is not None or subject.is_silent

    def routes() -> CheckReport:
        known, _ = subject.require()
        return check_routes(known, found.take("routes", RouteFacts), subject.user.uid)

    def dns() -> CheckReport:
        _, network = subject.require()
        return check_dns(
            found.take("DNS", DnsFacts),
            has_zones=bool(network.dns_zones),
            backend=network.os_integration,
        )

    def ipv6() -> CheckReport:
        known, _ = subject.require()
        return check_ipv6(
            known,
            found.take("IPv6", Ipv6Facts),
            found.maybe("routes", RouteFacts),
            found.maybe("DNS", DnsFacts),
        )

    def resolver() -> CheckReport:
        if subject.network is not None:
            return check_resolver(vnet, None)
        return check_resolver(None, found.take("resolver", ResolverFacts))

    yield _attempt(
        "routes",
        routes,
        CheckReport(
            status=CheckStatus.UNSPECIFIED,
            findings=[],
            details=[],
            route_conflict_report=RouteConflictReport(route_conflicts=[]),
        ),
        found.commands(programs.ROUTES),
    )
    yield _attempt(
        "ssh",
        lambda: check_ssh(found.take("SSH configuration", SshFacts)),
        CheckReport(
            status=CheckStatus.UNSPECIFIED,
            findings=[],
            details=[],
            ssh_configuration_report=SshConfigurationReport(
                user_openssh_config_path="",
                vnet_ssh_config_path="",
                user_openssh_config_includes_vnet_ssh_config=False,
                user_openssh_config_exists=False,
                user_openssh_config_contents="",
            ),
        ),
    )
    yield _attempt(
        "dns",
        dns,
        CheckReport(
            status=CheckStatus.UNSPECIFIED,
            findings=[],
            details=[],
            dns_report=DnsReport(ipv4_server=None, ipv6_server=None, zones=[]),
        ),
        found.commands(programs.RESOLVER),
    )
    yield _attempt(
        "vnet",
        lambda: check_vnet(
            vnet, subject.error, is_silent=subject.is_silent, version=subject.version
        ),
    )
    yield _attempt("ipv6", ipv6)
    yield _attempt("resolver", resolver)
    yield _attempt(
        "leftovers",
        lambda: check_leftovers(
            found.take("leftovers", LeftoverFacts), backend, is_running=is_running
        ),
    )
    yield _attempt("logins", lambda: check_logins(found.take("logins", HomeFacts), now))
    yield _attempt("proxies", lambda: check_proxies(vnet, found.take("proxies", tuple)))
    yield _attempt(
        "clock",
        lambda: check_clock(
            found.maybe("logins", HomeFacts), found.maybe("proxies", tuple) or (), now
        ),
    )
    yield _attempt("ports", lambda: check_ports(found.take("port 53", PortFacts), backend))
    yield _attempt(
        "surroundings",
        lambda: check_surroundings(found.take("surroundings", Surroundings), is_running=is_running),
    )


_EMPTY: Final = CheckReport(status=CheckStatus.UNSPECIFIED, findings=[], details=[])


def _attempt(
    name: str,
    check: Callable[[], CheckReport],
    empty: CheckReport = _EMPTY,
    commands: list[CommandAttempt] | None = None,
) -> CheckAttempt:
    """One check; a fault of it must not cost the rest of the report."""
    try:
        status, error, report = AttemptStatus.OK, "", check()
    except Exception as failure:  # noqa: BLE001  # told in the report
        status, error, report = AttemptStatus.ERROR, _reason(failure), empty
    return CheckAttempt(
        id=name, status=status, error=error, check_report=report, commands=commands or []
    )


def _network_stack(subject: Subject) -> NetworkStackAttempt:
    try:
        _, network = subject.require()
    except CannotCheckError as error:
        text = subject.error if subject.is_silent else str(error)
        return NetworkStackAttempt(status=AttemptStatus.ERROR, error=text)
    return NetworkStackAttempt(
        status=AttemptStatus.OK,
        network_stack=NetworkStack(
            interface_name=network.interface,
            ipv4_cidr_ranges=network.ipv4_cidr_ranges,
            ipv6_prefix=network.ipv6_prefix or "",
            dns_zones=network.dns_zones,
        ),
    )

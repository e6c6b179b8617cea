"""The report as `vnet diag --json` prints it; docs/schema/diag.json. Pure.

The layout is that of Teleport's own diagnosis (proto/teleport/lib/vnet/diag/v1/diag.proto): an attempt
to describe the network, then one attempt for each check, with the names of JSON in camel case.
`findings`, `details` and the checks beyond the first three are VNet's own.
"""

from enum import StrEnum
from typing import Final

import msgspec

from supervisor.diag.findings import Finding, Severity

SCHEMA: Final = 1


class AttemptStatus(StrEnum):
    """Whether something could be looked at."""

    OK = "OK"
    ERROR = "ERROR"


class CheckStatus(StrEnum):
    """What came of a look. UNSPECIFIED: there was none."""

    UNSPECIFIED = "UNSPECIFIED"
    OK = "OK"
    ISSUES_FOUND = "ISSUES_FOUND"


class RecordStatus(StrEnum):
    """What the system's resolver says of a probe name."""

    OK = "OK"
    HIJACKED = "HIJACKED"
    NOT_REGISTERED = "NOT_REGISTERED"
    TIMEOUT = "TIMEOUT"
    RESOLVER_ERROR = "RESOLVER_ERROR"


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    pass


class NetworkStack(_Part, frozen=True):
    """What VNet says of its network. `ipv6_prefix` is empty while IPv6 is off."""

    interface_name: str
    ipv4_cidr_ranges: list[str]
    ipv6_prefix: str
    dns_zones: list[str]


class NetworkStackAttempt(_Part, frozen=True):
    """`network_stack` is null exactly for ERROR."""

    status: AttemptStatus
    error: str = ""
    network_stack: NetworkStack | None = None


class RouteConflict(_Part, frozen=True):
    """A route of something else in the way of one of VNet's. `dest` may be empty: a policy rule."""

    dest: str
    vnet_dest: str
    interface_name: str
    interface_app: str


class RouteConflictReport(_Part, frozen=True):
    """Every interface in the way, once for each of its routes."""

    route_conflicts: list[RouteConflict]


class SshConfigurationReport(_Part, frozen=True):
    """Whether OpenSSH finds VNet's file. Of the contents only what matters for that is shown."""

    user_openssh_config_path: str
    vnet_ssh_config_path: str
    user_openssh_config_includes_vnet_ssh_config: bool
    user_openssh_config_exists: bool
    user_openssh_config_contents: str


class DnsServerReachability(_Part, frozen=True):
    """One of VNet's DNS addresses, asked directly."""

    address: str
    reachable: bool
    responded_a: bool
    responded_aaaa: bool
    error: str


class DnsRecord(_Part, frozen=True):
    """What the system's resolver says for one type of record."""

    status: RecordStatus
    observed_ip: str = ""
    error: str = ""


class DnsZone(_Part, frozen=True):
    """One zone; null for a type that was not asked for."""

    zone: str
    a_record: DnsRecord | None
    aaaa_record: DnsRecord | None


class DnsReport(_Part, frozen=True):
    """The ways a question takes to VNet. A family without an address of VNet's is null."""

    ipv4_server: DnsServerReachability | None
    ipv6_server: DnsServerReachability | None
    zones: list[DnsZone]


class Detail(_Part, frozen=True):
    """Something that was looked at, whether or not it is well."""

    name: str
    value: str


class CheckReport(_Part, frozen=True):
    """What a check has found; at most one of the last three is not null."""

    status: CheckStatus
    findings: list[Finding]
    details: list[Detail]
    route_conflict_report: RouteConflictReport | None = None
    ssh_configuration_report: SshConfigurationReport | None = None
    dns_report: DnsReport | None = None


class CommandAttempt(_Part, frozen=True):
    """A program of the system that was run for the report."""

    status: AttemptStatus
    error: str
    command: str
    output: str


class CheckAttempt(_Part, frozen=True):
    """One check. With ERROR its report is empty and `error` says why."""

    id: str
    status: AttemptStatus
    error: str
    check_report: CheckReport
    commands: list[CommandAttempt] = []


class Report(_Part, frozen=True, kw_only=True):
    """The whole. `created_at` is UTC (RFC 3339)."""

    schema: int = SCHEMA
    created_at: str
    version: str
    network_stack_attempt: NetworkStackAttempt
    checks: list[CheckAttempt]

    @property
    def findings(self) -> list[Finding]:
        """All findings, in the order of the checks."""
        return [found for check in self.checks for found in check.check_report.findings]

    @property
    def has_issues(self) -> bool:
        """Whether there is a problem, or something that could not be looked at."""
        is_whole = all(check.status is AttemptStatus.OK for check in self.checks)
        return not is_whole or any(f.severity is Severity.PROBLEM for f in self.findings)


def checked(
    findings: list[Finding],
    details: list[Detail] | None = None,
    *,
    routes: RouteConflictReport | None = None,
    ssh: SshConfigurationReport | None = None,
    dns: DnsReport | None = None,
) -> CheckReport:
    """The report of a check that could be done."""
    is_well = all(found.severity is Severity.NOTE for found in findings)
    return CheckReport(
        status=CheckStatus.OK if is_well else CheckStatus.ISSUES_FOUND,
        findings=findings,
        details=details or [],
        route_conflict_report=routes,
        ssh_configuration_report=ssh,
        dns_report=dns,
    )


class CannotCheckError(Exception):
    """A check is not possible; the text says why."""

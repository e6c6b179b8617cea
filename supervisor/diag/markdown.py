"""The report as text for people, and for an issue tracker: Markdown. Pure.

Its parts and their order are those of Teleport's own (web/packages/teleterm/src/services/vnet/diag.ts).
"""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from supervisor.diag.findings import Finding, Severity
from supervisor.diag.model import (
    AttemptStatus,
    CheckAttempt,
    CommandAttempt,
    DnsRecord,
    DnsReport,
    DnsServerReachability,
    RecordStatus,
    Report,
    RouteConflictReport,
    SshConfigurationReport,
)

_TITLES: Final = {
    "routes": "routes",
    "ssh": "SSH configuration",
    "dns": "DNS",
    "vnet": "VNet and its workers",
    "ipv6": "IPv6",
    "resolver": "the system's resolver",
    "leftovers": "what earlier runs have left",
    "logins": "logins",
    "proxies": "Teleport proxies",
    "clock": "the clock",
    "ports": "port 53",
    "surroundings": "the machine",
}
_WELL, _BAD, _KNOWN = "✅", "⚠️", "ℹ️"  # noqa: RUF001  # the sign for a note
_RECORD_WORDS: Final = {
    RecordStatus.OK: "OK",
    RecordStatus.HIJACKED: "hijacked",
    RecordStatus.NOT_REGISTERED: "not registered",
    RecordStatus.TIMEOUT: "timeout",
    RecordStatus.RESOLVER_ERROR: "resolver error",
}


def file_name(created: datetime, suffix: str) -> str:
    """The name under which a report is saved, by the time at which it was made."""
    return f"vnet_diag_report_{created.strftime('%Y-%m-%d_%H-%M-%S')}.{suffix}"


def render(report: Report, local_time: str) -> str:
    """The whole text, with a line feed at its end. `local_time` is `created_at` for the reader."""
    return "\n".join([*_head(report, local_time), *_body(report)]) + "\n"


def _head(report: Report, local_time: str) -> Iterator[str]:
    yield f"# VNet diagnostic report ({report.version})"
    yield ""
    yield f"Created at: {local_time} ({report.created_at})"
    attempt = report.network_stack_attempt
    network = attempt.network_stack
    if network is None:
        yield f"The network of VNet could not be determined: {attempt.error}"
    else:
        yield f"Network interface: {network.interface_name}"
        yield f"IPv4 CIDR ranges: {', '.join(network.ipv4_cidr_ranges)}"
        yield f"IPv6 prefix: {network.ipv6_prefix or 'none, IPv6 is off'}"
        yield f"DNS zones: {', '.join(network.dns_zones) or 'none'}"
    yield ""
    problems = [f for f in report.findings if f.severity is Severity.PROBLEM]
    unknown = [check for check in report.checks if check.status is AttemptStatus.ERROR]
    if not problems:
        yield f"{_WELL} No problem was found."
    else:
        yield f"{_BAD} Problems found: {len(problems)}"
        yield from (f"- {f.text} {f.advice}" for f in problems)
    if unknown:
        titles = ", ".join(_TITLES[check.id] for check in unknown)
        yield f"{_BAD} Could not be checked: {titles}"
    yield ""


def _body(report: Report) -> Iterator[str]:
    for number, check in enumerate(report.checks):
        if number:
            yield ""
        yield "---"
        yield from _check(check)


def _check(check: CheckAttempt) -> Iterator[str]:
    title = _TITLES[check.id]
    if check.status is AttemptStatus.ERROR:
        yield f"{_BAD} Failed to inspect {title}: {check.error}"
    else:
        yield from _summary(check, title)
    for command in check.commands:
        yield ""
        yield from _command(command)


def _summary(check: CheckAttempt, title: str) -> Iterator[str]:
    report = check.check_report
    if report.findings:
        yield f"{title[:1].upper()}{title[1:]}:"
        yield from map(_finding, report.findings)
    else:
        yield f"{_WELL} {title[:1].upper()}{title[1:]}: no problem found."
    if report.route_conflict_report is not None:
        yield from _routes(report.route_conflict_report)
    if report.ssh_configuration_report is not None:
        yield from _ssh(report.ssh_configuration_report)
    if report.dns_report is not None:
        yield from _dns(report.dns_report)
    if report.details:
        yield ""
        yield from table(["Looked at", "Found"], [[d.name, d.value] for d in report.details])


def _finding(found: Finding) -> str:
    sign = _BAD if found.severity is Severity.PROBLEM else _KNOWN
    return f"- {sign} {found.text} {found.advice} ({found.id})"


def _routes(report: RouteConflictReport) -> Iterator[str]:
    if report.route_conflicts:
        yield ""
        yield from table(
            ["VNet destination", "Conflicting destination", "Interface", "Set up by"],
            [
                [c.vnet_dest, c.dest or "a policy rule", c.interface_name or "none",
                 c.interface_app or "unknown"]
                for c in report.route_conflicts
            ],
        )  # fmt: skip


def _ssh(report: SshConfigurationReport) -> Iterator[str]:
    yield ""
    yield from table(
        ["File", "Path"],
        [
            ["User's configuration", report.user_openssh_config_path],
            ["VNet's configuration", report.vnet_ssh_config_path],
        ],
    )
    yield ""
    if report.user_openssh_config_exists:
        yield from _fenced(report.user_openssh_config_contents)
    else:
        yield f"{report.user_openssh_config_path} does not exist"


def _dns(report: DnsReport) -> Iterator[str]:
    yield ""
    servers = [s for s in (report.ipv4_server, report.ipv6_server) if s is not None]
    yield from (f"- {_server(server)}" for server in servers)
    if servers and not any(server.reachable for server in servers):
        yield ""
        yield "None of VNet's DNS addresses answers: a route or firewall may take its packets."
    wrong = [
        zone
        for zone in report.zones
        if any(r and r.status is not RecordStatus.OK for r in (zone.a_record, zone.aaaa_record))
    ]
    if not wrong:
        return
    yield ""
    yield f"{len(wrong)} of {len(report.zones)} zones do not reach VNet through the system's resolver:"
    yield ""
    columns = {
        "A": [zone.a_record for zone in wrong],
        "AAAA": [zone.aaaa_record for zone in wrong],
    }
    kept = {name: records for name, records in columns.items() if any(records)}
    rows = [
        [zone.zone, *(_record(records[number]) for records in kept.values())]
        for number, zone in enumerate(wrong)
    ]
    yield from table(["Zone", *kept], rows)


def _server(server: DnsServerReachability) -> str:
    if not server.reachable:
        return f"{_BAD} VNet's DNS server is unreachable on {server.address}: {server.error}"
    kinds = {"A": server.responded_a, "AAAA": server.responded_aaaa}
    answered = [kind for kind, is_answered in kinds.items() if is_answered]
    words = ", ".join(answered) if len(answered) > 1 else f"{answered[0]} only"
    return f"{_WELL} VNet's DNS server is reachable on {server.address} (responds to {words})"


def _record(record: DnsRecord | None) -> str:
    if record is None:
        return "—"
    observed = f" ({record.observed_ip})" if record.observed_ip else ""
    return f"{_RECORD_WORDS[record.status]}{observed}"


def _command(command: CommandAttempt) -> Iterator[str]:
    lines = [f"$ {command.command}"]
    if command.output:
        lines.append(command.output)
    if command.error:
        lines.append(f"error: {command.error}")
    yield from _fenced("\n".join(lines))


def _fenced(text: str) -> Iterator[str]:
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    yield fence
    yield text
    yield fence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; what would break out of a cell is escaped."""
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("\t", " ")

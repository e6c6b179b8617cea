"""Whether names reach VNet: directly, and by the way programs ask. Pure.

A probe name begins with `vnet-diag-`, is in the zone and was never asked for before; VNet's DNS server
answers it with its own addresses. Source: lib/vnet/diag/dns.go of Teleport.
"""

from collections.abc import Iterator
from ipaddress import ip_address

from supervisor.diag.facts import DnsFacts, Outcome, RecordFacts, ServerFacts
from supervisor.diag.findings import Finding, FindingId, finding
from supervisor.diag.model import (
    CheckReport,
    Detail,
    DnsRecord,
    DnsReport,
    DnsServerReachability,
    DnsZone,
    RecordStatus,
    checked,
)

# Zones that one sentence names.
MAX_NAMED = 5
PROBE_PREFIX = "vnet-diag-"
PROBE_RANDOM_BYTES = 8
# RFC 6761: nobody's, so VNet alone answers there.
DIRECT_ZONE = "test"


def probe_name(random_bytes: bytes, zone: str) -> str:
    """A name that nobody has asked for (PROBE_RANDOM_BYTES), without the final dot."""
    return f"{PROBE_PREFIX}{random_bytes.hex()}.{zone}"


def expected_of(servers: tuple[ServerFacts, ...]) -> dict[str, str]:
    """The right answer of each kind: the IPv6 server's, else the IPv4 server's."""
    found: dict[str, str] = {}
    for server in sorted(servers, key=lambda server: ":" not in server.address):
        for kind, address in (("A", server.a), ("AAAA", server.aaaa)):
            if address:
                found.setdefault(kind, address)
    return found


def status_of(record: RecordFacts, expected: str) -> RecordStatus:
    """What the answer of the system's resolver means."""
    match record.outcome:
        case Outcome.FOUND:
            is_right = expected in record.observed
            return RecordStatus.OK if is_right else RecordStatus.HIJACKED
        case Outcome.NOT_FOUND:
            return RecordStatus.NOT_REGISTERED
        case Outcome.TIMEOUT:
            return RecordStatus.TIMEOUT
        case _:
            return RecordStatus.RESOLVER_ERROR


def check_dns(facts: DnsFacts, *, has_zones: bool, backend: str) -> CheckReport:
    """`backend` is what sets up the system's resolver, "none" if that is left to the user."""
    findings = [*_unreachable(facts)]
    zones: dict[str, dict[str, DnsRecord]] = {}
    for record in facts.records:
        status = status_of(record, facts.expected[record.kind])
        is_wrong = status is RecordStatus.HIJACKED
        zones.setdefault(record.zone, {})[record.kind] = DnsRecord(
            status=status,
            observed_ip=record.observed[0] if is_wrong else "",
            error=record.error if status not in (RecordStatus.OK, RecordStatus.HIJACKED) else "",
        )
    findings += _by_status(zones, backend)
    if not has_zones:
        findings.append(
            finding(
                FindingId.DNS_NO_ZONES,
                "VNet serves no DNS zone.",
                "Log in with tsh login; the zones of a login are served within a second.",
            )
        )
    details = []
    if facts.zones_left_out:
        value = f"{facts.zones_left_out} more zones were not asked for"
        details.append(Detail(name="Left out", value=value))
    ipv4 = [s for s in facts.servers if ip_address(s.address).version == 4]
    ipv6 = [s for s in facts.servers if ip_address(s.address).version == 6]
    report = DnsReport(
        ipv4_server=_reachability(ipv4),
        ipv6_server=_reachability(ipv6),
        zones=[
            DnsZone(zone=zone, a_record=found.get("A"), aaaa_record=found.get("AAAA"))
            for zone, found in zones.items()
        ],
    )
    return checked(findings, details, dns=report)


def _unreachable(facts: DnsFacts) -> Iterator[Finding]:
    are_all = not any(server.is_reachable for server in facts.servers)
    for server in facts.servers:
        if not server.is_reachable:
            advice = "Look for a firewall or route that takes packets to this address"
            advice += "; vnet status says whether the worker dns runs." if are_all else "."
            text = f"VNet's DNS server does not answer at {server.address}: {server.error}."
            yield finding(FindingId.DNS_SERVER_UNREACHABLE, text, advice)


def _by_status(zones: dict[str, dict[str, DnsRecord]], backend: str) -> Iterator[Finding]:
    for status in RecordStatus:
        if status is RecordStatus.OK:
            continue
        concerned = {
            zone: record
            for zone, records in zones.items()
            for record in records.values()
            if record.status is status
        }
        if concerned:
            kinds = [
                kind
                for kind in ("A", "AAAA")
                if any(kind in r and r[kind].status is status for r in zones.values())
            ]
            yield _finding(status, list(concerned), kinds, next(iter(concerned.values())), backend)


def _finding(
    status: RecordStatus, zones: list[str], kinds: list[str], first: DnsRecord, backend: str
) -> Finding:
    named = ", ".join(zones[:MAX_NAMED])
    if len(zones) > MAX_NAMED:
        named += f" and {len(zones) - MAX_NAMED} more"
    where = f"{named} ({', '.join(kinds)})"
    match status:
        case RecordStatus.HIJACKED:
            return finding(
                FindingId.DNS_ZONE_HIJACKED,
                f"The system's resolver answers names in {where} itself, with {first.observed_ip}.",
                "Have the DNS server in /etc/resolv.conf, or the VPN that sets it, leave these zones"
                " to VNet.",
            )
        case RecordStatus.NOT_REGISTERED:
            advice = "Look at what vnet status says of the resolver, and restart VNet."
            if backend == "none":
                advice = (
                    'Set dns.os_integration to "auto", or have your resolver ask VNet for these'
                    " zones."
                )
            text = f"The system's resolver does not ask VNet for names in {where}."
            return finding(FindingId.DNS_ZONE_NOT_REGISTERED, text, advice)
        case RecordStatus.TIMEOUT:
            return finding(
                FindingId.DNS_TIMEOUT,
                f"The system's resolver gives no answer in time for names in {where}.",
                "Look whether the nameservers in /etc/resolv.conf answer, and for a firewall.",
            )
        case _:
            return finding(
                FindingId.DNS_RESOLVER_ERROR,
                f"The system's resolver fails for names in {where}: {first.error}.",
                "Look at the resolver's own log, and at the commands below.",
            )


def _reachability(servers: list[ServerFacts]) -> DnsServerReachability | None:
    if not servers:
        return None
    server = servers[0]
    return DnsServerReachability(
        address=server.address,
        reachable=server.is_reachable,
        responded_a=bool(server.a),
        responded_aaaa=bool(server.aaaa),
        error=server.error,
    )

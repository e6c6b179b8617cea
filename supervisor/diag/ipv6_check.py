"""Whether what goes to VNet's IPv6 addresses arrives. Pure."""

from supervisor.diag.facts import DnsFacts, Ipv6Facts, RouteFacts, VnetFacts
from supervisor.diag.findings import FindingId, finding
from supervisor.diag.model import CheckReport, Detail, checked


def check_ipv6(
    vnet: VnetFacts, kernel: Ipv6Facts, routes: RouteFacts | None, dns: DnsFacts | None
) -> CheckReport:
    """`routes` and `dns` are None where they could not be found out."""
    network = vnet.status.network
    assert network is not None
    details = [
        Detail(name="network.ipv6", value=vnet.ipv6_wanted),
        Detail(name="Prefix", value=network.ipv6_prefix or "none"),
        Detail(name="Switched off for the machine", value=_said(kernel.is_disabled_for_all)),
        Detail(
            name=f"Switched off for {network.interface}",
            value=_said(kernel.is_disabled_for_interface),
        ),
    ]
    if network.ipv6_prefix is None:
        off = finding(
            FindingId.IPV6_OFF,
            "VNet works with IPv4 only: IPv6 is off for it or for this machine.",
            "Nothing needs to be done; to have it, set network.ipv6 and the sysctl disable_ipv6.",
        )
        return checked([off], details)
    findings = []
    ways = [way for way in (routes.ways if routes else ()) if ":" in way[0]]
    for block, way, problem in ways:
        if way != network.interface:
            where = f"to {way}" if way else f"nowhere ({problem})"
            findings.append(
                finding(
                    FindingId.IPV6_NOT_ROUTED,
                    f"Packets to VNet's IPv6 prefix {block} go {where} instead of"
                    f" {network.interface}.",
                    "Remove that route (ip -6 route), or set network.ipv6 to off and restart VNet.",
                )
            )
    servers = dns.servers if dns else ()
    silent = [s for s in servers if ":" in s.address and not s.is_reachable]
    is_ipv4_well = any(s.is_reachable for s in servers if ":" not in s.address)
    if silent and is_ipv4_well:
        findings.append(
            finding(
                FindingId.IPV6_BLACK_HOLE,
                f"IPv4 works, but nothing comes back from {silent[0].address}: programs that try the"
                " IPv6 address of an app first wait in vain.",
                "Let the firewall accept IPv6 on VNet's interface, or set network.ipv6 to off and"
                " restart VNet.",
            )
        )
    return checked(findings, details)


def _said(is_so: bool | None) -> str:  # noqa: FBT001  # one word for a flag
    return "unknown" if is_so is None else "yes" if is_so else "no"

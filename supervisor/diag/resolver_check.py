"""What sets up the system's resolver, and why. Pure."""

from supervisor.diag.facts import ResolverFacts, VnetFacts
from supervisor.diag.findings import FindingId, finding
from supervisor.diag.model import CheckReport, Detail, checked


def check_resolver(vnet: VnetFacts | None, found: ResolverFacts | None) -> CheckReport:
    """Exactly one of the two is not None: what VNet does, or what it would do."""
    if vnet is None:
        assert found is not None
        details = [
            Detail(name="VNet would use", value=found.backend),
            Detail(name="Because", value="; ".join(found.reasons)),
        ]
        problems = [found.problem] if found.problem else []
        advice = "Correct dns.os_integration before you start VNet."
        return checked([finding(FindingId.RESOLVER_PROBLEM, p, advice) for p in problems], details)
    network = vnet.status.network
    assert network is not None
    why = "none is configured" if vnet.os_wanted == "none" else "nothing was chosen yet"
    details = [
        Detail(name="dns.os_integration", value=vnet.os_wanted),
        Detail(name="In use", value=network.os_integration),
        Detail(name="Because", value="; ".join(vnet.os_reasons) or why),
    ]
    advice = "Do what the sentence says; docs/os-integration.md tells more."
    findings = [finding(FindingId.RESOLVER_PROBLEM, p, advice) for p in vnet.os_problems]
    if vnet.os_wanted == "none":
        findings.append(
            finding(
                FindingId.RESOLVER_BY_HAND,
                "VNet does not set up the system's resolver, since dns.os_integration is none.",
                f"Have your resolver ask {' or '.join(network.dns_addresses)} for VNet's zones.",
            )
        )
    return checked(findings, details)

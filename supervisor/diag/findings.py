"""What `vnet diag` can find. Pure. docs/diagnostics.md has a section for each id."""

from enum import StrEnum
from typing import Final

import msgspec


class Severity(StrEnum):
    """A problem makes the exit status 1; a note is good to know."""

    PROBLEM = "problem"
    NOTE = "note"


class FindingId(StrEnum):
    """Fixed: scripts and the documentation name them."""

    VNET_NOT_RUNNING = "vnet-not-running"
    VNET_SILENT = "vnet-silent"
    VNET_DEGRADED = "vnet-degraded"
    WORKER_DOWN = "worker-down"
    WORKER_RESTARTED = "worker-restarted"
    CONFINEMENT_INCOMPLETE = "confinement-incomplete"
    VERSIONS_DIFFER = "versions-differ"
    INTERFACE_MISSING = "interface-missing"
    ROUTE_CONFLICT = "route-conflict"
    ROUTE_MISSING = "route-missing"
    ROUTE_STRAY = "route-stray"
    SSH_INCLUDE_MISSING = "ssh-include-missing"
    DNS_SERVER_UNREACHABLE = "dns-server-unreachable"
    DNS_ZONE_HIJACKED = "dns-zone-hijacked"
    DNS_ZONE_NOT_REGISTERED = "dns-zone-not-registered"
    DNS_TIMEOUT = "dns-timeout"
    DNS_RESOLVER_ERROR = "dns-resolver-error"
    DNS_NO_ZONES = "dns-no-zones"
    IPV6_OFF = "ipv6-off"
    IPV6_NOT_ROUTED = "ipv6-not-routed"
    IPV6_BLACK_HOLE = "ipv6-black-hole"
    RESOLVER_PROBLEM = "resolver-problem"
    RESOLVER_BY_HAND = "resolver-by-hand"
    LEFTOVER_CHANGES = "leftover-changes"
    LEFTOVER_FILE = "leftover-file"
    CLOCK_WRONG = "clock-wrong"
    LOGIN_MISSING = "login-missing"
    LOGIN_EXPIRED = "login-expired"
    LOGIN_UNUSABLE = "login-unusable"
    LOGIN_ENDS_SOON = "login-ends-soon"
    PROXY_NOT_FOUND = "proxy-not-found"
    PROXY_UNREACHABLE = "proxy-unreachable"
    PROXY_IPV6_BLACK_HOLE = "proxy-ipv6-black-hole"
    PROXY_UNTRUSTED = "proxy-untrusted"
    CLUSTER_UNREACHABLE = "cluster-unreachable"
    CLUSTER_UNREACHABLE_FOR_VNET = "cluster-unreachable-for-vnet"
    PORT_53_HELD = "port-53-held"
    CONTAINER = "container"
    WSL1 = "wsl1"
    WSL2 = "wsl2"
    WSL_MIRRORED = "wsl-mirrored"
    TUN_MISSING = "tun-missing"
    CAPABILITY_MISSING = "capability-missing"
    RESOLV_CONF_MOUNTED = "resolv-conf-mounted"


NOTES: Final = frozenset(
    {
        FindingId.WORKER_RESTARTED,
        FindingId.CONFINEMENT_INCOMPLETE,
        FindingId.VERSIONS_DIFFER,
        # SSH is one of several uses: who has none must not read of an issue each time.
        FindingId.SSH_INCLUDE_MISSING,
        FindingId.DNS_NO_ZONES,
        FindingId.IPV6_OFF,
        FindingId.RESOLVER_BY_HAND,
        FindingId.LOGIN_ENDS_SOON,
        FindingId.PORT_53_HELD,
        FindingId.CONTAINER,
        FindingId.WSL2,
        FindingId.WSL_MIRRORED,
        FindingId.RESOLV_CONF_MOUNTED,
    }
)


class Finding(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One thing that was found: `text` says what, `advice` what to do, both one sentence."""

    id: FindingId
    severity: Severity
    text: str
    advice: str


def finding(found: FindingId, text: str, advice: str) -> Finding:
    """A finding with the severity of its kind."""
    severity = Severity.NOTE if found in NOTES else Severity.PROBLEM
    return Finding(id=found, severity=severity, text=text, advice=advice)

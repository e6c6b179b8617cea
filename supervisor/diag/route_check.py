"""Whose routes are in the way of VNet's. Pure.

Which routes count, and that a table in motion is read again: lib/vnet/diag/routeconflict.go of
Teleport. What is in the way is judged as the kernel does, see `supervisor.osconfig.route_conflicts`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

from supervisor.diag.facts import RouteFacts, VnetFacts
from supervisor.diag.findings import Finding, FindingId, finding
from supervisor.diag.model import (
    CheckReport,
    Detail,
    RouteConflict,
    RouteConflictReport,
    checked,
)
from supervisor.osconfig.route_conflicts import (
    MAIN,
    Conflict,
    HostRoutes,
    Route,
    RouteKind,
    conflicts,
    strays,
)

# Rows of the table; one finding for each interface.
MAX_CONFLICTS = 100
MAX_STRAYS = 5


def own_routes(host: HostRoutes, interface: str) -> list[Route]:
    """VNet's routes: those of its interface in the table `main`, wherever they come from."""
    return [
        route
        for route in host.routes
        if route.interface == interface and route.table == MAIN and route.kind is RouteKind.UNICAST
    ]


def is_stable(host: HostRoutes, interface: str, ranges: Sequence[str]) -> bool:
    """Whether VNet's routes are what VNet says: each single address in a range, each other a range.

    Otherwise something is changing, and it is worth a second look.
    """
    blocks = [IPv4Network(text) for text in ranges]
    found = [route.destination for route in own_routes(host, interface)]
    return set(blocks) <= set(found) and all(
        block in blocks or (block.prefixlen == 32 and any(block.subnet_of(b) for b in blocks))
        for block in found
    )


def check_routes(vnet: VnetFacts, facts: RouteFacts, user: int) -> CheckReport:
    """`user` is the id of who connects, by whom policy rules may choose."""
    network = vnet.status.network
    assert network is not None
    interface = network.interface
    if not facts.has_interface:
        gone = finding(
            FindingId.INTERFACE_MISSING,
            f"VNet runs, but its interface {interface} is not there.",
            "Restart VNet; if you are in a container or network namespace, run this where VNet runs.",
        )
        return checked([gone], routes=RouteConflictReport(route_conflicts=[]))
    blocks = [IPv4Network(text) for text in network.ipv4_cidr_ranges]
    rows = list(_rows(facts.host, interface, blocks, user))[:MAX_CONFLICTS]
    findings = list(_conflicts(rows))
    named = {row.interface_name for row in rows}
    findings += _led_away(facts, interface, named)
    routed = {route.destination for route in own_routes(facts.host, interface)}
    for block in blocks:
        if block not in routed:
            text = f"The range {block} is not routed into {interface}."
            advice = "VNet puts it back within a second; if this stays, restart VNet."
            findings.append(finding(FindingId.ROUTE_MISSING, text, advice))
    findings += _strays(facts.host, interface, blocks)
    if not findings:
        # What VNet alone knows of, such as a nameserver that is routed into its interface.
        findings = [
            finding(FindingId.ROUTE_CONFLICT, problem, "Do what the sentence says.")
            for problem in vnet.network_problems
        ]
    details = [
        Detail(name=f"Packets to {block}", value=way or f"nowhere ({problem})")
        for block, way, problem in facts.ways
    ]
    return checked(findings, details, routes=RouteConflictReport(route_conflicts=rows))


def _rows(
    host: HostRoutes, interface: str, blocks: Sequence[IPv4Network], user: int
) -> Iterator[RouteConflict]:
    """Each thing in the way with the first of VNet's ranges that it is in the way of."""
    seen: set[tuple[str, str]] = set()
    for block in blocks:
        for dest, name in _in_the_way(host, interface, block, user):
            if (dest, name) not in seen:
                seen.add((dest, name))
                yield RouteConflict(
                    dest=dest, vnet_dest=str(block), interface_name=name, interface_app=name
                )


def _in_the_way(
    host: HostRoutes, interface: str, block: IPv4Network, user: int
) -> Iterator[tuple[str, str]]:
    # One route at a time, so that it is known which one it is; throws make others harmless.
    throws = [route for route in host.routes if route.kind is RouteKind.THROW]
    bare = replace(host, routes=throws, addresses=())
    rest = conflicts(replace(host, routes=()), interface, block, user)
    for route in host.routes:
        if route.destination.overlaps(block) and route.kind is not RouteKind.THROW:
            alone = replace(bare, routes=[*throws, route])
            if any(_is_of(found, route) for found in conflicts(alone, interface, block, user)):
                yield str(route.destination), route.interface
    for found in rest:
        yield str(found.taken) if found.interface else "", found.interface


def _is_of(found: Conflict, route: Route) -> bool:
    # Without this a policy rule that refuses would be counted for each route.
    return found.interface == route.interface and not found.text.startswith("the policy rule")


def _conflicts(rows: Sequence[RouteConflict]) -> Iterator[Finding]:
    of: dict[str, list[RouteConflict]] = {}
    for row in rows:
        of.setdefault(row.interface_name, []).append(row)
    for name, theirs in of.items():
        shown = ", ".join(dict.fromkeys(row.dest or "a policy rule" for row in theirs[:5]))
        more = f" and {len(theirs) - 5} more" if len(theirs) > 5 else ""
        who = f"The interface {name}" if name else "Something without an interface"
        yield finding(
            FindingId.ROUTE_CONFLICT,
            f"{who} is in the way of VNet's range {theirs[0].vnet_dest} ({shown}{more}).",
            "Stop the program that set it up, or give VNet another range with"
            " network.ipv4_cidr_range (a cluster's range: vnet_config) and restart VNet.",
        )


def _led_away(facts: RouteFacts, interface: str, named: set[str]) -> Iterator[Finding]:
    """What the kernel itself says, which knows rules that are not understood here."""
    for block, way, problem in facts.ways:
        if way == interface or way in named or ":" in block:
            continue
        named.add(way)
        where = f"to {way}" if way else f"nowhere ({problem})"
        yield finding(
            FindingId.ROUTE_CONFLICT,
            f"Packets to {block} go {where} instead of {interface}.",
            "Look at the policy rules (ip rule) and stop the program that sets them.",
        )


def _strays(host: HostRoutes, interface: str, blocks: Sequence[IPv4Network]) -> Iterator[Finding]:
    own = blocks[0].network_address + 1 if blocks else IPv4Address(0)
    for route in strays(host, interface, blocks, own)[:MAX_STRAYS]:
        table = "" if route.table == MAIN else f" table {route.table}"
        yield finding(
            FindingId.ROUTE_STRAY,
            f"Another program routes {route.destination} into {interface}, where nobody answers.",
            f"Remove that route: ip route del {route.destination} dev {interface}{table}",
        )

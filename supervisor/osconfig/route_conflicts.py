"""Which routes, rules and addresses of a host are in the way of a range of VNet's. Pure.

An ordinary packet (no mark, no bound interface, no source yet) asks one table after the other, as
the policy rules say, and takes the longest route of the first table that has one (ip-rule(8),
linux/net/core/fib_rules.c). VNet's routes stand in the table `main`. In the way is

- in a table that is asked before: every route, a default route too, unless it is suppressed;
- in `main`: a route as long as ours or longer, since it wins or nobody can have both, and a shorter one
  if it is the neighbourhood of an interface, which ours would take away from it. Other shorter routes,
  such as default routes whole or in halves (0.0.0.0/1 and 128.0.0.0/1), lose nothing they need.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from typing import Final

MAIN: Final = 254
# RFC 6598. Tailscale takes its addresses from it, and its firewall drops what comes from there on any
# other interface, except for a part that it leaves to virtual machines (util/linuxfw/
# iptables_runner.go and net/tsaddr of Tailscale).
SHARED_SPACE: Final = IPv4Network("100.64.0.0/10")
LEFT_BY_TAILSCALE: Final = IPv4Network("100.115.92.0/23")
TAILSCALE_PREFIX: Final = "tailscale"
# Interfaces that one sentence names.
MAX_NAMED: Final = 3
_NO_SUPPRESSION: Final = -1


class RouteKind(Enum):
    """What a route does with a packet."""

    UNICAST = "unicast"
    LOCAL = "local"  # also broadcast and the like
    THROW = "throw"  # the next table is asked
    REFUSING = "refusing"  # blackhole, unreachable, prohibit


class RuleAction(Enum):
    """What a rule does with a packet that it is about."""

    TABLE = "table"
    GOTO = "goto"
    NOTHING = "nothing"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Route:
    """One route. `interface` is empty where it leads nowhere."""

    destination: IPv4Network
    interface: str = ""
    table: int = MAIN
    kind: RouteKind = RouteKind.UNICAST
    # The subnet of an address: who is in it is asked directly.
    is_neighbourhood: bool = False
    gateway: IPv4Address | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One policy rule.

    `target` is a table or the priority to go to. `is_special`: it is about some sockets only, by
    source, port, protocol, type of service or VRF. `users` are the first and the last user id.
    """

    priority: int
    action: RuleAction
    target: int = 0
    destination: IPv4Network | None = None
    is_inverted: bool = False
    suppressed_length: int = _NO_SUPPRESSION
    mark: int = 0
    mask: int = 0
    incoming: str = ""
    outgoing: str = ""
    users: tuple[int, int] | None = None
    is_special: bool = False


@dataclass(frozen=True, slots=True)
class HostRoutes:
    """What the kernel says of this host, IPv4. Rules are in the order in which they are asked."""

    routes: Sequence[Route] = ()
    rules: Sequence[Rule] = ()
    addresses: Sequence[tuple[str, IPv4Address]] = ()  # interface and address


@dataclass(frozen=True, slots=True, order=True)
class Conflict:
    """One thing in the way: `taken` is the part of the range that is lost to it.

    `suffers`: the other way round, its neighbourhood is lost to VNet once the range is routed.
    """

    interface: str
    taken: IPv4Network
    text: str = field(compare=False)
    suffers: bool = field(default=False, compare=False)


def conflicts(host: HostRoutes, own: str, wanted: IPv4Network, user: int) -> list[Conflict]:
    """What is in the way of a range; `own` is VNet's interface, `user` the id of who connects."""
    found: dict[Conflict, None] = {}
    for rule in _asked(host.rules, wanted, user):
        if rule.action is RuleAction.REFUSE:
            part = _part_of(rule, wanted)
            text = f"the policy rule with priority {rule.priority} refuses {part}"
            found[Conflict("", part, text)] = None
            continue
        is_before_ours = rule.target != MAIN or rule.suppressed_length >= wanted.prefixlen
        table = [route for route in host.routes if route.table == rule.target]
        for route in _in_table(table, rule, own, wanted):
            if is_before_ours or _beats(route, wanted):
                suffers = not is_before_ours and _suffers(route, wanted)
                found[_conflict(route, wanted, suffers=suffers)] = None
    for conflict in _firewalled(host, own, wanted):
        found[conflict] = None
    return sorted(found)


def describe(found: Iterable[Conflict]) -> str:
    """The conflicts as one clause, each interface once, by its widest route."""
    widest: dict[str, Conflict] = {}
    for conflict in sorted(found, key=lambda c: (c.taken.prefixlen, c.taken)):
        widest.setdefault(conflict.interface or conflict.text, conflict)
    texts = [conflict.text for conflict in widest.values()]
    more = len(texts) - MAX_NAMED
    if more > 0:
        texts[MAX_NAMED:] = [f"{more} more"]
    return ", ".join(texts)


def strays(
    host: HostRoutes, own: str, ranges: Iterable[IPv4Network], address: IPv4Address
) -> list[Route]:
    """Routes into VNet's interface that are not VNet's: what takes them is dropped."""
    ours = {*ranges, IPv4Network(address)}
    return [
        route
        for route in host.routes
        if route.interface == own
        and route.kind is RouteKind.UNICAST
        and not any(route.destination.subnet_of(block) for block in ours)
    ]


# -- a free part of a range --


def taken_of(
    host: HostRoutes, own: str, pool: IPv4Network, user: int, others: Iterable[IPv4Address] = ()
) -> list[IPv4Network]:
    """The parts of `pool` that something else has. `others`: addresses that must stay reachable."""
    found = [conflict.taken for conflict in conflicts(host, own, pool, user)]
    gateways = [route.gateway for route in host.routes if route.gateway and route.interface != own]
    addresses = [address for interface, address in host.addresses if interface != own]
    single = {*gateways, *addresses, *others}
    found += [IPv4Network(address) for address in single if address in pool]
    return list(collapse_addresses(found))


def free_part(
    pool: IPv4Network, taken: Sequence[IPv4Network], *, longest: int
) -> IPv4Network | None:
    """The largest aligned block of `pool` that nobody has, the last of them; None if all are too small.

    `longest` is the prefix length of the smallest block that is of use. The last one, because
    others begin with the first addresses.
    """
    free = list(_free(pool, [block for block in taken if block.overlaps(pool)], longest))
    return max(free, key=lambda block: (-block.prefixlen, block), default=None)


def _free(pool: IPv4Network, taken: list[IPv4Network], longest: int) -> Iterator[IPv4Network]:
    if not taken:
        yield pool
    elif pool.prefixlen < longest and not any(pool.subnet_of(block) for block in taken):
        for half in pool.subnets():
            yield from _free(half, [block for block in taken if block.overlaps(half)], longest)


# -- rules and tables --


class _Share(Enum):
    """How much of a range a rule is about."""

    NOTHING = "nothing"
    PART = "part"
    ALL = "all"


def _asked(rules: Sequence[Rule], wanted: IPv4Network, user: int) -> Iterator[Rule]:
    """The rules that decide about packets to `wanted`, up to the one that finds VNet's route."""
    skipped_to = 0
    for rule in rules:
        share = _share(rule, wanted, user)
        if rule.priority < skipped_to or share is _Share.NOTHING:
            continue
        is_end = share is _Share.ALL
        if rule.action is RuleAction.GOTO and is_end:
            skipped_to = rule.target
        elif rule.action is RuleAction.TABLE:
            yield rule
            if rule.target == MAIN and rule.suppressed_length < wanted.prefixlen and is_end:
                return
        elif rule.action is RuleAction.REFUSE:
            yield rule
            if is_end:
                return


def _share(rule: Rule, wanted: IPv4Network, user: int) -> _Share:
    """For which addresses of `wanted` an ordinary packet of this user meets the rule."""
    if rule.is_special:
        return _Share.NOTHING
    matches = (
        not rule.outgoing
        and rule.incoming in ("", "lo")
        and not rule.mark & rule.mask
        and (rule.users is None or rule.users[0] <= user <= rule.users[1])
    )
    if not matches or (rule.destination and not rule.destination.overlaps(wanted)):
        share = _Share.NOTHING
    elif rule.destination is None or wanted.subnet_of(rule.destination):
        share = _Share.ALL
    else:
        share = _Share.PART
    if not rule.is_inverted or share is _Share.PART:
        return share
    return _Share.ALL if share is _Share.NOTHING else _Share.NOTHING


def _part_of(rule: Rule, wanted: IPv4Network) -> IPv4Network:
    """The addresses of `wanted` that a rule may be about, as one block."""
    return _common(None if rule.is_inverted else rule.destination, wanted)


def _in_table(table: Sequence[Route], rule: Rule, own: str, wanted: IPv4Network) -> Iterator[Route]:
    limit = _part_of(rule, wanted)
    near = [route for route in table if route.destination.overlaps(wanted)]
    throws = [route.destination for route in near if route.kind is RouteKind.THROW]
    for route in near:
        part = _common(route.destination, wanted)
        if (
            route.kind is not RouteKind.THROW
            and (route.interface != own or not own)
            and route.destination.prefixlen > rule.suppressed_length
            and limit.overlaps(part)
            and not any(
                throw.prefixlen > route.destination.prefixlen and part.subnet_of(throw)
                for throw in throws
            )
        ):
            yield route


def _beats(route: Route, wanted: IPv4Network) -> bool:
    return route.destination.prefixlen >= wanted.prefixlen or route.is_neighbourhood


def _suffers(route: Route, wanted: IPv4Network) -> bool:
    return route.is_neighbourhood and route.destination.prefixlen <= wanted.prefixlen


def _conflict(route: Route, wanted: IPv4Network, *, suffers: bool) -> Conflict:
    destination = route.destination
    where = (
        "" if route.table == MAIN or route.kind is RouteKind.LOCAL else f" (table {route.table})"
    )
    if route.kind is RouteKind.REFUSING:
        text = f"packets to {destination} are refused by a route{where}"
    elif route.kind is RouteKind.LOCAL and destination.prefixlen == destination.max_prefixlen:
        text = f"{route.interface} has the address {destination.network_address}"
    else:
        text = f"{route.interface or 'another route'} has {_named(destination)}{where}"
    return Conflict(route.interface, _common(destination, wanted), text, suffers)


def _named(destination: IPv4Network) -> str:
    return "the default route" if destination.prefixlen == 0 else f"the route {destination}"


def _firewalled(host: HostRoutes, own: str, wanted: IPv4Network) -> Iterator[Conflict]:
    """What Tailscale's firewall takes, as soon as it has an address."""
    for interface, address in host.addresses:
        is_there = interface.startswith(TAILSCALE_PREFIX) and interface != own
        if not is_there or address not in SHARED_SPACE or wanted.subnet_of(LEFT_BY_TAILSCALE):
            continue
        text = (
            f"{interface} drops what comes from {SHARED_SPACE} elsewhere, except for"
            f" {LEFT_BY_TAILSCALE}"
        )
        for block in SHARED_SPACE.address_exclude(LEFT_BY_TAILSCALE):
            if block.overlaps(wanted):
                yield Conflict(interface, _common(block, wanted), text)


def _common(block: IPv4Network | None, wanted: IPv4Network) -> IPv4Network:
    """The smaller one of two that overlap."""
    return wanted if block is None or wanted.subnet_of(block) else block

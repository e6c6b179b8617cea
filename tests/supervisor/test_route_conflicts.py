"""What is in the way of a range: tables and rules as other programs have them, and any others."""

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import own_range
from supervisor.config import NetworkConfig
from supervisor.exits import ConflictError, ExitStatus
from supervisor.osconfig.route_conflicts import (
    LEFT_BY_TAILSCALE,
    MAIN,
    SHARED_SPACE,
    Conflict,
    HostRoutes,
    Route,
    RouteKind,
    Rule,
    RuleAction,
    conflicts,
    describe,
    free_part,
    strays,
    taken_of,
)

USER = 1000
LOCAL, DEFAULT = 255, 253


def net(text: str) -> IPv4Network:
    return IPv4Network(text)


def route(destination: str, interface: str = "", table: int = MAIN, **more) -> Route:
    return Route(net(destination), interface, table, **more)


def lookup(priority: int, table: int, **more) -> Rule:
    return Rule(priority, RuleAction.TABLE, table, **more)


STANDARD = (lookup(0, LOCAL), lookup(32766, MAIN), lookup(32767, DEFAULT))
HOME = (
    route("0.0.0.0/0", "eth0", gateway=IPv4Address("192.168.1.1")),
    route("192.168.1.0/24", "eth0", is_neighbourhood=True),
    route("192.168.1.7/32", "eth0", LOCAL, kind=RouteKind.LOCAL),
    route("127.0.0.0/8", "lo", LOCAL, kind=RouteKind.LOCAL),
)


def host(*routes: Route, rules=(), addresses=()) -> HostRoutes:
    between = sorted((*STANDARD, *rules), key=lambda rule: rule.priority)
    return HostRoutes((*HOME, *routes), between, [(i, IPv4Address(a)) for i, a in addresses])


def found(where: HostRoutes, wanted: str, user: int = USER) -> str:
    return describe(conflicts(where, "vnet0", net(wanted), user))


# -- tables as programs have them --


MARK = {"mark": 0x80000, "mask": 0xFF0000}
TAILSCALE_RULES = (
    lookup(5210, MAIN, **MARK),
    lookup(5230, DEFAULT, **MARK),
    Rule(5250, RuleAction.REFUSE, **MARK),
    lookup(5270, 52),
)
TAILSCALE = host(
    route("100.100.100.100/32", "tailscale0", 52),
    route("100.101.1.1/32", "tailscale0", 52),
    route("127.0.0.0/8", "", 52, kind=RouteKind.THROW),
    route("100.70.1.2/32", "tailscale0", LOCAL, kind=RouteKind.LOCAL),
    rules=TAILSCALE_RULES,
    addresses=[("tailscale0", "100.70.1.2")],
)
WG_QUICK = host(
    route("0.0.0.0/0", "wg0", 51820),
    rules=[
        lookup(32764, MAIN, suppressed_length=0),
        lookup(32765, 51820, mark=0xCA6C, mask=0xFFFFFFFF, is_inverted=True),
    ],
)
BLUE = lookup(1000, 0, is_special=True)  # l3mdev


@pytest.mark.parametrize(
    ("where", "wanted", "words"),
    [
        (TAILSCALE, "100.64.0.0/10", "tailscale0 drops what comes from 100.64.0.0/10"),
        (TAILSCALE, "100.96.0.0/12", "tailscale0"),
        (host(route("100.64.0.0/10", "tailscale0", 52), rules=TAILSCALE_RULES), "100.64.0.0/10",
         "tailscale0 has the route 100.64.0.0/10 (table 52)"),
        (host(route("0.0.0.0/0", "tailscale0", 52), rules=TAILSCALE_RULES), "10.5.0.0/16",
         "tailscale0 has the default route (table 52)"),
        (host(route("10.5.3.0/24", "docker0", is_neighbourhood=True)), "10.5.0.0/16",
         "docker0 has the route 10.5.3.0/24"),
        (host(route("10.5.0.0/16", "tun0")), "10.5.0.0/16", "tun0 has the route 10.5.0.0/16"),
        (host(route("192.168.122.0/24", "virbr0", is_neighbourhood=True)), "192.168.0.0/16",
         "eth0 has the route 192.168.1.0/24, virbr0 has the route 192.168.122.0/24"),
        # Its subnet is larger than the range, which would take a part of it away.
        (host(route("10.0.0.0/8", "lan0", is_neighbourhood=True)), "10.5.0.0/16",
         "lan0 has the route 10.0.0.0/8"),
        (host(route("10.5.0.9/32", "dummy0", LOCAL, kind=RouteKind.LOCAL)), "10.5.0.0/16",
         "dummy0 has the address 10.5.0.9"),
        (host(route("10.5.0.0/20", kind=RouteKind.REFUSING)), "10.5.0.0/16",
         "packets to 10.5.0.0/20 are refused by a route"),
        (host(rules=[Rule(10, RuleAction.REFUSE, destination=net("10.0.0.0/8"))]), "10.5.0.0/16",
         "the policy rule with priority 10 refuses 10.5.0.0/16"),
        (host(route("10.5.0.0/16", "vpn0", 7), rules=[lookup(9, 7, destination=net("10.5.8.0/24"))]),
         "10.5.0.0/16", "vpn0 has the route 10.5.0.0/16 (table 7)"),
        (host(route("0.0.0.0/0", "vpn0", 7), rules=[lookup(9, 7, users=(1000, 1999))]),
         "10.5.0.0/16", "vpn0 has the default route (table 7)"),
        (host(route("0.0.0.0/0", "vpn0", 7), rules=[lookup(9, 7, incoming="lo")]),
         "10.5.0.0/16", "vpn0 has the default route (table 7)"),
        # Suppressed routes do not count, and then it is the next table's turn.
        (host(route("10.5.0.0/16", "a0", 7), rules=[lookup(8, 7, suppressed_length=16), lookup(9, 7)]),
         "10.5.0.0/16", "a0 has the route 10.5.0.0/16 (table 7)"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_named(where, wanted, words):
    assert words in found(where, wanted)


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (host(), "100.64.0.0/10"),
        (host(), "10.0.0.0/8"),
        (TAILSCALE, "10.5.0.0/16"),
        (TAILSCALE, str(LEFT_BY_TAILSCALE)),
        # Full tunnels: halves in the same table, or a table of its own behind ours.
        (host(route("0.0.0.0/1", "tun0"), route("128.0.0.0/1", "tun0")), "100.64.0.0/10"),
        (WG_QUICK, "100.64.0.0/10"),
        # A wide route of another network, which loses a part it does not need.
        (host(route("10.0.0.0/8", "corp0")), "10.5.0.0/16"),
        (host(route("10.0.0.0/8", kind=RouteKind.REFUSING)), "10.5.0.0/16"),
        (host(route("10.6.0.0/16", "tun0")), "10.5.0.0/16"),
        # What VNet itself has.
        (host(route("10.5.0.0/16", "vnet0"), route("10.5.0.1/32", "vnet0", LOCAL)), "10.5.0.0/16"),
        # Tables that no ordinary packet comes to.
        (host(route("10.5.0.0/16", "vrf0", 10), rules=[BLUE]), "10.5.0.0/16"),
        (host(route("10.5.0.0/16", "x0", 10), rules=[lookup(9, 10, **MARK)]), "10.5.0.0/16"),
        (host(route("10.5.0.0/16", "x0", 10), rules=[lookup(9, 10, users=(0, 9))]), "10.5.0.0/16"),
        (host(route("10.5.0.0/16", "x0", 10), rules=[lookup(9, 10, incoming="br0")]), "10.5.0.0/16"),
        (host(route("10.5.0.0/16", "x0", 10), rules=[lookup(9, 10, outgoing="x0")]), "10.5.0.0/16"),
        (host(route("10.5.0.0/16", "x0", 10), rules=[lookup(9, 10, is_special=True)]), "10.5.0.0/16"),
        (host(route("10.5.0.0/16", "x0", 10),
              rules=[Rule(8, RuleAction.GOTO, 32766), lookup(9, 10)]), "10.5.0.0/16"),
        (host(route("0.0.0.0/0", "x0", 10), rules=[lookup(9, 10, destination=net("10.6.0.0/16"))]),
         "10.5.0.0/16"),
        (host(route("0.0.0.0/0", "x0", 10),
              rules=[lookup(9, 10, destination=net("10.0.0.0/8"), is_inverted=True)]), "10.5.0.0/16"),
        # Thrown out of that table before its other routes count.
        (host(route("0.0.0.0/0", "x0", 10), route("10.0.0.0/8", "", 10, kind=RouteKind.THROW),
              rules=[lookup(9, 10)]), "10.5.0.0/16"),
        (host(route("10.5.0.0/16", "x0", DEFAULT)), "10.5.0.0/16"),
    ],
)  # fmt: skip
def test_what_is_not_in_the_way_is_no_conflict(where, wanted):
    assert found(where, wanted) == ""


def test_only_who_loses_its_neighbourhood_suffers():
    lan = route("10.0.0.0/8", "lan0", is_neighbourhood=True)
    bridge = route("10.5.3.0/24", "docker0", is_neighbourhood=True)
    all_of_it = conflicts(host(lan, bridge), "vnet0", net("10.5.0.0/16"), USER)
    assert {c.interface: c.suffers for c in all_of_it} == {"lan0": True, "docker0": False}


def test_many_conflicts_are_told_in_one_short_clause():
    many = [route(f"10.5.{number}.0/24", f"veth{number}") for number in range(50)]
    text = found(host(*many, *(route(f"10.5.0.{n}/32", "veth0") for n in range(50))), "10.5.0.0/16")
    assert text.count("has the route") == 3
    assert text.endswith(", 47 more")


def test_foreign_routes_into_the_interface_are_found():
    own = route("100.64.0.0/10", "vnet0")
    address = route("100.64.0.1/32", "vnet0", LOCAL, kind=RouteKind.LOCAL)
    stray, inside = route("0.0.0.0/0", "vnet0", 7), route("100.64.3.0/24", "vnet0")
    where = host(own, address, stray, inside)
    assert strays(where, "vnet0", [SHARED_SPACE], IPv4Address("100.64.0.1")) == [stray]


# -- a free part --


def choose(where, kept=None, setting="auto", nameservers=()):
    config = NetworkConfig(ipv4_cidr_range=setting)
    servers = [IPv4Address(text) for text in nameservers]
    return str(own_range.choose(config, where, kept and net(kept), USER, servers))


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        (host(), "100.64.0.0/10"),
        (WG_QUICK, "100.64.0.0/10"),
        (TAILSCALE, "100.115.92.0/23"),
        (host(route("100.64.0.0/16", "cilium_host")), "100.96.0.0/11"),
        (host(route("100.96.0.0/16", "wwan0", is_neighbourhood=True)), "100.64.0.0/11"),
        (host(route("100.64.0.0/11", "a0"), route("100.96.0.0/12", "a0")), "100.112.0.0/12"),
        # A carrier's gateway that is reached over a link without a subnet.
        (host(route("0.0.0.0/0", "ppp0", gateway=IPv4Address("100.127.255.1"))), "100.64.0.0/11"),
    ],
)
def test_auto_is_the_largest_free_part(where, chosen):
    assert choose(where) == chosen


def test_kept_part_stays_until_something_else_wants_it():
    assert choose(host(), kept="100.112.0.0/12") == "100.112.0.0/12"
    assert choose(host(route("100.64.0.0/12", "a0")), kept="100.112.0.0/12") == "100.112.0.0/12"
    assert choose(host(route("100.113.0.0/24", "a0")), kept="100.112.0.0/12") == "100.64.0.0/11"


def test_nameserver_in_the_pool_is_left_alone_unless_it_is_vnets_own():
    assert choose(host(), nameservers=["100.64.0.2", "192.0.2.1"]) == "100.64.0.0/10"
    assert choose(host(), nameservers=["100.90.0.53"]) == "100.96.0.0/11"
    kept = "100.112.0.0/12"
    assert choose(host(), kept=kept, nameservers=["100.112.0.2"]) == kept


@pytest.mark.parametrize(
    ("where", "setting", "words"),
    [
        (host(route("100.64.0.0/10", "vpn0")), "auto", "vpn0 has the route 100.64.0.0/10"),
        (host(route("0.0.0.0/0", "vpn0", 7), rules=[lookup(9, 7)]), "auto", "vpn0 has the default"),
        (host(route("10.5.3.0/24", "docker0")), "10.5.0.0/16", "docker0 has the route 10.5.3.0/24"),
    ],
)
def test_nothing_free_is_a_conflict_with_a_name(where, setting, words):
    with pytest.raises(ConflictError, match=r"set network\.ipv4_cidr_range") as raised:
        choose(where, setting=setting)
    assert words in str(raised.value)
    assert raised.value.status is ExitStatus.CONFLICT


def test_configured_range_is_taken_as_it_is_or_not_at_all():
    assert choose(TAILSCALE, setting="10.5.0.0/16") == "10.5.0.0/16"
    assert choose(host(), setting="100.80.0.0/27", kept="100.64.0.0/11") == "100.80.0.0/27"


@pytest.mark.parametrize(
    "text", ["", "x\n", "10.0.0.0/8\n", "100.64.0.0/9", "100.64.0.0/25\n", "\0"]
)
def test_useless_memory_is_no_memory(tmp_path, text):
    (tmp_path / own_range.FILE_NAME).write_text(text)
    assert own_range.read(tmp_path) is None


def test_choice_is_kept_in_the_state_directory(tmp_path):
    assert own_range.read(tmp_path) is None
    own_range.write(tmp_path, net("100.96.0.0/11"))
    assert own_range.read(tmp_path) == net("100.96.0.0/11")
    own_range.write(tmp_path / "missing", net("100.96.0.0/11"))


SMALL = net("10.0.0.0/24")
small_networks = st.integers(22, 32).flatmap(
    lambda length: st.integers(0, 1023).map(
        lambda offset: IPv4Network((int(net("10.0.0.0/22")[0]) + offset, length), strict=False)
    )
)


@given(st.lists(small_networks, max_size=12))
def test_free_part_is_free_and_nothing_larger_is(taken):
    part = free_part(SMALL, taken, longest=29)
    candidates = [block for length in range(24, 30) for block in SMALL.subnets(new_prefix=length)]
    free = [block for block in candidates if not any(map(block.overlaps, taken))]
    best = min((block.prefixlen for block in free), default=None)
    if part is None:
        assert free == []
    else:
        assert part in free
        assert part.prefixlen == best
        assert part == max(block for block in free if block.prefixlen == best)


# -- any tables: whoever gets a packet that is for VNet is found --


kinds = st.sampled_from([*RouteKind, RouteKind.UNICAST, RouteKind.UNICAST])
routes = st.builds(
    Route,
    destination=small_networks,
    interface=st.sampled_from(["eth0", "tun0"]),
    table=st.sampled_from([MAIN, 7, 8]),
    kind=kinds,
)
rules = st.builds(
    Rule,
    priority=st.integers(1, 40000),
    action=st.sampled_from(
        [RuleAction.TABLE, RuleAction.TABLE, RuleAction.REFUSE, RuleAction.GOTO]
    ),
    target=st.sampled_from([7, 8, MAIN, 20000]),
    destination=st.none() | small_networks,
    is_inverted=st.booleans(),
    suppressed_length=st.sampled_from([-1, -1, 0, 26, 32]),
    mark=st.sampled_from([0, 1]),
    mask=st.just(0xFF),
    users=st.sampled_from([None, (0, 9), (1000, 1000)]),
)


def winner(where: HostRoutes, address: IPv4Address) -> str:
    """Which interface an ordinary packet to this address takes; "" if none."""
    skipped_to = 0
    for rule in where.rules:
        if rule.priority < skipped_to:
            continue
        is_met = (
            not rule.mark & rule.mask
            and (rule.users is None or rule.users[0] <= USER <= rule.users[1])
            and (rule.destination is None or address in rule.destination)
        )
        if is_met == rule.is_inverted:
            continue
        if rule.action is RuleAction.REFUSE:
            return ""
        if rule.action is RuleAction.GOTO:
            skipped_to = rule.target
            continue
        table = [r for r in where.routes if r.table == rule.target and address in r.destination]
        best = max(table, key=lambda r: r.destination.prefixlen, default=None)
        if best is None or best.kind is RouteKind.THROW:
            continue
        if best.destination.prefixlen <= rule.suppressed_length:
            continue
        return "" if best.kind is RouteKind.REFUSING else best.interface
    return ""


@given(st.lists(routes, max_size=8), st.lists(rules, max_size=5))
def test_where_nothing_is_found_every_packet_comes_to_vnet(some_routes, some_rules):
    wanted = net("10.0.0.128/27")
    # Two routes for the same cannot be, and one that throws ours out stands in its place.
    other = [r for r in some_routes if r.destination != wanted and r.kind is not RouteKind.THROW]
    throws = [r for r in some_routes if r.kind is RouteKind.THROW and r.destination.prefixlen < 27]
    ordered = sorted((*some_rules, *STANDARD), key=lambda rule: rule.priority)
    bare = HostRoutes((*other, *throws), ordered)
    whole = HostRoutes((*bare.routes, Route(wanted, "vnet0")), ordered)
    in_the_way = conflicts(bare, "vnet0", wanted, USER)
    assert conflicts(whole, "vnet0", wanted, USER) == in_the_way
    if not in_the_way:
        has_way = any(rule.target == MAIN and rule.action is RuleAction.TABLE for rule in ordered)
        assert has_way
        assert {winner(whole, address) for address in wanted} == {"vnet0"}


@given(st.lists(routes, max_size=8), st.lists(rules, max_size=5))
def test_free_part_of_any_host_has_no_conflict(some_routes, some_rules):
    ordered = sorted((*some_rules, *STANDARD), key=lambda rule: rule.priority)
    where = HostRoutes(tuple(some_routes), ordered)
    pool = net("10.0.0.0/24")
    taken = taken_of(where, "vnet0", pool, USER)
    part = free_part(pool, taken, longest=30)
    assert all(isinstance(c, Conflict) for c in conflicts(where, "vnet0", pool, USER))
    if part is not None:
        assert not any(map(part.overlaps, taken))

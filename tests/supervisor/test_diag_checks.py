"""Each check of `vnet diag` by itself: what it finds, and what it does not take for a problem."""

import dataclasses
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import msgspec
import pytest
from diag_samples import CLUSTER, CONFINEMENT, VERSION, WORKER, ids, texts, vnet

from ipc.messages import ClusterState
from supervisor.diag.clock_check import check_clock
from supervisor.diag.dns_check import check_dns, expected_of
from supervisor.diag.facts import (
    DnsFacts,
    HomeFacts,
    Ipv6Facts,
    LeftoverFacts,
    LoginFacts,
    Outcome,
    ProxyFacts,
    RecordFacts,
    ResolverFacts,
    RouteFacts,
    ServerFacts,
    SshFacts,
)
from supervisor.diag.ipv6_check import check_ipv6
from supervisor.diag.leftover_check import check_leftovers
from supervisor.diag.login_check import check_logins
from supervisor.diag.model import CheckStatus
from supervisor.diag.proxy_check import check_proxies
from supervisor.diag.resolver_check import check_resolver
from supervisor.diag.route_check import check_routes, is_stable
from supervisor.diag.ssh_check import check_ssh, outline
from supervisor.diag.vnet_check import check_vnet
from supervisor.osconfig.route_conflicts import HostRoutes, Route, RouteKind, Rule, RuleAction
from supervisor.ssh_config_include import Inclusion
from supervisor.status import LastExitStatus
from supervisor.worker_states import WorkerState

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
LOCAL, MAIN = 255, 254
RANGES = ["100.64.0.0/10", "10.5.0.0/16"]
RULES = tuple(
    Rule(priority, RuleAction.TABLE, table)
    for priority, table in ((0, LOCAL), (32766, MAIN), (32767, 253))
)
OWN = (
    *(Route(IPv4Network(text), "vnet0") for text in RANGES),
    Route(IPv4Network("100.64.0.1/32"), "vnet0", LOCAL, RouteKind.LOCAL),
)
HOME_ROUTES = (
    Route(IPv4Network("0.0.0.0/0"), "eth0", gateway=IPv4Address("192.0.2.1")),
    Route(IPv4Network("192.0.2.0/24"), "eth0", is_neighbourhood=True),
)
WAYS = ((RANGES[0], "vnet0", ""), (RANGES[1], "vnet0", ""), ("fd00:1::", "vnet0", ""))


def host(*more: Route, rules: tuple[Rule, ...] = RULES, own: tuple[Route, ...] = OWN) -> HostRoutes:
    return HostRoutes((*own, *HOME_ROUTES, *more), rules, (("vnet0", IPv4Address("100.64.0.1")),))


def routes(found: HostRoutes, ways: tuple[tuple[str, str, str], ...] = WAYS) -> RouteFacts:
    return RouteFacts(found, has_interface=True, ways=ways)


# -- routes --


def test_ordinary_routes_are_in_nobodys_way():
    halves = (Route(IPv4Network(text), "wg0") for text in ("0.0.0.0/1", "128.0.0.0/1"))
    report = check_routes(vnet(), routes(host(*halves)), 1000)
    assert (report.status, ids(report)) == (CheckStatus.OK, [])
    assert report.route_conflict_report is not None
    assert report.route_conflict_report.route_conflicts == []


def test_each_route_of_each_interface_is_a_row_with_the_first_range_it_is_in_the_way_of():
    other = (
        Route(IPv4Network("100.80.0.0/16"), "vpn0"),
        Route(IPv4Network("100.81.0.0/16"), "vpn0"),
        Route(IPv4Network("10.0.0.0/8"), "br0", is_neighbourhood=True),
        Route(IPv4Network("100.99.0.1/32"), "dummy0", LOCAL, RouteKind.LOCAL),
    )
    report = check_routes(vnet(), routes(host(*other)), 1000)
    assert report.route_conflict_report is not None
    rows = [
        (row.vnet_dest, row.dest, row.interface_name, row.interface_app)
        for row in report.route_conflict_report.route_conflicts
    ]
    assert rows == [
        ("100.64.0.0/10", "100.80.0.0/16", "vpn0", "vpn0"),
        ("100.64.0.0/10", "100.81.0.0/16", "vpn0", "vpn0"),
        ("100.64.0.0/10", "100.99.0.1/32", "dummy0", "dummy0"),
        ("10.5.0.0/16", "10.0.0.0/8", "br0", "br0"),
    ]
    assert ids(report) == ["route-conflict"] * 3
    assert report.status is CheckStatus.ISSUES_FOUND


def test_tables_that_are_asked_first_count_and_their_throws_too():
    rules = (RULES[0], Rule(100, RuleAction.TABLE, 52), *RULES[1:])
    default = Route(IPv4Network("0.0.0.0/0"), "tailscale0", 52)
    throw = Route(IPv4Network("100.0.0.0/8"), "", 52, RouteKind.THROW)
    own_only = vnet(network={"ipv4_cidr_ranges": [RANGES[0]]})
    own = (OWN[0], OWN[2])
    report = check_routes(own_only, routes(host(default, rules=rules, own=own), WAYS[:1]), 1000)
    assert ids(report) == ["route-conflict"]
    assert "tailscale0" in texts(report)
    report = check_routes(
        own_only, routes(host(default, throw, rules=rules, own=own), WAYS[:1]), 1000
    )
    assert ids(report) == []


def test_rule_that_refuses_is_told_once_however_many_routes_there_are():
    rules = (RULES[0], Rule(100, RuleAction.REFUSE), *RULES[1:])
    report = check_routes(vnet(), routes(host(rules=rules)), 1000)
    assert ids(report) == ["route-conflict"]
    assert "policy rule" in texts(report)


def test_way_that_only_the_kernel_knows_is_told_and_an_interface_only_once():
    ways = ((RANGES[0], "odd0", ""), (RANGES[1], "odd0", ""), WAYS[2])
    report = check_routes(vnet(), routes(host(), ways), 1000)
    assert ids(report) == ["route-conflict"]
    assert f"{RANGES[0]} go to odd0 instead of vnet0" in texts(report)
    ways = ((RANGES[0], "", "Network is unreachable"), *WAYS[1:])
    report = check_routes(vnet(), routes(host(), ways), 1000)
    assert "nowhere (Network is unreachable)" in texts(report)


def test_missing_and_stray_routes_and_a_missing_interface():
    report = check_routes(vnet(), routes(host(own=OWN[:1])), 1000)
    assert ids(report) == ["route-missing"]
    assert RANGES[1] in texts(report)
    stray = Route(IPv4Network("0.0.0.0/0"), "vnet0", 7)
    report = check_routes(vnet(), routes(host(stray)), 1000)
    assert ids(report) == ["route-stray"]
    assert "ip route del 0.0.0.0/0 dev vnet0 table 7" in texts(report)
    report = check_routes(vnet(), RouteFacts(HostRoutes(), has_interface=False), 1000)
    assert ids(report) == ["interface-missing"]


def test_what_vnet_alone_knows_of_the_network_is_not_lost():
    report = check_routes(
        vnet(network_problems=["The nameserver is in there: move it."]), routes(host()), 0
    )
    assert "The nameserver is in there" in texts(report)


@pytest.mark.parametrize(
    ("found", "is_so"),
    [
        (OWN, True),
        (OWN[:1], False),
        ((*OWN, Route(IPv4Network("100.64.9.9/32"), "vnet0")), True),
        ((*OWN, Route(IPv4Network("192.0.2.9/32"), "vnet0")), False),
        ((*OWN, Route(IPv4Network("100.64.0.0/16"), "vnet0")), False),
        ((*OWN, Route(IPv4Network("100.64.0.0/16"), "eth0")), True),
    ],
    ids=["all", "one is missing", "address in a range", "address", "part of a range", "of others"],
)
def test_routes_that_are_not_what_vnet_says_are_looked_at_again(found, is_so):
    assert is_stable(HostRoutes(found), "vnet0", RANGES) is is_so


# -- SSH --

WANTED = Path("/home/alice/.tsh/vnet_ssh_config")


@pytest.mark.parametrize(
    ("inclusion", "expected"),
    [
        (Inclusion.NOT, ["ssh-include-missing"]),
        (Inclusion.FOR_SOME_HOSTS, ["ssh-include-missing"]),
        (Inclusion.FOR_ALL_HOSTS, []),
    ],
)
def test_include_that_does_not_count_is_a_note_and_never_an_issue(inclusion, expected):
    facts = SshFacts(Path("/home/alice/.ssh/config"), WANTED, "Host x\n", inclusion)
    report = check_ssh(facts)
    assert (ids(report), report.status) == (expected, CheckStatus.OK)
    assert report.ssh_configuration_report is not None
    is_there = inclusion is not Inclusion.NOT
    found = report.ssh_configuration_report.user_openssh_config_includes_vnet_ssh_config
    assert found is is_there


def test_missing_configuration_is_said_to_be_missing():
    report = check_ssh(SshFacts(Path("/c"), WANTED, None))
    assert report.ssh_configuration_report is not None
    assert not report.ssh_configuration_report.user_openssh_config_exists


def test_of_the_configuration_only_what_matters_is_shown():
    text = (
        "# secret1\nInclude ~/.ssh/x\n\nUser secret2\nHost a b\n\tSetEnv T=secret3\n"
        'match exec "curl secret4"\nroot:$6$secret5\nHost=c\nUser z'
    )
    assert outline(text) == (
        "# 1 other line\nInclude ~/.ssh/x\n# 2 other lines\nHost a b\n# 1 other line\nMatch ...\n"
        "# 1 other line\nHost=c\n# 1 other line"
    )
    assert outline("") == ""
    assert outline("Host x\n" * 300).endswith("# 100 more")


# -- DNS --

SERVERS = (
    ServerFacts("100.64.0.2", "100.64.0.2", "fd00:1::2"),
    ServerFacts("fd00:1::2", "100.64.0.2", "fd00:1::2"),
)
EXPECTED = {"A": "100.64.0.2", "AAAA": "fd00:1::2"}


def record(zone: str, kind: str, outcome: Outcome, *observed: str) -> RecordFacts:
    return RecordFacts(zone, kind, outcome, observed, "" if observed else "why")


def dns_of(*records: RecordFacts, backend: str = "resolved"):
    return check_dns(DnsFacts(SERVERS, EXPECTED, records), has_zones=True, backend=backend)


def test_right_address_among_others_is_right():
    records = [
        record("a.test", kind, Outcome.FOUND, "192.0.2.1", EXPECTED[kind]) for kind in EXPECTED
    ]
    report = dns_of(*records)
    assert (ids(report), report.status) == ([], CheckStatus.OK)


@pytest.mark.parametrize(
    ("outcome", "observed", "status", "expected"),
    [
        (Outcome.FOUND, ("192.0.2.9", "192.0.2.8"), "HIJACKED", "dns-zone-hijacked"),
        (Outcome.NOT_FOUND, (), "NOT_REGISTERED", "dns-zone-not-registered"),
        (Outcome.TIMEOUT, (), "TIMEOUT", "dns-timeout"),
        (Outcome.ERROR, (), "RESOLVER_ERROR", "dns-resolver-error"),
    ],
)
def test_each_wrong_answer_has_its_finding(outcome, observed, status, expected):
    good = record("b.test", "A", Outcome.FOUND, "100.64.0.2")
    report = dns_of(record("a.test", "A", outcome, *observed), good)
    assert ids(report) == [expected]
    assert "a.test (A)" in texts(report)
    assert report.dns_report is not None
    bad, well = report.dns_report.zones
    assert bad.a_record is not None
    assert bad.a_record.status.value == status
    assert bad.a_record.observed_ip == (observed[0] if observed else "")
    assert bad.aaaa_record is None
    assert well.a_record is not None
    assert well.a_record.status.value == "OK"


def test_many_zones_become_one_sentence():
    report = dns_of(*(record(f"z{n}.test", "A", Outcome.NOT_FOUND) for n in range(30)))
    assert ids(report) == ["dns-zone-not-registered"]
    assert "and 25 more" in texts(report)
    assert report.dns_report is not None
    assert len(report.dns_report.zones) == 30


def test_where_nobody_set_up_the_resolver_the_advice_is_another():
    zone = record("a.test", "A", Outcome.NOT_FOUND)
    assert "dns.os_integration" in texts(dns_of(zone, backend="none"))
    assert "dns.os_integration" not in texts(dns_of(zone))


def test_servers_that_do_not_answer_are_told_each():
    silent = tuple(ServerFacts(s.address, error="A: late; AAAA: late") for s in SERVERS)
    report = check_dns(DnsFacts(silent), has_zones=True, backend="resolved")
    assert ids(report) == ["dns-server-unreachable"] * 2
    assert "the worker dns" in texts(report)
    assert report.dns_report is not None
    assert report.dns_report.ipv4_server is not None
    assert not report.dns_report.ipv4_server.reachable


def test_expected_is_what_the_ipv6_server_says_else_the_other():
    four = ServerFacts("100.64.0.2", "1.1.1.1", "fd::1")
    assert expected_of((four, ServerFacts("fd00::2", "2.2.2.2"))) == {
        "A": "2.2.2.2",
        "AAAA": "fd::1",
    }
    assert expected_of((ServerFacts("100.64.0.2"),)) == {}


def test_no_zones_are_noted():
    report = check_dns(DnsFacts(SERVERS, EXPECTED), has_zones=False, backend="resolved")
    assert (ids(report), report.status) == (["dns-no-zones"], CheckStatus.OK)


# -- IPv6 --

KERNEL = Ipv6Facts(is_disabled_for_all=False, is_disabled_for_interface=False)


def test_ipv6_that_is_off_is_a_note():
    report = check_ipv6(vnet(network={"ipv6_prefix": None}), KERNEL, None, None)
    assert (ids(report), report.status) == (["ipv6-off"], CheckStatus.OK)


def test_ipv6_black_hole_needs_an_ipv4_that_works():
    dead = ServerFacts("fd00:1::2", error="late")
    report = check_ipv6(vnet(), KERNEL, routes(host()), DnsFacts((SERVERS[0], dead)))
    assert ids(report) == ["ipv6-black-hole"]
    both = DnsFacts((ServerFacts("100.64.0.2", error="late"), dead))
    assert ids(check_ipv6(vnet(), KERNEL, routes(host()), both)) == []
    assert ids(check_ipv6(vnet(), KERNEL, routes(host()), DnsFacts(SERVERS))) == []


def test_ipv6_prefix_that_goes_elsewhere_is_not_a_route_conflict_of_ipv4():
    ways = (*WAYS[:2], ("fd00:1::", "", "Network is unreachable"))
    assert ids(check_ipv6(vnet(), KERNEL, routes(host(), ways), None)) == ["ipv6-not-routed"]
    assert ids(check_routes(vnet(), routes(host(), ways), 0)) == []


# -- VNet itself --


def test_vnet_that_is_well_has_no_finding_and_shows_its_workers():
    report = check_vnet(vnet(), "", is_silent=False, version=VERSION)
    assert ids(report) == []
    shown = {detail.name: detail.value for detail in report.details}
    assert shown["dns"].startswith("ready, 0 restarts, uid 1, Landlock 4, seccomp allow-list")


def test_vnet_that_is_not_there_or_does_not_answer():
    report = check_vnet(None, "no", is_silent=False, version=VERSION)
    assert ids(report) == ["vnet-not-running"]
    report = check_vnet(None, "VNet did not answer within 2 s", is_silent=True, version=VERSION)
    assert ids(report) == ["vnet-silent"]
    assert "within 2 s" in texts(report)


def test_reasons_are_told_once_in_the_place_where_they_belong():
    known = vnet(
        reasons=["net", "os", "login", "The worker dns is starting: wait.", "else"],
        network_problems=["net"],
        os_problems=["os"],
        login_problems=["login"],
    )
    report = check_vnet(known, "", is_silent=False, version=VERSION)
    assert [found.text for found in report.findings] == ["else"]


@pytest.mark.parametrize("state", [WorkerState.FAILED, WorkerState.BACKOFF])
def test_worker_that_is_down_is_a_problem(state):
    killed = LastExitStatus(status=None, signal="SIGKILL")
    worker = msgspec.structs.replace(WORKER, state=state, restarts=5, last_exit=killed)
    report = check_vnet(vnet(workers=[worker]), "", is_silent=False, version=VERSION)
    assert ids(report) == ["worker-down"]
    assert "ended with SIGKILL" in texts(report)


def test_restarts_other_versions_and_missing_confinement_are_notes():
    ended = LastExitStatus(status=3, signal=None)
    missing = msgspec.structs.replace(CONFINEMENT, missing=["no Landlock"])
    workers = [
        msgspec.structs.replace(WORKER, name=name, restarts=2, last_exit=ended, confinement=missing)
        for name in ("dns", "tun")
    ]
    report = check_vnet(vnet(workers=workers), "", is_silent=False, version="9.9")
    assert ids(report) == ["versions-differ", *["worker-restarted"] * 2, "confinement-incomplete"]
    assert "dns, tun is not in force: no Landlock" in texts(report)
    assert report.status is CheckStatus.OK


# -- the system's resolver --


def test_resolver_of_a_running_vnet():
    assert ids(check_resolver(vnet(), None)) == []
    report = check_resolver(vnet(os_problems=["It fails: mend it."]), None)
    assert (ids(report), report.status) == (["resolver-problem"], CheckStatus.ISSUES_FOUND)
    by_hand = vnet(os_wanted="none", network={"os_integration": "none"})
    assert ids(check_resolver(by_hand, None)) == ["resolver-by-hand"]


def test_resolver_that_would_be_used():
    report = check_resolver(None, ResolverFacts("resolved", ("it runs", "programs ask it")))
    assert [(d.name, d.value) for d in report.details] == [
        ("VNet would use", "resolved"),
        ("Because", "it runs; programs ask it"),
    ]
    wrong = ResolverFacts("none", (), "macos is not possible")
    assert ids(check_resolver(None, wrong)) == ["resolver-problem"]


# -- leftovers --

FILE = "/etc/resolv.conf"
MARKS = {"resolv.conf": FILE}


@pytest.mark.parametrize(
    ("changes", "marks", "in_use", "backend", "expected"),
    [
        ((), {}, False, None, []),
        ((FILE,), MARKS, False, None, ["leftover-changes"]),
        ((), MARKS, False, None, ["leftover-file"]),
        (None, MARKS, False, None, ["leftover-file"]),
        (None, {}, False, None, []),
        ((FILE,), MARKS, False, "resolv.conf", []),
        ((FILE,), MARKS, True, None, []),
        ((), MARKS, False, "resolved", ["leftover-file"]),
    ],
    ids=[
        "nothing", "killed", "no journal", "journal of root", "root's, nothing", "in use by this one",
        "in use by another", "of another back end",
    ],
)  # fmt: skip
def test_what_counts_as_left(changes, marks, in_use, backend, expected):
    facts = LeftoverFacts(Path("/state"), changes, marks, is_in_use=in_use)
    report = check_leftovers(facts, backend, is_running=backend is not None)
    assert ids(report) == expected
    # One that hangs still has its files.
    assert ids(check_leftovers(facts, None, is_running=True)) == []
    if changes and expected:
        assert "vnet repair --state-dir /state" in texts(report)


# -- clock, logins --

LOGIN = LoginFacts(
    "proxy.root.test", "alice", "ok", "", NOW - timedelta(hours=1), NOW + timedelta(hours=5)
)
HOME = HomeFacts("/home/alice/.tsh", "", (LOGIN,))
PROXY = ProxyFacts(
    "proxy.root.test",
    "proxy.root.test:443",
    "root.test",
    connects=(("192.0.2.1", ""),),
    server_version="18.0.0",
)


@pytest.mark.parametrize(
    ("skew", "error", "expected"),
    [
        (0.0, 0.5, []),
        (59.0, 0.5, []),
        (300.0, 0.5, ["clock-wrong"]),
        (-300.0, 0.5, ["clock-wrong"]),
        (65.0, 8.0, []),
        (None, 0.0, []),
    ],
)
def test_clock_by_that_of_a_proxy(skew, error, expected):
    proxy = dataclasses.replace(PROXY, skew_seconds=skew, skew_error_seconds=error)
    report = check_clock(HOME, [proxy], NOW)
    assert ids(report) == expected
    if expected:
        assert ("behind" if skew > 0 else "ahead of") in texts(report)


def test_login_that_begins_in_the_future_tells_of_the_clock():
    later = dataclasses.replace(LOGIN, not_before=NOW + timedelta(minutes=10))
    report = check_clock(HomeFacts("/h", "", (later,)), [], NOW)
    assert ids(report) == ["clock-wrong"]
    assert "in 600 s" in texts(report)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"state": "login_expired"}, ["login-expired"]),
        ({"state": "no_login", "problem": "no key"}, ["login-unusable"]),
        ({"state": "hardware_key", "problem": "in a token"}, ["login-unusable"]),
        ({"not_after": NOW + timedelta(minutes=5)}, ["login-ends-soon"]),
    ],
)
def test_states_of_a_login(changed, expected):
    login = dataclasses.replace(LOGIN, **changed)
    assert ids(check_logins(HomeFacts("/h", "", (login,)), NOW)) == expected


def test_home_without_a_profile():
    report = check_logins(HomeFacts("/h", "no profile in /h: run tsh login"), NOW)
    assert ids(report) == ["login-missing"]


# -- proxies --


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"lookup_error": "Name or service not known"}, ["proxy-not-found"]),
        ({"connects": (("192.0.2.1", "refused"), ("fd::1", "late"))}, ["proxy-unreachable"]),
        (
            {"connects": (("192.0.2.1", ""), ("fd::1", "no answer within 4 s"))},
            ["proxy-ipv6-black-hole"],
        ),
        ({"connects": (("192.0.2.1", ""), ("fd::1", "Network is unreachable"))}, []),
        ({"connects": (("192.0.2.1", "no answer within 4 s"), ("fd::1", ""))}, []),
        ({"web_error": "self-signed", "is_untrusted": True}, ["proxy-untrusted"]),
        ({"web_error": "no HTTP"}, []),
        ({"auth_error": "it is closed", "server_version": ""}, ["cluster-unreachable"]),
        ({"connects": (), "forward_proxy": "http://fw:3128"}, []),
    ],
)
def test_ways_to_a_proxy_may_fail(changed, expected):
    report = check_proxies(vnet(), [dataclasses.replace(PROXY, **changed)])
    assert ids(report) == expected


def test_cluster_that_answers_here_but_not_vnet():
    lost = msgspec.structs.replace(CLUSTER, state=ClusterState.UNREACHABLE)
    leaf = msgspec.structs.replace(lost, name="leaf.test", leaf_of="root.test")
    report = check_proxies(vnet(clusters=[lost, leaf]), [PROXY])
    assert ids(report) == ["cluster-unreachable-for-vnet"]
    silent = dataclasses.replace(PROXY, auth_error="no", server_version="")
    assert ids(check_proxies(vnet(clusters=[lost]), [silent])) == ["cluster-unreachable"]
    assert ids(check_proxies(None, [PROXY])) == []

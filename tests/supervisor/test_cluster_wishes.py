"""What clusters may ask of this machine (supervisor.clusters)."""

from ipaddress import ip_address

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_fakes import CLUSTER, NETWORK

from ipc import messages as m
from ipc.messages import ClusterState
from supervisor import clusters
from supervisor.cluster_memory import ClusterMemory

OWN = NETWORK.ranges[0]
UPSTREAM = [bytes([10, 9, 0, 1]), b"\xfd" + bytes(15)]


def accept(*, zones=(), ranges=(), upstream=UPSTREAM):
    cluster = msgspec.structs.replace(CLUSTER, zones=list(zones), ranges=list(ranges))
    return clusters.accept([cluster], NETWORK, upstream)


def test_good_wishes_are_granted_once_and_in_order():
    found = accept(
        zones=["b.test", "a.test", "b.test", "_srv.a-b.test"],
        ranges=["10.1.0.0/16", OWN, "10.1.0.0/16", "10.2.0.0/255.255.0.0"],
    )
    assert found.zones == ["b.test", "a.test", "_srv.a-b.test"]
    assert found.ranges == [OWN, "10.1.0.0/16", "10.2.0.0/16"]
    assert found.problems == []


def report(name="root.test", **changes):
    return msgspec.structs.replace(CLUSTER, name=name, **changes)


def test_cluster_that_was_not_asked_yet_keeps_what_it_said_before():
    before = report(zones=["corp.test"], ranges=["10.1.0.0/16"])
    fresh = report(zones=[], ranges=[], is_configured=False, state="unreachable")
    [found] = clusters.complete([fresh], [before])
    assert (found.zones, found.ranges) == (before.zones, before.ranges)
    assert found.state == "unreachable"
    # The next such report is completed from this one.
    assert clusters.complete([fresh], [found]) == [found]


def test_leaves_are_kept_until_their_root_was_asked_again():
    root, leaf = report(), report("leaf.test", leaf_of="root.test", ranges=["10.1.0.0/16"])
    fresh = report(zones=[], ranges=[], is_configured=False, state="unreachable")
    assert clusters.complete([fresh], [root, leaf])[1:] == [leaf]
    # Once the root has answered it alone says which leaves there are.
    assert clusters.complete([root], [root, leaf]) == [root]


@pytest.mark.parametrize(("state", "is_kept"), [
    ("ok", True), ("unreachable", True), ("login_expired", True),
    ("no_login", False), ("hardware_key", False),
])  # fmt: skip
def test_what_a_cluster_wanted_ends_with_the_login(state, is_kept):
    before = [report(ranges=["10.1.0.0/16"]), report("leaf.test", leaf_of="root.test")]
    fresh = report(zones=[], ranges=[], is_configured=False, state=state)
    found = clusters.complete([fresh], before)
    assert (len(found) == 2, found[0].ranges == ["10.1.0.0/16"]) == (is_kept, is_kept)


@pytest.mark.parametrize(("changes", "matters"), [
    ({"state": m.ClusterState.NO_LOGIN}, True), ({"user": "bob"}, True), ({"zones": []}, True),
    ({"is_configured": False}, True), ({"profile": "other.test"}, True),
    ({"state": m.ClusterState.UNREACHABLE}, False), ({"problem": "it is slow"}, False),
    ({"expires": None}, False), ({"ranges": []}, False),
])  # fmt: skip
def test_only_a_change_of_logins_or_zones_may_change_whose_a_name_is(changes, matters):
    before = clusters.ClusterView([report(), report("leaf.test", leaf_of="root.test")], "")
    after = clusters.ClusterView([report(**changes), *before.clusters[1:]], "")
    assert (clusters.names_of(before) != clusters.names_of(after)) == matters
    assert clusters.names_of(None) != clusters.names_of(before)


def test_what_was_said_is_remembered_on_disk(tmp_path):
    memory = ClusterMemory(tmp_path / "clusters.json")
    assert memory.read() == []
    kept = report(
        zones=["corp.test"], ranges=["10.1.0.0/16"], problem="p", proxy_addresses=[b"1234"]
    )
    memory.write([kept, report("new.test", is_configured=False)])
    [found] = ClusterMemory(tmp_path / "clusters.json").read()
    assert (found.name, found.zones, found.ranges) == (kept.name, kept.zones, kept.ranges)
    assert (found.proxy_addresses, found.problem) == (kept.proxy_addresses, "")
    assert (tmp_path / "clusters.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "clusters.json").write_bytes(b"[{")
    assert memory.read() == []


def test_range_may_not_cover_a_proxy():
    proxy = ip_address("10.7.0.1").packed
    cluster = msgspec.structs.replace(CLUSTER, ranges=["10.7.0.0/16"], proxy_addresses=[proxy])
    found = clusters.accept([cluster], NETWORK, UPSTREAM)
    assert found.ranges == [OWN]
    assert "contains the Teleport proxy 10.7.0.1" in found.problems[0]


def test_range_that_something_uses_waits_and_is_named_with_it():
    cluster = msgspec.structs.replace(CLUSTER, ranges=["10.7.0.0/16", "10.8.0.0/16", OWN])
    asked = {}

    def in_the_way(block, *, is_routed):
        asked[str(block)] = is_routed
        return "docker0 has the route 10.8.3.0/24" if str(block) == "10.8.0.0/16" else ""

    routed = msgspec.structs.replace(NETWORK, ranges=[OWN, "10.7.0.0/16"])
    found = clusters.accept([cluster], routed, UPSTREAM, in_the_way)
    assert found.ranges == [OWN, "10.7.0.0/16"]
    assert asked == {"10.7.0.0/16": True, "10.8.0.0/16": False}
    [problem] = found.problems
    assert "10.8.0.0/16 of cluster 'demo.test'" in problem
    assert "docker0 has the route 10.8.3.0/24" in problem


def test_range_around_the_part_that_vnet_has_is_as_good_as_routed():
    part = msgspec.structs.replace(NETWORK, ranges=["100.115.92.0/23"])
    cluster = msgspec.structs.replace(CLUSTER, ranges=["100.64.0.0/10"])
    found = clusters.accept([cluster], part, UPSTREAM, lambda *_, **__: "tailscale0 has it")
    assert found == clusters.Accepted(CLUSTER.zones, ["100.115.92.0/23"], [])


def test_only_the_same_cluster_and_only_what_was_certain_is_kept():
    fresh = report(zones=["own.test"], ranges=[], is_configured=False)
    other = report(name="other.test", ranges=["10.1.0.0/16"])
    uncertain = report(ranges=["10.2.0.0/16"], is_configured=False)
    assert clusters.complete([fresh], [other, uncertain]) == [fresh]
    changed = report(zones=[], ranges=[])
    assert clusters.complete([changed], [report(ranges=["10.1.0.0/16"])]) == [changed]
    assert clusters.complete([], [other]) == []


@pytest.mark.parametrize(
    "zone",
    [
        "test", "", ".", "..", "a..test", ".a.test", "a.test.", "A.test", "../etc.passwd",
        "a/b.test", "a b.test", "a.test\n", "a\n.test", "a\0.test", "-a.test", "a-.test",
        "ä.test", "*.test", "~a.test", "a.test;x", f"{'a' * 64}.test", ".".join(["a"] * 128),
    ],
)  # fmt: skip
def test_zone_that_is_no_name_of_two_labels_is_left_out(zone):
    found = accept(zones=[zone, "good.test"])
    assert found.zones == ["good.test"]
    [problem] = found.problems
    assert problem.startswith("The zone ")
    assert "\n" not in problem
    assert "\0" not in problem


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0.0.0.0/0", "special"),
        ("0.0.0.0/1", "special"),
        ("64.0.0.0/2", "special"),  # loopback is in it
        ("10.0.0.0/7", "larger than a /8"),
        ("128.0.0.0/3", "larger than a /8"),
        ("10.9.0.0/16", "contains the nameserver 10.9.0.1"),
        ("10.0.0.0/8", "contains the nameserver 10.9.0.1"),
        ("127.0.0.0/8", "special"),
        ("169.254.0.0/16", "special"),
        ("168.0.0.0/7", "special"),
        ("224.0.0.0/8", "special"),
        ("255.255.255.0/24", "special"),
        ("10.1.0.0/28", "too small"),
        ("10.1.0.1/32", "too small"),
        ("10.1.0.1/16", "host bits"),
        ("10.1.0.0", "too small"),
        ("10.1.0.0/33", "not a valid netmask"),
        ("fd00::/64", "Expected 4 octets"),
        ("; rm -rf /", "Expected 4 octets"),
        ("10.1.0.0/16\nx", "netmask"),
    ],
)
def test_range_that_would_do_harm_is_left_out(text, reason):
    found = accept(ranges=[text, "10.1.0.0/16"])
    assert found.ranges == [OWN, "10.1.0.0/16"]
    [problem] = found.problems
    assert problem.startswith("The range ")
    assert reason in problem
    assert "\n" not in problem


def test_there_is_room_for_so_many_ranges_and_zones_only():
    many = [f"10.{n}.0.0/16" for n in range(100, 250)]
    found = accept(ranges=many, zones=[f"z{n}.test" for n in range(2000)])
    assert len(found.ranges) == clusters.MAX_RANGES
    assert len(found.zones) == clusters.MAX_ZONES
    assert "too many" in found.problems[0]


def test_a_thousand_problems_are_told_shortly():
    found = accept(zones=[f"UPPER{n}.test" for n in range(1000)])
    assert len(found.problems) == clusters.MAX_PROBLEMS + 1
    assert found.problems[-1].startswith("980 more")


@given(st.lists(st.text(max_size=30), max_size=5), st.lists(st.text(max_size=30), max_size=5))
def test_any_wish_gets_an_answer(zones, ranges):
    found = accept(zones=zones, ranges=ranges)
    assert found.ranges[0] == OWN
    assert all(clusters.is_zone(zone) for zone in found.zones)


def test_a_cluster_is_well_only_if_it_is_for_every_proxy():
    well, other = report(), report("other.test")
    failing = report(state=ClusterState.UNREACHABLE, problem="root.test cannot be reached")
    first = clusters.ClusterView([well, other], "")
    for views in ([[failing, other], [well, other]], [[well, other], [other, failing]]):
        found = clusters.combine([clusters.ClusterView(view, "") for view in views])
        assert sorted(c.state for c in found.clusters) == ["ok", "unreachable"]
        [problem] = [c.problem for c in found.clusters if c.problem]
        # With what to do, which the network does not say.
        assert problem.startswith("root.test cannot be reached; ")
        assert "vnet diag" in problem
    assert clusters.combine([first, clusters.ClusterView([], "")]) == first


def test_what_one_proxy_alone_finds_wrong_with_the_home_is_told():
    def problem(*problems: str) -> str:
        return clusters.combine([clusters.ClusterView([], text) for text in problems]).problem

    assert problem("", "", "cannot be written") == "cannot be written"
    assert problem("no profile", "", "cannot be written") == "no profile"
    assert problem("", "") == ""


@pytest.mark.parametrize("length", [10, 500])
def test_what_is_said_of_an_unreachable_cluster_ends_with_what_to_do_and_can_be_handed_over(length):
    there = report(state=ClusterState.UNREACHABLE, problem="x" * length)
    [found] = clusters.combine([clusters.ClusterView([there], "")]).clusters
    assert found.problem.startswith("x" * 10)
    assert found.problem.endswith("; VNet tries again, and vnet diag looks for the cause")
    assert msgspec.json.decode(msgspec.json.encode(found), type=m.Cluster) == found

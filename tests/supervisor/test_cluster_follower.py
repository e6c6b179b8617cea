"""What the supervisor makes of the proxies' reports: until when clusters count as not asked yet."""

import msgspec
import pytest
from run_fakes import CLUSTER, NETWORK, make_workers

from ipc import messages as m
from supervisor import clusters
from supervisor.cluster_follower import ClusterFollower
from supervisor.handover import KeptReport

FRESH = msgspec.structs.replace(CLUSTER, is_configured=False)
LEAF = msgspec.structs.replace(FRESH, name="leaf.test", leaf_of=CLUSTER.name)


class Plane:
    def set_ranges(self, _ranges):
        return {}


@pytest.fixture
def follower(tmp_path):
    return ClusterFollower(
        tmp_path / "clusters.json",
        Plane(),
        network=lambda: NETWORK,
        upstream=list,
        in_the_way=lambda _block, *, is_routed: "",
        use_ranges=lambda _ranges: None,
        forget_names=lambda: None,
    )


@pytest.fixture
def proxies():
    return make_workers("proxy-0", "proxy-1")


def tell(follower, worker, *found: m.Cluster) -> None:
    follower.hear(worker, m.ClustersReported(clusters=list(found)))


def test_every_proxy_has_to_have_asked_each_root(follower, proxies):
    one, two = proxies.values()
    assert follower.report is None
    tell(follower, one, FRESH)
    assert follower.report.awaited == (CLUSTER.name,)
    tell(follower, two, FRESH)
    tell(follower, one, CLUSTER)
    # The first proxy says all is well; the second does not know yet.
    assert follower.report.clusters == [CLUSTER]
    assert follower.report.awaited == (CLUSTER.name,)
    tell(follower, two, CLUSTER, LEAF)
    assert follower.report.awaited == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"state": m.ClusterState.UNREACHABLE},
        {"state": m.ClusterState.LOGIN_EXPIRED},
        {"problem": "it is slow"},
        {"is_configured": True},
    ],
)
def test_a_failure_is_an_answer(follower, proxies, changes):
    tell(follower, proxies["proxy-0"], msgspec.structs.replace(FRESH, **changes))
    assert follower.report.awaited == ()


def test_a_cluster_that_never_answers_is_not_waited_for_without_end(follower, proxies, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("supervisor.cluster_follower.time.monotonic", lambda: now[0])
    tell(follower, proxies["proxy-0"], FRESH)
    now[0] += clusters.FIRST_ANSWER_SECONDS - 1
    # Saying the same again, or something else of it, buys no time.
    tell(follower, proxies["proxy-0"], msgspec.structs.replace(FRESH, user="bob"))
    assert follower.report.awaited == (CLUSTER.name,)
    now[0] += 2
    assert follower.report.awaited == ()
    # Another proxy has its own time.
    tell(follower, proxies["proxy-1"], FRESH)
    assert follower.report.awaited == (CLUSTER.name,)


def test_a_proxy_that_has_ended_asks_nobody(follower, proxies):
    tell(follower, proxies["proxy-0"], CLUSTER)
    tell(follower, proxies["proxy-1"], FRESH)
    follower.forget("proxy-1")
    assert follower.report.awaited == ()


def test_after_an_update_of_vnet_it_is_still_known_who_asks(follower):
    follower.adopt({"proxy-0": KeptReport(clusters=[FRESH], problem="")}, [])
    assert follower.report.awaited == (CLUSTER.name,)

"""The report of all clusters in parts (ipc.cluster_report)."""

import msgspec
import pytest
from message_samples import CLUSTER

from ipc import codec
from ipc.cluster_report import MAX_PARTS, Assembly, ReportOrderError, split
from ipc.permits import Role


def numbered(count, **changes):
    return [msgspec.structs.replace(CLUSTER, name=f"c{n}.test", **changes) for n in range(count)]


def put_together(messages):
    assembly = Assembly()
    sent = [
        codec.decode(codec.encode(message), Role.PROXY, Role.SUPERVISOR) for message in messages
    ]
    results = [assembly.take(message) for message in sent]
    assert results[:-1] == [None] * (len(messages) - 1)
    return results[-1]


@pytest.mark.parametrize(
    "clusters",
    [
        [],
        numbered(1),
        numbered(5000),
        # The largest that a cluster can be.
        numbered(40, zones=["z" * 253] * 200, problem="p" * 500, user="u" * 500),
    ],
    ids=["none", "one", "many", "large"],
)
def test_every_number_of_clusters_arrives_in_messages_that_fit(clusters):
    messages = split(clusters, "why")
    assert {message.problem for message in messages} == {"why"}
    assert put_together(messages) == clusters


def test_more_than_can_be_sent_is_said():
    messages = split(numbered(900, zones=["z" * 253] * 200), "")
    assert len(messages) == MAX_PARTS
    assert "too many" in messages[0].problem


def test_a_problem_with_a_long_path_in_it_fits_and_still_says_what_to_do():
    [message] = split([], f"no profile in /{'x' * 4000}: run tsh login")
    assert codec.decode(codec.encode(message), Role.PROXY, Role.SUPERVISOR) == message
    assert message.problem.startswith("no profile in /xxx")
    assert message.problem.endswith("xxx: run tsh login")


def test_report_that_begins_anew_replaces_one_that_was_cut_off():
    clusters = numbered(5000)
    first, *rest = split(clusters, "")
    assembly = Assembly()
    assembly.take(first)
    assembly.take(rest[0])
    assert [assembly.take(message) for message in [first, *rest]][-1] == clusters


def test_parts_out_of_order_are_refused():
    _first, second, *_ = split(numbered(5000), "")
    with pytest.raises(ReportOrderError):
        Assembly().take(second)

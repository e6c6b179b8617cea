"""Users are told apart where packets are rewritten, too; the imported tests run here a second time."""

from collections.abc import Iterator

import pytest
from demo_bed import demo_bed
from private_bed import Bed
from test_e2e_users import (  # noqa: F401
    CLUSTER,
    CONFIG,
    bed,
    test_a_stranger_beside_an_allowed_user_at_the_same_port_is_not_taken_for_that_one,
    test_hosts_are_for_the_same_users,
    test_ipv6_and_ipv4_by_ipv6_sockets,
    test_users_who_take_each_others_ports_are_told_apart_in_a_thousand_connections,
    test_what_is_left_of_an_attempt_lets_nobody_in,
    test_who_stood_behind_an_allowed_user_gets_nothing_when_that_one_leaves,
)

pytestmark = [pytest.mark.root, pytest.mark.e2e]


@pytest.fixture(scope="module")
def users_bed() -> Iterator[Bed]:
    """In place of the other module's demo."""
    with demo_bed(CLUSTER, CONFIG, env={"VNET_DATA_PLANE": "rewriting"}) as made:
        assert made.status()["network"]["data_plane"] == "rewriting"
        yield made

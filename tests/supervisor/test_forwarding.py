"""Which forwarded networks are in force beside which virtual ranges."""

import errno

import pytest
from msgspec.structs import replace
from run_fakes import NETWORK

from ipc.messages import DataPlaneKind
from supervisor.forwarding import ForwardedNetworks, choose
from supervisor.network import without_ipv6

NAMESPACE, REWRITING = DataPlaneKind.NAMESPACE, DataPlaneKind.REWRITING
OWN = ["100.64.0.1/32", "fd60:67ec:4325::1/128"]


class FakePlane:
    kind = NAMESPACE

    def __init__(self):
        self.routed = None
        self.failing = {}
        self.error = None

    def set_forwarded(self, networks):
        if self.error is not None:
            raise self.error
        self.routed = list(networks)
        return {text: error for text, error in self.failing.items() if text in networks}


@pytest.fixture
def plane():
    return FakePlane()


def test_networks_beside_the_ranges_are_in_force_each_once():
    listed = ["172.30.0.0/24", "fd12::/64", "192.168.1.7", "172.30.0.0/24", *OWN]
    chosen = choose(listed, NETWORK, NAMESPACE)
    assert chosen.networks == ["172.30.0.0/24", "fd12::/64", "192.168.1.7/32", *OWN]
    assert chosen.warnings == []


@pytest.mark.parametrize(
    "listed", ["100.64.0.0/24", "100.70.0.0/16", "100.64.0.2", "10.5.7.0/24", "10.0.0.0/8"]
)
def test_network_in_a_virtual_range_is_not_and_what_to_do_is_said(listed):
    network = replace(NETWORK, ranges=["100.64.0.0/10", "10.5.0.0/16"])
    chosen = choose([listed, "172.30.0.0/24"], network, NAMESPACE)
    assert chosen.networks == ["172.30.0.0/24"]
    [warning] = chosen.warnings
    assert warning.startswith(listed)
    assert "security.allow_forwarded_from is not in force" in warning
    assert "overlaps the virtual range 10" in warning
    assert "VNet's own address alone may be listed: 100.64.0.1/32" in warning


def test_network_in_the_virtual_prefix_is_not():
    chosen = choose(["fd60:67ec:4325::/80"], NETWORK, NAMESPACE)
    assert chosen.networks == []
    assert "fd60:67ec:4325::1/128" in chosen.warnings[0]


def test_ipv6_networks_wait_while_ipv6_is_off():
    chosen = choose(["172.30.0.0/24", "fd12::/64", *OWN], without_ipv6(NETWORK), NAMESPACE)
    assert chosen.networks == ["172.30.0.0/24", OWN[0]]
    assert chosen.warnings == []


def test_where_packets_are_rewritten_only_what_is_masqueraded_is_in_force():
    chosen = choose(["172.30.0.0/24", *OWN], NETWORK, REWRITING)
    assert chosen.networks == OWN
    [warning] = chosen.warnings
    assert "172.30.0.0/24" in warning
    assert "masquerade what goes to vnet0, and list 100.64.0.1/32" in warning


def test_what_is_in_force_is_routed_and_told(plane, caplog):
    forwarded = ForwardedNetworks(plane)
    listed = ["172.30.0.0/24", "100.70.0.0/16", "fd12::/64"]
    plane.failing = {"fd12::/64": OSError(errno.ENETDOWN, "Network is down")}
    found = forwarded.put_into_force(listed, NETWORK)
    assert plane.routed == ["172.30.0.0/24", "fd12::/64"]
    assert found == replace(NETWORK, forwarded_from=["172.30.0.0/24"])
    assert len(forwarded.warnings) == 2
    assert "cannot be routed (Network is down)" in forwarded.warnings[1]
    told = len(caplog.records)
    assert told == 2
    # The same again is no news.
    forwarded.put_into_force(listed, NETWORK)
    assert len(caplog.records) == told
    plane.failing = {}
    assert forwarded.put_into_force(["fd12::/64"], found).forwarded_from == ["fd12::/64"]
    assert forwarded.warnings == []
    assert forwarded.put_into_force([], found) == NETWORK
    assert plane.routed == []


def test_range_of_a_cluster_that_comes_over_a_network_takes_it_out_of_force(plane):
    forwarded = ForwardedNetworks(plane)
    listed = ["172.30.0.0/24"]
    wider = replace(NETWORK, ranges=[*NETWORK.ranges, "172.16.0.0/12"])
    assert forwarded.put_into_force(listed, NETWORK).forwarded_from == listed
    assert forwarded.put_into_force(listed, wider).forwarded_from == []
    assert "172.16.0.0/12" in forwarded.warnings[0]
    assert forwarded.put_into_force(listed, NETWORK).forwarded_from == listed
    assert forwarded.warnings == []


def test_kernel_that_says_nothing_leaves_all_out_of_force(plane):
    forwarded = ForwardedNetworks(plane)
    plane.error = OSError(errno.EIO, "Input/output error")
    assert forwarded.put_into_force(["172.30.0.0/24"], NETWORK) == NETWORK
    assert "Input/output error" in forwarded.warnings[0]

"""Where questions belong."""

from ipaddress import ip_address

import pytest
from dns_fakes import PREFIX, make_network, make_query, packed
from hypothesis import given
from hypothesis import strategies as st

from ipc.addresses import ipv6_twin
from workers.dns.message import parse
from workers.dns.zones import (
    Diagnostic,
    Elsewhere,
    EmptyReverse,
    HostName,
    NoSuchReverse,
    Route,
    VirtualAddress,
    Zones,
)


def route(name: str, *ranges: str, ipv6: bool = True) -> Route:
    return Zones(make_network(*ranges, ipv6=ipv6)).route(parse(make_query(name, "PTR")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pg.Root.example.test", HostName("pg.root.example.test", "pg.Root.example.test")),
        ("single", HostName("single", "single")),
        ("vnet-diag-00ff.any.zone", Diagnostic()),
        ("VNET-Diag-00ff.test", Diagnostic()),
        ("vnet-dia.test", HostName("vnet-dia.test", "vnet-dia.test")),
        ("7.0.64.100.in-addr.arpa", VirtualAddress(packed("100.64.0.7"), 4)),
        ("7.0.64.100.IN-ADDR.ARPA", VirtualAddress(packed("100.64.0.7"), 4)),
        ("255.255.127.100.in-addr.arpa", VirtualAddress(packed("100.127.255.255"), 4)),
        ("0.0.128.100.in-addr.arpa", Elsewhere()),
        ("1.1.1.1.in-addr.arpa", Elsewhere()),
        ("64.100.in-addr.arpa", EmptyReverse(4)),
        ("0.64.100.in-addr.arpa", EmptyReverse(4)),
        ("100.in-addr.arpa", Elsewhere()),
        ("in-addr.arpa", Elsewhere()),
        ("1.7.0.64.100.in-addr.arpa", NoSuchReverse(4)),
        ("x.0.64.100.in-addr.arpa", NoSuchReverse(4)),
        ("07.0.64.100.in-addr.arpa", NoSuchReverse(4)),
        ("300.0.64.100.in-addr.arpa", NoSuchReverse(4)),
        ("064.100.in-addr.arpa", Elsewhere()),
        ("b._dns-sd._udp.0.0.64.100.in-addr.arpa", NoSuchReverse(4)),
        ("x.ip6.arpa", Elsewhere()),
        ("_tcp.home.arpa", Elsewhere()),
    ],
)
def test_name_is_routed(name: str, expected: Route) -> None:
    assert route(name) == expected


@pytest.mark.parametrize(
    ("range_", "name", "zone_labels"),
    [
        ("10.0.0.0/8", "1.2.3.10.in-addr.arpa", 3),
        ("192.168.4.0/22", "1.7.168.192.in-addr.arpa", 5),
        ("192.168.4.32/27", "63.4.168.192.in-addr.arpa", 6),
    ],
)
def test_reverse_zone_is_cut_at_the_label_inside_the_range(
    range_: str, name: str, zone_labels: int
) -> None:
    found = route(name, "100.64.0.0/10", range_)
    assert isinstance(found, VirtualAddress)
    assert found.zone_labels == zone_labels


def test_ipv6_address_is_placed_by_its_ipv4_twin() -> None:
    twin = ip_address(ipv6_twin(PREFIX, packed("100.64.0.7")))
    assert route(twin.reverse_pointer) == VirtualAddress(packed("100.64.0.7"), 18)
    assert route(twin.reverse_pointer.upper()) == VirtualAddress(packed("100.64.0.7"), 18)
    assert route(twin.reverse_pointer, ipv6=False) == Elsewhere()
    assert route(twin.reverse_pointer[2:]) == EmptyReverse(18)


@pytest.mark.parametrize("tail", ["::2", "::1:6440:7", "::c000:201"])
def test_ipv6_address_that_is_never_given_out_does_not_exist(tail: str) -> None:
    address = ip_address("fd60:67ec:4325:0" + tail)
    assert route(address.reverse_pointer) == NoSuchReverse(18)


@given(st.ip_addresses(v=4))
def test_ipv4_address_is_ours_exactly_inside_the_ranges(address: object) -> None:
    found = route(ip_address(str(address)).reverse_pointer)
    inside = ip_address("100.64.0.0") <= ip_address(str(address)) <= ip_address("100.127.255.255")
    assert isinstance(found, VirtualAddress if inside else Elsewhere)


def test_other_classes_and_the_root_go_upstream() -> None:
    zones = Zones(make_network())
    chaos = make_query("version.bind")[:-2] + b"\0\3"
    assert zones.route(parse(chaos)) == Elsewhere()
    assert zones.route(parse(make_query("."))) == Elsewhere()

import zlib
from ipaddress import IPv4Address, IPv6Address

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from ipc.addresses import as_text, ipv4_twin, ipv6_twin, owner_of_address, owner_of_name
from ipc.curve import make_key_pair, z85_encode

PREFIX = IPv6Address("fd60:67ec:4325::").packed
ipv4 = st.binary(min_size=4, max_size=4)


@given(ipv4)
def test_both_addresses_of_a_name_lead_to_each_other_and_to_one_proxy(address):
    twin = ipv6_twin(PREFIX, address)
    assert twin[:12] == PREFIX[:8] + bytes(4)
    assert ipv4_twin(twin) == ipv4_twin(address) == address
    for proxies in (1, 2, 7):
        owner = owner_of_address(address, proxies)
        assert owner == owner_of_address(twin, proxies) == zlib.crc32(address) % proxies
        assert 0 <= owner < proxies


@given(st.text(min_size=1, max_size=253), st.integers(1, 64))
def test_each_name_is_asked_of_one_of_the_proxies(name, proxies):
    owner = owner_of_name(name, proxies)
    assert owner == owner_of_name(name, proxies)
    assert 0 <= owner < proxies


def test_addresses_are_spread_over_the_proxies():
    owners = [
        owner_of_address(IPv4Address(f"100.64.{n >> 8}.{n & 255}").packed, 4) for n in range(1000)
    ]
    assert all(150 < owners.count(proxy) < 350 for proxy in range(4))


@pytest.mark.parametrize("text", ["100.64.0.1", "255.255.255.255", "fd60:67ec:4325::1", "::"])
def test_address_is_shown_in_its_usual_form(text):
    packed = (IPv6Address if ":" in text else IPv4Address)(text).packed
    assert as_text(packed) == text


@given(st.binary(max_size=64).filter(lambda data: len(data) % 4 == 0))
def test_z85_is_that_of_libzmq(data):
    assert z85_encode(data).encode() == z85.encode(data)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 31])
def test_z85_takes_whole_words_only(length):
    with pytest.raises(ValueError, match="no multiple of 4"):
        z85_encode(bytes(length))


def test_key_pairs_are_what_libzmq_would_make():
    pairs = [make_key_pair() for _ in range(20)]
    for public, secret in pairs:
        assert len(public) == len(secret) == 40
        assert zmq.curve_public(secret.encode()) == public.encode()
    assert len(set(pairs)) == len(pairs)

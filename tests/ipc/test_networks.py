"""Which networks an address lies in, against what the standard library says."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.networks import Networks

NETWORKS = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.integers(0, 32)),
    st.tuples(st.ip_addresses(v=6), st.integers(0, 128)),
).map(lambda pair: f"{pair[0]}/{pair[1]}")
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@given(st.lists(NETWORKS, max_size=4), ADDRESSES, st.data())
def test_an_address_is_found_in_the_networks_that_have_it(texts, address, data):
    if texts:  # addresses at random are hardly ever in any
        near = [ip_address(text.partition("/")[0]) for text in texts]
        address = data.draw(st.sampled_from([address, *near]))
    expected = any(address in ip_network(text, strict=False) for text in texts)
    assert (address.packed in Networks(texts)) is expected


def test_families_are_kept_apart():
    assert b"\0\0\0\1" not in Networks(["::/0"])
    assert bytes(16) not in Networks(["0.0.0.0/0"])


@pytest.mark.parametrize("text", ["", "10.0.0.0/33", "x", "10.0.0/8"])
def test_what_is_no_network_is_an_error(text):
    with pytest.raises(ValueError):
        Networks([text])

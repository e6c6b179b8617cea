from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from workers.proxy.probe_order import capacity, probe_order

networks = st.builds(
    lambda base, prefix: IPv4Network((base, prefix), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(22, 27),
)


@given(st.text(max_size=30), networks, st.sets(st.integers(0, 1023), max_size=5))
def test_the_order_is_that_of_a_slow_obvious_model(name, network, offsets):
    reserved = {IPv4Address((int(network[0]) + offset) % 2**32) for offset in offsets}
    everything = list(network)
    start = int.from_bytes(sha256(name.encode()).digest()[:8], "big") % len(everything)
    rotated = everything[start:] + everything[:start]
    forbidden = reserved | {everything[0], everything[-1]}
    expected = [address for address in rotated if address not in forbidden]
    assert list(probe_order(name, network, reserved)) == expected
    assert capacity(network, reserved) == len(expected)


def test_names_spread_over_the_range():
    network = IPv4Network("100.64.0.0/10")
    firsts = {next(probe_order(f"app{i}.test", network, ())) for i in range(1000)}
    assert len(firsts) > 990


def test_a_large_range_is_not_listed_to_find_the_first_address():
    network = IPv4Network("0.0.0.0/1")
    assert len(list(islice(probe_order("a.test", network, ()), 3))) == 3

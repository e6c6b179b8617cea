"""The bounded cache."""

from hypothesis import given
from hypothesis import strategies as st

from workers.dns.cache import ExpiringCache


def test_entry_is_there_until_it_expires() -> None:
    cache: ExpiringCache[str, int] = ExpiringCache(4)
    cache.put("a", 1, expires=10.0)
    assert cache.get("a", 9.99) == 1
    assert cache.get("a", 10.0) is None
    assert len(cache) == 0


def test_full_cache_gives_up_its_oldest_entry() -> None:
    cache: ExpiringCache[str, int] = ExpiringCache(2)
    cache.put("a", 1, 10.0)
    cache.put("b", 2, 10.0)
    cache.put("a", 3, 10.0)
    cache.put("c", 4, 10.0)
    assert [cache.get(key, 0.0) for key in "abc"] == [3, None, 4]


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9), st.integers(0, 9))),
)
def test_cache_never_exceeds_its_limit_and_never_lies(
    limit: int, steps: list[tuple[str, int, int]]
) -> None:
    cache: ExpiringCache[str, int] = ExpiringCache(limit)
    model: dict[str, tuple[int, int]] = {}
    for number, (key, expires, now) in enumerate(steps):
        cache.put(key, number, expires)
        model[key] = (number, expires)
        assert len(cache) <= limit
        for name, (value, end) in model.items():
            found = cache.get(name, now)
            assert found is None or (found == value and now < end)
        assert cache.get(key, now) == (number if now < expires else None)

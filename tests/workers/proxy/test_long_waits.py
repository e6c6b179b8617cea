from workers.proxy.long_waits import LongWaits


def make(**limits):
    return LongWaits(**({"max_total": 5, "max_per_target": 3, "long_seconds": 10.0} | limits))


def enter(waits, target, members, now=0.0):
    return [member for member in members if waits.enter(target, member, now)]


def test_a_burst_may_wait_together_for_a_moment():
    waits = make()
    assert len(enter(waits, "pg", range(1000))) == 1000
    assert waits.surplus(9.9) == []
    assert len(waits) == 1000


def test_after_that_only_the_first_of_each_target_may_stay():
    waits = make()
    enter(waits, "pg", range(10))
    enter(waits, "other", range(100, 102), now=5.0)
    assert waits.surplus(10.0) == list(range(3, 10))
    for member in range(3, 10):
        waits.leave("pg", member)
    assert waits.surplus(20.0) == []
    assert enter(waits, "pg", [50], now=20.0) == []


def test_all_targets_together_have_a_limit():
    waits = make()
    for target in ("a", "b", "c"):
        enter(waits, target, [f"{target}{i}" for i in range(3)])
    assert waits.surplus(10.0) == ["b2", "c0", "c1", "c2"]
    for member in waits.surplus(10.0):
        waits.leave(member[0], member)
    assert enter(waits, "d", ["d0"], now=10.0) == []
    waits.leave("a", "a0")
    assert enter(waits, "d", ["d0"], now=10.0) == ["d0"]


def test_target_with_a_certificate_is_never_full():
    """Those who pass at once wait for nobody."""
    waits = make()
    for step in range(1000):
        assert enter(waits, "pg", [step], now=float(step))
        waits.leave("pg", step)
    assert len(waits) == 0


def test_leaving_twice_or_without_having_waited_is_nothing():
    waits = make()
    enter(waits, "pg", [1, 2])
    for _ in range(2):
        waits.leave("pg", 1)
        waits.leave("other", 1)
    assert len(waits) == 1

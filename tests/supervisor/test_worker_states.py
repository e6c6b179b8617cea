import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.restart_policy import (
    FIRST_DELAY_SECONDS,
    JITTER,
    LONGEST_DELAY_SECONDS,
    RestartLimits,
    RestartPolicy,
)
from supervisor.worker_states import (
    ALIVE,
    TRANSITIONS,
    ImpossibleTransitionError,
    WorkerEvent,
    WorkerState,
    after,
)

PAIRS = list(itertools.product(WorkerState, WorkerEvent))


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_pair_is_in_the_table_or_raises(state, event):
    if (state, event) in TRANSITIONS:
        assert after(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(ImpossibleTransitionError, match=f"{event} while {state}"):
            after(state, event)


def test_a_process_begins_with_spawning_and_ends_with_an_exit_only():
    begins = {WorkerEvent.SPAWNED}
    ends = {
        WorkerEvent.CRASHED,
        WorkerEvent.CRASHED_TOO_OFTEN,
        WorkerEvent.EXITED,
        WorkerEvent.SUCCESSOR_ENDED,
    }
    for (state, event), follows in TRANSITIONS.items():
        assert (state not in ALIVE and follows in ALIVE) == (event in begins)
        assert (state in ALIVE and follows not in ALIVE) == (event in ends)


def test_every_state_can_be_left_and_reached():
    assert {state for state, _ in TRANSITIONS} == set(WorkerState)
    assert set(TRANSITIONS.values()) == set(WorkerState)


def test_a_stop_can_be_ordered_whatever_happens():
    for state in WorkerState:
        assert after(state, WorkerEvent.STOP_ORDERED) in {WorkerState.DRAINING, WorkerState.STOPPED}


def model_of_delay(times: list[float], limits: RestartLimits, chance: float) -> float | None:
    """The slow, obvious way: all crashes ever, counted anew."""
    recent = [time for time in times if times[-1] - time <= limits.window_seconds]
    if len(recent) > limits.restart_max:
        return None
    longest = FIRST_DELAY_SECONDS
    for _ in recent[1:]:
        longest = min(longest * 2, LONGEST_DELAY_SECONDS)
    return longest - longest * JITTER * chance


@given(
    restart_max=st.integers(0, 12),
    window=st.floats(1, 100),
    steps=st.lists(
        st.tuples(st.floats(0, 60), st.floats(0, 1, exclude_max=True), st.booleans()), max_size=40
    ),
)
def test_policy_is_that_of_a_slow_model(restart_max, window, steps):
    limits = RestartLimits(restart_max, window)
    policy, now, times = RestartPolicy(limits), 1000.0, []
    for pause, chance, is_commanded in steps:
        now += pause
        if is_commanded:
            policy.forget()
            times = []
        times.append(now)
        wanted = model_of_delay(times, limits, chance)
        found = policy.crashed(now, chance)
        assert found == (None if wanted is None else pytest.approx(wanted))


def test_wait_doubles_up_to_the_longest_and_is_forgotten_after_calm():
    policy = RestartPolicy(RestartLimits(100, 30.0))
    delays = [policy.crashed(now=1.0, chance=0.0) for _ in range(12)]
    assert delays[:4] == [0.05, 0.1, 0.2, 0.4]
    assert delays[-1] == LONGEST_DELAY_SECONDS
    assert policy.crashed(now=31.1, chance=0.0) == FIRST_DELAY_SECONDS


def test_worker_is_given_up_with_the_crash_after_the_last_restart_allowed():
    policy = RestartPolicy(RestartLimits(5, 30.0))
    assert [policy.crashed(now, 0.0) is None for now in range(6)] == [False] * 5 + [True]
    policy.forget()
    assert policy.crashed(6, 0.0) == FIRST_DELAY_SECONDS


def test_no_restart_at_all_can_be_wished():
    assert RestartPolicy(RestartLimits(0, 30.0)).crashed(1.0, 0.0) is None

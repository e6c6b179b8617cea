"""Who is blamed for silence, with a clock and workers of the test's own."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.probe_blame import GAP_SECONDS, TUN, Blame, Ready

HANG = 5.0
STEP = 0.25
SLOTS = ("tun", "proxy-0", "proxy-1", "dns")
ENDS = frozenset(SLOTS) - {TUN}
# After so long a sentence is told about a silence that has cost no worker.
TOLD = HANG + 2 * GAP_SECONDS
BLOCKED = "Operation not permitted"


@dataclass
class Story:
    """Ways that answer as the test says; `arrives`, `answers` and `waits` are what else is seen.

    `arrives`: tun counts the probes of connections. `answers`: these workers count what they do.
    `waits`: packets wait for tun.
    """

    slots: tuple[str, ...] = SLOTS
    now: float = 1000.0
    started: dict[str, float] = field(default_factory=dict)
    counters: dict[str, Counter[str]] = field(default_factory=dict)
    suspects: list[str] = field(default_factory=list)
    late: set[str] = field(default_factory=set)  # whose heartbeats do not come
    beats: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.blame = Blame("vnet0", "100.64.0.2", heartbeat_seconds=0.5, hang_seconds=HANG)
        for slot in self.slots:
            self.start(slot)

    def start(self, slot: str) -> None:
        self.started[slot] = self.now
        self.counters[slot] = Counter()

    def stop(self, slot: str) -> None:
        del self.started[slot]

    def turn(
        self,
        answering: frozenset[str] = frozenset(),
        *,
        arrives: bool = True,
        answers: frozenset[str] = frozenset(),
        waits: bool = False,
        error: str = "",
    ) -> list[str]:
        if arrives and TUN in self.counters:
            self.counters[TUN]["probes"] += 1
        for slot in answers | answering:
            name = {"dns": "answers_own", TUN: "packets_to_outer"}.get(slot, "probes")
            self.counters[slot][name] += 1
        self.beats |= {
            slot: dict(self.counters[slot]) for slot in self.started if slot not in self.late
        }
        ready = {slot: Ready(at, self.beats[slot]) for slot, at in self.started.items()}
        self.blame.follow(self.now, ready)
        for slot in self.blame.ways:
            if slot in answering:
                self.blame.answered(slot, self.now)
            elif error:
                self.blame.failed(slot, error)
        found = [suspect.slot for suspect in self.blame.judge(self.now, ready, lambda: waits)]
        self.suspects += found
        return found

    def live(self, seconds: float, answering: frozenset[str] = frozenset(), **seen) -> list[str]:
        """Turns for so long; who was suspected meanwhile."""
        found = []
        end = self.now + seconds
        while self.now < end:
            self.now += STEP
            found += self.turn(answering, **seen)
        return found


TABLE = {
    # silent ways, what else is seen -> suspected
    "nothing": (set(), {}, []),
    "dns": ({"dns"}, {}, ["dns"]),
    "one proxy": ({"proxy-1"}, {}, ["proxy-1"]),
    "dns and one proxy": ({"dns", "proxy-1"}, {}, ["proxy-1", "dns"]),
    "all, and tun reads nothing": (ENDS, {"arrives": False, "waits": True}, ["tun"]),
    "all, and tun reads connections": (ENDS, {}, ["tun"]),
    "all, and nothing reaches tun": (ENDS, {"arrives": False}, []),
    "all, and tun writes answers": (ENDS, {"answers": frozenset({TUN})}, []),
    "all, and nothing can be sent": (ENDS, {"error": BLOCKED, "waits": True}, []),
    "all proxies": (ENDS - {"dns"}, {}, ["tun"]),
    "all proxies, and no connection reaches tun": (ENDS - {"dns"}, {"arrives": False}, []),
    "all proxies, and each refuses": (ENDS - {"dns"}, {"answers": ENDS - {"dns"}}, ["tun"]),
    "dns, which counts answers": ({"dns"}, {"answers": frozenset({"dns"})}, []),
    "a proxy, which counts answers": ({"proxy-0"}, {"answers": frozenset({"proxy-0"})}, []),
    "dns, and nothing can be sent to it": ({"dns"}, {"error": BLOCKED}, []),
}


def test_worker_that_gets_no_processor_is_not_suspected():
    """It beats late, and what it has done is in no heartbeat yet."""
    story = Story()
    story.live(3, ENDS)
    story.late.add("proxy-0")
    assert story.live(HANG + 3, ENDS - {"proxy-0"}) == []
    story.late.clear()
    assert story.live(HANG, ENDS - {"proxy-0"}) == ["proxy-0"]


@pytest.mark.parametrize("beats", [1, 2])
def test_probes_that_tun_tells_of_late_were_before_the_silence(beats):
    """It got no processor while a firewall was set up, and then reads what had come before."""
    story = Story()
    story.live(3, ENDS)
    story.late.add(TUN)
    assert story.live(HANG - 1, frozenset({"dns"}), arrives=False) == []
    story.late.clear()
    for _ in range(beats):
        story.counters[TUN]["probes"] += 9
        assert story.live(STEP, frozenset({"dns"}), arrives=False) == []
    assert story.live(3 * HANG, frozenset({"dns"}), arrives=False) == []


def test_worker_that_nobody_asks_any_more_is_not_suspected():
    """As while tun, or the supervisor, gets no processor; before that it has answered."""
    story = Story()
    story.live(3, ENDS)
    story.live(HANG - 1, ENDS - {"proxy-0"}, answers=frozenset({"proxy-0"}))
    assert story.live(HANG + 3, ENDS - {"proxy-0"}, arrives=False) == []


@pytest.mark.parametrize("name", TABLE)
def test_blame_follows_from_which_ways_are_silent(name):
    silent, seen, expected = TABLE[name]
    story = Story()
    assert story.live(3, ENDS) == []
    assert story.live(HANG - 2 * STEP, ENDS - silent, **seen) == []
    assert story.live(3 * STEP, ENDS - silent, **seen) == expected
    # What the system says is no worker's fault.
    assert bool(story.blame.problems) == ("error" in seen)
    story.live(TOLD - HANG, ENDS - silent, **seen)
    explained = bool(silent) and not expected
    assert bool(story.blame.problems) == explained


def test_every_problem_names_what_is_blocked_and_ends_with_the_silence():
    story = Story()
    story.live(3, ENDS)
    story.live(TOLD + 1, error=BLOCKED, arrives=False)
    (problem,) = story.blame.problems
    assert "vnet0" in problem
    assert BLOCKED in problem
    story.live(1, ENDS)
    assert story.blame.problems == []
    story.live(TOLD + 1, ENDS - {"dns"}, error=BLOCKED)
    (problem,) = story.blame.problems
    assert "UDP port 53" in problem
    assert "vnet restart dns" in problem
    story.live(1, ENDS)
    story.live(TOLD + 1, ENDS - {"proxy-1"}, arrives=False)
    (problem,) = story.blame.problems
    assert "TCP to 100.64.0.2" in problem
    assert "proxy-1" in problem


def test_firewall_that_was_there_from_the_start_costs_no_worker():
    story = Story()
    assert story.live(10 * HANG, waits=True) == []
    assert len(story.blame.problems) == 1


def test_worker_whose_replacement_helps_nothing_is_suspected_no_more():
    story = Story()
    story.live(3, ENDS)
    assert story.live(HANG + 1, ENDS - {"dns"}) == ["dns"]
    story.stop("dns")
    story.live(1, ENDS)
    assert story.blame.problems == []
    story.start("dns")
    assert story.live(5 * HANG, ENDS - {"dns"}) == []
    assert "DNS server" in story.blame.problems[0]


def test_worker_that_hangs_again_after_it_has_worked_is_suspected_again():
    story = Story()
    for _ in range(3):
        story.start("proxy-0")
        story.live(3, ENDS)
        assert story.live(HANG + 1, ENDS - {"proxy-0"}) == ["proxy-0"]


def test_replaced_worker_has_its_full_time():
    story = Story()
    story.live(3, ENDS)
    story.live(HANG - 1, ENDS - {"dns"})
    story.start("dns")
    assert story.live(HANG - 1, ENDS - {"dns"}) == []
    story.start(TUN)  # every way is new
    assert story.live(HANG - 1, ENDS - {"dns"}) == []
    assert story.blame.problems == []


@pytest.mark.parametrize("slot", SLOTS)
def test_worker_that_hangs_and_is_replaced_is_no_reason_to_speak_of_a_firewall(slot):
    """It stops at once, and its last heartbeat tells of work; the supervisor notices it by that."""
    story = Story()
    story.live(3, ENDS)
    silent = ENDS if slot == TUN else frozenset({slot})
    end = story.now + HANG + 2 * GAP_SECONDS
    while story.now < end - STEP:
        story.live(STEP, ENDS - silent, arrives=slot != TUN)
        assert not story.blame.problems
    story.stop(slot)
    story.live(1, ENDS - silent)
    story.start(slot)
    story.live(TOLD - 1, ENDS - silent)
    assert not story.blame.problems


def test_proxies_that_stay_silent_behind_a_new_tun_are_suspected_then():
    story = Story()
    story.live(3, ENDS)
    assert story.live(HANG + 1, frozenset({"dns"})) == [TUN]
    story.start(TUN)
    assert sorted(story.live(HANG + 1, frozenset({"dns"}))) == ["proxy-0", "proxy-1"]
    for slot in ("proxy-0", "proxy-1"):
        story.start(slot)
    assert story.live(3 * HANG, frozenset({"dns"})) == []


def test_single_proxy_is_suspected_itself_while_dns_answers():
    story = Story(("tun", "proxy-0", "dns"))
    both = frozenset({"proxy-0", "dns"})
    story.live(3, both)
    assert story.live(HANG + 1, frozenset({"dns"})) == ["proxy-0"]
    story.start("proxy-0")
    story.live(3, both)
    assert story.live(HANG + 1, waits=True) == [TUN]


def test_last_way_that_is_left_costs_tun_first_and_then_the_worker():
    story = Story(("tun", "proxy-0"))
    story.live(3, frozenset({"proxy-0"}))
    assert story.live(HANG + 1) == [TUN]
    story.start(TUN)
    assert story.live(HANG + 1) == ["proxy-0"]
    story.start("proxy-0")
    assert story.live(3 * HANG) == []


def test_silence_of_tun_is_not_put_down_to_who_fell_silent_first():
    story = Story()
    story.live(3, ENDS)
    story.live(1, ENDS - {"dns"}, waits=True)
    found = story.live(HANG + 1, waits=True)
    assert found == [TUN]


def test_time_in_which_the_supervisor_did_not_run_is_not_counted():
    story = Story()
    story.live(3, ENDS)
    story.live(HANG - 1, ENDS - {"dns"})
    story.now += 3600
    assert story.live(HANG - 1, ENDS - {"dns"}) == []
    assert story.live(2, ENDS - {"dns"}) == ["dns"]


@pytest.mark.parametrize("error", ["", BLOCKED])
@pytest.mark.parametrize("silent", [ENDS, {"dns"}])
def test_what_is_told_stays_told_over_time_in_which_the_supervisor_did_not_run(silent, error):
    story = Story()
    story.live(3, ENDS)
    seen = {"arrives": False, "error": error, "answers": frozenset({"dns"})}
    assert story.live(TOLD + 3, ENDS - silent, **seen) == []
    told = story.blame.problems
    assert len(told) == 1
    assert (f"({BLOCKED})" in told[0]) == bool(error)
    story.now += 3600
    for _ in range(int(TOLD / STEP)):
        assert story.live(STEP, ENDS - silent, **seen) == []
        assert story.blame.problems == told
    story.turn(ENDS)
    assert story.blame.problems == []


def test_no_way_is_there_without_tun():
    story = Story()
    story.live(3, ENDS)
    story.stop(TUN)
    story.turn()
    assert story.blame.ways == {}
    assert story.live(2 * HANG) == []


def test_worker_that_takes_long_to_answer_is_well():
    story = Story()
    for _ in range(20):
        assert story.live(HANG - 1, ENDS - {"dns"}) == []
        story.turn(ENDS)
    assert story.blame.problems == []


TURNS = st.lists(
    st.tuples(
        st.frozensets(st.sampled_from(sorted(ENDS))),
        st.booleans(),  # arrives
        st.frozensets(st.sampled_from(SLOTS)),  # who counts what it does
        st.booleans(),  # waits
        st.sampled_from(["", "", "", BLOCKED]),
        st.sampled_from([1, 2, 5, 12, 24]),  # turns
        st.sampled_from([None, None, None, *SLOTS]),  # who is replaced before
        st.sampled_from([0.0, 0.0, 0.0, 0.9, 2.0, 100.0]),  # pause before
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(TURNS, st.booleans())
def test_nobody_is_suspected_without_cause(turns, follows):
    """`follows`: whether the supervisor replaces whom it suspects."""
    story = Story()
    last_answer: dict[str, float] = {}
    worked: set[tuple[str, float]] = set()
    suspected: set[tuple[str, float]] = set()
    awake_since = story.now
    told: set[str] = set()
    for answering, arrives, answers, waits, error, number, replaced, pause in turns:
        if replaced is not None:
            story.start(replaced)
        story.now += pause
        if pause + STEP > GAP_SECONDS:
            awake_since = story.now + STEP
        for _ in range(number):
            story.now += STEP
            found = story.turn(
                answering, arrives=arrives, answers=answers, waits=waits, error=error
            )
            for slot in answering:
                last_answer[slot] = story.now
                worked |= {(slot, story.started[slot]), (TUN, story.started[TUN])}
            if TUN in found:
                assert found == [TUN]
                assert not answering & {"proxy-0", "proxy-1"}
            for slot in found:
                process = slot, story.started[slot]
                assert process in worked
                assert process not in suspected
                suspected.add(process)
                assert story.now - awake_since >= HANG
                assert story.now - story.started[slot] >= HANG
                ways = {"proxy-0", "proxy-1"} if slot == TUN else {slot}
                for way in ways:
                    assert story.now - last_answer.get(way, 0) >= HANG
                assert error == "" or slot not in ways
                if follows:
                    story.start(slot)
            told_before, told = told, {s for s, way in story.blame.ways.items() if way.is_told}
            for slot in told - told_before:
                assert story.now - awake_since >= HANG
                assert story.now - last_answer.get(slot, 0) >= HANG
            assert not told & answering
            assert told or not story.blame.problems


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SLOTS), st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.floats(0, 5))
def test_worker_that_hangs_is_found_in_time_however_often_the_loop_turns(slot, step, phase):
    story = Story()
    story.live(3 + phase, ENDS)
    silent = ENDS if slot == TUN else frozenset({slot})
    began = story.now
    while not (found := story.turn(ENDS - silent, waits=slot == TUN)):
        story.now += step
        assert story.now - began <= HANG + 3 * step
    assert found == [slot]
    assert not story.blame.problems

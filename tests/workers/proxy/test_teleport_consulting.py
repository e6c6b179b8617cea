"""Several clusters at once: who is waited for, and how long."""

import asyncio

import pytest

from workers.proxy.teleport.apps import App, OtherApp
from workers.proxy.teleport.consulting import Answered, Deferred, Question, consult
from workers.proxy.teleport.databases import Database
from workers.proxy.teleport.errors import UnreachableError, ZonesUnknownError
from workers.proxy.teleport.precedence import (
    NO_CANDIDATE,
    Answer,
    Candidate,
    Claim,
    Relation,
)

QUESTION = Question("x.a.test", "x.a.test")
ZONE = Candidate(frozenset({Relation.ZONE}))
NAMED = Candidate(frozenset({Relation.CLUSTER}), host="x", suffix="a.test")
REMOTE = Candidate(frozenset({Relation.PROFILE}), label="x", is_remote=True)
DATABASE = Candidate(frozenset({Relation.ROOT_DATABASE}), identifier="x", is_remote=True)
TCP = Answer(App("pg", "x.a.test", "tcp://x:1", None))
WEB = Answer(OtherApp("web"))
NOTHING = Answer()
DEAD = UnreachableError("dead")


class Cluster:
    """Answers after `gate`, with `reply`; remembers `kept` for sure and `stale` at a pinch."""

    def __init__(self, reply=NOTHING, gate=None, kept=None, stale=None, becomes=NO_CANDIDATE):
        self.reply = reply
        self.gate = gate
        self.kept = kept
        self.stale = stale
        self.becomes = becomes
        self.asked = 0

    def known(self, _question, _candidate):
        return self.kept

    def last_known(self, _question, _candidate):
        return self.stale

    async def ask(self, _question, candidate):
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.reply, Exception):
            raise self.reply
        if isinstance(self.reply, Deferred):
            return self.reply
        return Answered(candidate or self.becomes, self.reply)


def hung(**changes):
    return Cluster(gate=asyncio.Event(), **changes)


async def ask(*sources, limit=2.0, **times):
    """The claim, and which cluster's it is."""
    times = {"grace_seconds": 0.02, "remote_seconds": 0.02} | times
    async with asyncio.timeout(limit):
        decision, asked = await consult(sources, QUESTION, **times)
    return decision, asked[decision.index].source if decision.claim is not None else None


def run(main):
    asyncio.run(main())


def test_all_are_asked_at_once():
    async def main():
        gate = asyncio.Event()
        clusters = [Cluster(gate=gate) for _ in range(5)]
        asking = asyncio.create_task(ask(*((c, ZONE) for c in clusters)))
        async with asyncio.timeout(5):
            while not all(c.asked for c in clusters):
                await asyncio.sleep(0)
        gate.set()
        assert (await asking)[0].claim is None

    run(main)


def test_what_is_remembered_is_not_asked_for():
    async def main():
        cluster = Cluster(kept=TCP)
        assert (await ask((cluster, ZONE)))[1] is cluster
        assert cluster.asked == 0

    run(main)


def test_what_cannot_change_anything_is_not_even_looked_up():
    async def main():
        class Forgetful(Cluster):
            def known(self, _question, _candidate):
                raise AssertionError("not to be asked")

        first = Cluster(kept=TCP)
        assert (await ask((first, ZONE), (Forgetful(), ZONE)))[1] is first

    run(main)


def test_an_earlier_candidate_gets_a_moment_and_wins():
    async def main():
        gate = asyncio.Event()
        slow, quick = Cluster(TCP, gate), Cluster(TCP)
        asyncio.get_running_loop().call_later(0.01, gate.set)
        assert (await ask((slow, ZONE), (quick, ZONE), grace_seconds=10))[1] is slow

    run(main)


def test_one_that_hangs_is_passed_over():
    async def main():
        dead, good = hung(), Cluster(TCP)
        assert (await ask((dead, ZONE), (good, ZONE)))[1] is good
        assert (await ask((hung(), NAMED), (Cluster(WEB), ZONE)))[0].claim is Claim.WEB_APP

    run(main)


def test_one_that_hangs_does_not_take_a_name_below_another_clusters():
    async def main():
        named = Cluster()
        decision, source = await ask((hung(), ZONE), (named, NAMED))
        assert decision.claim is Claim.CLUSTER
        assert source is named

    run(main)


def test_what_one_that_hangs_said_last_still_counts():
    async def main():
        dead = hung(stale=TCP)
        assert (await ask((dead, ZONE), (Cluster(TCP), ZONE)))[1] is dead

    run(main)


def test_a_later_candidate_that_hangs_costs_nothing():
    async def main():
        good = Cluster(TCP)
        assert (await ask((good, ZONE), (hung(), ZONE), grace_seconds=100))[1] is good

    run(main)


def test_the_cluster_whose_name_it_is_is_waited_for():
    async def main():
        gate = asyncio.Event()
        asking = asyncio.create_task(ask((Cluster(gate=gate), NAMED)))
        await asyncio.sleep(0.1)
        assert not asking.done()
        gate.set()
        assert (await asking)[0].claim is Claim.CLUSTER

    run(main)


def test_other_clusters_of_a_profile_get_a_moment_for_names_outside_their_zones():
    async def main():
        decision, _ = await ask((Cluster(), ZONE), (hung(), REMOTE), (hung(), REMOTE))
        assert isinstance(decision.failure, ZonesUnknownError)

    run(main)


@pytest.mark.parametrize(
    ("candidate", "is_in_doubt"), [(None, True), (REMOTE, True), (ZONE, False), (DATABASE, False)]
)
def test_a_failure_says_whose_the_name_is_only_if_that_is_known(candidate, is_in_doubt):
    async def main():
        decision, _ = await ask((Cluster(DEAD), candidate), (Cluster(), ZONE))
        assert isinstance(decision.failure, ZonesUnknownError) is is_in_doubt
        assert str(decision.failure) == "dead"

    run(main)


def test_one_that_turns_out_to_be_a_candidate_counts():
    async def main():
        found = Cluster(TCP, becomes=ZONE)
        assert (await ask((Cluster(), None), (found, None)))[1] is found

    run(main)


def test_those_that_become_known_are_asked_in_their_place():
    async def main():
        first, second = Cluster(TCP), Cluster(TCP)
        leaves = Cluster(Deferred([(Cluster(), ZONE), (first, ZONE)]))
        assert (await ask((leaves, None), (second, ZONE), grace_seconds=10))[1] is first
        assert (await ask((Cluster(Deferred([])), None)))[0].claim is None

    run(main)


def test_a_thousand_clusters_cost_little():
    async def main():
        clusters = [(Cluster(), REMOTE) for _ in range(1000)]
        last = Cluster(Answer(database=Database("x", "mysql")))
        times = {"grace_seconds": 10, "remote_seconds": 10, "limit": 10}
        assert (await ask(*clusters, (last, DATABASE), **times))[1] is last

    run(main)


def test_whoever_stops_waiting_stops_only_the_waiting():
    async def main():
        asking = asyncio.create_task(ask((hung(), ZONE), (hung(), REMOTE)))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0)

    run(main)

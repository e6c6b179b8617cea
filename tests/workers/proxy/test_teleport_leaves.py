import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teleport_fakes import CLUSTER, Clock, FakeApi

from workers.proxy.teleport.cluster import Cluster
from workers.proxy.teleport.errors import NotImplementedByClusterError, UnreachableError
from workers.proxy.teleport.leaves import MAX_LEAVES, Leaves, read_leaves
from workers.proxy.teleport.pb import types_pb2


def remote(name, connection="online"):
    return types_pb2.RemoteClusterV3(
        Metadata=types_pb2.Metadata(Name=name),
        Status=types_pb2.RemoteClusterStatusV3(Connection=connection),
    )


def leaves_of(api, clock=None, on_answer=lambda: None):
    async def connect():
        return api

    clock = clock or Clock()
    root = Cluster(CLUSTER, connect, clock=clock.monotonic, on_change=lambda: None)
    return Leaves(root, clock=clock.monotonic, on_answer=on_answer)


def test_leaves_are_sorted_and_known_as_connected_or_not():
    found = [remote("b.test", "offline"), remote("c.test", ""), remote("a.test")]
    assert list(read_leaves(found).items()) == [
        ("a.test", True),
        ("b.test", False),
        ("c.test", True),
    ]


def test_impossible_names_and_too_many_are_left_out():
    assert read_leaves([remote(""), remote("a\nb"), remote("x" * 300)]) == {}
    assert len(read_leaves(remote(f"l{i}") for i in range(MAX_LEAVES + 10))) == MAX_LEAVES


@given(st.binary(max_size=200))
def test_no_message_a_root_sends_breaks_the_list(data):
    try:
        cluster = types_pb2.RemoteClusterV3.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf refused it before us
        return
    read_leaves([cluster])


def test_the_list_is_kept_for_its_time_and_serves_while_the_root_is_down():
    async def run():
        api, clock = FakeApi(leaves={"a.test": FakeApi()}), Clock()
        leaves = leaves_of(api, clock)
        lists = await asyncio.gather(*(leaves.current() for _ in range(5)))
        assert {tuple(found) for found in lists} == {("a.test",)}
        clock.seconds += 299
        await leaves.current()
        assert api.calls == ["remote_clusters"]
        clock.seconds += 2
        api.error = UnreachableError("down")
        assert list(await leaves.current()) == ["a.test"]
        assert not leaves.is_due()
        clock.seconds += 5
        assert leaves.is_due()
        api.error = None
        await leaves.current()
        assert len(api.calls) == 3

    asyncio.run(run())


def test_a_root_that_never_answered_is_an_error_and_an_old_one_has_no_leaves():
    async def run():
        with pytest.raises(UnreachableError):
            await leaves_of(FakeApi(error=UnreachableError("down"))).current()
        old = leaves_of(FakeApi(leaves_error=NotImplementedByClusterError("unknown method")))
        assert await old.current() == {}

    asyncio.run(run())


def test_the_return_of_an_offline_leaf_is_looked_for_more_often():
    async def run():
        api, clock = FakeApi(leaves={"a.test": FakeApi()}, offline={"a.test"}), Clock()
        leaves = leaves_of(api, clock)
        await leaves.current()
        clock.seconds += 31
        assert leaves.is_due()
        api.offline.clear()
        await leaves.current()
        clock.seconds += 31
        assert not leaves.is_due()

    asyncio.run(run())


def test_who_wants_a_new_list_gets_it_soon_but_not_at_every_turn():
    async def run():
        api, clock = FakeApi(), Clock()
        leaves = leaves_of(api, clock)
        await leaves.current()
        leaves.want()
        assert not leaves.is_due()
        clock.seconds += 5
        assert leaves.is_due()

    asyncio.run(run())


def test_authorities_are_remembered_and_asked_for_anew_when_wanted():
    async def run():
        api = FakeApi(authorities={"a.test": (b"old",)})
        leaves = leaves_of(api)
        assert await leaves.authorities("a.test") == (b"old",)
        api.authorities["a.test"] = (b"new",)
        assert await leaves.authorities("a.test") == (b"old",)
        assert await leaves.authorities("a.test", is_new=True) == (b"new",)
        assert await leaves.authorities("a.test") == (b"new",)

    asyncio.run(run())

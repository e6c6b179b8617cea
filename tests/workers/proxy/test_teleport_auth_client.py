"""What is asked of an auth service and what is made of the answers, over real gRPC."""

import asyncio
import contextlib
import tracemalloc

import pytest
from auth_bed import Bed, make_authority
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from ssh_keys import HOST_AUTHORITY, KINDS, line
from teleport_fakes import der, pem

from workers.proxy.teleport import auth_client
from workers.proxy.teleport.errors import (
    AccessDeniedError,
    KeyPolicyError,
    LimitExceededError,
    MfaRequiredError,
    UnreachableError,
)
from workers.proxy.teleport.pb import auth_pb2


@contextlib.asynccontextmanager
async def asked(directory):
    """A cluster and a client of it."""
    async with Bed(directory, leaves=()) as bed:
        client = auth_client.connect(bed.login("direct"))
        try:
            yield bed.root, client
        finally:
            client.close()


def app(i, description=""):
    resource = auth_pb2.PaginatedResource()
    metadata = resource.AppServer.Spec.App.Metadata
    metadata.Name, metadata.Description = f"app{i}", description
    return resource


def names(resources):
    return [resource.AppServer.Spec.App.Metadata.Name for resource in resources]


def test_a_server_is_told_its_own_version_from_the_second_question_on(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            await client.ping()
            await client.ping()
            assert cluster.auth.versions == [auth_client.CLIENT_VERSION, "17.0.0"]

    asyncio.run(scenario())


def test_20000_apps_come_page_by_page(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            cluster.auth.rows["app_server"] = rows = [app(i, "d" * 500) for i in range(20_000)]
            listing = client.resources("app_server", search=["a", "b"])
            assert names([await anext(listing)]) == ["app0"]
            assert len(cluster.auth.requests) == 1
            tracemalloc.start()
            try:
                count = 1
                async for resource in listing:
                    assert names([resource]) == names([rows[count]])
                    count += 1
                    if count % 1000 == 0:
                        # All of them would be 13 MB.
                        assert tracemalloc.get_traced_memory()[0] < 8e6
            finally:
                tracemalloc.stop()
            assert count == 20_000
            assert [list(r.SearchKeywords) for r in cluster.auth.requests] == [["a", "b"]] * 40

    asyncio.run(scenario())


def test_pages_become_smaller_until_the_server_can_send_them(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            cluster.auth.rows["app_server"] = [app(i) for i in range(300)]
            cluster.auth.max_rows = 100
            found = [resource async for resource in client.resources("app_server")]
            assert names(found) == [f"app{i}" for i in range(300)]
            assert [r.Limit for r in cluster.auth.requests[:4]] == [500, 250, 125, 62]
            assert all(r.Limit == 62 for r in cluster.auth.requests[4:])

    asyncio.run(scenario())


def test_pages_become_smaller_until_we_can_take_them(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            cluster.auth.rows["app_server"] = [app(i, "d" * 20_000) for i in range(600)]
            found = [resource async for resource in client.resources("app_server")]
            assert names(found) == [f"app{i}" for i in range(600)]
            assert cluster.auth.requests[-1].Limit == 125

    asyncio.run(scenario())


def test_one_resource_that_is_too_large_is_an_error(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            cluster.auth.rows["app_server"] = [app(0, "d" * 5_000_000)]
            with pytest.raises(LimitExceededError, match="too large"):
                await anext(client.resources("app_server"))
            with pytest.raises(LimitExceededError, match="too large"):
                await client.app_servers("", 1)
            assert (await client.ping()).ClusterName == cluster.name
            assert len(cluster.auth.connections) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("next_key", [lambda request: "a", lambda request: request.StartKey + "a"])
def test_a_list_without_end_ends(tmp_path, next_key, monkeypatch):
    monkeypatch.setattr(auth_client, "MAX_PAGES", 20)

    async def scenario():
        async with asked(tmp_path) as (cluster, client):

            async def list_resources(stream):
                request = await stream.recv_message()
                await stream.send_message(
                    auth_pb2.ListResourcesResponse(Resources=[app(0)], NextKey=next_key(request))
                )

            cluster.auth.list_resources = list_resources
            with pytest.raises(UnreachableError, match="list of kind node"):
                [resource async for resource in client.resources("node")]

    asyncio.run(scenario())


def test_servers_of_one_kind_are_asked_for_with_a_predicate(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            database = auth_pb2.PaginatedResource()
            database.DatabaseServer.Spec.Database.Spec.Protocol = "postgres"
            cluster.auth.rows = {
                "db_server": [database, database, app(0)],
                "app_server": [app(1), database],
            }
            (first, second) = await client.database_servers('name == "x"', 10)
            assert first == second == database.DatabaseServer
            assert [a.Spec.App.Metadata.Name for a in await client.app_servers("", 1)] == ["app1"]
            request, _ = cluster.auth.requests
            assert (request.PredicateExpression, request.Limit) == ('name == "x"', 10)

    asyncio.run(scenario())


def test_leaves_come_from_all_pages_and_may_never_have_been_seen(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            cluster.presence.names = [f"leaf{i}" for i in range(5)]
            found = await client.remote_clusters()
            assert [c.Metadata.Name for c in found] == cluster.presence.names
            assert found[0].Status.LastHeartbeat.ToDatetime().year == 1

    asyncio.run(scenario())


def test_there_are_not_more_leaves_than_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(auth_client, "MAX_REMOTE_CLUSTERS", 3)

    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            cluster.presence.names = [f"leaf{i}" for i in range(5)]
            with pytest.raises(UnreachableError, match="more than 3"):
                await client.remote_clusters()

    asyncio.run(scenario())


def test_host_authorities_are_the_active_and_the_additional_ones(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            old, new, newer = (make_authority("leaf.test")[1] for _ in range(3))
            cluster.trust.active = [pem(old)]
            cluster.trust.additional = [pem(new) + b"\n", pem(newer).rstrip()]
            assert await client.host_authority("leaf.test") == (der(old), der(new), der(newer))
            cluster.trust.active, cluster.trust.additional = [b"nonsense"], []
            with pytest.raises(UnreachableError, match=r"no host authority of cluster leaf\.test"):
                await client.host_authority("leaf.test")

    asyncio.run(scenario())


def test_ssh_host_authorities_are_the_active_and_the_additional_ones(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            assert await client.ssh_host_authorities("leaf.test") == ()
            old, new = (line(key) for key in (HOST_AUTHORITY, KINDS["rsa"]))
            cluster.trust.active_ssh = [new + b" comment\n", b"nonsense", b""]
            cluster.trust.additional_ssh = [old]
            assert await client.ssh_host_authorities("leaf.test") == (new, old)

    asyncio.run(scenario())


def test_a_challenge_is_asked_for(tmp_path):
    async def scenario():
        async with asked(tmp_path) as (_cluster, client):
            challenge = await client.create_challenge(
                auth_pb2.CreateAuthenticateChallengeRequest(ContextUser=auth_pb2.ContextUser())
            )
            assert challenge.HasField("TOTP")
            assert not challenge.HasField("WebauthnChallenge")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (Status.PERMISSION_DENIED, "access to resource requires MFA", MfaRequiredError),
        (Status.PERMISSION_DENIED, "access to db denied", AccessDeniedError),
        (Status.INVALID_ARGUMENT, "private key policy not met: hardware_key", KeyPolicyError),
    ],
)
def test_a_refusal_keeps_the_clusters_words(tmp_path, status, text, expected):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):
            cluster.auth.error = GRPCError(status, text)
            with pytest.raises(expected, match=text):
                await client.is_mfa_required(auth_pb2.IsMFARequiredRequest())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "message",
    [
        b"\1\0\0\0\1x",  # compressed
        b"\0\xff\xff\xff\xff",  # 4 GiB
        b"\0\0\0\0\2\xff\xff",  # no protobuf
        b"\0\0\0\0\5ab",  # cut off
        b"",
    ],
)
def test_nonsense_is_an_error_of_ours(tmp_path, message):
    async def scenario():
        async with asked(tmp_path) as (cluster, client):

            async def list_resources(stream):
                await stream.recv_message()
                await stream.send_initial_metadata()
                await stream._stream.send_data(message)
                await stream._stream.send_headers([("grpc-status", "0")], end_stream=True)
                await asyncio.sleep(5)

            cluster.auth.list_resources = list_resources
            with pytest.raises(UnreachableError):
                await client.app_servers("", 1)
            assert (await client.ping()).ClusterName == cluster.name

    asyncio.run(scenario())

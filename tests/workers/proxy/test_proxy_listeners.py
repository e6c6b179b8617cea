import asyncio
import gc
import socket
from pathlib import Path

import pytest
from glue_fakes import Sent

from ipc.errors import BusyError
from ipc.messages import CloseListener, ListenerOpened, ListenerRefused, OpenListener
from workers.proxy import listeners as module
from workers.proxy.listeners import NoListenerError, Place, ProxyListeners, describe, flow_key

ADDRESS = b"\x7f\0\0\1"


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


class Bed:
    def __init__(self, limit: int = 2) -> None:
        self.sent = Sent()
        self.accepted: list[socket.socket] = []
        self.places: set[Place] = set()
        self.needed: set[int] = set()
        self.listeners = ProxyListeners(
            self.sent, self.accept, lambda _address, port: port in self.needed, limit
        )

    def accept(self, connection: socket.socket, place: Place) -> None:
        self.accepted.append(connection)
        self.places.add(place)

    def open(self, port: int) -> tuple[str, int]:
        """The supervisor's answer; returns where the listener really is."""
        listener = socket.create_server(("127.0.0.1", 0))
        where = listener.getsockname()
        self.listeners.opened(ListenerOpened(address=ADDRESS, port=port), listener.detach())
        return where


def run(scenario) -> None:
    async def main() -> None:
        bed = Bed()
        try:
            await scenario(bed)
        finally:
            bed.listeners.close()
            for connection in bed.accepted:
                connection.close()

    before = open_descriptors()
    asyncio.run(main())
    assert open_descriptors() <= before


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_listener_is_asked_for_once_and_all_who_wait_go_on():
    async def scenario(bed: Bed) -> None:
        waiting = [asyncio.create_task(bed.listeners.ensure(ADDRESS, 80)) for _ in range(3)]
        await turns()
        assert bed.sent.messages == [OpenListener(address=ADDRESS, port=80)]
        bed.open(80)
        await asyncio.gather(*waiting)
        await bed.listeners.ensure(ADDRESS, 80)  # it is there
        assert len(bed.sent.messages) == 1

    run(scenario)


def test_refusal_reaches_all_who_wait_and_the_next_one_asks_again():
    async def scenario(bed: Bed) -> None:
        waiting = [asyncio.create_task(bed.listeners.ensure(ADDRESS, 80)) for _ in range(3)]
        await turns()
        bed.listeners.refused(ListenerRefused(address=ADDRESS, port=80, reason="no room"))
        for task in waiting:
            with pytest.raises(NoListenerError, match="no room"):
                await task
        again = asyncio.create_task(bed.listeners.ensure(ADDRESS, 80))
        await turns()
        assert len(bed.sent.messages) == 2
        bed.open(80)
        await again

    run(scenario)


def test_silent_supervisor_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "OPEN_SECONDS", 0.01)

    async def scenario(bed: Bed) -> None:
        with pytest.raises(NoListenerError, match="did not answer"):
            await bed.listeners.ensure(ADDRESS, 80)
        monkeypatch.setattr(module, "OPEN_SECONDS", 10)
        again = asyncio.create_task(bed.listeners.ensure(ADDRESS, 80))
        await turns()
        bed.open(80)
        await again

    run(scenario)


def test_supervisor_that_takes_no_message_is_an_error():
    async def scenario(bed: Bed) -> None:
        def refuse(_message) -> None:
            raise BusyError("the supervisor has not read for too long")

        bed.listeners._send = refuse
        for _ in range(2):  # the second is not left waiting for an answer to the first
            with pytest.raises(NoListenerError, match="has not read"):
                await bed.listeners.ensure(ADDRESS, 80)

    run(scenario)


def test_one_who_leaves_does_not_disturb_the_others():
    async def scenario(bed: Bed) -> None:
        leaving = asyncio.create_task(bed.listeners.ensure(ADDRESS, 80))
        staying = asyncio.create_task(bed.listeners.ensure(ADDRESS, 80))
        await turns()
        leaving.cancel()
        await turns()
        bed.open(80)
        await staying
        assert leaving.cancelled()

    run(scenario)


def test_least_recently_used_makes_room_unless_it_is_needed():
    async def scenario(bed: Bed) -> None:
        bed.open(1)
        bed.open(2)
        await bed.listeners.ensure(ADDRESS, 1)  # used last
        bed.open(3)
        assert bed.sent.messages == [CloseListener(address=ADDRESS, port=2)]
        bed.needed = {1}
        bed.open(4)
        assert bed.sent.messages[-1] == CloseListener(address=ADDRESS, port=3)
        bed.needed = {1, 4}
        bed.open(5)  # none can go: better one too many than a lost connection
        assert len(bed.listeners) == 3

    run(scenario)


def test_room_is_made_before_the_supervisor_is_asked_for_another():
    async def scenario(bed: Bed) -> None:
        bed.open(1)
        bed.open(2)
        waiting = asyncio.create_task(bed.listeners.ensure(ADDRESS, 3))
        await turns()
        assert bed.sent.messages == [
            CloseListener(address=ADDRESS, port=1),
            OpenListener(address=ADDRESS, port=3),
        ]
        bed.open(3)
        await waiting
        assert len(bed.listeners) == 2
        assert len(bed.sent.messages) == 2

    run(scenario)


def test_listener_sent_again_replaces_the_one_before():
    async def scenario(bed: Bed) -> None:
        bed.open(80)
        bed.open(80)
        assert len(bed.listeners) == 1
        assert bed.sent.messages == []

    run(scenario)


def test_connections_are_accepted_non_blocking_and_name_their_flow():
    async def scenario(bed: Bed) -> None:
        where = bed.open(80)
        clients = [socket.create_connection(where) for _ in range(100)]
        while len(bed.accepted) < len(clients):
            await asyncio.sleep(0.001)
        source = clients[0].getsockname()
        assert bed.places == {(ADDRESS, 80)}
        keys = {flow_key(connection, (ADDRESS, where[1])) for connection in bed.accepted}
        assert (ADDRESS, source[1], ADDRESS, where[1]) in keys
        assert len(keys) == 100
        assert not any(connection.getblocking() for connection in bed.accepted)
        for client in clients:
            client.close()

    run(scenario)


def connected(client_address: str, server_address: str) -> tuple[socket.socket, socket.socket]:
    """A connection and its accepted end."""
    with socket.create_server((server_address, 0)) as server:
        client = socket.create_connection(
            server.getsockname(), source_address=(client_address, 0), timeout=5
        )
        return client, server.accept()[0]


def test_flow_is_known_by_its_listener_where_packets_are_rewritten():
    # 127.0.0.9 is the virtual address, as rewritten packets have it for their source.
    client, accepted = connected("127.0.0.9", "127.0.0.1")
    with client, accepted:
        place = (b"\x7f\0\0\x09", 443)
        port = client.getsockname()[1]
        assert flow_key(accepted, place) == (b"\x7f\0\0\1", port, *place)


def test_connection_to_the_listeners_own_port_is_no_flow():
    client, accepted = connected("127.0.0.1", "127.0.0.1")
    with client, accepted:
        assert flow_key(accepted, (b"\x7f\0\0\x09", 443)) is None


def test_backlog_outlives_this_process_copy():
    async def scenario(bed: Bed) -> None:
        kept = socket.create_server(("127.0.0.1", 0))  # the supervisor's
        bed.listeners.opened(ListenerOpened(address=ADDRESS, port=80), kept.dup().detach())
        bed.listeners.close()
        with socket.create_connection(kept.getsockname()), kept:
            connection, _ = kept.accept()
            connection.close()

    run(scenario)


@pytest.mark.parametrize(
    ("address", "text"),
    [(b"\x64\x40\3\4", "100.64.3.4:80"), (b"\xfd" + bytes(14) + b"\1", "[fd00::1]:80")],
)
def test_place_is_described_for_people(address, text):
    assert describe(address, 80) == text


def test_listener_that_comes_after_the_end_is_left_to_the_successor():
    async def scenario(bed: Bed) -> None:
        bed.listeners.close()
        with socket.create_server(("127.0.0.1", 0)) as kept:
            copy = kept.dup().detach()
            bed.listeners.opened(ListenerOpened(address=ADDRESS, port=80), copy)
            with socket.create_connection(kept.getsockname()):
                await asyncio.sleep(0.02)
                connection, _ = kept.accept()
                connection.close()
        assert len(bed.listeners) == 0
        assert bed.accepted == []

    run(scenario)

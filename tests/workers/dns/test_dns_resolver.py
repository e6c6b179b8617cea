"""Asking the proxies over the bus."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from dns_fakes import packed, run, wait_until

from ipc.addresses import owner_of_name
from ipc.errors import BusyError
from ipc.messages import (
    AddressResolved,
    DnsToProxy,
    NameOutcome,
    NameResolved,
    ResolveAddress,
    ResolveName,
)
from workers.dns.resolver import OverloadedError, Resolver

NAME = "pg.example.test"


class Bus:
    """Records what is sent; proxies in `busy` do not take anything."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, DnsToProxy]] = []
        self.busy: set[int] = set()

    def send(self, index: int, message: DnsToProxy) -> None:
        if index in self.busy:
            raise BusyError("full")
        self.sent.append((index, message))


def resolved(request_id: int) -> NameResolved:
    return NameResolved(
        request_id=request_id,
        outcome=NameOutcome.ADDRESS,
        ipv4=packed("100.64.0.7"),
        valid_seconds=5,
    )


def start(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work)


def test_owner_of_the_name_is_asked_and_its_answer_given_back() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, 4)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        ((index, message),) = bus.sent
        assert index == owner_of_name(NAME, 4)
        assert isinstance(message, ResolveName)
        resolver.on_message(resolved(message.request_id + 1))
        resolver.on_message(resolved(message.request_id))
        assert await task == resolved(message.request_id)

    run(main())


def test_same_question_travels_once() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, 2)
        tasks = [start(resolver.resolve_name(NAME)) for _ in range(5)]
        await wait_until(lambda: bool(bus.sent))
        tasks[0].cancel()
        resolver.on_message(resolved(bus.sent[0][1].request_id))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert len(bus.sent) == 1
        assert answers[1:] == [resolved(bus.sent[0][1].request_id)] * 4
        again = start(resolver.resolve_name(NAME))
        await wait_until(lambda: len(bus.sent) == 2)
        resolver.close()
        with pytest.raises(asyncio.CancelledError):
            await again

    run(main())


@pytest.mark.parametrize(("proxies", "order"), [(1, [0, 0, 0]), (3, [0, 1, 2])])
def test_silent_proxy_is_followed_by_the_next_and_then_given_up(
    proxies: int, order: list[int]
) -> None:
    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, proxies, attempt_seconds=0.01)
        assert await resolver.resolve_name(NAME) is None
        first = owner_of_name(NAME, proxies)
        assert [(index - first) % proxies for index, _ in bus.sent] == order

    run(main())


def test_late_answer_of_the_first_proxy_is_taken() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, 2, attempt_seconds=0.02)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: len(bus.sent) == 2)
        resolver.on_message(resolved(bus.sent[0][1].request_id))
        assert await task is not None

    run(main())


def test_a_proxy_that_is_back_is_asked_again_at_once() -> None:
    """Its predecessor took the question with it; nobody waits for the attempt's time to pass."""

    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, 2, attempt_seconds=20)
        owner = owner_of_name(NAME, 2)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        resolver.on_connect(1 - owner)
        assert len(bus.sent) == 1
        resolver.on_connect(owner)
        assert bus.sent[1] == bus.sent[0]
        resolver.on_message(resolved(bus.sent[1][1].request_id))
        resolver.on_message(resolved(bus.sent[1][1].request_id))
        assert await task is not None
        resolver.on_connect(owner)
        assert len(bus.sent) == 2

    run(main())


def test_busy_proxy_is_passed_over_at_once() -> None:
    async def main() -> None:
        bus = Bus()
        first = owner_of_name(NAME, 2)
        bus.busy = {first}
        resolver = Resolver(bus.send, 2, attempt_seconds=20)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        assert bus.sent[0][0] == 1 - first
        resolver.on_message(resolved(bus.sent[0][1].request_id))
        assert await task is not None

    run(main())


def test_address_is_asked_for() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, 2)
        task = start(resolver.resolve_address(packed("100.64.0.7")))
        await wait_until(lambda: bool(bus.sent))
        message = bus.sent[0][1]
        assert isinstance(message, ResolveAddress)
        resolver.on_message(AddressResolved(request_id=message.request_id, name=NAME))
        answer = await task
        assert answer is not None
        assert answer.name == NAME

    run(main())


def test_answer_of_the_wrong_kind_is_no_answer() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, 1)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        resolver.on_message(AddressResolved(request_id=bus.sent[0][1].request_id, name=None))
        assert await task is None

    run(main())


def test_too_many_different_questions_are_refused() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, 1, max_waiting=2)
        tasks = [start(resolver.resolve_name(f"{letter}.test")) for letter in "ab"]
        await wait_until(lambda: len(bus.sent) == 2)
        with pytest.raises(OverloadedError):
            await resolver.resolve_name("c.test")
        resolver.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())

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
# Its owner is the same.
OTHER_NAME = next(
    name
    for name in (f"{number}.example.test" for number in range(100))
    if owner_of_name(name, 2) == owner_of_name(NAME, 2)
)


class Bus:
    """Records what is sent; proxies in `busy` do not take anything.

    `alive` answer at once when they are asked for a sign of life.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[int, DnsToProxy]] = []
        self.busy: set[int] = set()
        self.alive: set[int] = set()
        self.signs = 0
        self.resolver: Resolver

    def send(self, index: int, message: DnsToProxy) -> None:
        if index in self.busy:
            raise BusyError("full")
        if isinstance(message, ResolveAddress) and message.ipv4 == bytes(4):
            self.signs += 1
            if index in self.alive:
                sign = AddressResolved(request_id=message.request_id, name=None)
                asyncio.get_running_loop().call_soon(self.resolver.on_message, index, sign)
            return
        self.sent.append((index, message))


def connected(bus: Bus, proxies: int, *, without: int | None = None, **times: float) -> Resolver:
    """A resolver whose proxies are there. Looks for signs of life only if the test says when."""
    bus.resolver = Resolver(bus.send, proxies, **{"check_seconds": 20.0, **times})
    for index in range(proxies):
        if index != without:
            bus.resolver.on_connect(index)
    return bus.resolver


def answer(bus: Bus, number: int) -> None:
    """The question that was sent as `number` is answered by whom it was sent to."""
    index, message = bus.sent[number]
    bus.resolver.on_message(index, resolved(message.request_id))


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
        resolver = connected(bus, 4)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        ((index, message),) = bus.sent
        assert index == owner_of_name(NAME, 4)
        assert isinstance(message, ResolveName)
        resolver.on_message(index, resolved(message.request_id + 1))
        resolver.on_message((index + 1) % 4, resolved(message.request_id))
        assert not task.done()
        answer(bus, 0)
        assert await task == resolved(message.request_id)

    run(main())


def test_same_question_travels_once() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 2)
        tasks = [start(resolver.resolve_name(NAME)) for _ in range(5)]
        await wait_until(lambda: bool(bus.sent))
        tasks[0].cancel()
        answer(bus, 0)
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
        resolver = connected(bus, proxies, attempt_seconds=0.01)
        assert await resolver.resolve_name(NAME) is None
        first = owner_of_name(NAME, proxies)
        assert [(index - first) % proxies for index, _ in bus.sent] == order

    run(main())


def test_late_answer_of_the_first_proxy_is_taken() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 2, attempt_seconds=0.5)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: len(bus.sent) == 2)
        answer(bus, 0)
        assert await task is not None

    run(main())


def test_questions_of_a_proxy_that_is_lost_are_asked_of_another_at_once() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 2, attempt_seconds=20)
        owner = owner_of_name(NAME, 2)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        resolver.on_disconnect(1 - owner)
        resolver.on_connect(1 - owner)
        assert len(bus.sent) == 1
        resolver.on_disconnect(owner)
        assert bus.sent[1] == (1 - owner, bus.sent[0][1])
        # Nor is it asked while the other has the question.
        resolver.on_connect(owner)
        assert len(bus.sent) == 2
        answer(bus, 1)
        answer(bus, 1)
        assert await task is not None

    run(main())


def test_proxy_that_is_not_there_is_not_asked_while_another_is() -> None:
    async def main() -> None:
        bus = Bus()
        owner = owner_of_name(NAME, 2)
        resolver = connected(bus, 2, without=owner, attempt_seconds=20)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        assert bus.sent[0][0] == 1 - owner
        answer(bus, 0)
        assert await task is not None

    run(main())


def test_without_any_proxy_the_first_to_come_is_asked() -> None:
    async def main() -> None:
        bus = Bus()
        owner = owner_of_name(NAME, 2)
        resolver = connected(bus, 2, attempt_seconds=20)
        for index in range(2):
            resolver.on_disconnect(index)
        task = start(resolver.resolve_name(NAME))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not bus.sent
        resolver.on_connect(1 - owner)
        assert bus.sent[0][0] == 1 - owner
        resolver.on_connect(owner)
        assert len(bus.sent) == 1
        answer(bus, 0)
        assert await task is not None

    run(main())


def test_without_any_proxy_the_wait_has_an_end() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = Resolver(bus.send, 2, attempt_seconds=0.01)
        assert await resolver.resolve_name(NAME) is None
        assert not bus.sent

    run(main())


def test_proxy_that_comes_back_unnoticed_is_asked_again() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 1, attempt_seconds=20)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        resolver.on_connect(0)
        assert bus.sent[1] == bus.sent[0]
        answer(bus, 1)
        assert await task is not None

    run(main())


def test_silent_proxy_is_passed_over_until_it_is_heard_again() -> None:
    """As one that hangs: it would keep each new name waiting for the attempt's time."""

    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 2, attempt_seconds=20, check_seconds=0.01)
        owner = owner_of_name(NAME, 2)
        bus.alive = {1 - owner}
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: len(bus.sent) == 2)
        assert bus.sent[1] == (1 - owner, bus.sent[0][1])
        answer(bus, 1)
        assert await task is not None
        second = start(resolver.resolve_name(OTHER_NAME))
        await wait_until(lambda: len(bus.sent) == 3)
        assert bus.sent[2][0] == 1 - owner
        answer(bus, 0)  # late, but a sign of life
        third = start(resolver.resolve_name(NAME))
        await wait_until(lambda: len(bus.sent) == 4)
        assert bus.sent[3][0] == owner
        answer(bus, 2)
        answer(bus, 3)
        assert None not in await asyncio.gather(second, third)

    run(main())


def test_slow_cluster_is_not_asked_twice() -> None:
    async def main() -> None:
        bus = Bus()
        bus.alive = {0, 1}
        resolver = connected(bus, 2, attempt_seconds=20, check_seconds=0.01)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bus.signs > 5)
        assert len(bus.sent) == 1
        answer(bus, 0)
        assert await task is not None

    run(main())


def test_when_all_are_silent_no_question_is_repeated_before_its_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 2, attempt_seconds=20, check_seconds=0.01)
        task = start(resolver.resolve_name(NAME))
        with caplog.at_level("INFO"):
            await wait_until(lambda: caplog.text.count("does not answer, others are asked") == 2)
        assert len(bus.sent) == 2
        answer(bus, 0)
        assert await task is not None

    run(main())


def test_busy_proxy_is_passed_over_at_once() -> None:
    async def main() -> None:
        bus = Bus()
        first = owner_of_name(NAME, 2)
        bus.busy = {first}
        resolver = connected(bus, 2, attempt_seconds=20)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        assert bus.sent[0][0] == 1 - first
        answer(bus, 0)
        assert await task is not None

    run(main())


def test_address_is_asked_for() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 2)
        task = start(resolver.resolve_address(packed("100.64.0.7")))
        await wait_until(lambda: bool(bus.sent))
        message = bus.sent[0][1]
        assert isinstance(message, ResolveAddress)
        reply = AddressResolved(request_id=message.request_id, name=NAME)
        resolver.on_message(bus.sent[0][0], reply)
        assert await task == reply

    run(main())


def test_answer_of_the_wrong_kind_is_no_answer() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 1)
        task = start(resolver.resolve_name(NAME))
        await wait_until(lambda: bool(bus.sent))
        resolver.on_message(0, AddressResolved(request_id=bus.sent[0][1].request_id, name=None))
        assert await task is None

    run(main())


def test_too_many_different_questions_are_refused() -> None:
    async def main() -> None:
        bus = Bus()
        resolver = connected(bus, 1, max_waiting=2)
        tasks = [start(resolver.resolve_name(f"{letter}.test")) for letter in "ab"]
        await wait_until(lambda: len(bus.sent) == 2)
        with pytest.raises(OverloadedError):
            await resolver.resolve_name("c.test")
        resolver.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())

"""Asks the proxies what a name or a virtual address stands for.

    question ──▶ the proxy that a hash picks ──1.5 s──▶ the next one ──1.5 s──▶ the next ──▶ None
                   │ its connection is lost, or it is silent
                   └──▶ the next one, at once

All proxies answer alike, so an answer is taken from whichever was asked, late ones too. Who is not
connected is not asked; when nobody is, questions wait for the first who comes. The same question asked
by several clients at once travels once.

A slow cluster is no reason to ask another proxy soon: it would ask the same cluster. So a proxy that has
said nothing for CHECK_SECONDS is asked something that it knows by itself; one that does not answer that
either is silent, and others are preferred until it is heard again.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Final

from ipc.addresses import as_text, owner_of_address, owner_of_name
from ipc.errors import BusyError
from ipc.messages import (
    AddressResolved,
    AnyMessage,
    DnsToProxy,
    NameResolved,
    ProxyToDns,
    ResolveAddress,
    ResolveName,
)

log = logging.getLogger(__name__)

ATTEMPTS: Final = 3
# An answer out of the book takes a millisecond, and a loop that has much to do some ten of them.
CHECK_SECONDS: Final = 0.1
# Counted in looks, so that time in which this process itself did not run counts as one.
SILENT_LOOKS: Final = 2
# Nobody's address: whose it is a proxy can say without asking a cluster.
_NOBODY: Final = bytes(4)


class OverloadedError(Exception):
    """So many questions wait for the proxies that no more are taken."""


class _Question:
    """One that is under way. `holders` have it now; `asked` have had it at some time."""

    __slots__ = ("answer", "asked", "first", "holders", "message")

    def __init__(self, first: int, message: DnsToProxy, answer: asyncio.Future[ProxyToDns]) -> None:
        self.first = first
        self.message = message
        self.answer = answer
        self.holders: set[int] = set()
        self.asked: set[int] = set()


class _Proxy:
    """What is known of one proxy. `looks` counts since it was asked for a sign of life, or is None."""

    __slots__ = ("check", "is_connected", "looks", "was_heard")

    def __init__(self) -> None:
        self.is_connected = False
        self.was_heard = False  # since the last look
        self.looks: int | None = None
        self.check: asyncio.TimerHandle | None = None

    @property
    def is_silent(self) -> bool:
        return self.looks is not None and self.looks >= SILENT_LOOKS

    def begin(self) -> None:
        """A new connection: nothing is known."""
        self.was_heard, self.looks = False, None

    def heard(self) -> None:
        """It has said something."""
        self.was_heard, self.looks = True, None


class Resolver:
    """`send(index, message)` puts a message on the bus to proxy `index`, or raises BusyError."""

    def __init__(
        self,
        send: Callable[[int, DnsToProxy], None],
        proxies: int,
        *,
        attempt_seconds: float = 1.5,
        check_seconds: float = CHECK_SECONDS,
        max_waiting: int = 1024,
    ) -> None:
        self._send = send
        self._proxies = [_Proxy() for _ in range(proxies)]
        self._attempt_seconds = attempt_seconds
        self._check_seconds = check_seconds
        self._max_waiting = max_waiting
        self._ids = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._flights: dict[str | bytes, asyncio.Task[ProxyToDns | None]] = {}

    async def resolve_name(self, name: str) -> NameResolved | None:
        """What the name, as it was typed, stands for; None when no proxy answered.

        Raises:
            OverloadedError: too many questions wait already.
        """
        resolved = await self._share(
            name,
            owner_of_name(name.lower(), len(self._proxies)),
            lambda id_: ResolveName(request_id=id_, name=name),
        )
        return resolved if isinstance(resolved, NameResolved) else None

    async def resolve_address(self, ipv4: bytes) -> AddressResolved | None:
        """The name behind a virtual address; None when no proxy answered.

        Raises:
            OverloadedError: too many questions wait already.
        """
        resolved = await self._share(
            ipv4,
            owner_of_address(ipv4, len(self._proxies)),
            lambda id_: ResolveAddress(request_id=id_, ipv4=ipv4),
        )
        return resolved if isinstance(resolved, AddressResolved) else None

    # -- what the bus tells --

    def on_message(self, index: int, message: AnyMessage) -> None:
        """Takes an answer of proxy `index`; one that nobody waits for any more is dropped."""
        if not isinstance(message, ProxyToDns):
            return
        self._proxies[index].heard()
        question = self._questions.get(message.request_id)
        if question is None or index not in question.asked or question.answer.done():
            return
        question.answer.set_result(message)

    def on_connect(self, index: int) -> None:
        """Proxy `index` is there, perhaps anew: it is asked what nobody has been asked."""
        if self._proxies[index].is_connected:
            self.on_disconnect(index)
        self._proxies[index].begin()
        self._proxies[index].is_connected = True
        for question in list(self._questions.values()):
            if not question.holders:
                self._ask_next(question)

    def on_disconnect(self, index: int) -> None:
        """Proxy `index` is gone, and its questions with it: others are asked."""
        self._proxies[index].begin()
        self._proxies[index].is_connected = False
        for question in list(self._questions.values()):
            if index in question.holders:
                question.holders.discard(index)
                if not question.holders:
                    self._ask_next(question)

    def close(self) -> None:
        """Gives up every question that is under way."""
        for task in list(self._flights.values()):
            task.cancel()
        for proxy in self._proxies:
            if proxy.check is not None:
                proxy.check.cancel()

    # -- one question --

    async def _share(
        self, key: str | bytes, first: int, make: Callable[[int], DnsToProxy]
    ) -> ProxyToDns | None:
        task = self._flights.get(key)
        if task is None:
            if len(self._flights) >= self._max_waiting:
                raise OverloadedError(f"{self._max_waiting} questions wait for the proxies")
            task = asyncio.get_running_loop().create_task(self._ask(first, make(next(self._ids))))
            self._flights[key] = task
            task.add_done_callback(lambda _: self._flights.pop(key, None))
        # One client that goes away must not take the answer from the others.
        return await asyncio.shield(task)

    async def _ask(self, first: int, message: DnsToProxy) -> ProxyToDns | None:
        question = _Question(first, message, asyncio.get_running_loop().create_future())
        self._questions[message.request_id] = question
        try:
            for _ in range(ATTEMPTS):
                self._ask_next(question, or_again=True)
                done, _ = await asyncio.wait({question.answer}, timeout=self._attempt_seconds)
                if done:
                    return question.answer.result()
                log.info(
                    "request %d (%s): no answer from %s",
                    message.request_id,
                    _subject(message),
                    ", ".join(f"proxy-{index}" for index in sorted(question.holders)) or "nobody",
                )
            return None
        finally:
            del self._questions[message.request_id]

    def _ask_next(self, question: _Question, *, or_again: bool = False) -> None:
        """Asks the next proxy that is there, or nobody; `or_again`: if all have been asked, another time."""
        number = len(self._proxies)
        order = [(question.first + step) % number for step in range(number)]
        there = [index for index in order if self._proxies[index].is_connected]
        left = [index for index in there if index not in question.holders]
        if not left and or_again:
            left = there
        for index in sorted(left, key=lambda index: self._proxies[index].is_silent):
            try:
                self._send(index, question.message)
            except BusyError as error:
                log.debug(
                    "request %d: proxy-%d is busy: %s", question.message.request_id, index, error
                )
                continue
            question.holders.add(index)
            question.asked.add(index)
            self._watch(index)
            return

    # -- signs of life --

    def _watch(self, index: int) -> None:
        proxy = self._proxies[index]
        if proxy.check is None:
            proxy.was_heard = False
            self._look_later(index)

    def _look_later(self, index: int) -> None:
        loop = asyncio.get_running_loop()
        self._proxies[index].check = loop.call_later(self._check_seconds, self._look, index)

    def _look(self, index: int) -> None:
        proxy = self._proxies[index]
        proxy.check = None
        held = [question for question in self._questions.values() if index in question.holders]
        if not held:
            return
        self._look_later(index)
        if proxy.was_heard:
            proxy.was_heard = False
        elif proxy.looks is None:
            self._ask_for_life(index)
        else:
            proxy.looks += 1
            if proxy.looks == SILENT_LOOKS:
                log.info("proxy-%d does not answer, others are asked", index)
                self._ask_others(held)

    def _ask_for_life(self, index: int) -> None:
        try:
            self._send(index, ResolveAddress(request_id=next(self._ids), ipv4=_NOBODY))
        except BusyError as error:
            log.debug("proxy-%d is busy: %s", index, error)
        self._proxies[index].looks = 0

    def _ask_others(self, held: list[_Question]) -> None:
        for question in held:
            has_hope = any(not self._proxies[index].is_silent for index in question.holders)
            is_alone = all(
                proxy.is_silent or not proxy.is_connected or index in question.holders
                for index, proxy in enumerate(self._proxies)
            )
            if not has_hope and not is_alone:
                self._ask_next(question)


def _subject(message: DnsToProxy) -> str:
    return message.name if isinstance(message, ResolveName) else as_text(message.ipv4)

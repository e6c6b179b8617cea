"""Asks the proxies what a name or a virtual address stands for.

    question ──▶ the proxy that a hash picks ──1.5 s──▶ the next one ──1.5 s──▶ the next ──▶ None

All proxies answer alike, so an answer is taken from whichever of them it comes, late ones too. A
proxy that was restarted is asked again as soon as it is back: its predecessor took the questions
with it. The same question asked by several clients at once travels once.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import suppress
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


class OverloadedError(Exception):
    """So many questions wait for the proxies that no more are taken."""


class Resolver:
    """`send(index, message)` puts a message on the bus to proxy `index`, or raises BusyError."""

    def __init__(
        self,
        send: Callable[[int, DnsToProxy], None],
        proxies: int,
        *,
        attempt_seconds: float = 1.5,
        max_waiting: int = 1024,
    ) -> None:
        self._send = send
        self._proxies = proxies
        self._attempt_seconds = attempt_seconds
        self._max_waiting = max_waiting
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[ProxyToDns]] = {}
        self._asked: dict[int, tuple[int, DnsToProxy]] = {}  # request id -> whom, and what
        self._flights: dict[str | bytes, asyncio.Task[ProxyToDns | None]] = {}

    async def resolve_name(self, name: str) -> NameResolved | None:
        """What the name, as it was typed, stands for; None when no proxy answered.

        Raises:
            OverloadedError: too many questions wait already.
        """
        resolved = await self._share(
            name,
            owner_of_name(name.lower(), self._proxies),
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
            owner_of_address(ipv4, self._proxies),
            lambda id_: ResolveAddress(request_id=id_, ipv4=ipv4),
        )
        return resolved if isinstance(resolved, AddressResolved) else None

    def on_message(self, message: AnyMessage) -> None:
        """Takes an answer from the bus; one that nobody waits for any more is dropped."""
        if not isinstance(message, ProxyToDns):
            return
        future = self._waiting.get(message.request_id)
        if future is not None and not future.done():
            future.set_result(message)

    def on_connect(self, index: int) -> None:
        """Proxy `index` is there, perhaps anew: what its predecessor did not answer is asked again.

        A question that did arrive is then answered twice, and the second answer dropped.
        """
        for asked, message in list(self._asked.values()):
            if asked == index:
                with suppress(BusyError):  # the next attempt asks another proxy
                    self._send(index, message)

    def close(self) -> None:
        """Gives up every question that is under way."""
        for task in list(self._flights.values()):
            task.cancel()

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
        future: asyncio.Future[ProxyToDns] = asyncio.get_running_loop().create_future()
        self._waiting[message.request_id] = future
        try:
            for attempt in range(ATTEMPTS):
                index = (first + attempt) % self._proxies
                self._asked[message.request_id] = (index, message)
                try:
                    self._send(index, message)
                except BusyError as error:
                    log.debug("request %d: proxy-%d is busy: %s", message.request_id, index, error)
                    if attempt + 1 < self._proxies:
                        continue
                done, _ = await asyncio.wait({future}, timeout=self._attempt_seconds)
                if done:
                    return future.result()
                log.info(
                    "request %d (%s): proxy-%d does not answer",
                    message.request_id,
                    _subject(message),
                    index,
                )
            return None
        finally:
            del self._waiting[message.request_id]
            self._asked.pop(message.request_id, None)


def _subject(message: DnsToProxy) -> str:
    return message.name if isinstance(message, ResolveName) else as_text(message.ipv4)

"""Looks after VNet's interface among everything else that changes the host's network.

What somebody takes away from the interface is put back. What others route that VNet has routed, or the
other way round, becomes sentences for `vnet status`. A look is taken when the kernel says that something
has changed, and every `LOOK_SECONDS`.
"""

import logging
import resource
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from ipc.addresses import as_text
from ipc.messages import Network
from supervisor.dataplane import DataPlane
from supervisor.network import DNS_HOST, ipv6_range
from supervisor.osconfig.route_conflicts import (
    MAIN,
    HostRoutes,
    Route,
    RouteKind,
    conflicts,
    describe,
    strays,
)
from supervisor.this_system import HostNetwork, Monitor

log = logging.getLogger(__name__)

# Changes come in groups, such as an address and its routes.
SETTLE_SECONDS: Final = 0.05
# Between two looks: while things change, and otherwise. A machine with thousands of routes is looked at
# less often, so that this takes a tenth or a hundredth of a processor at most. A look that had to wait
# for a processor or for the kernel is followed by as long a pause, and no longer one.
PAUSE_SECONDS: Final = 0.25
LOOK_SECONDS: Final = 15.0
PAUSE_PER_LOOK: Final = 10.0
REST_PER_LOOK: Final = 100.0
# What was in the way is believed to be gone after this: an interface that comes and goes must not take
# routes and addresses of apps along each time.
LINGER_SECONDS: Final = 2.0
# A clock that went on this much while the other stood still: the machine was asleep.
SLEEP_SECONDS: Final = 1.0
# Somebody who takes away what is put back this often does it on purpose.
MENDS_IN_A_ROW: Final = 10
MENDS_WINDOW_SECONDS: Final = 30.0
# Addresses that the kernel is asked about, per look.
MAX_ASKED: Final = 40
MAX_STRAYS: Final = 3
MAX_BLOCKED: Final = 200

Outsider = tuple[str, bytes]  # what it is, and its packed address


@dataclass(frozen=True, slots=True)
class HostChange:
    """What a look has found. `has_moved`: another default route, or the machine was asleep."""

    has_moved: bool
    has_ipv6: bool


@dataclass(slots=True)
class _Blocked:
    """What is in the way of a range; `free_at` once it is gone."""

    text: str
    free_at: float | None = None


class NetworkWatch:
    """See the module; `problems` are sentences. Not for threads.

    `network` says what is routed now, `outsiders` who must never be reached through VNet.
    """

    def __init__(
        self,
        data_plane: DataPlane,
        *,
        network: Callable[[], Network],
        outsiders: Callable[[], Iterable[Outsider]],
        user: int,
        is_auto: bool,
    ) -> None:
        """Raises OSError."""
        self._data_plane: Final = data_plane
        self._network: Final = network
        self._outsiders: Final = outsiders
        self._user: Final = user
        self._is_auto: Final = is_auto
        with ExitStack() as undo:
            self._kernel: Final = undo.enter_context(closing(HostNetwork()))
            # In this order: what changes meanwhile is heard of.
            self._monitor: Final = undo.enter_context(closing(Monitor()))
            self._host = self._kernel.read()
            undo.pop_all()
        self.problems: list[str] = []
        # Monotonic seconds at which each sentence was true last.
        self._seen: dict[str, float] = {}
        self._blocked: dict[IPv4Network, _Blocked] = {}
        self._is_lingering = False
        self._mended: deque[float] = deque(maxlen=MENDS_IN_A_ROW)
        self._asleep = _seconds_asleep()
        self._has_slept = False
        # One address of each range is chosen by it; the same one for a whole run.
        self._drawn: Final = secrets.randbits(32)
        self._mend_problem = ""
        self._looked_at = 0.0
        self._pause = PAUSE_SECONDS
        self.next_look_at = 0.0

    def fileno(self) -> int:
        return self._monitor.fileno()

    def close(self) -> None:
        """Safe to call twice."""
        self._monitor.close()
        self._kernel.close()

    def hear(self) -> None:
        """The kernel has something to say."""
        if self._monitor.has_heard():
            self._look_by(time.monotonic() + SETTLE_SECONDS)

    def tick(self, now: float) -> HostChange | None:
        """To be called in every turn of the loop; what has changed, if anything that matters.

        Raises:
            LinkLostError: VNet's interface is gone.
        """
        asleep = _seconds_asleep()
        if asleep - self._asleep > SLEEP_SECONDS:
            log.info("the machine was asleep for %.0f s", asleep - self._asleep)
            self._has_slept = True
            self.next_look_at = now
        self._asleep = asleep
        if now < self.next_look_at:
            return None
        return self._look(now)

    def in_the_way(self, block: IPv4Network, *, is_routed: bool) -> str:
        """What is in the way of a range, as a clause; empty if it is free.

        A range that is routed already stays so, unless that takes the neighbourhood of an interface
        away: who comes later is in the wrong, and the range's apps keep their addresses.
        """
        found = conflicts(self._host, self._network().interface, block, self._user)
        if is_routed:
            found = [conflict for conflict in found if conflict.suffers]
        if found:
            if len(self._blocked) >= MAX_BLOCKED:
                self._blocked.clear()
            self._blocked[block] = _Blocked(describe(found))
            return self._blocked[block].text
        blocked = self._blocked.get(block)
        if blocked is None or is_routed:
            return ""
        now = time.monotonic()
        if blocked.free_at is None:
            blocked.free_at = now + LINGER_SECONDS
        if now >= blocked.free_at:
            del self._blocked[block]
            return ""
        self._is_lingering = True
        self._look_by(blocked.free_at)
        return blocked.text

    # -- one look --

    def _look(self, now: float) -> HostChange | None:
        began, spent = time.monotonic(), _processor_seconds()
        had_ipv6 = self._data_plane.has_ipv6
        has_mended = self._mend(now)
        before, was_lingering = self._host, self._is_lingering
        self._is_lingering = False
        is_sure = True
        try:
            problems = self._read_problems(now)
            if any(problem not in self._seen for problem in problems):
                # What somebody took away since it was mended looks like one, and is put back now.
                has_mended |= self._mend(now)
                found = self._read_problems(now)
                # What was not there a moment ago may be such a one again: the next look will tell.
                known = [*problems, *self._seen]
                problems = [problem for problem in found if problem in known]
                is_sure = problems == found
        except OSError as error:
            # Tried again; what is known stays.
            log.warning("the routes of this machine cannot be read: %s", error)
            problems = list(self._seen)
        self._keep_problems(problems, now)
        has_ipv6 = self._data_plane.has_ipv6
        has_slept, self._has_slept = self._has_slept, False
        spent = _processor_seconds() - spent
        self._looked_at = time.monotonic()
        self._pause = max(PAUSE_SECONDS, PAUSE_PER_LOOK * spent, self._looked_at - began)
        over_at = [seen_at + LINGER_SECONDS for seen_at in self._seen.values() if seen_at < now]
        self.next_look_at = min([now + max(LOOK_SECONDS, REST_PER_LOOK * spent), *over_at])
        if not is_sure:
            self._look_by(self._looked_at)
        has_moved = has_slept or _defaults(before) != _defaults(self._host)
        is_same = before == self._host and had_ipv6 == has_ipv6
        # Without what was mended a range may have been refused by the kernel.
        if is_same and not has_moved and not was_lingering and not has_mended:
            return None
        return HostChange(has_moved=has_moved, has_ipv6=has_ipv6)

    def _mend(self, now: float) -> bool:
        """Whether anything was missing."""
        name = self._network().interface
        self._mend_problem = ""
        try:
            missing = self._data_plane.mend()
        except OSError as error:
            reason = error.strerror or error
            self._mend_problem = f"The interface {name} cannot be put right ({reason}): restart VNet if that stays so."
            return False
        if missing:
            self._mended.append(now)
            log.warning("%s is put right again: %s", name, ", ".join(missing))
        return bool(missing)

    def _read_problems(self, now: float) -> list[str]:
        self._host = self._kernel.read()
        return [*self._find_problems(now)]

    def _find_problems(self, now: float) -> Iterator[str]:
        network = self._network()
        own, *_ = ranges = [IPv4Network(text) for text in network.ranges]
        named: set[str] = set()
        if self._mend_problem:
            yield self._mend_problem
        for block in ranges:
            if found := conflicts(self._host, network.interface, block, self._user):
                named |= {conflict.interface for conflict in found}
                yield self._in_use(block, describe(found), is_own=block == own)
        yield from self._find_strays(network, ranges)
        yield from self._ask_kernel(network, ranges, named)
        is_often = len(self._mended) == MENDS_IN_A_ROW
        if is_often and now - self._mended[0] < MENDS_WINDOW_SECONDS:
            yield (
                f"Another program keeps taking addresses or routes away from {network.interface}: have"
                " it leave that interface alone."
            )

    def _in_use(self, block: IPv4Network, what: str, *, is_own: bool) -> str:
        advice = "stop the other program, or change vnet_config"
        if is_own:
            advice = (
                "restart VNet, which then takes a free range"
                if self._is_auto
                else "stop the other program, or set network.ipv4_cidr_range and restart VNet"
            )
        return f"The range {block} is used by something else as well ({what}): {advice}."

    def _find_strays(self, network: Network, ranges: Sequence[IPv4Network]) -> Iterator[str]:
        name = network.interface
        found = strays(self._host, name, ranges, IPv4Address(network.tun_ipv4))
        for route in found[:MAX_STRAYS]:
            table = "" if route.table == MAIN else f" table {route.table}"
            yield (
                f"Another program routes {route.destination} into {name}, where nobody answers for"
                f" it: remove that route (ip route del {route.destination} dev {name}{table})."
            )

    def _ask_kernel(
        self, network: Network, ranges: Sequence[IPv4Network], named: set[str]
    ) -> Iterator[str]:
        name = network.interface
        has_ipv6 = self._data_plane.has_ipv6
        samples = _samples(network, ranges, self._drawn, has_ipv6=has_ipv6)
        for block, address in samples[:MAX_ASKED]:
            way = self._kernel.way_to(address)
            if way.interface != name and way.interface not in named:
                named.add(way.interface)
                where = f"to {way.interface}" if way.interface else f"nowhere ({way.problem})"
                yield (
                    f"Packets to {block} go {where} instead of {name}: look at the policy rules"
                    " (ip rule) and stop the program that sets them."
                )
        for what, address in list(self._outsiders())[:MAX_ASKED]:
            if self._kernel.way_to(address).interface == name:
                yield (
                    f"{what} {as_text(address)} cannot be reached, because it is routed into {name}:"
                    " remove that route, or set network.ipv4_cidr_range to a range without it."
                )

    # -- inside --

    def _keep_problems(self, problems: Iterable[str], now: float) -> None:
        for problem in problems:
            if problem not in self._seen:
                log.warning("%s", problem)
            self._seen[problem] = now
        for old in [text for text, at in self._seen.items() if now - at >= LINGER_SECONDS]:
            del self._seen[old]
            log.info("this is over: %s", old)
        self.problems = list(self._seen)

    def _look_by(self, moment: float) -> None:
        self.next_look_at = min(self.next_look_at, max(moment, self._looked_at + self._pause))


def _samples(
    network: Network, ranges: Sequence[IPv4Network], drawn: int, *, has_ipv6: bool
) -> list[tuple[str, bytes]]:
    """(range, address in it): the first that can be an app's, and one anywhere."""
    found = []
    prefix = ipv6_range(network)
    if has_ipv6 and prefix is not None and network.dns_ipv6 is not None:
        found.append((str(prefix), network.dns_ipv6))
    for block in ranges:
        first = DNS_HOST + 1
        numbers = (first, first + drawn % (block.num_addresses - first - 1))
        found += [(str(block), block[number].packed) for number in numbers]
    return found


def _defaults(host: HostRoutes) -> set[Route]:
    return {
        route
        for route in host.routes
        if route.destination.prefixlen == 0 and route.kind is RouteKind.UNICAST
    }


def _processor_seconds() -> float:
    """What this thread, and programs it has waited for (macOS), have had of a processor."""
    programs = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.thread_time() + programs.ru_utime + programs.ru_stime


def _seconds_asleep() -> float:
    """How long the machine was asleep since it was started; only differences mean anything."""
    # macOS: its CLOCK_MONOTONIC goes on while the machine sleeps, and Python's clock does not.
    whole = time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC
    return time.clock_gettime(whole) - time.monotonic()

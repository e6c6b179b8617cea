"""Whom the workers become: the proxies the VNet user, all others each a user of its own.

Such a user is a number without a name, a process or a file.
"""

import contextlib
import grp
import os
import pwd
import random
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipc.permits import Role, role_of
from supervisor.privileges import Identity
from supervisor.settings import User

# Above what distributions give to people and services, below what containers get.
FREE_NUMBERS: Final = range(64_100, 65_000)
# The user that owns nothing, and whom other programs may be as well.
NOBODY: Final = 65534


@dataclass(frozen=True, slots=True)
class Identities:
    """By slot, and the group that opens the bus directory (None: all workers are one user)."""

    of: dict[str, Identity]
    bus_group: int | None


def choose(slots: Sequence[str], user: User) -> Identities:
    """Looks at the system and decides. Other users than root stay who they are."""
    # Elsewhere than on Linux there are no user namespaces.
    kinds = ("uid", "gid") if sys.platform == "linux" else ()
    mapped = [_parse_map(_read(f"/proc/self/{kind}_map")) for kind in kinds]
    if os.geteuid() != 0 or not all(_is_mapped(NOBODY, ranges) for ranges in mapped):
        own = Identity(os.getuid(), os.getgid(), None)
        return Identities(dict.fromkeys(slots, own), None)
    free = [
        number
        for number in free_numbers(_taken())
        if all(_is_mapped(number, ranges) for ranges in mapped)
    ]
    # Drawn, so that two runs that start at the same moment do not share one.
    return assign(slots, user, random.SystemRandom().sample(free, len(free)))


def assign(slots: Sequence[str], user: User, free: Sequence[int]) -> Identities:
    """Gives numbers away, nobody's when there are too few. Pure."""
    remaining = iter(free)
    group = next(remaining, NOBODY)
    of = {}
    for slot in slots:
        if role_of(slot) is Role.PROXY:
            of[slot] = Identity(user.uid, user.gid, group)
        else:
            number = next(remaining, NOBODY)
            # metrics has no business on the bus.
            extra_group = number if role_of(slot) is Role.METRICS else group
            of[slot] = Identity(number, number, extra_group)
    return Identities(of, group)


def free_numbers(taken: Collection[int]) -> list[int]:
    """Numbers that are no user's and no group's."""
    return [number for number in FREE_NUMBERS if number not in taken]


def _taken() -> set[int]:
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    for status in Path("/proc").glob("[0-9]*/status"):
        # A process may end meanwhile.
        with contextlib.suppress(OSError):
            taken |= set(_numbers_of_process(status.read_text()))
    return taken


def _numbers_of_process(status: str) -> Iterable[int]:
    for line in status.splitlines():
        name, _, values = line.partition(":")
        if name in ("Uid", "Gid", "Groups"):
            yield from map(int, values.split())


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _parse_map(text: str) -> list[range]:
    """The numbers inside this user namespace (user_namespaces(7)); without a map all."""
    if not text.strip():
        return [range(2**32)]
    ranges = []
    for line in text.splitlines():
        inside, _, length = map(int, line.split())
        ranges.append(range(inside, inside + length))
    return ranges


def _is_mapped(number: int, ranges: Iterable[range]) -> bool:
    return any(number in each for each in ranges)

"""The resolver of a system where `/etc/resolv.conf` is all there is.

VNet is named first, and the nameservers that were there become its upstream. A symbolic link is
replaced by a file and comes back with the undo; its target is not touched, and what its owner writes
there meanwhile counts. Where another program replaces the file itself, that is what counts from then
on, and what is restored.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.file_state import FileKind, FileState, look
from supervisor.osconfig.journal import ChangedByOthersError, FileChange, Journal, Outcome
from supervisor.osconfig.resolv_conf import STUBS, compose, nameservers, without_vnet
from supervisor.osconfig.wish import ResolverWish, without_own

log = logging.getLogger(__name__)

RESOLV_CONF: Final = Path("/etc/resolv.conf")
# The nameservers that systemd-resolved itself asks.
UPLINKS: Final = Path("/run/systemd/resolve/resolv.conf")
DNS_PORT: Final = 53
# So often in this time the file is taken back from another program.
MAX_FIGHTS: Final = 10
FIGHT_SECONDS: Final = 60.0


def asks_in_order() -> bool:
    """Whether this system's C library asks the second nameserver only when the first is silent.

    glibc does; musl asks all at once and takes the first answer.
    """
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (ValueError, OSError):
        return False


def text_before(journal: Journal, path: Path = RESOLV_CONF) -> str:
    """The text of the file as it is without VNet, a link followed. Raises OsConfigError, OSError."""
    change = journal.find(path)
    if change is not None and change.before.kind is FileKind.FILE:
        return _text(journal.original(change))
    if change is not None and change.before.kind is FileKind.MISSING:
        return ""
    place = path if change is None else path.parent / change.before.target
    try:
        return _text(place.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except IsADirectoryError as error:
        raise OsConfigError(
            f"{place} is neither a file nor a symbolic link: make it one."
        ) from error


class ResolvConfBackend:
    """See the module."""

    name = "resolv.conf"

    def __init__(
        self,
        journal: Journal,
        path: Path = RESOLV_CONF,
        *,
        uplinks: Path = UPLINKS,
        lists_others: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lists_others` says whether the old nameservers may follow VNet's (`asks_in_order`)."""
        self._journal = journal
        self._path = path
        self._uplinks = uplinks
        self._lists_others = asks_in_order() if lists_others is None else lists_others
        self._clock = clock
        self._wish: ResolverWish | None = None
        # What another program has left, when it was seen first: it may still be writing.
        self._seen: tuple[FileState, bytes] | None = None
        self._fights: deque[float] = deque()

    def apply(self, wish: ResolverWish) -> None:
        """Puts VNet first. Raises OsConfigError, OSError."""
        self._wish = wish
        self._settle(wish)

    def undo(self) -> None:
        """Restores what was there, or what another program has made of it. Raises OsConfigError."""
        wish, self._wish, self._seen = self._wish, None, None
        change = self._journal.find(self._path)
        if wish is not None and change is not None and not self._journal.is_ours(change):
            now, data = look(self._path)
            self._take_back(change, now, data, wish)
        for undone in self._journal.undo({self.name}):
            if undone.outcome is not Outcome.UNDONE:
                raise OsConfigError(undone.text)

    def upstream(self) -> list[tuple[str, int, str]] | None:
        """The nameservers of the file without VNet. Raises OsConfigError, OSError."""
        found = nameservers(text_before(self._journal, self._path))
        if any(host in STUBS for host, _ in found):
            # With VNet in the file, systemd-resolved may ask VNet in turn.
            real = nameservers(_text(self._uplinks.read_bytes())) if self._uplinks.exists() else []
            found = real or found
        servers = [(host, DNS_PORT, scope) for host, scope in found]
        return without_own(servers, self._wish)

    def check(self) -> list[str]:
        """Follows what other programs do with the file. Raises OsConfigError, OSError."""
        return [] if self._wish is None else self._settle(self._wish)

    def _settle(self, wish: ResolverWish) -> list[str]:
        change = self._journal.find(self._path)
        if change is None:
            return self._write(wish)
        now, data = look(self._path)
        if self._journal.is_ours(change):
            self._seen = None
            return self._write(wish)
        if (now, data) != self._seen:
            self._seen = now, data
            return []
        if self._is_fighting():
            problem = (
                f"Another program writes {self._path} again and again: set dns.os_integration to"
                " what manages this file, or stop that program."
            )
            return [problem]
        self._take_back(change, now, data, wish)
        return self._write(wish)

    def _is_fighting(self) -> bool:
        now = self._clock()
        while self._fights and self._fights[0] < now - FIGHT_SECONDS:
            self._fights.popleft()
        return len(self._fights) >= MAX_FIGHTS

    def _take_back(
        self, change: FileChange, now: FileState, data: bytes, wish: ResolverWish
    ) -> None:
        self._fights.append(self._clock())
        self._seen = None
        log.info("another program has written %s: its nameservers are upstream now", self._path)
        rest = without_vnet(_text(data), wish.server_texts)
        self._journal.take_foreign(change, now, data, _bytes(rest))

    def _write(self, wish: ResolverWish) -> list[str]:
        text = text_before(self._journal, self._path)
        rest = without_vnet(text, wish.server_texts)
        others = [(host, scope) for host, _, scope in self.upstream() or ()]
        content = compose(rest, wish.server_texts, others if self._lists_others else ())
        # A leftover of a VNet whose journal is lost must not be what is restored.
        first = self._journal.find(self._path) is None
        instead = _bytes(rest) if first and rest != text and not self._path.is_symlink() else None
        try:
            self._journal.write(self.name, self._path, _bytes(content), instead=instead)
        except ChangedByOthersError:
            # In this moment; the next look sees it.
            return []
        except OSError as error:
            raise OsConfigError(
                f"{self._path} cannot be written ({error.strerror}): make it writable, or set"
                ' dns.os_integration = "none" and have your resolver ask VNet.'
            ) from error
        return []


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")

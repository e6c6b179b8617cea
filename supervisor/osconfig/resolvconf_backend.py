"""The resolver of a system where resolvconf composes `/etc/resolv.conf`: Debian's, or openresolv.

VNet is one more record. It is named like that of a name server on this machine, which both put
before those of all network interfaces (interface-order(5), resolvconf.conf(5)); records lie in
`/run` and so are gone with a restart of the machine.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.journal import Journal, Outcome
from supervisor.osconfig.resolv_conf import nameservers
from supervisor.osconfig.resolv_conf_backend import RESOLV_CONF
from supervisor.osconfig.wish import ResolverWish, without_own

RECORD: Final = "lo.vnet"
PROGRAM: Final = "resolvconf"
PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
COMMAND_SECONDS: Final = 10.0
# Asking for all records starts a shell.
LOOK_SECONDS: Final = 5.0
DNS_PORT: Final = 53
_HEAD_BYTES: Final = 4096
_UNDO: Final = f"resolvconf -d {RECORD}"


class ResolvconfKind(StrEnum):
    """Whose program it is."""

    DEBIAN = "Debian's resolvconf"
    OPENRESOLV = "openresolv"
    RESOLVECTL = "systemd's resolvectl"
    UNKNOWN = "an unknown resolvconf"


def kind_of(name: str, head: bytes) -> ResolvconfKind:
    """Which resolvconf a program is, by its real name and how it begins. Pure."""
    if name in ("resolvectl", "systemd-resolve"):
        return ResolvconfKind.RESOLVECTL
    if b"OPENRESOLV_VERSION" in head or b"Roy Marples" in head:
        return ResolvconfKind.OPENRESOLV
    if b"/etc/resolvconf" in head or b"Thomas Hood" in head or b"resolvconf package" in head:
        return ResolvconfKind.DEBIAN
    return ResolvconfKind.UNKNOWN


def find_resolvconf(path: str = PATH) -> tuple[Path, ResolvconfKind] | None:
    """The resolvconf of this system."""
    found = shutil.which(PROGRAM, path=path)
    if found is None:
        return None
    real = Path(found).resolve()
    try:
        with real.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        head = b""
    return Path(found), kind_of(real.name, head)


def servers_of_others(listing: str) -> list[tuple[str, str]]:
    """The nameservers of `resolvconf -l`, without those of VNet's record. Pure."""
    kept, is_own = [], False
    for line in listing.splitlines():
        if line.startswith("# resolv.conf from "):
            is_own = line.split()[-1] == RECORD
        if not is_own:
            kept.append(line)
    return nameservers("\n".join(kept))


def _undo(arguments: Mapping[str, str]) -> None:
    program = Path(arguments["program"])
    if not program.exists():
        # Removed meanwhile, and its records with it.
        return
    _run(program, "-d", RECORD, *arguments["options"].split())


UNDO_CALLS: Final[Mapping[str, Callable[[Mapping[str, str]], None]]] = {_UNDO: _undo}


class ResolvconfBackend:
    """See the module."""

    name = "resolvconf"

    def __init__(
        self,
        journal: Journal,
        program: Path,
        kind: ResolvconfKind,
        *,
        resolv_conf: Path = RESOLV_CONF,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._program = program
        self._kind = kind
        self._resolv_conf = resolv_conf
        self._clock = clock
        self._wish: ResolverWish | None = None
        self._upstream: list[tuple[str, str]] = []
        self._next_look = 0.0

    def apply(self, wish: ResolverWish) -> None:
        """Adds the record. Raises OsConfigError, OSError."""
        if self._wish is not None and self._wish.servers == wish.servers and self._is_first():
            self._wish = wish
            return
        self._wish = wish
        self._look()
        # openresolv calls a record that is gone an error.
        options = "-f" if self._kind is ResolvconfKind.OPENRESOLV else ""
        self._journal.note(self.name, _UNDO, program=str(self._program), options=options)
        self._add(wish)

    def undo(self) -> None:
        """Deletes the record. Raises OsConfigError."""
        self._wish = None
        for undone in self._journal.undo({self.name}):
            if undone.outcome is not Outcome.UNDONE:
                raise OsConfigError(undone.text)

    def upstream(self) -> list[tuple[str, int, str]] | None:
        """The nameservers of all other records, and what else stands in the file."""
        composed = nameservers(_read(self._resolv_conf))
        found = list(dict.fromkeys([*self._upstream, *composed]))
        return without_own([(host, DNS_PORT, scope) for host, scope in found], self._wish)

    def check(self) -> list[str]:
        """Adds the record again where it is lost. Raises OsConfigError, OSError."""
        wish = self._wish
        if wish is None or self._clock() < self._next_look:
            return [] if wish is None or self._is_first() else [self._problem()]
        self._look()
        if not self._is_first():
            self._add(wish)
        return [] if self._is_first() else [self._problem()]

    def _look(self) -> None:
        self._next_look = self._clock() + LOOK_SECONDS
        self._upstream = servers_of_others(_run(self._program, "-l"))

    def _add(self, wish: ResolverWish) -> None:
        # One of VNet's addresses, so that those of others follow within the three of the C library.
        text = f"nameserver {wish.server_texts[0]}\n"
        _run(self._program, "-a", RECORD, stdin=text)

    def _is_first(self) -> bool:
        if self._wish is None:
            return False
        found = nameservers(_read(self._resolv_conf))
        return bool(found) and found[0][0] in self._wish.server_texts

    def _problem(self) -> str:
        return (
            f"{self._kind} does not put VNet first in {self._resolv_conf}: put {RECORD} at the top"
            " of its interface order, or have your own name server ask VNet for your zones and set"
            ' dns.os_integration = "none".'
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except FileNotFoundError:
        return ""


def _run(program: Path, *arguments: str, stdin: str = "") -> str:
    """Standard output. Raises OsConfigError."""
    command = [str(program), *arguments]
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            input=stdin.encode(),
            capture_output=True,
            timeout=COMMAND_SECONDS,
            check=False,
            env={"PATH": PATH},
        )
    except subprocess.TimeoutExpired as error:
        raise OsConfigError(
            f"{shown} has not ended after {COMMAND_SECONDS:g} s: run it by hand."
        ) from error
    except OSError as error:
        raise OsConfigError(
            f"{shown} cannot be started ({error.strerror}): install it again, or restart VNet."
        ) from error
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split())[:300]
        raise OsConfigError(
            f"{shown} has failed ({said or f'status {done.returncode}'}): run it by hand."
        )
    return done.stdout.decode(errors="replace")

"""Which users of this machine may connect: the VNet user, root, and those whom the configuration names.

    security.allow_users, allow_groups --accounts of the system--> uids --> proxies and dns
                                                                    (which ask the kernel whose a socket is)

Whether the kernel says so is tried with a socket of our own. Where it does not nobody may connect; on macOS, where
that has never been tried, everybody.

Accounts are looked up by a process of its own: this module as a program, which reads a SecurityConfig and writes
Allowed, both as JSON.
"""

import contextlib
import errno
import functools
import grp
import logging
import os
import pwd
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from ipc.macos_sockets import SocketTable
from ipc.messages import Access
from ipc.permits import Role, role_of
from ipc.socket_owner import UNKNOWN, Owner, SocketDiag
from supervisor.config import SecurityConfig
from supervisor.exits import MisconfiguredError, StartupError
from supervisor.settings import User

log = logging.getLogger(__name__)

# Of `ipc.messages.Access`.
MAX_USERS: Final = 10_000
MAX_RESOLVERS: Final = 100
# The supervisor's loop waits so long for a name service, twice at a reload; its watchdog for the loop 20 s
# (`supervisor.osconfig.systemd_unit`).
LOOKUP_SECONDS: Final = 5.0
# As the supervisor finds its modules, but never in the present directory.
_LOOKUP: Final = (sys.executable, "-P", "-m", "supervisor.access")
# As whom resolvers ask, on behalf of everybody. Not "nobody": that is anybody.
RESOLVER_ACCOUNTS: Final = (
    "systemd-resolve",
    "dnsmasq",
    "unbound",
    "named",
    "bind",
    "nscd",
    "pdns",
    "pdns-recursor",
    "knot-resolver",
    "stubby",
    "_stubby",
    "dnscrypt-proxy",
    "_dnscrypt-proxy",
)
# Its dnsmasq may run as nobody.
NETWORKMANAGER: Final = "networkmanager"
_NOBODY: Final = 65534
_IS_UID: Final = re.compile("[0-9]{1,10}")
_PASSWD: Final = Path("/etc/passwd")
_IS_MACOS: Final = sys.platform == "darwin"


class Account(NamedTuple):
    """A user of the system; `gid` is that of the primary group."""

    name: str
    uid: int
    gid: int


class Accounts(Protocol):
    """What the system knows of users and groups."""

    def user(self, name: str) -> Account | None:
        """The user of this name."""
        ...

    def group(self, name: str) -> tuple[int, list[str]] | None:
        """Number and listed members of the group of this name."""
        ...

    def users(self) -> Iterable[Account]:
        """All users that the system enumerates, which may be fewer than it knows."""
        ...


class SystemAccounts:
    """Those of the name service (nsswitch.conf(5))."""

    def user(self, name: str) -> Account | None:
        """See `Accounts`."""
        try:
            entry = pwd.getpwnam(name)
        except (KeyError, ValueError):
            return None
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)

    def group(self, name: str) -> tuple[int, list[str]] | None:
        """See `Accounts`."""
        try:
            entry = grp.getgrnam(name)
        except (KeyError, ValueError):
            return None
        return entry.gr_gid, entry.gr_mem

    def users(self) -> Iterator[Account]:
        """See `Accounts`."""
        for entry in pwd.getpwall():
            yield Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


@dataclass(frozen=True, slots=True)
class Allowed:
    """Whom the configuration means; `problems` are about names that the system does not know."""

    uids: frozenset[int]
    problems: list[str]


def allowed(security: SecurityConfig, accounts: Accounts) -> Allowed:
    """Users of `allow_users`, listed and primary members of `allow_groups`. Pure but for `accounts`."""
    uids: set[int] = set()
    problems: list[str] = []
    for name in security.allow_users:
        user = accounts.user(name)
        if user is None:
            problems.append(f"security.allow_users: the system knows no user {name!r}")
        else:
            uids.add(user.uid)
    groups: set[int] = set()
    for name in security.allow_groups:
        group = accounts.group(name)
        if group is None:
            problems.append(f"security.allow_groups: the system knows no group {name!r}")
            continue
        groups.add(group[0])
        # Of a member who was deleted the name may be left.
        uids |= {member.uid for member in map(accounts.user, group[1]) if member is not None}
    if groups:
        uids |= {user.uid for user in accounts.users() if user.gid in groups}
    if len(uids) > MAX_USERS - 2:
        problems.append(
            f"security.allow_groups: {len(uids)} users are more than {MAX_USERS - 2}:"
            " name smaller groups"
        )
    return Allowed(frozenset(uids), problems)


class UnansweredError(StartupError):
    """The system does not say whom the configuration means, which is no fault of the configuration."""


def ask_system(security: SecurityConfig) -> Allowed:
    """`allowed` by the accounts of this system, which has LOOKUP_SECONDS to answer.

    A directory in the network may let a question wait for minutes, and nothing but the end of the process that
    asks ends that.

    Raises:
        UnansweredError: there is no answer.
    """
    if not (security.allow_users or security.allow_groups):
        return Allowed(frozenset(), [])
    try:
        done = subprocess.run(
            _LOOKUP,
            input=msgspec.json.encode(security),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LOOKUP_SECONDS,
            check=True,
        )
        return msgspec.json.decode(done.stdout, type=Allowed)
    except subprocess.TimeoutExpired:
        why = f"the system's name service has not answered within {LOOKUP_SECONDS:g} s"
    except (OSError, subprocess.CalledProcessError, msgspec.MsgspecError) as error:
        why = str(error)
    raise UnansweredError(f"security.allow_users and allow_groups cannot be looked up ({why})")


def _answer() -> None:
    """What the process does that `ask_system` starts."""
    security = msgspec.json.decode(sys.stdin.buffer.read(), type=SecurityConfig)
    sys.stdout.buffer.write(msgspec.json.encode(allowed(security, SystemAccounts())))


def check(security: SecurityConfig) -> None:
    """Raises MisconfiguredError with each name that the system does not know, or UnansweredError."""
    problems = ask_system(security).problems
    if problems:
        raise MisconfiguredError(problems)


def resolvers(passwd: str, back_end: str) -> set[int]:
    """The uids of the system's resolvers among the accounts in `passwd` (passwd(5)). Pure.

    `back_end` sets up the present one.
    """
    names = {*RESOLVER_ACCOUNTS, *({"nobody"} if back_end == NETWORKMANAGER else ())}
    rows = (line.split(":") for line in passwd.splitlines())
    return {
        int(row[2])
        for row in rows
        if len(row) > 2 and row[0] in names and _IS_UID.fullmatch(row[2]) is not None
    }


def _local_accounts() -> str:
    # Of this machine's own alone: a directory in the network may be slow to say that it has none of them.
    try:
        return _PASSWD.read_text(errors="replace")
    except OSError:
        return ""


class Security:
    """Who may connect now, and what is to be said about that."""

    def __init__(self, user: User, *, accounts: Accounts | None = None) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.back_end = ""
        self._user = user
        self._find: Callable[[SecurityConfig], Allowed] = (
            ask_system if accounts is None else functools.partial(allowed, accounts=accounts)
        )
        self._names: tuple[list[str], list[str]] = ([], [])
        self._uids: frozenset[int] = frozenset()

    def look_up(self, security: SecurityConfig, interface: int, back_end: str) -> Access:
        """Asks the system anew. `interface` is the index of VNet's; `back_end` sets up the system's resolver."""
        self.back_end = back_end
        found = self._look_up(security)
        unable = why_unable()
        self.warnings = [
            f"{problem}: correct it, then run: vnet reload" for problem in found.problems
        ]
        self.problems = []
        if unable and _IS_MACOS:
            self.warnings.append(
                f"This system does not say which user connects ({unable}), so all of its users may:"
                " run VNet only where all of them are trusted."
            )
        elif unable:
            self.problems.append(
                f"This kernel does not say which user connects ({unable}), so nobody may: run modprobe -a"
                " tcp_diag udp_diag, then vnet reload"
            )
        # What a user of another user namespace looks like is nobody's.
        nobodies = {unmapped_uid(), UNKNOWN}
        own = {0, self._user.uid}
        others = sorted(found.uids - own)[: MAX_USERS - len(own)]
        return Access(
            uids=[uid for uid in (*sorted(own), *others) if uid not in nobodies],
            user=self._user.name,
            resolvers=sorted(resolvers(_local_accounts(), back_end) - nobodies)[:MAX_RESOLVERS],
            interface=interface,
            can_tell=not unable,
            is_checked=not (unable and _IS_MACOS),
        )

    def _look_up(self, security: SecurityConfig) -> Allowed:
        names = (security.allow_users, security.allow_groups)
        try:
            found = self._find(security)
        except UnansweredError as error:
            # Whoever was found for the same names still is.
            return Allowed(self._uids if names == self._names else frozenset(), [str(error)])
        self._names, self._uids = names, found.uids
        return found


@contextlib.contextmanager
def lookup_socket(slot: str, *, can_tell: bool) -> Iterator[list[int]]:
    """The descriptor with which the worker of this slot asks the kernel, if it does at all.

    One of its own: two processes would take each other's answers. Without one it refuses everybody, as it has
    to where the kernel does not tell anyway.

    Raises:
        OSError: there is none now, though the kernel `can_tell`.
    """
    if _IS_MACOS or role_of(slot) not in (Role.PROXY, Role.DNS):
        yield []
        return
    try:
        kernel = SocketDiag.open()
    except OSError as error:
        if can_tell:
            raise
        log.error("%s cannot ask which user connects, and refuses everybody: %s", slot, error)
        yield []
        return
    with kernel:
        yield [kernel.fileno()]


def unmapped_uid() -> int | None:
    """What users without a number in this user namespace look like (user_namespaces(7)).

    None where all have one.
    """
    if _IS_MACOS:
        return None
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return _NOBODY


def why_unable() -> str:
    """Why this system does not say whose a socket is; empty if it does."""
    with contextlib.ExitStack() as closing:
        try:
            kernel: SocketTable | SocketDiag = (
                SocketTable() if _IS_MACOS else SocketDiag(closing.enter_context(SocketDiag.open()))
            )
        except OSError as error:
            return error.strerror or str(error)
        return try_out(kernel.tcp_owner, kernel.udp_owner)


_Ask = Callable[[bytes, int, bytes, int], Owner | None]


def try_out(tcp_owner: _Ask, udp_owner: _Ask) -> str:
    """Asks about sockets of this process; says what is wrong with the answers, empty: nothing."""
    for kind, ask in ((socket.SOCK_STREAM, tcp_owner), (socket.SOCK_DGRAM, udp_owner)):
        with contextlib.ExitStack() as closing:
            try:
                ends = _own_ends(kind, closing)
            except OSError as error:
                # Without a loopback address this says nothing about the kernel.
                log.debug("no socket to ask the kernel about: %s", error)
                continue
            try:
                owner = ask(*ends)
            except OSError as error:
                return error.strerror or str(error)
        protocol = "TCP" if kind == socket.SOCK_STREAM else "UDP"
        if owner is None:
            return f"it does not find {protocol} sockets"
        if owner.uid != os.geteuid():
            return f"it calls uid {os.geteuid()} the uid {owner.uid}"
    return ""


def _own_ends(
    kind: socket.SocketKind, closing: contextlib.ExitStack
) -> tuple[bytes, int, bytes, int]:
    """The ends of a socket of this process, which is open as long as `closing`. Raises OSError."""
    far = closing.enter_context(socket.socket(socket.AF_INET, kind))
    far.bind(("127.0.0.1", 0))
    if kind == socket.SOCK_STREAM:
        far.listen(1)
    end = closing.enter_context(socket.socket(socket.AF_INET, kind))
    # Whether it gets through does not matter, and is not waited for.
    end.setblocking(False)
    if (number := end.connect_ex(far.getsockname())) not in (0, errno.EINPROGRESS):
        raise OSError(number, os.strerror(number))
    loopback = socket.inet_aton("127.0.0.1")
    return loopback, end.getsockname()[1], loopback, far.getsockname()[1]


if __name__ == "__main__":
    _answer()

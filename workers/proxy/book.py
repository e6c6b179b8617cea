"""The address book: which virtual IPv4 address a name has, and what it stood for last.

One SQLite file serves all proxies of one VNet and outlives them, so addresses stay the same over
restarts. Every write is one transaction; what is read is cached until another process writes.

A file that is damaged or not a book is left as it is, and a new book begins in a file with the
next number (`addresses.db`, `addresses.db.1`, ...): SQLite must not see a file replaced under its
name, because whoever closes the old one deletes the log of the new one. Addresses come from a hash
of the name, so most names get their old address again.
"""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import msgspec

from workers.proxy.probe_order import MAX_PREFIX_LENGTH, capacity, probe_order

logger = logging.getLogger(__name__)

APP, DATABASE, CLUSTER = "app", "database", "cluster"
# Any name below a cluster's gets an address, also a mistyped one: that many of them are kept in a
# range, and in at most half of it, so that apps and databases find room.
MAX_CLUSTER_NAMES = 10_000
_CLUSTER_MARK = b'"kind":"cluster"'
# So long the log of the file becomes, in pages of 4 KiB, before it is written again from its start.
# A new name takes three; SQLite's own 1000 would fill a small disk with a book of 400 names.
LOG_PAGES = 250

APPLICATION_ID = 0x564E4554  # "VNET"
VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS names (
  name    TEXT PRIMARY KEY,
  address INTEGER NOT NULL UNIQUE,
  target  BLOB NOT NULL
) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
COMMIT;
"""


class BookError(Exception):
    """Base: the book cannot do what was asked."""


class RangeFullError(BookError):
    """No address is left in the range."""


class RangeTooSmallError(BookError):
    """The range is smaller than a /27."""


class BookUnavailableError(BookError):
    """The file cannot be read or written now: disk full, no permission, locked too long."""


class _DamagedError(Exception):
    """The file is no book of this version."""


class BookTarget(msgspec.Struct, frozen=True, kw_only=True):
    """What a name stood for when its cluster was last asked. `leaf` is empty for the root.

    `kind` is one of APP, DATABASE, CLUSTER, or of a later version. `resource` is the name of the
    app or of the database; for a name below a cluster's what stands before that. `spelling` is the
    whole name as the cluster spells it, by which it finds the resource again; empty when it is the
    name itself.
    """

    profile: str
    leaf: str
    cluster: str
    # The names in the file are those of the first books, which had apps alone.
    resource: str = msgspec.field(name="app")
    spelling: str = msgspec.field(name="public_addr", default="")
    kind: str = APP


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the book. `name` is lower-case and without the trailing dot."""

    name: str
    address: IPv4Address
    target: BookTarget


class Book:
    """The book in one file. Not thread-safe; several processes may have it open.

    Calls block for well under a millisecond, at most for `busy_seconds` when another process writes.
    """

    def __init__(
        self,
        path: Path,
        *,
        reserved: Collection[IPv4Address],
        busy_seconds: float = 2.0,
        max_cached: int = 10_000,
        max_cluster_names: int = MAX_CLUSTER_NAMES,
    ) -> None:
        self._path = path
        self._reserved = frozenset(reserved)
        self._busy_seconds = busy_seconds
        self._max_cached = max_cached
        self._max_cluster_names = max_cluster_names
        self._by_name: dict[str, Entry] = {}
        self._by_address: dict[IPv4Address, Entry] = {}
        self._seen_version = -1
        self._generation = 0
        self._database: sqlite3.Connection | None = None

    def open(self) -> None:
        """Opens or makes the file.

        Raises:
            BookUnavailableError: neither is possible.
        """
        with self._translated():
            self._reopen()

    def close(self) -> None:
        """Closes the file."""
        if self._database is not None:
            self._database.close()
            self._database = None
        self._forget()

    def by_name(self, name: str) -> Entry | None:
        """The entry of a name.

        Raises:
            BookUnavailableError: the file cannot be read.
        """
        with self._translated():
            self._notice_writes()
            entry = self._by_name.get(name)
            return entry if entry is not None else self._read("name = ?", name)

    def by_address(self, address: IPv4Address) -> Entry | None:
        """The entry that has an address.

        Raises:
            BookUnavailableError: the file cannot be read.
        """
        with self._translated():
            self._notice_writes()
            entry = self._by_address.get(address)
            return entry if entry is not None else self._read("address = ?", int(address))

    def assign(self, name: str, network: IPv4Network, target: BookTarget) -> Entry:
        """The entry of a name with an address in `network`, made or changed as needed.

        Raises:
            RangeFullError: no address is left.
            RangeTooSmallError: the range is smaller than a /27.
            BookUnavailableError: the file cannot be written. A name that has an address in the
                range already needs no writing.
        """
        if network.prefixlen > MAX_PREFIX_LENGTH:
            raise RangeTooSmallError(f"{network} is smaller than a /{MAX_PREFIX_LENGTH}")
        entry = self.by_name(name)
        if entry is None or not self._fits(entry.address, network):
            return self._write(name, network, target)
        if entry.target != target:
            try:
                return self._write(name, network, target)
            except BookUnavailableError as error:
                # The address is right, only the note beside it is old.
                logger.warning("%s", error)
        return entry

    def _write(self, name: str, network: IPv4Network, target: BookTarget) -> Entry:
        with self._translated(), self._transaction() as database:
            # Read again inside the transaction: another process may just have assigned it.
            entry = self._read("name = ?", name)
            if entry is not None and self._fits(entry.address, network):
                address = entry.address
            else:
                if target.kind == CLUSTER:
                    self._make_room(database, name, network)
                address = self._free_address(database, name, network)
            database.execute(
                "INSERT INTO names VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE "
                "SET address = excluded.address, target = excluded.target",
                (name, int(address), msgspec.json.encode(target)),
            )
        self._forget()
        return self._keep(Entry(name, address, target))

    def _fits(self, address: IPv4Address, network: IPv4Network) -> bool:
        ends = (network.network_address, network.broadcast_address)
        return address in network and address not in ends and address not in self._reserved

    def _free_address(
        self, database: sqlite3.Connection, name: str, network: IPv4Network
    ) -> IPv4Address:
        used = _count(database, network)
        # A quick answer for the full range; the search below is right in any case.
        if used < network.num_addresses - 2:
            for address in probe_order(name, network, self._reserved):
                taken = database.execute(
                    "SELECT 1 FROM names WHERE address = ?", (int(address),)
                ).fetchone()
                if taken is None:
                    return address
        limit = capacity(network, self._reserved)
        raise RangeFullError(f"all {limit} addresses of {network} are taken")

    def _make_room(self, database: sqlite3.Connection, name: str, network: IPv4Network) -> None:
        """Forgets one name below a cluster's when there are too many; not always the same one."""
        limit = min(self._max_cluster_names, capacity(network, self._reserved) // 2)
        if _count(database, network) < limit or _count(database, network, _CLUSTER_MARK) < limit:
            return
        start = int(next(probe_order(name, network, self._reserved)))
        bounds = (int(network.network_address), int(network.broadcast_address))
        database.execute(
            "DELETE FROM names WHERE address = (SELECT address FROM names "
            "WHERE address BETWEEN ? AND ? AND instr(target, ?) "
            "ORDER BY address < ?, address LIMIT 1)",
            (*bounds, _CLUSTER_MARK, start),
        )

    def _read(self, condition: str, value: str | int) -> Entry | None:
        row = self._connection.execute(
            f"SELECT name, address, target FROM names WHERE {condition}",  # noqa: S608 - constants
            (value,),
        ).fetchone()
        if row is None:
            return None
        name, address, target = row
        try:
            decoded = msgspec.json.decode(target, type=BookTarget)
            return self._keep(Entry(name, IPv4Address(address), decoded))
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            raise _DamagedError(f"the entry of {name!r} is malformed") from error

    def _keep(self, entry: Entry) -> Entry:
        if len(self._by_name) >= self._max_cached:
            self._forget()
        self._by_name[entry.name] = self._by_address[entry.address] = entry
        return entry

    def _forget(self) -> None:
        self._by_name.clear()
        self._by_address.clear()

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._database is None:
            self._reopen()
        assert self._database is not None
        return self._database

    def _notice_writes(self) -> None:
        """Drops what is cached when another process has written, or has begun a new file."""
        if self._database is not None and not self._file(self._generation).exists():
            self._begin_anew("the file is gone")
        elif self._database is None or self._file(self._generation + 1).exists():
            self._reopen()
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version != self._seen_version:
            self._seen_version = version
            self._forget()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._notice_writes()
        database = self._connection
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            self._forget()
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns errors of the file into BookUnavailableError; a damaged file is replaced."""
        try:
            yield
        except (sqlite3.Error, _DamagedError, OSError) as error:
            if not _is_damage(error):
                raise BookUnavailableError(f"address book {self._path}: {error}") from error
            try:
                self._begin_anew(str(error))
            except (sqlite3.Error, _DamagedError, OSError) as again:
                raise BookUnavailableError(f"address book {self._path}: {again}") from again
            raise BookUnavailableError(
                f"address book {self._path} was damaged and begins anew: try again"
            ) from error

    def _reopen(self) -> None:
        self.close()
        with self._locked():
            latest = self._latest()
            try:
                self._connect(latest)
            except (sqlite3.Error, _DamagedError) as error:
                if not _is_damage(error):
                    raise
                logger.error("%s is no address book (%s)", self._file(latest), error)
                self._connect(latest + 1)

    def _begin_anew(self, reason: str) -> None:
        self.close()
        with self._locked():
            latest = self._latest()
            if latest == self._generation:
                logger.error("address book %s is lost: %s", self._file(latest), reason)
                self._remove_old(latest)
                latest += 1
            self._connect(latest)

    def _file(self, generation: int) -> Path:
        name = self._path.name
        return self._path.with_name(f"{name}.{generation}") if generation else self._path

    def _latest(self) -> int:
        prefix = self._path.name + "."
        suffixes = [p.name.removeprefix(prefix) for p in self._path.parent.glob(f"{prefix}*")]
        return max((int(s) for s in suffixes if s.isascii() and s.isdecimal()), default=0)

    def _remove_old(self, latest: int) -> None:
        """Keeps the last damaged file for whoever wants to look at it, not all of them."""
        if latest > 1:
            for suffix in ("", "-wal", "-shm"):
                old = self._file(latest - 1)
                old.with_name(old.name + suffix).unlink(missing_ok=True)

    def _connect(self, generation: int) -> None:
        path = self._file(generation)
        with suppress(FileExistsError):
            # O_EXCL: closing a descriptor of a file in use would drop SQLite's locks on it.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(
            path, timeout=self._busy_seconds, isolation_level=None, cached_statements=16
        )
        try:
            self._check(database)
        except BaseException:
            database.close()
            raise
        self._database = database
        self._generation = generation
        self._seen_version = -1

    def _check(self, database: sqlite3.Connection) -> None:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and (application, version) != (APPLICATION_ID, VERSION):
            raise _DamagedError("it belongs to another program or version")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        # An assignment lost in a power cut costs nothing: the programs that knew it are gone too.
        database.execute("PRAGMA synchronous = NORMAL")
        if not tables:
            database.executescript(_SCHEMA)
        ((verdict,),) = database.execute("PRAGMA quick_check(1)").fetchmany(1)
        if verdict != "ok":
            raise _DamagedError(verdict)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time decides whether the file is good."""
        path = self._path.with_name(f"{self._path.name}.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _count(database: sqlite3.Connection, network: IPv4Network, mark: bytes = b"") -> int:
    """How many names have an address of the network and `mark` in their target."""
    bounds = (int(network.network_address), int(network.broadcast_address))
    condition = "address BETWEEN ? AND ?" + (" AND instr(target, ?)" if mark else "")
    count: int
    (count,) = database.execute(
        f"SELECT count(*) FROM names WHERE {condition}",  # noqa: S608 - constants
        (*bounds, mark) if mark else bounds,
    ).fetchone()
    return count


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA}
    return isinstance(error, _DamagedError)

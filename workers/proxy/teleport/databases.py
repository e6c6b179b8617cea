"""Databases by name: `<identifier>.db.<proxy host>`, the identifier being one label.

Source: `lib/vnet/db/db.go`, `lib/srv/db/vnet/vnet.go`. The identifier is the database's name, or a
hash of it for names that are no DNS label.
"""

import logging
from base64 import b32hexencode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from math import inf

from workers.proxy.teleport.cluster import Cluster
from workers.proxy.teleport.errors import RefusedError, TeleportError, safe_text
from workers.proxy.teleport.names import DATABASE_ALPN, is_label, name_predicate, quote
from workers.proxy.teleport.pb import types_pb2
from workers.proxy.teleport.remembered import Remembered
from workers.proxy.teleport.single_flight import SingleFlight

logger = logging.getLogger(__name__)

# Several agents may serve one database.
LOOKUP_LIMIT = 10
# Of a cluster that cannot be asked for hashes so many rows are looked through.
MAX_LISTED = 10_000
LISTED_SECONDS = 60.0

ID_LENGTH = 13
_ID_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuv")


@dataclass(frozen=True, slots=True)
class Database:
    """A database that VNet carries. `protocol` is a key of `names.DATABASE_ALPN`."""

    name: str
    protocol: str


def database_id(name: str) -> str:
    """The hash of a database's name: base32hex (RFC 4648 section 7), lower-case, 13 characters."""
    digest = sha256(name.encode("utf-8", "surrogatepass")).digest()
    return b32hexencode(digest[:8]).decode("ascii").rstrip("=").lower()


def database_label(name: str) -> str:
    """The identifier to show for a database: its name where that is a label, else the hash."""
    return name if is_label(name) else database_id(name)


def is_database_id(text: str) -> bool:
    """Whether this may be a hash of a name. It may be a name as well."""
    return len(text) == ID_LENGTH and _ID_CHARACTERS.issuperset(text)


def make_database(database: types_pb2.DatabaseV3) -> Database | None:
    """The value of a database; None for a protocol that needs more than VNet knows."""
    name, protocol = database.Metadata.Name, database.Spec.Protocol
    return Database(name, protocol) if name and protocol in DATABASE_ALPN else None


def select_database(
    servers: Iterable[types_pb2.DatabaseServerV3], identifier: str
) -> Database | None:
    """The database that a lower-case identifier stands for; None when there is none for VNet.

    Servers of one database are one. Of several databases the first is taken, with a warning.
    """
    found: dict[str, types_pb2.DatabaseV3] = {}
    for server in servers:
        database = server.Spec.Database
        name = database.Metadata.Name
        if identifier in {name.lower(), database_id(name)}:
            found.setdefault(name, database)
    if not found:
        return None
    names = [safe_text(name, 60) for name in found]
    if len(names) > 1:
        logger.warning("%s stands for the databases %s: the first", identifier, ", ".join(names))
    first = next(iter(found.values()))
    value = make_database(first)
    if value is None:
        protocol = safe_text(first.Spec.Protocol, 40)
        logger.info("database %s has protocol %s, which VNet does not carry", names[0], protocol)
    return value


def database_predicate(identifier: str) -> str:
    """Predicate for the databases that an identifier may stand for, on servers that know hashes."""
    return f"resource.status.vnet_dns_name == {quote(identifier.lower())} || " + name_predicate(
        identifier
    )


class DatabaseFinder:
    """Finds the database for an identifier in one cluster and remembers the answer.

    Older servers cannot be asked for a hash: their databases are listed, at most once a minute.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        clock: Callable[[], float],
        positive_seconds: float = 60.0,
        negative_seconds: float = 10.0,
        patience_seconds: float = 1.0,
        max_names: int = 1000,
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._answers_hashes = True
        self._listed: list[types_pb2.DatabaseServerV3] = []
        self._listed_until = -inf
        self._listing = SingleFlight[str, list[types_pb2.DatabaseServerV3]]()
        self._kept = Remembered[str, Database](
            self._ask,
            clock=clock,
            positive_seconds=positive_seconds,
            negative_seconds=negative_seconds,
            patience_seconds=patience_seconds,
            max_names=max_names,
        )

    async def find(
        self, identifier: str, *, spelling: str = "", fresh: bool = False
    ) -> Database | None:
        """The database; `identifier` is lower-case, `spelling` the same as it was typed.

        Raises:
            TeleportError: the cluster cannot be asked and never was asked for this one.
        """
        return await self._kept.find(identifier, spelling or identifier, fresh=fresh)

    def current(self, identifier: str) -> tuple[Database | None] | None:
        """The remembered answer in a tuple, or None when the cluster has to be asked."""
        found = self._kept.current(identifier)
        return None if found is None else (found.value,)

    def last_known(self, identifier: str) -> Database | None:
        """What the cluster last said, however old; None also when it was never asked."""
        return self._kept.last_known(identifier)

    def expire(self) -> None:
        """Lets everything be asked again; the old answers still serve when that fails."""
        self._answers_hashes = True
        self._listed_until = -inf
        self._kept.expire()

    async def _ask(self, identifier: str) -> Database | None:
        lower = identifier.lower()
        try:
            found = select_database(await self._servers(identifier), lower)
            if found is None and is_database_id(lower):
                # Agents of older versions do not tell their hashes.
                found = select_database(await self._all_servers(), lower)
        except TeleportError as error:
            self._cluster.note(error)
            raise
        self._cluster.note(None)
        self._kept.keep_normalised(lower, found)
        return found

    async def _servers(self, identifier: str) -> list[types_pb2.DatabaseServerV3]:
        api = await self._cluster.api()
        if self._answers_hashes:
            try:
                return await api.database_servers(database_predicate(identifier), LOOKUP_LIMIT)
            except RefusedError:
                self._answers_hashes = False
        return await api.database_servers(name_predicate(identifier), LOOKUP_LIMIT)

    async def _all_servers(self) -> list[types_pb2.DatabaseServerV3]:
        if self._clock() >= self._listed_until:
            self._listed = await self._listing.run("all", self._list)
        return self._listed

    async def _list(self) -> list[types_pb2.DatabaseServerV3]:
        found: dict[str, types_pb2.DatabaseServerV3] = {}
        rows = 0
        api = await self._cluster.api()
        async for row in api.resources("db_server"):
            rows += 1
            if rows > MAX_LISTED:
                logger.warning("%s has more than %d databases", self._cluster.name, MAX_LISTED)
                break
            if row.WhichOneof("resource") == "DatabaseServer":
                server = row.DatabaseServer
                found.setdefault(server.Spec.Database.Metadata.Name, server)
        self._listed_until = self._clock() + LISTED_SECONDS
        return list(found.values())

    async def close(self) -> None:
        """Ends the questions under way."""
        await self._kept.close()
        await self._listing.close()

"""Finds an app or database by the name a user types, in all clusters: for `vnet proxy`.

    what is typed                    finds
    a public address                 the TCP app that has it, whether or not in a DNS zone of VNet
    <name or hash>.db.<proxy host>   the database
    anything else                    the TCP apps and databases of this name

An address counts more than a name. Resources of one cluster that several profiles lead to are one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, auto
from pathlib import Path

from workers.proxy.every_cluster import AskedCluster, Connect, Survey, ask_every_cluster
from workers.proxy.listing import require_cluster
from workers.proxy.resource_rows import (
    MCP_NOTE,
    Place,
    Problem,
    database_address,
    is_mcp,
    protocol_note,
    web_url,
)
from workers.proxy.teleport.apps import make_app
from workers.proxy.teleport.databases import (
    database_id,
    database_predicate,
    is_database_id,
    make_database,
)
from workers.proxy.teleport.errors import RefusedError, safe_text
from workers.proxy.teleport.names import name_predicate, normalise, public_addr_predicate
from workers.proxy.teleport.pb import types_pb2
from workers.proxy.teleport.precedence import ClusterNames, Relation, candidate
from workers.proxy.teleport.targets import AppTarget, DatabaseTarget

# Agents that serve one app, and apps of one name.
LOOKUP_LIMIT = 100
# Databases looked through for a hash, where the cluster cannot be asked for hashes.
MAX_LISTED = 20_000
MAX_SHOWN_CANDIDATES = 10


class NotFoundByNameError(Exception):
    """Nothing VNet can carry has the name, or several have. The text says what to do."""


class NotAskedError(Exception):
    """Nothing was found, but not every cluster could be asked; `problems` say why."""

    def __init__(self, text: str, problems: list[Problem]) -> None:
        super().__init__(text)
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Found:
    """An app or database. `address` is what a program would use with VNet."""

    target: AppTarget | DatabaseTarget
    address: str

    def __str__(self) -> str:
        return f"{self.address} in {self.target.cluster}"


class _How(IntEnum):
    """How a find was found; less is better."""

    OWN_ADDRESS = auto()
    ROOT_ADDRESS = auto()  # a leaf's database below the root's proxy, where the root's come first
    NAME = auto()


@dataclass(slots=True)
class _Finds:
    """`found`: by what makes a find the same as another. `others`: what VNet does not carry."""

    found: dict[tuple[str, ...], tuple[_How, Found]] = field(default_factory=dict)
    others: dict[str, None] = field(default_factory=dict)

    def add(self, kind: str, name: str, how: _How, found: Found) -> None:
        key = (found.target.cluster, kind, name, found.address)
        if key not in self.found or how < self.found[key][0]:
            self.found[key] = (how, found)

    @property
    def best(self) -> list[Found]:
        best = min((how for how, _ in self.found.values()), default=None)
        return [found for how, found in self.found.values() if how is best]


async def find_by_name(
    directory: Path, connect: Connect, now: datetime, name: str, *, cluster: str = ""
) -> Found:
    """The app or database that `name` stands for; looked for in one cluster only, if named.

    Raises:
        NotFoundByNameError: there is none, or more than one.
        NotAskedError: there is none in the clusters that could be asked.
        NoSuchClusterError: there is no such cluster.
    """
    finds = _Finds()

    async def ask(asked: AskedCluster) -> None:
        await _find_apps(asked, name, finds)
        await _find_databases(asked, name, finds)

    survey = await ask_every_cluster(directory, connect, now, ask, only=cluster)
    require_cluster(cluster, survey)
    return _choose(name, finds, survey)


def _choose(name: str, finds: _Finds, survey: Survey) -> Found:
    found = finds.best
    shown = repr(safe_text(name, 100))
    if len(found) == 1:
        return found[0]
    if found:
        listed = "; ".join(map(str, found[:MAX_SHOWN_CANDIDATES]))
        more = len(found) - MAX_SHOWN_CANDIDATES
        listed += f"; and {more} more" if more > 0 else ""
        raise NotFoundByNameError(
            f"{shown} is more than one: {listed}: give the address, or the cluster with --cluster"
        )
    if finds.others:
        raise NotFoundByNameError("; ".join(list(finds.others)[:MAX_SHOWN_CANDIDATES]))
    if survey.problems:
        text = f"no app or database {shown} in the clusters that can be asked"
        raise NotAskedError(text, survey.problems)
    raise NotFoundByNameError(f"no app or database {shown}: vnet ls shows what there is")


async def _find_apps(asked: AskedCluster, name: str, finds: _Finds) -> None:
    place = asked.place
    predicate = f"{public_addr_predicate([name])} || {name_predicate(name)}"
    for server in await asked.api.app_servers(predicate, LOOKUP_LIMIT):
        app = server.Spec.App
        has_address = normalise(app.Spec.PublicAddr) == normalise(name)
        if not has_address and app.Metadata.Name.lower() != name.lower():
            continue
        tcp = make_app(app)
        if tcp is not None:
            target = AppTarget(
                profile=place.names.profile,
                root_cluster=place.root,
                leaf=place.leaf,
                ipv4_range=None,
                app=tcp,
            )
            address = safe_text(tcp.public_addr.removesuffix(".") or tcp.name)
            how = _How.OWN_ADDRESS if has_address else _How.NAME
            finds.add("app", tcp.name, how, Found(target, address))
        else:
            finds.others[_not_tcp(app, place)] = None


def _not_tcp(app: types_pb2.AppV3, place: Place) -> str:
    what = f"{safe_text(app.Metadata.Name, 100)} in {place.cluster}"
    if is_mcp(app):
        return f"{what}: {MCP_NOTE}"
    return f"{what} is a web app: open {web_url(app, place)} in a browser"


async def _find_databases(asked: AskedCluster, name: str, finds: _Finds) -> None:
    place = asked.place
    how, identifier = _database_identifier(name, place.names)
    for database in await _databases(asked, identifier, is_name=how is _How.NAME):
        carried = make_database(database)
        if carried is None:
            what = f"{safe_text(database.Metadata.Name, 100)} in {place.cluster}"
            finds.others[f"{what}: {protocol_note(database.Spec.Protocol)}"] = None
            continue
        target = DatabaseTarget(
            profile=place.names.profile,
            root_cluster=place.root,
            leaf=place.leaf,
            ipv4_range=None,
            database=carried,
        )
        address = safe_text(database_address(carried.name, place.names))
        finds.add("database", carried.name, how, Found(target, address))


def _database_identifier(name: str, names: ClusterNames) -> tuple[_How, str]:
    as_address = candidate(normalise(name), names)
    if as_address is None or not as_address.identifier:
        return _How.NAME, name
    is_own = Relation.DATABASE in as_address.relations
    return _How.OWN_ADDRESS if is_own else _How.ROOT_ADDRESS, as_address.identifier


async def _databases(
    asked: AskedCluster, identifier: str, *, is_name: bool
) -> Iterable[types_pb2.DatabaseV3]:
    """The databases, each once; those that VNet does not carry too."""
    if is_name:
        servers = await asked.api.database_servers(name_predicate(identifier), LOOKUP_LIMIT)
    else:
        servers = await _servers_by_identifier(asked, identifier)
    found = (server.Spec.Database for server in servers)
    return {
        database.Metadata.Name: database
        for database in found
        if _stands_for(identifier, database.Metadata.Name, is_name=is_name)
    }.values()


def _stands_for(identifier: str, name: str, *, is_name: bool) -> bool:
    is_same = identifier.lower() == name.lower()
    return is_same or (not is_name and identifier.lower() == database_id(name))


async def _servers_by_identifier(
    asked: AskedCluster, identifier: str
) -> list[types_pb2.DatabaseServerV3]:
    try:
        servers = await asked.api.database_servers(database_predicate(identifier), LOOKUP_LIMIT)
    except RefusedError:  # servers before 2026 know no hashes
        servers = await asked.api.database_servers(name_predicate(identifier), LOOKUP_LIMIT)
    if servers or not is_database_id(identifier):
        return servers
    listed = 0
    async for resource in asked.api.resources("db_server"):
        listed += 1
        if listed > MAX_LISTED:
            asked.note(f"of more than {MAX_LISTED} databases not all were looked at")
            break
        database = resource.DatabaseServer.Spec.Database
        if database_id(database.Metadata.Name) == identifier:
            return [resource.DatabaseServer]
    return []

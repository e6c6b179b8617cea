"""Resources as rows of ListResources and ListUnifiedResources, and how rows are chosen. No I/O.

A cluster may have tens of thousands of apps: rows are made once, their messages when first asked
for, and an index answers the look-ups of clients, which ask for a name or an address.
"""

import base64
import dataclasses
import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from google.protobuf.timestamp_pb2 import Timestamp

from demo.cluster.config import App, Database, Node
from demo.cluster.errors import RequestError
from demo.cluster.identity import Identity
from demo.cluster.predicate import Fields, Predicate, compile_predicate, search_text
from demo.cluster.state import SERVER_VERSION, AppTable, ClusterState
from workers.proxy.teleport.pb import auth_pb2, types_pb2

MAX_PAGE = 1000  # DefaultChunkSize of api/defaults

# Go's zero time. Its encoder emits non-nullable timestamps always, so clients meet it.
ZERO_TIME = Timestamp(seconds=-62135596800)
_INDEXED = frozenset(
    {
        "name",
        "resource.metadata.name",
        "resource.spec.hostname",
        "resource.spec.public_addr",
        "resource.status.vnet_dns_name",
    }
)
_APP_LABELS = {"env": "demo"}
# Kinds of ListUnifiedResources and the ResourceType of their rows.
_UNIFIED_KINDS = {"app": "app_server", "node": "node", "db": "db_server"}


class Row:
    """One resource: `key` orders the pages, `fields` is what predicates see.

    `roles` are those that allow it; None means everyone.
    """

    __slots__ = ("_make", "_resource", "_text", "fields", "key", "roles")

    def __init__(
        self,
        key: str,
        fields: Fields,
        make: Callable[[], auth_pb2.PaginatedResource],
        roles: frozenset[str] | None = None,
    ) -> None:
        self.key = key
        self.fields = fields
        self.roles = roles
        self._make = make
        self._resource: auth_pb2.PaginatedResource | None = None
        self._text: str | None = None

    @property
    def resource(self) -> auth_pb2.PaginatedResource:
        """The message, the same one each time."""
        if self._resource is None:
            self._resource = self._make()
        return self._resource

    def has_words(self, words: list[str]) -> bool:
        """Whether every word (lower case) occurs somewhere in the resource."""
        if self._text is None:
            self._text = search_text(self.fields)
        return all(word in self._text for word in words)

    def with_key(self, key: str) -> "Row":
        """The same resource with another place in the order."""
        return Row(key, self.fields, lambda: self.resource, self.roles)


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """What both listing calls share. `limit` is positive."""

    limit: int
    start_key: str
    predicate: str
    labels: dict[str, str]
    words: list[str]
    needs_total: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Rows of one answer. `next_key` is empty at the end; `total` counts all matching rows.

    It is 0 when the query does not need it.
    """

    rows: tuple[Row, ...]
    next_key: str
    total: int


class Listing:
    """The rows of one or several kinds in the order of their keys, with an index."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = sorted(rows, key=lambda row: row.key)
        self._keys = [row.key for row in self._rows]
        self._index: dict[tuple[str, str], list[int]] = {}
        for position, row in enumerate(self._rows):
            for name in _INDEXED:
                value = row.fields.get(name)
                if isinstance(value, str):
                    self._index.setdefault((name, value), []).append(position)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def select(self, query: Query, caller: Identity) -> Page:
        """The page of what the caller may see.

        Raises:
            PredicateError: the predicate is malformed or names an unknown field.
        """
        predicate = compile_predicate(query.predicate)
        for row in self._rows[:1]:
            # The index passes rows by; an unknown field is an error all the same.
            predicate(row.fields)
        roles = frozenset(caller.roles)
        words = [word.lower() for word in query.words]
        shown: list[Row] = []
        next_key = ""
        total = 0
        for position in self._candidates(predicate, query):
            row = self._rows[position]
            if not (
                (row.roles is None or not roles.isdisjoint(row.roles))
                and predicate(row.fields)
                and _has_labels(row, query.labels)
                and row.has_words(words)
            ):
                continue
            total += 1
            if row.key < query.start_key:
                continue
            if len(shown) < query.limit:
                shown.append(row)
            elif not next_key:
                next_key = row.key
                if not query.needs_total:
                    break
        return Page(tuple(shown), next_key, total if query.needs_total else 0)

    def _candidates(self, predicate: Predicate, query: Query) -> Iterable[int]:
        start = 0 if query.needs_total else bisect_left(self._keys, query.start_key)
        needs = predicate.needs
        if needs is None or any(field not in _INDEXED for field, _ in needs):
            return range(start, len(self._rows))
        found = {position for equality in needs for position in self._index.get(equality, ())}
        return sorted(position for position in found if position >= start)


class Listings:
    """The listings of one cluster, made anew when its apps have changed."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._apps: AppTable | None = None
        self._made: dict[tuple[str, ...], Listing] = {}

    def of(self, kind: str) -> Listing:
        """All resources of one ResourceType: `app_server`, `node`, `db_server`.

        Raises:
            RequestError: the cluster does not list this kind.
        """
        if kind not in _UNIFIED_KINDS.values():
            raise RequestError(f"resource type {kind!r} does not support pagination")
        return self._get((kind,), lambda: _rows_of(self._state, kind))

    def unified(self, kinds: Iterable[str]) -> Listing:
        """All resources of these kinds (`app`, `node`, `db`), of all kinds when none is named."""
        wanted = set(kinds) or set(_UNIFIED_KINDS)
        chosen = tuple(kind for kind in _UNIFIED_KINDS if kind in wanted)

        def rows() -> Iterator[Row]:
            for kind in chosen:
                for row in self.of(_UNIFIED_KINDS[kind]):
                    yield row.with_key(f"{row.fields['name']}/{kind}")

        return self._get(("unified", *chosen), rows)

    def _get(self, key: tuple[str, ...], rows: Callable[[], Iterable[Row]]) -> Listing:
        if self._apps is not self._state.apps:
            self._apps = self._state.apps
            self._made.clear()
        if key not in self._made:
            self._made[key] = Listing(rows())
        return self._made[key]


def _rows_of(state: ClusterState, kind: str) -> Iterable[Row]:
    if kind == "app_server":
        return (_app_row(state, app) for app in state.apps.all)
    if kind == "node":
        return (_node_row(node) for node in state.config.nodes)
    return (_database_row(state, database) for database in state.config.databases)


def vnet_dns_name(database: str) -> str:
    """The DNS label that stands for a database: 13 characters (lib/srv/db/vnet)."""
    digest = hashlib.sha256(database.encode()).digest()[:8]
    return base64.b32hexencode(digest).decode().rstrip("=").lower()


def _has_labels(row: Row, labels: dict[str, str]) -> bool:
    own = row.fields["labels"]
    assert not isinstance(own, str)
    return all(own.get(name) == value for name, value in labels.items())


def _fields(name: str, labels: dict[str, str], spec: dict[str, str]) -> Fields:
    return {
        "name": name,
        "labels": labels,
        "resource.metadata.name": name,
        "resource.metadata.labels": labels,
        **spec,
    }


def _metadata(name: str, labels: dict[str, str]) -> types_pb2.Metadata:
    return types_pb2.Metadata(Name=name, Namespace="default", Labels=labels)


def _app_row(state: ClusterState, app: App) -> Row:
    spec = {"resource.spec.public_addr": app.public_addr, "resource.spec.uri": app.uri}
    make = partial(_app_resource, state, app)
    fields = _fields(app.name, _APP_LABELS, spec)
    return Row(f"{state.host_id}/{app.name}", fields, make, frozenset(app.allowed_roles))


def _app_resource(state: ClusterState, app: App) -> auth_pb2.PaginatedResource:
    spec = types_pb2.AppServerSpecV3(
        Version=SERVER_VERSION,
        Hostname=f"agent.{state.name}",
        HostID=state.host_id,
        App=types_pb2.AppV3(
            Kind="app",
            Version="v3",
            Metadata=_metadata(app.name, _APP_LABELS),
            Spec=types_pb2.AppSpecV3(
                URI=app.uri,
                PublicAddr=app.public_addr,
                TCPPorts=[
                    types_pb2.PortRange(Port=ports.port, EndPort=ports.end_port)
                    for ports in app.tcp_ports
                ],
            ),
        ),
    )
    # Rotation and component_features are unknown to our message definition; what is unknown is
    # sent on as it is.
    spec.MergeFromString(_field(4, _empty_rotation()) + _field(9, b""))
    server = types_pb2.AppServerV3(
        Kind="app_server", Version="v3", Metadata=_metadata(app.name, _APP_LABELS), Spec=spec
    )
    return auth_pb2.PaginatedResource(AppServer=server)


def _empty_rotation() -> bytes:
    """types.Rotation with Started = 5 and LastRotated = 7 at Go's zero time."""
    year_one = ZERO_TIME.SerializeToString()
    return _field(5, year_one) + _field(7, year_one)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field of fewer than 128 bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def _node_row(node: Node) -> Row:
    spec = {"resource.spec.hostname": node.hostname, "resource.spec.addr": node.addr}
    fields = _fields(node.uuid, node.labels, spec)
    return Row(node.uuid, fields, partial(_node_resource, node), frozenset(node.allowed_roles))


def _node_resource(node: Node) -> auth_pb2.PaginatedResource:
    spec = types_pb2.ServerSpecV2(
        Addr=node.addr, Hostname=node.hostname, UseTunnel=not node.addr, Version=SERVER_VERSION
    )
    spec.MergeFromString(_field(5, _empty_rotation()))
    server = types_pb2.ServerV2(
        Kind="node", Version="v2", Metadata=_metadata(node.uuid, node.labels), Spec=spec
    )
    return auth_pb2.PaginatedResource(Node=server)


def _database_row(state: ClusterState, database: Database) -> Row:
    spec = {
        "resource.spec.protocol": database.protocol,
        "resource.spec.uri": database.uri,
        "resource.status.vnet_dns_name": vnet_dns_name(database.name),
    }
    make = partial(_database_resource, state, database)
    roles = frozenset(database.allowed_roles)
    fields = _fields(database.name, {}, spec)
    return Row(f"{state.host_id}/{database.name}", fields, make, roles)


def _database_resource(state: ClusterState, database: Database) -> auth_pb2.PaginatedResource:
    described = types_pb2.DatabaseV3(
        Kind="db",
        Version="v3",
        Metadata=_metadata(database.name, {}),
        Spec=types_pb2.DatabaseSpecV3(Protocol=database.protocol, URI=database.uri),
    )
    # Status = 6, of type DatabaseStatusV3, with VNetDNSName = 6.
    described.MergeFromString(_field(6, _field(6, vnet_dns_name(database.name).encode())))
    spec = types_pb2.DatabaseServerSpecV3(
        Version=SERVER_VERSION,
        Hostname=f"agent.{state.name}",
        HostID=state.host_id,
        Database=described,
    )
    spec.MergeFromString(_field(10, _empty_rotation()))
    server = types_pb2.DatabaseServerV3(
        Kind="db_server", Version="v3", Metadata=_metadata(database.name, {}), Spec=spec
    )
    return auth_pb2.PaginatedResource(DatabaseServer=server)

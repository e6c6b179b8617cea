"""Resources as rows of ListResources and ListUnifiedResources, and how rows are chosen. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp

from demo.cluster.config import App, Database, Node
from demo.cluster.errors import RequestError
from demo.cluster.identity import Identity
from demo.cluster.predicate import Fields, compile_predicate, matches_search
from demo.cluster.state import SERVER_VERSION, ClusterState, may_use
from workers.proxy.teleport.pb import auth_pb2, types_pb2

MAX_PAGE = 1000  # DefaultChunkSize of api/defaults

# Go's zero time. Its encoder emits non-nullable timestamps always, so clients meet it.
_YEAR_ONE_SECONDS = -62135596800


@dataclass(frozen=True, slots=True)
class Row:
    """One resource: `key` orders the pages, `fields` is what predicates see."""

    key: str
    fields: Fields
    resource: auth_pb2.PaginatedResource = field(repr=False)


@dataclass(frozen=True, slots=True)
class Query:
    """What both listing calls share. `limit` is positive."""

    limit: int
    start_key: str
    predicate: str
    labels: dict[str, str]
    words: list[str]


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of one answer. `next_key` is empty at the end; `total` counts all matching rows."""

    rows: tuple[Row, ...]
    next_key: str
    total: int


def rows_of(state: ClusterState, caller: Identity, kind: str) -> list[Row]:
    """All rows of one ResourceType (`app_server`, `node`, `db_server`) that the caller may see.

    Raises:
        RequestError: the cluster does not list this kind.
    """
    builders: dict[str, Callable[[], Iterable[Row]]] = {
        "app_server": lambda: (
            _app_row(state, app) for app in state.config.apps if may_use(app, caller)
        ),
        "node": lambda: (_node_row(state, node) for node in state.config.nodes),
        "db_server": lambda: (_database_row(state, db) for db in state.config.databases),
    }
    if kind not in builders:
        raise RequestError(f"resource type {kind!r} does not support pagination")
    return sorted(builders[kind](), key=lambda row: row.key)


def select(rows: Iterable[Row], query: Query) -> Page:
    """The page of `rows` (sorted by key) that a query asks for.

    Raises:
        PredicateError: the predicate is malformed or names an unknown field.
    """
    matches = compile_predicate(query.predicate)
    matching = [
        row
        for row in rows
        if matches(row.fields) and _has_labels(row, query.labels) and _has_words(row, query.words)
    ]
    from_start = [row for row in matching if row.key >= query.start_key]
    shown = from_start[: query.limit]
    rest = from_start[query.limit :]
    return Page(tuple(shown), rest[0].key if rest else "", len(matching))


def _has_labels(row: Row, labels: dict[str, str]) -> bool:
    own = row.fields["labels"]
    assert not isinstance(own, str)
    return all(own.get(name) == value for name, value in labels.items())


def _has_words(row: Row, words: list[str]) -> bool:
    return matches_search(row.fields, words)


def _fields(name: str, labels: dict[str, str], **spec: str) -> Fields:
    return {
        "name": name,
        "labels": labels,
        "resource.metadata.name": name,
        "resource.metadata.labels": labels,
        **{f"resource.spec.{key}": value for key, value in spec.items()},
    }


def _metadata(name: str, labels: dict[str, str]) -> types_pb2.Metadata:
    return types_pb2.Metadata(Name=name, Namespace="default", Labels=labels)


def _app_row(state: ClusterState, app: App) -> Row:
    labels = {"env": "demo"}
    spec = types_pb2.AppServerSpecV3(
        Version=SERVER_VERSION,
        Hostname=f"agent.{state.name}",
        HostID=state.host_id,
        App=types_pb2.AppV3(
            Kind="app",
            Version="v3",
            Metadata=_metadata(app.name, labels),
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
    # Rotation = 4 is unknown to our message definition; unknown fields are sent on as they are.
    spec.MergeFromString(_field(4, _empty_rotation()))
    server = types_pb2.AppServerV3(
        Kind="app_server", Version="v3", Metadata=_metadata(app.name, labels), Spec=spec
    )
    fields = _fields(app.name, labels, public_addr=app.public_addr, uri=app.uri)
    resource = auth_pb2.PaginatedResource(AppServer=server)
    return Row(f"{state.host_id}/{app.name}", fields, resource)


def _empty_rotation() -> bytes:
    """types.Rotation with Started = 5 and LastRotated = 7 at Go's zero time."""
    year_one = Timestamp(seconds=_YEAR_ONE_SECONDS).SerializeToString()
    return _field(5, year_one) + _field(7, year_one)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field of fewer than 128 bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def _node_row(state: ClusterState, node: Node) -> Row:
    host_id = f"{state.host_id}-{node.hostname}"
    spec = types_pb2.ServerSpecV2(
        Addr=node.addr, Hostname=node.hostname, UseTunnel=not node.addr, Version=SERVER_VERSION
    )
    server = types_pb2.ServerV2(
        Kind="node", Version="v2", Metadata=_metadata(host_id, {}), Spec=spec
    )
    fields = _fields(host_id, {}, hostname=node.hostname, addr=node.addr)
    return Row(host_id, fields, auth_pb2.PaginatedResource(Node=server))


def _database_row(state: ClusterState, database: Database) -> Row:
    spec = types_pb2.DatabaseServerSpecV3(
        Version=SERVER_VERSION,
        Hostname=f"agent.{state.name}",
        HostID=state.host_id,
        Database=types_pb2.DatabaseV3(
            Kind="db",
            Version="v3",
            Metadata=_metadata(database.name, {}),
            Spec=types_pb2.DatabaseSpecV3(Protocol=database.protocol, URI=database.uri),
        ),
    )
    server = types_pb2.DatabaseServerV3(
        Kind="db_server", Version="v3", Metadata=_metadata(database.name, {}), Spec=spec
    )
    fields = _fields(database.name, {}, protocol=database.protocol, uri=database.uri)
    resource = auth_pb2.PaginatedResource(DatabaseServer=server)
    return Row(f"{state.host_id}/{database.name}", fields, resource)

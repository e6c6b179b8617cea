"""A cluster's apps, databases and SSH servers as rows for people and scripts. Pure.

    resource           address                              ports             through VNet
    TCP app            its public address                   of its list, any  in a zone of the cluster
    web app            https://<public address>             -                 no: a browser needs none
    database           <name or hash>.db.<proxy host>       any               protocols in DATABASE_ALPN
    SSH server         <host name>.<cluster>                22                yes

Several agents may serve one resource, which then is one row.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TypeAlias

import msgspec

from workers.proxy.teleport.apps import App, make_app
from workers.proxy.teleport.databases import database_label, make_database
from workers.proxy.teleport.errors import safe_text
from workers.proxy.teleport.names import DEFAULT_WEB_PORT, is_zone, normalise
from workers.proxy.teleport.pb import auth_pb2, types_pb2
from workers.proxy.teleport.precedence import ClusterNames, candidate

# A row takes about a kilobyte.
MAX_ROWS = 100_000
# An app may have thousands of port ranges; who needs more of them asks for the app.
MAX_SHOWN_RANGES = 100
_MAX_NAME = 253
_MAX_URL = 300

ANY_PORT = "any"
_SSH_PORT = "22"

WEB_NOTE = "a web app, which VNet leaves to the browser"
NO_ADDRESS_NOTE = "no public address: use vnet proxy with its name"
NO_ZONE_NOTE = (
    "in no DNS zone of its cluster: use vnet proxy, or have the zone added to custom_dns_zones"
)
MCP_NOTE = "VNet carries no MCP: use tsh mcp"
SAME_HOST_NOTE = (
    "several servers have this host name: use ssh <id>.<cluster> with an id of tsh ls --verbose"
)
NO_HOST_NOTE = "its name is no DNS name: use tsh ssh"


class Kind(StrEnum):
    """What a row is about."""

    APP = "app"
    DATABASE = "db"
    NODE = "node"


RESOURCE_TYPES = {Kind.APP: "app_server", Kind.DATABASE: "db_server", Kind.NODE: "node"}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One resource: an app, a database or an SSH server."""

    kind: Kind
    name: str
    cluster: str
    profile: str
    address: str  # what a program connects to, a URL for a web app; empty if there is none
    ports: str  # "any", "8000-8010, 9000", or empty
    protocol: str  # tcp, web, mcp, ssh, or a database's
    through_vnet: bool  # whether a program reaches it by its address while VNet runs
    note: str = ""  # if not: what to do instead


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why something is missing. `profile` and `cluster` are empty if it is all of one."""

    profile: str
    cluster: str
    text: str

    def __str__(self) -> str:
        what = self.cluster or self.profile
        return f"{what} cannot be asked: {self.text}" if what else self.text


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What `vnet ls --json` prints."""

    schema: int = 1
    resources: list[Row]
    problems: list[Problem]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a resource is. `leaf` is empty for the root cluster; `names` are for DNS, normalised.

    `web_port` is the port of the profile's web address.
    """

    root: str
    leaf: str
    names: ClusterNames
    web_port: int = DEFAULT_WEB_PORT

    @property
    def cluster(self) -> str:
        """The cluster's own name."""
        return self.leaf or self.root


_Key: TypeAlias = tuple[Kind, str, str, str, str]


class Rows:
    """Collects rows: each once, and only those that contain all `words` (without case)."""

    def __init__(self, words: Sequence[str] = (), max_rows: int = MAX_ROWS) -> None:
        self._words = [word.lower() for word in words]
        self._max_rows = max_rows
        self._rows: dict[_Key, Row] = {}
        self._node_ids: dict[_Key, str] = {}

    def add(self, resource: auth_pb2.PaginatedResource, place: Place) -> bool:
        """Takes a resource; whether there was room for it."""
        row = make_row(resource, place)
        if row is None or not self._matches(resource, row):
            return True
        key = (row.kind, row.profile, row.cluster, row.name, row.address)
        if row.kind is Kind.NODE:
            node_id = resource.Node.Metadata.Name
            if self._node_ids.setdefault(key, node_id) != node_id:
                row = _without_address(row, SAME_HOST_NOTE)
                self._rows[key] = row
        if key not in self._rows and len(self._rows) >= self._max_rows:
            return False
        self._rows.setdefault(key, row)
        return True

    def sorted(self) -> list[Row]:
        """All rows: by kind, then by name."""
        kinds = list(Kind)
        return sorted(
            self._rows.values(),
            key=lambda r: (kinds.index(r.kind), r.name.lower(), r.profile, r.cluster, r.address),
        )

    def _matches(self, resource: auth_pb2.PaginatedResource, row: Row) -> bool:
        # Servers look at more of a database (its type) than our messages have of it.
        if not self._words or row.kind is Kind.DATABASE:
            return True
        text = "\0".join(_texts(resource)).lower()
        return all(word in text for word in self._words)


def make_row(resource: auth_pb2.PaginatedResource, place: Place) -> Row | None:
    """The row of a resource; None for another kind or one without a name."""
    match resource.WhichOneof("resource"):
        case "AppServer":
            app = resource.AppServer.Spec.App
            row = _app_row(app, place) if app.Metadata.Name else None
        case "DatabaseServer":
            database = resource.DatabaseServer.Spec.Database
            row = _database_row(database, place) if database.Metadata.Name else None
        case "Node":
            row = _node_row(resource.Node, place) if resource.Node.Spec.Hostname else None
        case _:
            return None
    return row


def is_claimed(address: str, names: ClusterNames) -> bool:
    """Whether VNet asks this cluster for a name; True while its zones are not known."""
    return names.zones is None or candidate(normalise(address), names) is not None


def shown_ports(app: App) -> str:
    """The ports that an app takes, for people."""
    if app.ports is None:
        return ANY_PORT
    shown = ", ".join(map(str, app.ports[:MAX_SHOWN_RANGES]))
    more = len(app.ports) - MAX_SHOWN_RANGES
    return f"{shown} and {more} more" if more > 0 else shown


def web_url(app: types_pb2.AppV3, place: Place) -> str:
    """Where a browser finds a web app; an app of a leaf is below the root's proxy.

    Source: `lib/utils/app.go`.
    """
    host = app.Spec.PublicAddr.removesuffix(".")
    if place.leaf or not host or app.Spec.UseAnyProxyPublicAddr:
        host = f"{app.Metadata.Name}.{place.names.web_host}"
    port = "" if place.web_port == DEFAULT_WEB_PORT else f":{place.web_port}"
    return safe_text(f"https://{host}{port}", _MAX_URL)


def database_address(name: str, names: ClusterNames) -> str:
    """Where a program finds a database: below its own cluster's proxy."""
    host = names.public_host if names.leaf and is_zone(names.public_host) else names.profile
    return f"{database_label(name)}.db.{host}"


def _row(
    kind: Kind, name: str, place: Place, address: str, ports: str, protocol: str, note: str = ""
) -> Row:
    # Foreign text: a terminal obeys control characters.
    return Row(
        kind=kind,
        name=safe_text(name, _MAX_NAME),
        cluster=safe_text(place.cluster, _MAX_NAME),
        profile=place.names.profile,
        address=safe_text(address, _MAX_URL),
        ports=ports,
        protocol=safe_text(protocol, 40),
        through_vnet=not note,
        note=note,
    )


def _without_address(row: Row, note: str) -> Row:
    return msgspec.structs.replace(row, address="", ports="", through_vnet=False, note=note)


def _app_row(app: types_pb2.AppV3, place: Place) -> Row:
    name, tcp = app.Metadata.Name, make_app(app)
    if tcp is not None:
        address = tcp.public_addr.removesuffix(".")
        note = "" if is_claimed(address, place.names) else NO_ZONE_NOTE
        if not address:
            note = NO_ADDRESS_NOTE
        return _row(Kind.APP, name, place, address, shown_ports(tcp), "tcp", note)
    if is_mcp(app):
        return _row(Kind.APP, name, place, "", "", "mcp", MCP_NOTE)
    return _row(Kind.APP, name, place, web_url(app, place), "", "web", WEB_NOTE)


def is_mcp(app: types_pb2.AppV3) -> bool:
    """Whether this is a server of the Model Context Protocol."""
    return app.Spec.URI.lower().startswith("mcp+")


def _database_row(database: types_pb2.DatabaseV3, place: Place) -> Row:
    name, protocol = database.Metadata.Name, database.Spec.Protocol
    if make_database(database) is None:
        return _row(Kind.DATABASE, name, place, "", "", protocol, protocol_note(protocol))
    address = database_address(name, place.names)
    return _row(Kind.DATABASE, name, place, address, ANY_PORT, protocol)


def protocol_note(protocol: str) -> str:
    """What to do with a database that VNet does not carry."""
    shown = safe_text(protocol, 40) or "unknown"
    return f"VNet carries no databases of protocol {shown}: use tsh proxy db"


def _node_row(node: types_pb2.ServerV2, place: Place) -> Row:
    host = node.Spec.Hostname
    address = f"{host}.{place.cluster}"
    if not is_zone(place.names.cluster) and place.leaf:
        address = f"{address}.{place.root}"
    # OpenSSH finds its settings by the name as it is typed, and ours are lower-case.
    address = normalise(address)
    if not is_zone(address) or candidate(address, place.names) is None:
        return _row(Kind.NODE, host, place, "", "", "ssh", NO_HOST_NOTE)
    return _row(Kind.NODE, host, place, address, _SSH_PORT, "ssh")


def _texts(resource: auth_pb2.PaginatedResource) -> Iterator[str]:
    """What servers look through; some look through more. Source: `api/types` (MatchSearch)."""
    match resource.WhichOneof("resource"):
        case "AppServer":
            app = resource.AppServer.Spec.App
            yield app.Spec.PublicAddr
            yield from _metadata_texts(app.Metadata)
            yield from _command_labels(app.Spec.DynamicLabels)
        case "Node":
            node = resource.Node
            yield from (node.Spec.Hostname, node.Spec.Addr, *node.Spec.public_addrs)
            yield "tunnel" if node.Spec.UseTunnel else ""
            yield from _metadata_texts(node.Metadata)
            yield from _command_labels(node.Spec.CmdLabels)


def _metadata_texts(metadata: types_pb2.Metadata) -> Iterator[str]:
    yield from (metadata.Name, metadata.Description)
    yield from metadata.Labels
    yield from metadata.Labels.values()


def _command_labels(labels: Mapping[str, types_pb2.CommandLabelV2]) -> Iterator[str]:
    for key, label in labels.items():
        yield key
        yield label.Result

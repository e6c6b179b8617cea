"""The cluster file: TOML in, frozen values out. Pure.

The file is described in docs; keys that are unknown, of the wrong type or impossible are
errors that name the key. `ping_interval_seconds = 0` makes a proxy without the ping variant
of its protocols, `ssh_proxy_port = 0` takes a free port. Leaf clusters may leave out `proxy_addr`;
it only names their apps.
"""

import re
import tomllib
from collections.abc import Iterator
from ipaddress import IPv4Network
from typing import Annotated, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta

from demo.cluster.errors import ClusterFileError

DEFAULT_LEAF_PORT = 443
# Names of backends that the cluster runs itself: see demo.cluster.backends.
BUILTIN_SUFFIX = ".backend.internal"

_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*", re.ASCII)
# These names become file names below keys/ (section 1.3 of the key path layout).
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._+-]{0,127}", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=253)]
# A common name has at most 64 characters (X.520 ub-common-name), which `cryptography` enforces.
CommonName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
Port: TypeAlias = Annotated[int, Meta(ge=1, le=65535)]
MfaKind: TypeAlias = Literal["totp", "webauthn", "sso"]


class PortRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ports from `port` to `end_port` inclusive; `end_port` 0 means the single port."""

    port: Port
    end_port: Annotated[int, Meta(ge=0, le=65535)] = 0

    def __contains__(self, port: int) -> bool:
        return self.port <= port <= (self.end_port or self.port)


class App(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One application. `uri` is where the cluster sends the bytes."""

    name: Text
    uri: Annotated[str, Meta(min_length=1, max_length=2048)]
    public_addr: Annotated[str, Meta(max_length=253)] = ""
    tcp_ports: tuple[PortRange, ...] = ()
    session_mfa: bool = False
    allowed_roles: tuple[Text, ...] = ("access",)

    @property
    def is_tcp(self) -> bool:
        """Whether this is a TCP app, not a web or MCP app."""
        return self.uri.startswith("tcp://")

    @property
    def is_web(self) -> bool:
        """Whether this is a web app, which the proxy's web port shows."""
        return self.uri.startswith(("http://", "https://"))

    def allows_port(self, target_port: int) -> bool:
        """Whether a certificate with this target port (0 = unset) may connect."""
        if not self.tcp_ports:
            return target_port == 0
        return any(target_port in ports for ports in self.tcp_ports)

    def backend(self, target_port: int) -> tuple[str, int]:
        """Host and port of the backend for an allowed target port."""
        parts = urlsplit(self.uri)
        return parts.hostname or "", target_port or parts.port or 0


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One SSH server; without `addr` the cluster runs a small one itself.

    `uuid` is the host ID; empty means that one is made up at the start.
    """

    hostname: Text
    addr: Annotated[str, Meta(max_length=253)] = ""
    uuid: Annotated[str, Meta(max_length=36)] = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    session_mfa: bool = False
    allowed_roles: tuple[Text, ...] = ("access",)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `addr`, which must not be empty."""
        host, _, port = self.addr.rpartition(":")
        return host, int(port)

    def is_called(self, host: str, port: int) -> bool:
        """Whether a client means this node; port 0 stands for any.

        Without an address a node is reached through a tunnel, whatever the port.
        """
        if not self.addr:
            return host in {self.hostname, self.uuid}
        own_host, own_port = self.address
        return host in {self.hostname, self.uuid, own_host} and port in {0, own_port}


class Database(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One database; `uri` is host:port, where the cluster sends the bytes."""

    name: Text
    protocol: Text
    uri: Text
    session_mfa: bool = False
    allowed_roles: tuple[Text, ...] = ("access",)

    @property
    def backend(self) -> tuple[str, int]:
        """Host and port of the backend."""
        host, _, port = self.uri.rpartition(":")
        return host, int(port)


class AccessRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An approved access request of the logged-in user, active in the login. It adds roles."""

    id: Text
    roles: Annotated[tuple[Text, ...], Meta(min_length=1)]


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One cluster, root or leaf."""

    name: CommonName
    leaf_of: Annotated[str, Meta(max_length=253)] = ""
    proxy_addr: Annotated[str, Meta(max_length=260)] = ""
    ipv4_cidr_range: Annotated[str, Meta(max_length=64)] = ""
    custom_dns_zones: tuple[Text, ...] = ()
    user: CommonName = "alice"
    logins: tuple[Text, ...] = ("alice", "root")
    roles: Annotated[tuple[Text, ...], Meta(min_length=1)] = ("access",)
    access_requests: tuple[AccessRequest, ...] = ()
    mfa_devices: tuple[MfaKind, ...] = ("totp", "webauthn")
    home_layout: Literal[16, 17] = 17
    cert_ttl_seconds: Annotated[int, Meta(ge=1, le=10 * 365 * 86400)] = 43200
    tls_routing: bool = True
    ssh_proxy_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    conn_upgrade_required: bool = False
    session_recording: Literal["node", "proxy"] = "node"
    ping_interval_seconds: Annotated[float, Meta(ge=0, le=86400)] = 30.0
    apps: tuple[App, ...] = ()
    generated_apps: Annotated[int, Meta(ge=0, le=100_000)] = 0
    nodes: tuple[Node, ...] = ()
    databases: tuple[Database, ...] = ()

    @property
    def proxy_host(self) -> str:
        """Host part of `proxy_addr`."""
        return self.proxy_addr.rpartition(":")[0]

    @property
    def proxy_port(self) -> int:
        """Port part of `proxy_addr`; 0 means one is chosen at start."""
        return int(self.proxy_addr.rpartition(":")[2])

    @property
    def ssh_proxy_addr(self) -> str:
        """Where SSH and the transport service are: a port of its own without TLS routing."""
        port = self.proxy_port if self.tls_routing else self.ssh_proxy_port
        return f"{self.proxy_host}:{port}"

    @property
    def has_vnet_config(self) -> bool:
        """Whether the cluster has a vnet_config resource."""
        return bool(self.ipv4_cidr_range or self.custom_dns_zones)


class ClusterFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All clusters of one cluster file, roots and leaves in the file's order."""

    clusters: Annotated[tuple[Cluster, ...], Meta(min_length=1, max_length=50)]

    @property
    def roots(self) -> tuple[Cluster, ...]:
        """The root clusters: one profile each."""
        return tuple(cluster for cluster in self.clusters if not cluster.leaf_of)


def parse_cluster_file(text: str) -> ClusterFile:
    """The clusters described by `text` (TOML), with every default filled in.

    Raises:
        ClusterFileError: and nothing else; the message names the key.
    """
    try:
        raw = tomllib.loads(text)
        parsed = msgspec.convert(raw, ClusterFile, strict=True)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ClusterFileError(str(error)) from error
    return check_clusters(parsed)


def check_clusters(file: ClusterFile) -> ClusterFile:
    """The same clusters with defaults that depend on other keys filled in.

    Raises:
        ClusterFileError: a value is impossible, alone or beside another.
    """
    clusters = tuple(
        _check_cluster(cluster, f"clusters[{index}]") for index, cluster in enumerate(file.clusters)
    )
    _check_unique((cluster.name for cluster in clusters), "clusters", "name")
    roots = {cluster.name for cluster in clusters if not cluster.leaf_of}
    for index, cluster in enumerate(clusters):
        if cluster.leaf_of and cluster.leaf_of not in roots:
            raise ClusterFileError(
                f"clusters[{index}].leaf_of: {cluster.leaf_of!r} is no root cluster of this file"
            )
    for index, cluster in enumerate(clusters):
        ids = (request.id for request in cluster.access_requests)
        _check_unique(ids, f"clusters[{index}].access_requests", "id")
    hosts = (cluster.proxy_host for cluster in clusters if not cluster.leaf_of)
    _check_unique(hosts, "clusters", "proxy_addr (its host names the profile)")
    return ClusterFile(clusters=clusters)


def _check_cluster(cluster: Cluster, where: str) -> Cluster:
    _check_name(cluster.name, f"{where}.name")
    for key, value in (("user", cluster.user), *(("roles", role) for role in cluster.roles)):
        if not _FILE_NAME.fullmatch(value):
            raise ClusterFileError(f"{where}.{key}: {value!r} is no usable name")
    proxy_addr = cluster.proxy_addr
    if not proxy_addr and cluster.leaf_of:
        proxy_addr = f"{cluster.name}:{DEFAULT_LEAF_PORT}"
    _check_address(proxy_addr, f"{where}.proxy_addr", lowest_port=0)
    for zone in cluster.custom_dns_zones:
        _check_name(zone, f"{where}.custom_dns_zones")
    if cluster.ipv4_cidr_range:
        _check_range(cluster.ipv4_cidr_range, f"{where}.ipv4_cidr_range")
    host, _, port = proxy_addr.rpartition(":")
    if cluster.ssh_proxy_port and cluster.tls_routing:
        raise ClusterFileError(f"{where}.ssh_proxy_port: with TLS routing there is no such port")
    if cluster.ssh_proxy_port and cluster.ssh_proxy_port == int(port):
        raise ClusterFileError(f"{where}.ssh_proxy_port: {port} is the web port")
    apps = tuple(
        _check_app(app, host, f"{where}.apps[{index}]") for index, app in enumerate(cluster.apps)
    )
    _check_unique((app.name for app in apps), f"{where}.apps", "name")
    _check_unique((app.public_addr for app in apps), f"{where}.apps", "public_addr")
    _check_unique((node.uuid for node in cluster.nodes if node.uuid), f"{where}.nodes", "uuid")
    for index, node in enumerate(cluster.nodes):
        _check_name(node.hostname, f"{where}.nodes[{index}].hostname")
        if node.uuid and not _UUID.fullmatch(node.uuid):
            raise ClusterFileError(f"{where}.nodes[{index}].uuid: {node.uuid!r} is no UUID")
        if node.addr:
            _check_address(node.addr, f"{where}.nodes[{index}].addr")
    _check_unique((database.name for database in cluster.databases), f"{where}.databases", "name")
    for index, database in enumerate(cluster.databases):
        _check_address(database.uri, f"{where}.databases[{index}].uri")
    return msgspec.structs.replace(cluster, proxy_addr=proxy_addr, apps=apps)


def _check_app(app: App, proxy_host: str, where: str) -> App:
    _check_name(app.name, f"{where}.name")
    public_addr = app.public_addr or f"{app.name}.{proxy_host}"
    _check_name(public_addr, f"{where}.public_addr")
    for index, ports in enumerate(app.tcp_ports):
        if ports.end_port and ports.end_port < ports.port:
            raise ClusterFileError(
                f"{where}.tcp_ports[{index}].end_port: {ports.end_port} is below port {ports.port}"
            )
    _check_uri(app, f"{where}.uri")
    return msgspec.structs.replace(app, public_addr=public_addr)


def _check_uri(app: App, where: str) -> None:
    parts, port = _split_uri(app.uri, where)
    if app.tcp_ports and (parts.scheme != "tcp" or port is not None):
        raise ClusterFileError(
            f"{where}: {app.uri!r}: with tcp_ports it must be tcp://HOST without a port"
        )
    if parts.scheme == "tcp" and not app.tcp_ports and not port:
        raise ClusterFileError(f"{where}: {app.uri!r} needs a port, or the app tcp_ports")


def _split_uri(uri: str, where: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise ClusterFileError(f"{where}: {uri!r}: {error}") from error
    known = parts.scheme in {"tcp", "http", "https"} or parts.scheme.startswith("mcp+")
    if not known or not parts.hostname:
        raise ClusterFileError(f"{where}: {uri!r} is not tcp://, http:// or https:// and a host")
    return parts, port


def _check_name(value: str, where: str) -> None:
    if len(value) > 253 or not _NAME.fullmatch(value):
        raise ClusterFileError(f"{where}: {value!r} is no DNS name")


def _check_range(value: str, where: str) -> None:
    try:
        IPv4Network(value)
    except ValueError as error:
        raise ClusterFileError(f"{where}: {error}") from error


def _check_address(value: str, where: str, lowest_port: int = 1) -> None:
    host, colon, port = value.rpartition(":")
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not colon or not digits or not lowest_port <= int(port) <= 65535:
        raise ClusterFileError(f"{where}: {value!r} is not HOST:PORT")
    _check_name(host, where)


def _check_unique(values: Iterator[str], where: str, key: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value.lower() in seen:
            raise ClusterFileError(f"{where}: two have the same {key}, {value!r}")
        seen.add(value.lower())


def default_clusters(
    proxy_addr: str = "teleport.demo.test:443", logins: tuple[str, ...] = ("alice", "root")
) -> ClusterFile:
    """The clusters of a demo without a cluster file; all backends run inside the cluster."""

    def app(name: str, zone: str, port: int = 80, tcp_ports: tuple[PortRange, ...] = ()) -> App:
        uri = f"tcp://{name}{BUILTIN_SUFFIX}" + ("" if tcp_ports else f":{port}")
        return App(name=name, uri=uri, public_addr=f"{name}.{zone}", tcp_ports=tcp_ports)

    root = Cluster(
        name="demo.test",
        proxy_addr=proxy_addr,
        custom_dns_zones=("demo.test",),
        logins=logins,
        apps=(
            app("hello", "demo.test"),
            app("echo", "demo.test", port=7),
            app("ports", "demo.test", tcp_ports=(PortRange(port=8000, end_port=8010),)),
        ),
        nodes=(Node(hostname="node1"),),
    )
    leaf = Cluster(
        name="leaf.demo.test",
        leaf_of="demo.test",
        logins=logins,
        apps=(app("hello", "leaf.demo.test"),),
    )
    return check_clusters(ClusterFile(clusters=(root, leaf)))

"""Where a TLS connection to the proxy goes, by the ALPN list of its ClientHello. Pure."""

from dataclasses import dataclass
from enum import Enum

from demo.cluster.clienthello import ClientHello
from demo.cluster.state import decode_cluster_name

AUTH_PREFIX = "teleport-auth@"
TRANSPORT = "teleport-proxy-ssh-grpc"
TCP = "teleport-tcp"
PING_SUFFIX = "-ping"
HTTP = "http/1.1"
HTTP2 = "h2"
# Which database it is stands in the client's certificate; CockroachDB comes as PostgreSQL
# (lib/srv/alpnproxy/common/protocols.go).
DATABASES = (
    "cassandra",
    "clickhouse",
    "dynamodb",
    "elasticsearch",
    "mongodb",
    "mysql",
    "opensearch",
    "oracle",
    "postgres",
    "redis",
    "snowflake",
    "spanner",
    "sqlserver",
)
# What the proxy ends the TLS of, and looks at the client certificate for.
_CERTIFIED = frozenset({TCP, *(f"teleport-{name}" for name in DATABASES)})


class Kind(Enum):
    """What a connection is for; faults end connections by kind."""

    NEW = "new"
    WEB = "web"
    AUTH = "auth"
    TRANSPORT = "transport"
    APP = "app"
    DATABASE = "database"
    NODE = "node"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a connection goes: the ALPN value to negotiate, and for AUTH the cluster.

    APP stands for databases too, as long as the client certificate has not been seen.
    """

    kind: Kind
    protocol: str
    cluster: str = ""

    @property
    def is_ping(self) -> bool:
        """Whether the bytes inside are framed."""
        return self.protocol.endswith(PING_SUFFIX)

    @property
    def is_for_apps(self) -> bool:
        """Whether it is not for databases only."""
        return self.protocol.removesuffix(PING_SUFFIX) == TCP


WEB = Route(Kind.WEB, HTTP)


def choose_route(hello: ClientHello, *, has_ping: bool, has_tls_routing: bool) -> Route | None:
    """The first entry of the client's ALPN list that has a handler."""
    if not hello.alpn:
        return WEB
    for protocol in hello.alpn:
        if protocol in {HTTP, HTTP2}:
            # No HTTP/2 web stack here: with h2 alone the handshake ends without a protocol.
            return WEB
        plain = protocol.removesuffix(PING_SUFFIX)
        if plain in _CERTIFIED and (protocol == plain or has_ping):
            return Route(Kind.APP, protocol)
        if protocol == TRANSPORT:
            return Route(Kind.TRANSPORT, protocol)
        if protocol.startswith(AUTH_PREFIX) and has_tls_routing:
            name = decode_cluster_name(protocol.removeprefix(AUTH_PREFIX))
            return Route(Kind.AUTH, protocol, name) if name else None
    return None

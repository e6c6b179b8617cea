"""Names in Teleport's terms: cluster names in TLS, host names, zones, predicates. Pure.

Source: `api/utils` (EncodeClusterName), `lib/srv/alpnproxy/common/protocols.go`, `lib/vnet`.
"""

from collections.abc import Iterable, Mapping
from ipaddress import ip_address

API_DOMAIN = "teleport.cluster.local"
AUTH_ALPN_PREFIX = "teleport-auth@"
# The ping variant first: the proxy takes the first entry it can serve.
APP_ALPN = ("teleport-tcp-ping", "teleport-tcp")
# The databases whose service takes the user from the wire, so that VNet need not know it.
# CockroachDB has PostgreSQL's protocol.
DATABASE_ALPN: Mapping[str, tuple[str, ...]] = {
    "postgres": ("teleport-postgres-ping", "teleport-postgres"),
    "cockroachdb": ("teleport-postgres-ping", "teleport-postgres"),
    "mysql": ("teleport-mysql-ping", "teleport-mysql"),
    "sqlserver": ("teleport-sqlserver-ping", "teleport-sqlserver"),
}
# RFC 6066 section 3 leaves 65535 bytes; OpenSSL takes no more than this.
MAX_SERVER_NAME_BYTES = 255
DEFAULT_WEB_PORT = 443


def encode_cluster_name(cluster: str) -> str:
    """The server name (SNI) of a cluster: lower-case hex of its bytes, one label, then the domain.

    The label exceeds the 63 characters of DNS when the name is longer than 31 bytes.
    """
    return f"{cluster.encode().hex()}.{API_DOMAIN}"


def auth_alpn(cluster: str) -> list[str]:
    """ALPN list that makes the proxy forward the connection to the auth service of `cluster`."""
    return [AUTH_ALPN_PREFIX + encode_cluster_name(cluster), "h2"]


def split_host_port(address: str, default_port: int = DEFAULT_WEB_PORT) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]:port`, with an optional `https://`, as (host, port).

    The host is lower-case and without brackets.

    Raises:
        ValueError: no host, or the port is no number from 1 to 65535.
    """
    text = address.strip().removeprefix("https://").rstrip("/")
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    elif text.count(":") > 1:
        host, port = text, ""
    else:
        host, _, port = text.partition(":")
    if port and not (port.isascii() and port.isdecimal()):
        raise ValueError(f"{address!r} has no valid port")
    number = int(port) if port else default_port
    host = host.lower().rstrip(".")
    is_host = host and host.isprintable() and not any(c in "/\\ " for c in host)
    if not is_host or not 1 <= number <= 65535:
        raise ValueError(f"{address!r} is no host:port")
    return host, number


def normalise(name: str) -> str:
    """A DNS name lower-case and without the trailing dot."""
    return name.lower().removesuffix(".")


def is_zone(name: str) -> bool:
    """Whether a normalised name can be a DNS zone: a host name of two labels or more, no address.

    Underscores pass: they are usual in private DNS (RFC 2181 section 11).
    """
    labels = name.split(".")
    if len(labels) < 2 or len(name) > 253 or not name.isascii():
        return False
    try:
        ip_address(name)
    except ValueError:
        return all(_is_label(label) for label in labels)
    return False


def _is_label(label: str) -> bool:
    letters = label.replace("-", "").replace("_", "")
    return 1 <= len(label) <= 63 and (not letters or letters.isalnum()) and label[0] != "-"


def quote(text: str) -> str:
    r"""A string literal of the predicate language, which has Go's: `"` and `\` are escaped."""
    escaped = []
    for char in text:
        if char in '"\\':
            escaped.append("\\" + char)
        elif char.isprintable():
            escaped.append(char)
        else:
            escaped.append(f"\\U{ord(char):08x}")
    return '"' + "".join(escaped) + '"'


def public_addr_predicate(names: Iterable[str]) -> str:
    """Predicate for resources whose public address is one of `names`.

    The server compares bytes, so each name is asked as given and lower-case, with and without the
    trailing dot.
    """
    spellings: dict[str, None] = {}
    for name in names:
        bare = name.removesuffix(".")
        for spelling in (bare, bare.lower()):
            spellings[spelling] = spellings[spelling + "."] = None
    return " || ".join(f"resource.spec.public_addr == {quote(s)}" for s in spellings)


def name_predicate(name: str) -> str:
    """Predicate for resources of this name, as given and lower-case."""
    return " || ".join(f"name == {quote(s)}" for s in dict.fromkeys((name, name.lower())))


def is_label(text: str) -> bool:
    """Whether this is one label of a DNS name, lower-case."""
    return text.isascii() and text == text.lower() and "." not in text and _is_label(text)

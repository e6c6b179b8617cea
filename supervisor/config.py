"""The configuration file, read into a value that cannot be wrong. Pure but for `read`.

Every key is optional. All problems are found in one go, each with its key: unknown keys, wrong
types, impossible values.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    ip_address,
)
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from supervisor import forwarded_values, http_names
from supervisor.exits import MisconfiguredError

DEFAULT_PATH = Path("/etc/vnet/vnet.toml")
DEFAULT_RANGE = "100.64.0.0/10"  # shared address space, RFC 6598
# Names need at least 27 addresses beside network, TUN, DNS and broadcast: what Teleport demands.
MIN_HOST_BITS = 5
# RFC 6890: this network, loopback, link-local, multicast, reserved and broadcast.
_SPECIAL = tuple(
    map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"))
)


class _Section(msgspec.Struct, frozen=True, kw_only=True):
    pass


S = TypeVar("S", bound=_Section)


class NetworkConfig(_Section, frozen=True):
    """The TUN device and VNet's own addresses."""

    interface: str = "vnet0"
    mtu: int = 65535
    ipv4_cidr_range: str = "auto"
    ipv6: Literal["auto", "on", "off"] = "auto"


class DnsConfig(_Section, frozen=True):
    """Upstream servers ("192.0.2.1", "192.0.2.1:5353", "[fe80::1%eth0]:53") and answers."""

    upstream: list[str] = []
    ttl_seconds: int = 10
    os_integration: Literal[
        "auto", "resolved", "networkmanager", "resolvconf", "resolv.conf", "macos", "none"
    ] = "auto"


class ProxyConfig(_Section, frozen=True):
    """How many proxy workers, and how much they carry together."""

    workers: int = 2
    max_connections: int = 10_000


class TeleportConfig(_Section, frozen=True):
    """Trust for the web certificates of proxies, and how long a user has for a second factor."""

    ca_file: str = ""
    insecure: bool = False
    mfa_seconds: float = 110


class SupervisorConfig(_Section, frozen=True):
    """When a worker is restarted, when it counts as hung, how long one that is replaced may finish."""

    restart_max: int = 5
    restart_window_seconds: float = 30
    heartbeat_seconds: float = 1
    hang_seconds: float = 5
    drain_seconds: float = 3600


class SecurityConfig(_Section, frozen=True):
    """Who besides the VNet user and root may connect, and which HTTP requests pass.

    `http_hosts` and `http_origins` say by DNS name of an app what is right beside the name itself; `"*"`
    is anything.
    """

    allow_users: list[str] = []
    allow_groups: list[str] = []
    allow_forwarded_from: list[str] = []
    http_check: bool = True
    http_hosts: dict[str, list[str]] = {}
    http_origins: dict[str, list[str]] = {}


class MetricsConfig(_Section, frozen=True):
    """Where Prometheus metrics are served; empty is off."""

    listen: str = ""


class Config(_Section, frozen=True):
    """The whole configuration file."""

    user: str = ""
    teleport_home: str = ""
    network: NetworkConfig = NetworkConfig()
    dns: DnsConfig = DnsConfig()
    proxy: ProxyConfig = ProxyConfig()
    teleport: TeleportConfig = TeleportConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    security: SecurityConfig = SecurityConfig()
    metrics: MetricsConfig = MetricsConfig()


def read(path: Path | None) -> Config:
    """The configuration in `path`; without a path the default file, which need not exist.

    Raises:
        MisconfiguredError: with every problem found.
    """
    chosen = path or DEFAULT_PATH
    try:
        text = chosen.read_bytes().decode()
    except FileNotFoundError as error:
        if path is None:
            return Config()
        raise MisconfiguredError([f"{chosen} does not exist"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfiguredError([f"{chosen} cannot be read: {error}"]) from error
    return parse(text)


def parse(text: str) -> Config:
    """The configuration in `text` (TOML).

    Raises:
        MisconfiguredError: with every problem found.
    """
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise MisconfiguredError([f"not valid TOML: {error}"]) from error
    problems: list[str] = []
    config = _convert(raw, Config, "", problems)
    problems.extend(_impossible_values(config))
    if problems:
        raise MisconfiguredError(problems)
    return config


def _convert(raw: dict[str, Any], kind: type[S], prefix: str, problems: list[str]) -> S:
    """Field by field, so that one wrong key does not hide another; wrong ones keep defaults."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        field_type = fields.get(key)
        if field_type is None:
            problems.append(f"{name}: unknown key")
        elif isinstance(field_type, type) and issubclass(field_type, _Section):
            if isinstance(value, dict):
                values[key] = _convert(value, field_type, f"{name}.", problems)
            else:
                problems.append(f"{name}: expected a table, got {value!r}")
        else:
            try:
                values[key] = msgspec.convert(value, field_type)
            except msgspec.ValidationError as error:
                problems.append(f"{name}: {_plain(error)}, got {value!r}")
    return kind(**values)


def _plain(error: msgspec.ValidationError) -> str:
    text = str(error).split(" - at ")[0]
    return text[0].lower() + text[1:].replace("`", "")


def _impossible_values(config: Config) -> Iterator[str]:
    for name, value, test, hint in _checks(config):
        try:
            reason = "" if test(value) else hint
        except ValueError as error:
            reason = f"{hint} ({error})"
        if reason:
            yield f"{name}: {reason}, got {value!r}"


_Check = tuple[str, Any, Callable[[Any], bool], str]


def _checks(config: Config) -> Iterator[_Check]:
    network, dns, proxy = config.network, config.dns, config.proxy
    supervisor, security = config.supervisor, config.security
    yield (
        "network.interface",
        network.interface,
        # Linux: IFNAMSIZ is 16 with the final zero byte.
        lambda name: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", name) is not None,
        "must be 1 to 15 letters, digits, '-', '_' or '.'",
    )
    # RFC 8200 section 5: IPv6 needs 1280.
    yield "network.mtu", network.mtu, _between(1280, 65535), "must be 1280 to 65535"
    if network.ipv4_cidr_range != "auto":
        yield (
            "network.ipv4_cidr_range",
            network.ipv4_cidr_range,
            is_usable_range,
            "must be 'auto' or an IPv4 range of /27 or larger",
        )
    for index, server in enumerate(dns.upstream):
        yield f"dns.upstream[{index}]", server, _is_server, "must be an address or address:port"
    for name, path in (
        ("teleport_home", config.teleport_home),
        ("teleport.ca_file", config.teleport.ca_file),
    ):
        # Relative to what? The supervisor is started from anywhere.
        yield name, path, lambda text: not text or text[0] in "~/", "must be an absolute path"
    # Linux repeats a SYN for 127 s; what comes after the answer takes its time too.
    yield (
        "teleport.mfa_seconds",
        config.teleport.mfa_seconds,
        _between(5, 110),
        "must be 5 to 110",
    )
    yield "dns.ttl_seconds", dns.ttl_seconds, _between(0, 86400), "must be 0 to 86400"
    yield "proxy.workers", proxy.workers, _between(1, 64), "must be 1 to 64"
    yield (
        "proxy.max_connections",
        proxy.max_connections,
        _between(1, 1_000_000),
        "must be 1 to 1000000",
    )
    yield "supervisor.restart_max", supervisor.restart_max, _between(0, 1000), "must be 0 to 1000"
    for name, low, high in (
        ("restart_window_seconds", 1, 86400),
        ("heartbeat_seconds", 0.1, 60),
        ("hang_seconds", 1, 3600),
        ("drain_seconds", 0, 604800),
    ):
        value = getattr(supervisor, name)
        yield f"supervisor.{name}", value, _between(low, high), f"must be {low} to {high}"
    yield (
        "supervisor.hang_seconds",
        supervisor.hang_seconds,
        lambda seconds: seconds > supervisor.heartbeat_seconds,
        "must be more than supervisor.heartbeat_seconds",
    )
    yield from forwarded_values.checks(
        security.allow_forwarded_from, network.ipv4_cidr_range, DEFAULT_RANGE
    )
    yield from http_names.checks(security.http_hosts, security.http_origins)
    if config.metrics.listen:
        yield (
            "metrics.listen",
            config.metrics.listen,
            lambda text: bool(split_listen(text)),
            "must be host:port, the host being an address or localhost",
        )


def _between(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


def is_usable_range(text: str) -> bool:
    """Whether VNet can take its addresses from this IPv4 range.

    Raises:
        ValueError: it is no IPv4 range, or host bits are set.
    """
    network = IPv4Network(text)
    return 32 - network.prefixlen >= MIN_HOST_BITS and not any(map(network.overlaps, _SPECIAL))


def split_server(text: str) -> tuple[str, int, str]:
    """`address`, `address:port` or `[address%interface]:port` as (address, port, interface).

    Raises:
        ValueError: it is none of these.
    """
    host, port = text, "53"
    if match := re.fullmatch(r"\[(.+)\](?::(\d+))?", text):
        host, port = match[1], match[2] or "53"
    elif match := re.fullmatch(r"([0-9.]+):(\d+)", text):
        host, port = match[1], match[2]
    host, _, scope = host.partition("%")
    address = ip_address(host)
    if address.is_unspecified or address.is_multicast or not 0 < int(port) < 65536:
        raise AddressValueError(f"{text!r} is no address of a server")
    return str(address), int(port), scope


def _is_server(text: str) -> bool:
    return bool(split_server(text))


def split_listen(text: str) -> tuple[str, int]:
    """`address:port`, `[IPv6 address]:port` or `localhost:port` as (address, port).

    Names are not looked up: that may take long, and their addresses change.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)|localhost):([0-9]{1,5})", text)
    if match is None:
        raise AddressValueError(f"{text!r} is no address with a port")
    ipv6, ipv4, port = match.groups()
    address = str(IPv6Address(ipv6)) if ipv6 else str(IPv4Address(ipv4 or "127.0.0.1"))
    if not 0 < int(port) < 65536:
        raise AddressValueError(f"{port} is no port")
    return address, int(port)
